"""Scores of a folder of clips: one line a score in metrics.jsonl, nothing computed twice.

    python -m distill_bench.evaluate FOLDER --reference FOLDER --evaluators NAME,NAME
    torchrun --nproc_per_node 4 -m distill_bench.evaluate ...

FOLDER is one that `distill_bench.sample` wrote, or any folder of mp4, gif, webp or npy clips with captions in manifest.jsonl:
see `distill_bench.sample.media`. An evaluator whose lines are there with its version, its settings and the protocol is left alone;
older lines of it are replaced. What networks make of clips is kept in `.features` beside them.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distill_bench.evaluator import Clips, Evaluator, Score, require_same_frames
from distill_bench.networks.ranks import group_ranks, on_first_rank
from distill_bench.registry import evaluators as all_evaluators
from distill_bench.registry import find_evaluator
from distill_bench.sample.media import load_clips
from distill_bench.store.files import unwritable, write_bytes
from distill_bench.store.nested import differences

NEEDS = "needs a reference (--reference FOLDER), or facts.npz beside the clips"  # why an evaluator gives no score


class References(Mapping[str, Clips]):
    """Reference rows by kind, each read from disk when it is first asked for."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders, self._loaded = dict(folders), {}

    def __getitem__(self, key: str) -> Clips:
        if key not in self._loaded:
            self._loaded[key] = load_clips(self._folders[key])
        return self._loaded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)

    def __contains__(self, key: object) -> bool:
        return key in self._folders


def evaluate(
    folder: Path,
    references: Mapping[str, Path],
    evaluators: Sequence[str] | None = None,
    protocol: str | None = None,
    out: Path | None = None,
    settings: Mapping[str, Mapping[str, Any]] = {},  # noqa: B006 - never changed
) -> list[dict]:
    """Score the clips of a folder and write the lines to `out`; the lines are also returned.

    Under torch.distributed every rank calls this: they share the forwards, and the first one writes.

    Args:
        references: folders of clips by what they are: see `Evaluator.scores`; `distill_bench.sample.references.references` makes them.
        evaluators: names; None is every one that applies to the clips.
        protocol: two rows compare only if theirs is one; None is a digest of `conditions`.
        out: the metrics.jsonl, by default in the folder.
        settings: fields of evaluators by name.

    Raises:
        ValueError: if a named evaluator cannot score the clips, a score is not finite, or `out` holds other evaluators' scores
            of another protocol.
    """
    out = out or folder / "metrics.jsonl"
    clips, against = load_clips(folder), References(references)
    under = conditions(clips, against)
    protocol = protocol or _digest(under)
    names = list(dict.fromkeys(all_evaluators() if evaluators is None else evaluators))
    # all that can be known to be wrong is said before the first of them works for hours
    for key in REFERENCES:
        if key in against:
            require_same_frames(clips, against[key], key)
    _refuse_mixture(out, on_first_rank(lambda: _read(out)), names, protocol, under)
    if (why := on_first_rank(lambda: unwritable(out.parent))) is not None:
        raise ValueError(f"cannot write {out}: {why}; name another file by --out")
    chosen = {}
    for name in names:
        evaluator = _with_settings(name, settings.get(name, {}))
        reason = evaluator.reason_to_skip(clips)
        if reason is None:
            chosen[name] = evaluator
        elif evaluators is not None:
            raise ValueError(f"{name} cannot score {folder}: {reason}")
        else:
            _say(f"{name} skipped: {reason}")
    for name, evaluator in chosen.items():
        key = _key(name, evaluator, protocol, under)
        lines = on_first_rank(lambda: _read(out))
        if not any(key.items() <= line.items() for line in lines):
            new = [_line(key, score, clips) for score in evaluator.scores(clips, against)]
            if not new and evaluators is None:
                _say(f"{name} skipped: it {NEEDS}")
            kept = [line for line in lines if line.get("metric") != name]
            if new or kept != lines:
                text = "".join(json.dumps(line) + "\n" for line in [*kept, *new])
                on_first_rank(lambda text=text: write_bytes(out, text.encode()))
    return on_first_rank(lambda: _read(out))


def _read(out: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without one at its end that is torn (a crash in the midst of a write).

    Raises:
        ValueError: if it is another kind of file: it would be written over.
    """
    if not out.is_file():
        return []
    found, texts = [], out.read_text(errors="replace").splitlines(keepends=True)
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
            if number == len(texts) and text.startswith("{") and not text.endswith("\n"):
                continue
        if not isinstance(line, dict):
            raise ValueError(
                f"{out}, line {number} is no score: another file would be written over; name one by --out"
            )
        found.append(line)
    return found


def _say(text: str) -> None:
    if group_ranks().first:
        print(text, flush=True)


def conditions(clips: Clips, references: Mapping[str, Clips]) -> dict[str, Any]:
    """What rows must share to be compared: prompts, counts, sizes, rate and references; seeds by their digest."""
    n, frames, _, height, width = clips.frames.shape
    found = {"clips": n, "frames": frames, "height": height, "width": width, "fps": clips.fps}
    found |= {"prompts": _digest(clips.prompts), "seeds": _digest(clips.seeds)}
    return found | {
        "references": {
            key: references[key].digest[:8] for key in sorted(references) if key in REFERENCES
        }
    }


# the rows that evaluators are given; the other rows of a table (controls, the untrained student) differ between runs
REFERENCES = ("teacher", "teacher_other", "data", "data_other")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _refuse_mixture(
    out: Path, lines: list[dict], names: Sequence[str], protocol: str, under: Mapping[str, Any]
) -> None:
    for line in lines:
        if line.get("metric") in names:
            continue
        what = differences(line.get("conditions") or {}, under)
        if what or line.get("protocol") != protocol:
            what = what or "the teacher's sampling"
            raise ValueError(
                f"{out} holds {line.get('column')} of protocol {line.get('protocol')}, these clips are of {protocol}; they "
                f"differ in {what}; one row holds one protocol: delete the file, name another by --out, or score with every one"
            )


def _with_settings(name: str, values: Mapping[str, Any]) -> Evaluator:
    evaluator = find_evaluator(name)
    known = [f.name for f in fields(evaluator)]
    for key in values:
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; it has: {', '.join(known) or 'none'}")
    try:
        return TypeAdapter(evaluator).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{name}.{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}"
        ) from error


def _key(name: str, evaluator: Evaluator, protocol: str, under: Mapping[str, Any]) -> dict:
    """What makes a line still hold."""
    settings = json.loads(json.dumps(asdict(evaluator), default=str))
    key = {"metric": name, "version": evaluator.version, "protocol": protocol}
    return key | {"settings": settings, "conditions": dict(under)}


def _line(key: dict, score: Score, clips: Clips) -> dict:
    numbers = [score.value, *(score.per_clip or ()), *([] if score.sd is None else [score.sd])]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{score.column} of the clips is not finite: {score.value}")
    per_clip = None if score.per_clip is None else [round(float(v), 6) for v in score.per_clip]
    return (
        asdict(score)
        | {"per_clip": per_clip, "warnings": list(score.warnings), "n": len(clips.frames)}
        | key
    )
