"""Conformance checks for any evaluator: on rendered clips, or on clips of the author's choice."""

import dataclasses
import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from distill_bench.domain.controls import rendered
from distill_bench.evaluate.score import configured, evaluate
from distill_bench.evaluator import Clips, Evaluator, Score
from distill_bench.sample.load_folder import load_clips
from distill_bench.sample.reference_kinds import COMPARED
from distill_bench.sample.write_folder import ClipSource, write_folder
from distill_bench.testing.runs import conformance

CAPTIONS = 12  # two clips each
FIRST = 40_000  # key of the first rendered clip; the shipped networks were trained on others
ROUNDING = 1e-4  # relative; batches of another make-up change the last digits of features


@dataclasses.dataclass(frozen=True)
class EvaluatorCase:
    """An evaluator with clips and references to score."""

    name: str
    evaluator: Evaluator
    folder: Path  # of the clips
    references: Mapping[str, Path]  # folders by kind

    @classmethod
    def make(
        cls,
        name: str,
        folder: Path,
        settings: Mapping[str, Any] | None = None,
        clips: Path | None = None,
        references: Mapping[str, Path] | None = None,
    ) -> "EvaluatorCase":
        """An evaluator on clips of a folder, or on clips that are rendered into `folder`.

        Raises:
            ValueError: if there is no such evaluator or setting, or it cannot score the clips.
        """
        evaluator = configured(name, settings or {})
        if clips is None:
            clips = folder / "clips"
            references = {kind: folder / kind for kind in COMPARED}
            for number, target in enumerate([clips, *references.values()]):
                _write_rendered(target, FIRST + 1000 * number)
        case = cls(name, evaluator, clips, references or {})
        loaded = case.clips()
        reason = evaluator.reason_to_skip(loaded)
        absent = sorted({*evaluator.needs_facts} - loaded.facts.keys())
        if reason is None and absent:
            reason = f"they come without {', '.join(absent)}"
        if reason is not None:
            raise ValueError(
                f"{name} cannot score the clips in {clips}: {reason}; name a folder of clips that "
                "it can score by --clips"
            )
        return case

    def clips(self) -> Clips:
        """The clips, read anew and without a cache of features."""
        return dataclasses.replace(load_clips(self.folder), cache=None)

    def loaded_references(self, kinds: Mapping[str, Path] | None = None) -> dict[str, Clips]:
        """The references by kind, read anew and without a cache."""
        folders = self.references if kinds is None else kinds
        return {k: dataclasses.replace(load_clips(f), cache=None) for k, f in folders.items()}

    def scores(self, clips: Clips | None = None, kinds: Mapping[str, Path] | None = None) -> Any:
        """Scores of the clips against references of some kinds; by default all that there are."""
        return self.evaluator.scores(clips or self.clips(), self.loaded_references(kinds))


def _write_rendered(folder: Path, first: int) -> None:
    frames, prompts = rendered(CAPTIONS, first)
    frames = np.concatenate([frames, rendered(CAPTIONS, first + CAPTIONS)[0]])
    seeds = [0] * CAPTIONS + [1] * CAPTIONS
    source = ClipSource(lambda first, end: frames[first:end], len(frames))
    write_folder(folder, source, prompts * 2, seeds, {"kind": "data", "fps": 8.0})


@conformance
def check_declaration(case: EvaluatorCase) -> None:
    """A purpose, a paper, a version, and settings that JSON can hold."""
    evaluator, kind = case.evaluator, type(case.evaluator)
    assert kind.__dataclass_params__.frozen, "the class is no frozen dataclass"
    assert (kind.__doc__ or "").strip(), "the class has no docstring, whose first line is shown"
    assert str(evaluator.paper), 'paper is empty; write a Citation, a source, or "none"'
    assert type(evaluator.version) is int and evaluator.version >= 1, (
        f"version is {evaluator.version!r}; it must be an integer from 1"
    )
    settings = json.loads(json.dumps(dataclasses.asdict(evaluator)))
    again = TypeAdapter(kind).validate_python(settings)
    assert again == evaluator, f"settings change in a round trip through JSON: {settings}"


