"""Score a folder of clips: one line per score in metrics.jsonl; valid lines are kept.

A line is kept if its evaluator, version, settings and protocol are unchanged; otherwise it is
replaced. `sample/load_folder.py` says which folders can be scored.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distill_bench.evaluate.device import devices_used, running_on, scoring_device
from distill_bench.evaluator import Clips, Evaluator, Score, require_same_frames
from distill_bench.networks.ranks import group_ranks, on_first_rank
from distill_bench.registry import find_evaluator, usual_evaluators
from distill_bench.sample.load_folder import load_clips, unscored
from distill_bench.sample.reference_kinds import COMPARED
from distill_bench.store.files import text_lines, unwritable, write_bytes
from distill_bench.store.nested import describe_differences

NEEDS = "needs a reference (--reference FOLDER), or facts.npz beside the clips"


class LazyReferences(Mapping[str, Clips]):
    """Reference clips by kind, read from disk on first access."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)
        self._loaded: dict[str, Clips] = {}

    @property
    def folders(self) -> list[Path]:
        """Folders whose clips were read."""
        return [self._folders[kind] for kind in self._loaded]

    def __getitem__(self, kind: str) -> Clips:
        if kind not in self._loaded:
            self._loaded[kind] = load_clips(self._folders[kind])
        return self._loaded[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)

    def __contains__(self, kind: object) -> bool:  # Mapping's own would load the clips
        return kind in self._folders


def evaluate(
    folder: Path,
    references: Mapping[str, Path],
    evaluators: Sequence[str] | None = None,
    protocol: str | None = None,
    out: Path | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    device: str | None = None,
) -> list[dict]:
    """Score the clips of a folder, write the lines to `out` and return them.

    Collective under torch.distributed: the ranks share forward passes and rank 0 writes.

    Args:
        references: folders of reference clips by kind, see `Evaluator.scores`.
        evaluators: names; None for every evaluator that applies to the clips.
        protocol: hash of the protocol; only scores of one protocol compare. None for a digest of
            `conditions`.
        out: the metrics.jsonl; None for the one in the folder.
        settings: fields of evaluators, by evaluator and field.
        device: of the evaluators' networks, see `scoring_device`; None for this process's GPU, or
            the processor without a GPU. Lines record it, but stay valid under another one.

    Raises:
        ValueError: if a named evaluator cannot score the clips, a score is not finite, `out` has
            scores of other evaluators under another protocol, or there is no such device.
    """
    run_on = scoring_device(device)
    out = out or folder / "metrics.jsonl"
    names = list(dict.fromkeys(usual_evaluators() if evaluators is None else evaluators))
    # every check comes before the first evaluator, which may work for hours
    instances = {name: configured(name, (settings or {}).get(name, {})) for name in names}
    clips, reference_clips = load_clips(folder), LazyReferences(references)
    current = conditions(clips, reference_clips)
    protocol = protocol or _digest(current)
    for kind in COMPARED:
        if kind in reference_clips:
            require_same_frames(clips, reference_clips[kind], kind)
    _refuse_mixed_protocols(out, on_first_rank(lambda: _read(out)), names, protocol, current)
    if (reason := on_first_rank(lambda: unwritable(out.parent))) is not None:
        raise ValueError(f"cannot write {out}: {reason}; name another file by --out")
    applicable: dict[str, Evaluator] = {}
    for name, evaluator in instances.items():
        reason = evaluator.reason_to_skip(clips)
        if reason is None:
            applicable[name] = evaluator
        elif evaluators is not None:
            raise ValueError(f"{name} cannot score {folder}: {reason}")
        else:
            _print(f"{name} skipped: {reason}")
    for path in (folder, *reference_clips.folders):
        if (note := on_first_rank(lambda path=path: unscored(path))) is not None:
            _print(note)
    for name, evaluator in applicable.items():
        identity = _identity(name, evaluator, protocol, current)
        lines = on_first_rank(lambda: _read(out))
        if any(identity.items() <= line.items() for line in lines):
            continue
        with running_on(run_on), devices_used() as used:
            scores = evaluator.scores(clips, reference_clips)
        made_on = {"device": " + ".join(sorted(used)) or "cpu"}
        new = [_line(identity, score, clips) | made_on for score in scores]
        if not new:
            _print(f"{name} skipped: it {NEEDS}")
        kept = [line for line in lines if line.get("metric") != name]
        if new or kept != lines:
            text = "".join(json.dumps(line) + "\n" for line in [*kept, *new])
            on_first_rank(lambda text=text: write_bytes(out, text.encode()))
    return on_first_rank(lambda: _read(out))


