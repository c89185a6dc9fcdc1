"""Scores of a folder of clips: one line a score in metrics.jsonl, nothing computed twice.

    python -m distill_bench.evaluate FOLDER --reference teacher=FOLDER --reference data=FOLDER

An evaluator whose lines are there with its version, its settings and the protocol is left alone; older lines of it are replaced.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from distill_bench.evaluator import Clips, Evaluator, Score
from distill_bench.registry import evaluators as all_evaluators
from distill_bench.registry import find_evaluator
from distill_bench.store import read_json, read_jsonl, write_bytes


def evaluate(
    folder: Path,
    references: Mapping[str, Path],
    evaluators: Sequence[str] | None = None,
    protocol: str | None = None,
    out: Path | None = None,
) -> list[dict]:
    """Score the clips of a folder and write the lines to `out`; the lines are also returned.

    Args:
        references: folders of clips by what they are: `teacher`, `data`.
        evaluators: names; None is every one that applies to the clips.
        protocol: two rows compare only if theirs is one; None is a digest of prompts, seeds, sizes and references.
        out: the metrics.jsonl, by default in the folder.

    Raises:
        ValueError: if a named evaluator cannot score the clips, or a score is not finite.
    """
    out = out or folder / "metrics.jsonl"
    clips = load_clips(folder)
    against = {key: load_clips(path) for key, path in references.items()}
    protocol = protocol or protocol_of(clips, against)
    for name in dict.fromkeys(all_evaluators() if evaluators is None else evaluators):
        evaluator = find_evaluator(name)()
        reason = evaluator.reason_to_skip(clips)
        if reason is not None:
            if evaluators is not None:
                raise ValueError(f"{name} cannot score {folder}: {reason}")
            print(f"{name} skipped: {reason}", flush=True)
            continue
        key = _key(name, evaluator, protocol, against)
        lines = read_jsonl(out)
        if not any(key.items() <= line.items() for line in lines):
            new = [_line(key, score, clips) for score in evaluator.scores(clips, against)]
            kept = [line for line in lines if line.get("metric") != name]
            write_bytes(out, "".join(json.dumps(line) + "\n" for line in [*kept, *new]).encode())
    return read_jsonl(out)


def load_clips(folder: Path) -> Clips:
    """The clips of a folder that `distill_bench.sample` wrote.

    Raises:
        ValueError: if files are missing or do not belong together.
    """
    path, manifest = folder / "clips.npy", folder / "manifest.jsonl"
    for each in (path, manifest):
        if not each.is_file():
            raise ValueError(f"no {each.name} in {folder}: it is no folder of clips")
    lines = read_jsonl(manifest)
    try:
        frames = np.load(path, allow_pickle=False)
        if [line["index"] for line in lines] != list(range(len(frames))):
            raise ValueError(f"{manifest} lists {len(lines)} clips, {path.name} holds {len(frames)}")
        extra = {"fps": float(row["fps"])} if "fps" in (row := read_json(folder / "row.json") or {}) else {}
        if (folder / "facts.npz").is_file():
            extra["facts"] = dict(np.load(folder / "facts.npz", allow_pickle=False))
        return Clips(frames, [line["prompt"] for line in lines], [line["seed"] for line in lines], **extra)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{folder}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{manifest}: a line has no {error}") from error


def protocol_of(clips: Clips, references: Mapping[str, Clips]) -> str:
    """Digest of what rows must share to be compared: prompts, seeds, sizes and references (8 digits)."""
    digest = hashlib.sha256(json.dumps([clips.prompts, clips.seeds, clips.frames.shape, clips.fps]).encode())
    for key, reference in sorted(references.items()):
        digest.update(key.encode() + hashlib.sha256(np.ascontiguousarray(reference.frames)).digest())
    return digest.hexdigest()[:8]


def _key(name: str, evaluator: Evaluator, protocol: str, references: Mapping[str, Clips]) -> dict:
    """What makes a line still hold; settings are written where there are any."""
    settings = json.loads(json.dumps(asdict(evaluator), default=str))
    key = {"metric": name, "version": evaluator.version, "protocol": protocol}
    return key | {"settings": settings, "references": sorted(references)}


def _line(key: dict, score: Score, clips: Clips) -> dict:
    if not math.isfinite(score.value):
        raise ValueError(f"{score.column} of the clips is {score.value}")
    per_clip = None if score.per_clip is None else [round(float(v), 6) for v in score.per_clip]
    return asdict(score) | {"per_clip": per_clip, "n": len(clips.frames)} | key


def main(argv: list[str] | None = None) -> int:
    """Command line: score one folder of clips."""
    parser = argparse.ArgumentParser(prog="distill_bench.evaluate", description=evaluate.__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder with clips.npy and manifest.jsonl")
    parser.add_argument("--reference", action="append", default=[], metavar="KEY=FOLDER", help="teacher=... and data=...")
    parser.add_argument("--evaluators", help="names with commas between; default: every one that applies")
    parser.add_argument("--protocol", help="protocol of the row; default: a digest of prompts, seeds, sizes and references")
    parser.add_argument("--out", type=Path, help="file of the lines; default: metrics.jsonl in the folder")
    options = parser.parse_args(argv)
    names = None if options.evaluators is None else [n.strip() for n in options.evaluators.split(",") if n.strip()]
    try:
        if any("=" not in each for each in options.reference):
            raise ValueError("--reference takes KEY=FOLDER, for instance teacher=runs/references/1a2b3c4d/teacher")
        references = {key: Path(path) for key, path in (each.split("=", 1) for each in options.reference)}
        lines = evaluate(options.folder, references, names, options.protocol, options.out)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for line in lines:
        sd = "" if line["sd"] is None else f" (sd {line['sd']:.3g})"
        unit = f" {line['unit']}" if line["unit"] else ""
        print(f"{line['column']:20} {line['value']:.4g}{sd}{unit}  {line['title']}, {line['n']} clips")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
