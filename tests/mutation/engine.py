"""mutmut with operators for numerical code; started by `run.py` in a folder that it prepared.

mutmut mutates the bodies of functions and methods that have no decorator. `plain_source` rewrites a
module so that properties, cached and `no_grad` functions are mutated, too.
"""

from collections.abc import Iterator

import libcst as cst
import libcst.matchers as m
from mutmut.mutation import mutators

OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}
REDUCTIONS = {
    "mean": "sum",
    "sum": "mean",
    "amin": "amax",
    "amax": "amin",
    "argmin": "argmax",
    "argmax": "argmin",
    "floor": "ceil",
    "ceil": "floor",
    "sin": "cos",
    "cos": "sin",
}
# Attributes that have the same type and another meaning.
SIBLINGS = {
    "student": "fake_score",
    "fake_score": "student",
    "student_lr": "fake_score_lr",
    "fake_score_lr": "student_lr",
    "student_sigmas": "teacher_sigmas",
    "shift": "score_shift",
    "score_shift": "shift",
    "sigma_min": "sigma_max",
    "sigma_max": "sigma_min",
    "low": "high",
    "high": "low",
    "text": "null_text",
    "null_text": "text",
}
COMMUTATIVE = ("min", "max", "minimum", "maximum", "isclose", "equal", "add", "mul")
KEPT = ("staticmethod", "classmethod", "overload", "abstractmethod")  # decorators


def other_text(node: cst.SimpleString) -> Iterator[cst.SimpleString]:
    """Another text; mutmut also tries upper and lower case, which finds no more."""
    if node.quote in ('"', "'") and not node.value.startswith(("b", "rb")):
        yield node.with_changes(value=f"{node.prefix}{node.quote}XX{node.raw_value}XX{node.quote}")


def no_call(node: cst.Expr) -> Iterator[cst.CSTNode]:
    """A statement that is only a call, left out."""
    if isinstance(node.value, cst.Call):
        yield cst.Pass()


def negated_test(node: cst.If | cst.CompIf) -> Iterator[cst.CSTNode]:
    """The opposite condition; `a == b` and `not a` have theirs from mutmut."""
    test = node.test
    simple = m.Comparison(comparisons=[m.ComparisonTarget(m.Equal() | m.NotEqual())])
    if not m.matches(test, simple | m.UnaryOperation(operator=m.Not())):
        inside = test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(
            test=cst.UnaryOperation(cst.Not(), inside),
            whitespace_before_test=cst.SimpleWhitespace(" "),
        )


def turned_comparison(node: cst.ComparisonTarget) -> Iterator[cst.ComparisonTarget]:
    """Greater for less and less for greater."""
    turned = {
        cst.LessThan: cst.GreaterThan,
        cst.GreaterThan: cst.LessThan,
        cst.LessThanEqual: cst.GreaterThanEqual,
        cst.GreaterThanEqual: cst.LessThanEqual,
    }
    if type(node.operator) in turned:
        yield node.with_changes(operator=turned[type(node.operator)]())


def swapped_arguments(node: cst.Call) -> Iterator[cst.Call]:
    """The first two positional arguments in the other order."""
    first = node.args[:2]
    function = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
    if isinstance(function, cst.Name) and function.value in COMMUTATIVE:
        return
    if len(first) < 2 or any(argument.keyword or argument.star for argument in first):
        return
    a, b = first
    if not a.value.deep_equals(b.value):
        swapped = [a.with_changes(value=b.value), b.with_changes(value=a.value)]
        yield node.with_changes(args=[*swapped, *node.args[2:]])


def other_function(node: cst.Call) -> Iterator[cst.Call]:
    """max for min, sum for mean, and the like."""
    if isinstance(node.func, cst.Name) and node.func.value in OPPOSITES:
        yield node.with_changes(func=cst.Name(OPPOSITES[node.func.value]))
    elif isinstance(node.func, cst.Attribute):
        name = (OPPOSITES | REDUCTIONS).get(node.func.attr.value)
        if name:
            yield node.with_changes(func=node.func.with_changes(attr=cst.Name(name)))


def sibling_attribute(node: cst.Attribute) -> Iterator[cst.Attribute]:
    """The attribute of the other network, rate, shift or bound."""
    if node.attr.value in SIBLINGS:
        yield node.with_changes(attr=cst.Name(SIBLINGS[node.attr.value]))


class _PlainSource(cst.CSTTransformer):
    """See `plain_source`."""

    def _statements(self, body):
        for statement in body:
            if not isinstance(statement, cst.FunctionDef) or not self._applied(statement):
                yield statement
                continue
            name = statement.name
            yield statement.with_changes(decorators=[])
            value: cst.BaseExpression = name
            for decorator in reversed(statement.decorators):
                value = cst.Call(decorator.decorator, [cst.Arg(value)])
            yield cst.SimpleStatementLine([cst.Assign([cst.AssignTarget(name)], value)])

    @staticmethod
    def _applied(function: cst.FunctionDef) -> bool:
        """True if each decorator can be applied in a statement after the function."""
        texts = [cst.Module([]).code_for_node(d.decorator) for d in function.decorators]
        return bool(texts) and not any(
            text.rpartition(".")[2] in (*KEPT, "setter") for text in texts
        )

    def leave_Module(self, original_node, updated_node):
        return updated_node.with_changes(body=list(self._statements(updated_node.body)))

    def leave_ClassDef(self, original_node, updated_node):
        body = updated_node.body
        if not isinstance(body, cst.IndentedBlock):
            return updated_node
        statements = list(self._statements(body.body))
        return updated_node.with_changes(body=body.with_changes(body=statements))

    def leave_Call(self, original_node, updated_node):
        if not m.matches(updated_node.func, m.Name("zip")):
            return updated_node
        kept = [a for a in updated_node.args if not (a.keyword and a.keyword.value == "strict")]
        return updated_node.with_changes(args=kept)


def plain_source(source: str) -> str:
    """Return a module with decorators of functions as calls, and without `zip(strict=True)`.

    `@property def p` becomes `def p` and `p = property(p)`. A `strict` that never raises would be
    an equivalent mutant wherever it stands.
    """
    return cst.parse_module(source).visit(_PlainSource()).code


def main() -> None:
    """Run mutmut's command line with the operators of this file."""
    from collected import CollectedTests, quickest_first, run_without_mutant
    from mutmut import __main__ as command  # reads the settings in the working directory
    from mutmut.workers import isolation

    # On a busy machine a slow test is no endless loop: only its CPU time is limited. A test that
    # waits is ended by pytest-timeout.
    isolation.register_timeout = lambda pid, timeout_s: None
    new_runner = command.get_mutant_runner

    def quick_runner(*arguments):
        runner = new_runner(*arguments)
        runner.test_runner_class = CollectedTests
        runner.run_clean_tests = lambda tests: isolation.run_in_fork(run_without_mutant)
        submit = runner.submit
        runner.submit = lambda name, tests, *limits: submit(name, quickest_first(tests), *limits)
        return runner

    command.get_mutant_runner = quick_runner
    replaced = (mutators.operator_string,)
    mutators.mutation_operators[:] = [
        *(pair for pair in mutators.mutation_operators if pair[1] not in replaced),
        (cst.SimpleString, other_text),
        (cst.Expr, no_call),
        (cst.If, negated_test),
        (cst.CompIf, negated_test),
        (cst.ComparisonTarget, turned_comparison),
        (cst.Call, swapped_arguments),
        (cst.Call, other_function),
        (cst.Attribute, sibling_attribute),
    ]
    command.cli()


if __name__ == "__main__":
    main()