def conditions(clips: Clips, references: Mapping[str, Clips]) -> dict[str, Any]:
    """Conditions that comparable scores share: counts, size, rate, prompts, seeds, references."""
    count, frames, _, height, width = clips.frames.shape
    return {
        "clips": count,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": clips.fps,
        "prompts": _digest(clips.prompts),
        "seeds": _digest(clips.seeds),
        "references": {
            kind: references[kind].digest[:8] for kind in sorted(references) if kind in COMPARED
        },
    }


def _read(out: Path) -> list[dict]:
    """Lines of a metrics.jsonl, without a torn last line, which a crash may leave.

    Raises:
        ValueError: if the file holds anything else, so that no other file is overwritten.
    """
    if not out.is_file():
        return []
    lines = []
    content = out.read_bytes().decode(errors="replace")
    texts = text_lines(content)
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
            if number == len(texts) and text.startswith("{") and not content.endswith("\n"):
                continue
        if not isinstance(line, dict):
            raise ValueError(
                f"{out}, line {number} is not a score and would be overwritten; "
                "name another file by --out"
            )
        lines.append(line)
    return lines


def _print(text: str) -> None:
    if group_ranks().first:
        print(text, flush=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _refuse_mixed_protocols(
    out: Path, lines: list[dict], names: Sequence[str], protocol: str, current: Mapping[str, Any]
) -> None:
    """Raise ValueError if a line that would stay in `out` has another protocol."""
    for line in lines:
        if line.get("metric") in names:
            continue
        differing = describe_differences(line.get("conditions") or {}, current)
        if differing or line.get("protocol") != protocol:
            differing = differing or "the teacher's sampling"
            raise ValueError(
                f"{out} holds {line.get('column')} of protocol {line.get('protocol')}, these clips "
                f"are of {protocol}; they differ in {differing}; delete the file, name another by "
                "--out, or score with every evaluator"
            )


def configured(name: str, settings: Mapping[str, Any]) -> Evaluator:
    """Build the named evaluator with these settings.

    Raises:
        ValueError: for an unknown setting, or a value of the wrong type or out of range.
    """
    evaluator = find_evaluator(name)
    known = [field.name for field in fields(evaluator)]
    for key in settings:
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; it has: {', '.join(known) or 'none'}")
    try:
        return TypeAdapter(evaluator).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{name}.{key} = {first['input']!r}: {first['msg']}") from error


def _identity(
    name: str, evaluator: Evaluator, protocol: str, current: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of a line that must be unchanged for it to stay valid."""
    return {
        "metric": name,
        "version": evaluator.version,
        "protocol": protocol,
        "settings": json.loads(json.dumps(asdict(evaluator), default=str)),
        "conditions": dict(current),
    }


def _line(identity: dict[str, Any], score: Score, clips: Clips) -> dict[str, Any]:
    numbers = [score.value, *(score.per_clip or ())]
    if score.sd is not None:
        numbers.append(score.sd)
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{score.column} of the clips is not finite: {score.value}")
    line = asdict(score)
    if score.per_clip is not None:
        line["per_clip"] = [round(float(value), 6) for value in score.per_clip]
    line["warnings"] = list(score.warnings)
    return line | {"n": len(clips.frames)} | identity