@conformance
def check_scores(case: EvaluatorCase) -> None:
    """Scores are finite, their columns differ, and a mean over clips has a value per clip."""
    scores = case.scores()
    assert scores, "no score for these clips and references"
    for score in scores:
        assert isinstance(score, Score), f"scores holds {score!r}, which is no Score"
        assert math.isfinite(score.value), f"{score.column} is {score.value}"
        assert score.column and not set(score.column) & set(" ,;\"'"), (
            f"column {score.column!r} must be one word without commas and quotes"
        )
        if score.per_clip is None:
            continue
        count = len(case.clips().frames)
        assert len(score.per_clip) == count, (
            f"{score.column} has {len(score.per_clip)} values per clip for {count} clips"
        )
        mean = float(np.mean(score.per_clip))
        assert math.isclose(mean, score.value, rel_tol=1e-6, abs_tol=1e-9), (
            f"{score.column} is {score.value:g}, but the mean of its values per clip is {mean:g}"
        )
    stated = case.evaluator.extractors(case.clips())
    unstated = {score.extractor for score in scores} - {None} - (stated or set())
    assert stated is None or not unstated, (
        f"scores are by {', '.join(map(str, unstated))}, which `extractors` does not state"
    )
    columns = Counter(score.column for score in scores)
    assert max(columns.values()) == 1, f"column {columns.most_common(1)[0][0]!r} is given twice"


@conformance
def check_repeatable(case: EvaluatorCase) -> None:
    """The same clips score the same, whatever the global random state."""
    first, again = (_values_under_seed(case, seed) for seed in (1, 2))
    for column, value in first.items():
        assert again.get(column) == value, (
            f"{column} is {value!r}, and {again.get(column)!r} when computed again; seed its draws"
        )


def _values_under_seed(case: EvaluatorCase, seed: int) -> dict[str, float]:
    """Values by column, with the global generators seeded; their state is restored."""
    state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed)
            return {score.column: score.value for score in case.scores()}
    finally:
        np.random.set_state(state)


@conformance
def check_input(case: EvaluatorCase) -> None:
    """Scoring changes neither the clips nor the references."""
    clips, references = case.clips(), case.loaded_references()
    before = {kind: c.frames.copy() for kind, c in {"clips": clips, **references}.items()}
    case.evaluator.scores(clips, references)
    for kind, frames in before.items():
        after = clips if kind == "clips" else references[kind]
        assert np.array_equal(after.frames, frames), f"scoring changes the frames of the {kind}"


@conformance
def check_order(case: EvaluatorCase) -> None:
    """A clip's value does not depend on its place among the clips."""
    clips = case.clips()
    order = np.random.default_rng(0).permutation(len(clips.frames))
    moved = dataclasses.replace(
        clips,
        frames=clips.frames[order],
        prompts=[clips.prompts[i] for i in order],
        seeds=[clips.seeds[i] for i in order],
    )
    values = {score.column: score for score in case.scores(moved)}
    for score in case.scores():
        if score.per_clip is None:
            continue
        expected = np.array(score.per_clip)[order]
        found = values[score.column].per_clip if score.column in values else None
        assert found is not None, f"{score.column} is missing when the clips are in another order"
        size = max(float(np.abs(expected).max()), 1e-9)
        error = float(np.abs(np.array(found) - expected).max())
        assert error <= ROUNDING * size, (
            f"{score.column} of a clip changes by {error:.3g} when the clips are in another order"
        )


@conformance
def check_references(case: EvaluatorCase) -> None:
    """Absent references end in fewer scores, not in an error."""
    for kinds in [{}, *({kind: folder} for kind, folder in case.references.items())]:
        given = ", ".join(kinds) or "no reference"
        try:
            scores = case.scores(kinds=kinds)
        except Exception as error:
            raise AssertionError(
                f"with {given}: {type(error).__name__}: {error}; return no score if a needed "
                "reference is absent"
            ) from error
        assert isinstance(scores, list), f"with {given}, scores returns {type(scores).__name__}"


@conformance
def check_lines(case: EvaluatorCase) -> None:
    """The scores pass through metrics.jsonl, and unchanged ones are not computed again."""
    settings = {case.name: dataclasses.asdict(case.evaluator)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "metrics.jsonl"
        arguments = (case.folder, case.references, [case.name], None, out, settings)
        lines = evaluate(*arguments)
        scores = {score.column: score.value for score in case.scores()}
        written = {line["column"]: line["value"] for line in lines}
        assert written == scores, f"metrics.jsonl holds {written}, not {scores}"
        before = out.stat().st_mtime_ns
        evaluate(*arguments)
        assert out.stat().st_mtime_ns == before, "unchanged scores are computed and written again"


EVALUATOR_CHECKS = (
    check_declaration,
    check_scores,
    check_repeatable,
    check_input,
    check_order,
    check_references,
    check_lines,
)
