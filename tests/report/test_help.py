"""`--help` of the commands that read a store or results: usage, and a phrase for each option."""

import re

import pytest

from distill_bench.report import __main__ as report
from distill_bench.report import compare, verify
from distill_bench.report.tables import power

POWER_GOAL = "(--effect [SCORE=]VALUE[%] | --half-width [SCORE=]VALUE[%])"
COMMANDS = [
    (verify, "verify [-h] [--store STORE] results"),
    (compare, "compare [-h] [--store STORE] RUN RUN"),
    (power, f"power [-h] [--pilot SWEEP] {POWER_GOAL} [--power POWER] [--store STORE] sweep"),
    (
        report,
        "report [-h] [--store STORE] [--out OUT] [--baseline KEY=VALUE,...] [--budget COST] sweep",
    ),
]


@pytest.mark.parametrize(
    "module, usage", COMMANDS, ids=lambda value: getattr(value, "__name__", "")
)
def test_help_explains_the_command_in_a_sentence_and_its_options_in_phrases(
    module, usage, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    output = re.sub(r"\n {8,}", "  ", capsys.readouterr().out.strip())
    first, description, *sections = output.split("\n\n")
    assert first == f"usage: distill-bench {usage}"
    assert re.fullmatch(r"[A-Z][a-z].*[A-Za-z]\.", description)
    arguments = [line.strip() for section in sections for line in section.splitlines()[1:]]
    assert len(arguments) == 2 + usage.count("--"), "the positional one, -h, and the others"
    for line in arguments:
        name, text = re.split(r"\s{2,}", line)
        assert name and re.fullmatch(r"(YAML|[a-z]+)\b.*[^.X]", text), line
