"""Presets and defaults against the values that are written in the sources they cite.

`tests/references/preset_sources.toml` holds those values and the files where they were read. Each
of ours is derived from one of them; a value without a row fails.
"""

import dataclasses
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_bench.config.schema import RunConfig
from distill_bench.method import Method
from distill_bench.methods.f_distill import FDistill
from distill_bench.methods.sgmd import SGMD
from distill_bench.methods.sid import SiD
from distill_bench.methods.tsg_fisher import TSGFisher
from distill_bench.methods.tsg_sim import TSGSIM
from distill_bench.noise import student_sigmas
from distill_bench.registry import find_method, methods
from distill_bench.testing.gradient import student_gradient

ROOT = Path(__file__).parents[2]
TABLE = tomllib.loads((ROOT / "tests/references/preset_sources.toml").read_text())
SOURCES, WORDS, CONSTANTS = (TABLE.pop(name) for name in ("sources", "words", "constants"))
Row = Mapping[str, Any]

CONVERSIONS: Mapping[str, Callable[[float], float]] = {
    "half": lambda value: value / 2,  # our denoising loss, in the same sum, is half of theirs
    "less_one": lambda value: value - 1,  # levels -> intervals; updates without the student's
}
ROWS = {
    (method, preset, key): row
    for method, presets in TABLE.items()
    for preset, rows in presets.items()
    for key, row in rows.items()
}
READ = [row for row in [*ROWS.values(), *CONSTANTS.values()] if "from" in row]


def derived(row: Row, key: str) -> Any:
    """Our value, as it follows from the value of a row."""
    if "same_as" in row:
        return derived(ROWS[*row["same_as"].split("."), key], key)
    value = row["value"]
    if key in WORDS and "from" in row:
        value = WORDS[key][value]
        return None if value == "null" else value
    return CONVERSIONS[row["convert"]](value) if "convert" in row else value


def values() -> dict[tuple[str, str, str], Any]:
    """Our value per method, preset or `default`, and key."""
    ours = {}
    for name, method in methods().items():
        for field in dataclasses.fields(method):
            ours[name, "default", f"method.{field.name}"] = field.default
        for preset, settings in method.presets.items():
            for key, value in settings.overrides.items():
                ours[name, preset, key] = value
    for key in TABLE["run"]["default"]:
        ours["run", "default", key] = RunConfig.model_fields[key].default
    return ours


VALUES = values()


def test_every_value_of_a_preset_and_every_default_has_a_row():
    assert VALUES.keys() == ROWS.keys()


@pytest.mark.parametrize("cell", VALUES, ids="-".join)
def test_a_value_is_the_one_that_its_source_has(cell):
    expected = derived(ROWS[cell], cell[2])
    assert VALUES[cell] == expected
    assert isinstance(VALUES[cell], bool) is isinstance(expected, bool)


@pytest.mark.parametrize("cell", ROWS, ids="-".join)
def test_a_row_says_where_its_value_can_be_checked(cell):
    row = ROWS[cell]
    kinds = row.keys() & {"from", "same_as", "property", "ours", "unverified"}
    assert len(kinds) == 1
    extra = {"value"} if "same_as" not in row else set()
    if "from" in row:
        extra |= {"setting"} | (row.keys() & {"convert", "via"})
    assert row.keys() - kinds == extra
    if "property" in row:
        path, test = row["property"].split("::")
        assert f"\ndef {test}(" in (ROOT / path).read_text()


def test_a_source_names_a_commit_and_a_file_and_is_used():
    assert SOURCES.keys() == {row["from"] for row in READ}
    for name, source in SOURCES.items():
        assert source.keys() >= {"cited", "read", "path"}, name
        commit = re.search(r"@[0-9a-f]{40}$", source["read"])
        assert commit or source["read"].startswith("https://") or source.get("copy"), name


def test_every_translation_is_used():
    used = {(cell[2], row["value"]) for cell, row in ROWS.items() if "from" in row}
    assert {(key, theirs) for key, words in WORDS.items() for theirs in words} <= used


def test_a_preset_cites_the_code_or_paper_that_its_values_were_read_in():
    for (name, preset, key), row in ROWS.items():
        if "from" in row and preset != "default":
            cited = SOURCES[row["from"]]["cited"]
            assert cited in find_method(name).presets[preset].source, (name, preset, key)


def gradient(method: Method, fake_score: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Gradient at x0 = 1, times the number of elements, where the teacher predicts x0: n is 0."""
    ones = torch.ones(1, 1, 1, 2, 2, dtype=torch.float64)
    sigma = torch.tensor([0.5], dtype=torch.float64)
    return ones.numel() * student_gradient(
        method, ones, 3 * ones, sigma, fake_score, lambda x_t, *_: ones + 0 * x_t
    )


def test_the_normalisers_have_the_floors_of_the_released_codes():
    floor, epsilon = CONSTANTS["sid_floor"]["value"], CONSTANTS["sgmd_epsilon"]["value"]
    # x0_fake = 1.5, no Jacobian: (x0_fake - x0_teacher) / n
    for method in (SiD(), TSGSIM()):
        sid = gradient(method, lambda x_t, *_: 1.5 + 0 * x_t)
        torch.testing.assert_close(sid, torch.full_like(sid, 0.5 / floor), rtol=1e-9, atol=0)
    # x0_fake = x_t = 2, its Jacobian 1 - sigma = 0.5; the residual's share is below 1e-8
    for method in (TSGFisher(), SGMD()):
        fisher = gradient(method, lambda x_t, *_: x_t)
        torch.testing.assert_close(
            fisher, torch.full_like(fisher, 0.5 / epsilon), rtol=1e-8, atol=0
        )


def test_the_students_levels_are_those_of_a_released_list():
    """FastGen's Wan configs print 4 levels of shift 5 in three digits, the highest being 0.999."""
    *levels, last = CONSTANTS["student_levels"]["value"]
    assert student_sigmas(len(levels), 5.0).tolist() == pytest.approx(levels, abs=1.01e-3)
    assert last == 0.0


@pytest.mark.parametrize("name", methods())
def test_a_method_that_changes_weights_after_an_update_says_that_it_mixes_them(name):
    """Adapters of two roles cannot be mixed, so a run with both is refused."""
    method = find_method(name)
    changes = method.after_student_update is not Method.after_student_update
    assert method.mixes_weights is changes


def test_the_averages_of_f_distill_are_part_of_a_checkpoint():
    assert "ratio" in FDistill().modules(2)["histogram"].state_dict()
