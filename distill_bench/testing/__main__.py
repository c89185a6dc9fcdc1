"""Run the conformance checks of a method or an evaluator and print a report.

A method is trained by the real trainer on a tiny Wan pipeline with random weights. An evaluator
scores 24 rendered clips of moving shapes, or the clips of --clips. Exit code: 0 if every check
passes, 1 if one fails, 2 if the checks cannot start.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from distill_bench.config.overrides import parse_override
from distill_bench.evaluate.__main__ import references_of
from distill_bench.registry import find_plugin
from distill_bench.store.files import user_text
from distill_bench.testing.checks import CHECKS
from distill_bench.testing.evaluator_checks import EVALUATOR_CHECKS, EvaluatorCase
from distill_bench.testing.hyperparameter_checks import undirected
from distill_bench.testing.ranks import check_two_ranks
from distill_bench.testing.runs import Runs

EXAMPLES = """\
examples:
  distill-bench check my_method.py:MyMethod
  distill-bench check my_method.py:MyMethod --set scale=2 --no-ranks
  distill-bench check brightness.py:Brightness
  distill-bench check my_metric.py:MyMetric --clips clips/ --reference teacher_clips/"""

Check = tuple[Callable[[], None], str, str]  # function, name, purpose


def main(argv: list[str] | None = None) -> int:
    """Check one plugin; returns the exit code."""
    options = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            kind, plugin = find_plugin(options.plugin)
            checks = (_of_method if kind == "method" else _of_evaluator)(options, Path(folder))
        except (ValueError, OSError) as error:
            print(f"distill-bench check: {error}", file=sys.stderr)
            return 2
        print(f"{kind} {options.plugin}: {len(checks)} checks", flush=True)
        failed = sum([not _passes(*check) for check in checks])
    for field, reason in undirected(plugin).items() if kind == "method" else ():
        print(f"{field} states no direction: {reason}")
    print(f"{failed} of {len(checks)} checks failed" if failed else "every check passed")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill-bench check",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plugin", help="FILE:CLASS, MODULE:CLASS, or the name of an installed one")
    parser.add_argument(
        "--set",
        type=user_text,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the method or the evaluator; may be repeated",
    )
    parser.add_argument(
        "--no-ranks", action="store_true", help="leave out the training in two processes"
    )
    parser.add_argument("--clips", type=Path, help="folder of clips that an evaluator scores")
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="[KIND=]FOLDER",
        help="reference clips, as for `distill-bench evaluate`",
    )
    return parser


def _of_method(options: argparse.Namespace, folder: Path) -> list[Check]:
    """The checks of a method."""
    if options.clips or options.reference:
        raise ValueError("--clips and --reference are for evaluators; a method trains on its own")
    fields = dict(parse_override(text) for text in options.set)
    method = {"name": options.plugin} | fields
    runs = Runs(method, folder)
    runs.make()  # a wrong field ends here
    checks = [
        (lambda check=check: check(runs), check.__name__, _purpose(check)) for check in CHECKS
    ]
    if not options.no_ranks:
        both = (lambda: check_two_ranks(method, folder=folder)), check_two_ranks.__name__
        checks.append((*both, _purpose(check_two_ranks)))
    return checks


def _of_evaluator(options: argparse.Namespace, folder: Path) -> list[Check]:
    """The checks of an evaluator."""
    settings = dict(parse_override(text) for text in options.set)
    if options.reference and options.clips is None:
        raise ValueError("--reference needs --clips; the rendered clips have their own references")
    references = references_of(options.reference)
    case = EvaluatorCase.make(options.plugin, folder, settings, options.clips, references)
    return [
        (lambda check=check: check(case), check.__name__, _purpose(check))
        for check in EVALUATOR_CHECKS
    ]


def _purpose(check: Callable[..., None]) -> str:
    """First line of a check's docstring."""
    return (check.__doc__ or "").splitlines()[0]


def _passes(check: Callable[[], None], name: str, purpose: str) -> bool:
    """Run a check and print its result; True if it passes."""
    started = time.monotonic()
    reason = ""
    with _quiet():
        try:
            check()
        except AssertionError as error:
            # begins with the plugin and the check, which the line names already
            reason = str(error).partition(f"{name}: ")[2] or str(error)
    seconds = time.monotonic() - started
    print(
        f"  {'FAILED' if reason else 'passed'}  {name:22} {seconds:6.1f} s  {purpose}", flush=True
    )
    if reason:
        print(f"          {reason}", flush=True)
    return not reason


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the output and the warnings of the trainer, which a report would drown in."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    raise SystemExit(main())
