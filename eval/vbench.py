"""VBench's dimensions, quality, semantic and total score, from the result files of its package."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from distill_bench.evaluator import Citation, Clips, Evaluator, Score

# VBench@7975661, scripts/constant.py: lowest and highest raw score, and weight, per dimension.
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
CLIP_NAME = re.compile(r"(.*)-\d+$")  # {prompt}-{number}, without the suffix

Ranges = Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class VBench(Evaluator):
    """VBench in per cent: total, quality, semantic, and each dimension as measured, unnormalised.

    The package is run in an environment of its own: write the clips by
    `distill-bench sample RUN --vbench FOLDER`, score them, and name the folder of its result files
    in `results`. Aggregates need all of their dimensions; the published script counts an absent
    dimension as 0. Scores of one prompt list and one version of the package compare.
    """

    paper: ClassVar[Citation] = Citation(
        "2311.17982",
        "VBench: Comprehensive Benchmark Suite for Video Generative Models",
        "Ziqi Huang, Yinan He, Jiashuo Yu, Fan Zhang, Chenyang Si, Yuming Jiang, Yuanhan Zhang, "
        "Tianxing Wu, Qingyang Jin, Nattapol Chanpaisit, Yaohui Wang, Xinyuan Chen, Limin Wang, "
        "Dahua Lin, Yu Qiao, Ziwei Liu",
        2023,
    )
    version: ClassVar[int] = 1
    only_if_named: ClassVar[bool] = True

    # a file *_eval_results.json of the package, or a folder of them
    results: str | None = None
    package: str = "unknown"  # version of the package that wrote the results, e.g. 0.1.5
    # of the files in `results`: scores are read again if a file is added or changed
    results_digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.results is not None:
            object.__setattr__(self, "results_digest", _digest(Path(self.results)))

    def reason_to_skip(self, clips: Clips) -> str | None:
        if self.results is not None:
            read_results(Path(self.results))
            return None
        return (
            "it reads result files of VBench, which belong to one folder of clips: write it by "
            "`distill-bench sample RUN --vbench FOLDER`, score it in an environment of its own "
            "(`pip install vbench`, `vbench evaluate --videos_path FOLDER --dimension NAME`), and "
            "read the results by `distill-bench evaluate FOLDER --set vbench.results=RESULTS`"
        )

    def scores(self, clips: Clips, references: Mapping[str, Clips]) -> list[Score]:
        if self.results is None:
            return []
        raw, prompts = read_results(Path(self.results))
        unknown = sorted(prompts - set(clips.prompts)) if all(clips.prompts) else []
        if unknown:
            raise ValueError(
                f"{self.results} scores clips of {len(unknown)} prompts that these clips lack, "
                f"e.g. {unknown[0]!r}; name the results of these clips"
            )
        listed = hashlib.sha256("\n".join(sorted(prompts)).encode()).hexdigest()[:8]
        suite = f"vbench {self.package}, {len(prompts)} prompts {listed}"

        def score(column: str, value: float, title: str, **fields: Any) -> Score:
            return Score(column, 100 * value, title, "%", "higher", extractor=suite, **fields)

        scores = []
        quality, semantic = aggregate(raw, QUALITY), aggregate(raw, SEMANTIC)
        if quality is not None and semantic is not None:
            both = QUALITY_WEIGHT + SEMANTIC_WEIGHT
            total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / both
            scores.append(score("vbench_total", total, "VBench total", headline=True))
        if quality is not None:
            scores.append(score("vbench_quality", quality, "VBench quality"))
        if semantic is not None:
            scores.append(score("vbench_semantic", semantic, "VBench semantic"))
        absent = sorted({*QUALITY, *SEMANTIC} - raw.keys())
        warnings = (f"no results of {', '.join(absent)}",) if absent else ()
        scores += [
            score(f"vbench_{name}", value, f"VBench {name.replace('_', ' ')}", warnings=warnings)
            for name, value in raw.items()
        ]
        return scores


def aggregate(raw: Mapping[str, float], ranges: Ranges) -> float | None:
    """Weighted mean of normalised dimensions, (raw - lowest) / (highest - lowest).

    None if a dimension is absent. VBench@5ebbf0b, scripts/cal_final_score.py.
    """
    if not ranges.keys() <= raw.keys():
        return None
    parts = [
        weight * (raw[name] - lowest) / (highest - lowest)
        for name, (lowest, highest, weight) in ranges.items()
    ]
    return sum(parts) / sum(weight for _, _, weight in ranges.values())


def read_results(path: Path) -> tuple[dict[str, float], set[str]]:
    """Raw scores by dimension, in the order of the constants, and the prompts of the clips.

    Raises:
        ValueError: if there are no results, or a dimension has two different ones.
    """
    files = _files(path)
    if not files:
        raise ValueError(f"vbench.results {path}: no file *_eval_results.json")
    raw: dict[str, float] = {}
    prompts: set[str] = set()
    for file in files:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            for name, (value, clips) in data.items():
                if not 0 <= value <= 1:  # early versions gave imaging_quality in per cent
                    raise ValueError(f"{name} is {value}; raw scores are in [0, 1]")
                if raw.setdefault(name, float(value)) != value:
                    raise ValueError(f"a second, other result of {name}")
                prompts |= {_prompt(clip["video_path"]) for clip in clips}
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise ValueError(f"{file} is no result file of VBench: {error}") from error
    known = [name for name in (*QUALITY, *SEMANTIC) if name in raw]
    if unknown := sorted(raw.keys() - {*known}):
        raise ValueError(
            f"{path}: no dimension {unknown[0]!r}; known: {', '.join((*QUALITY, *SEMANTIC))}"
        )
    return {name: raw[name] for name in known}, prompts


def _files(path: Path) -> list[Path]:
    """The result files; the package names them `results_{time}_eval_results.json`."""
    if path.is_dir():
        return sorted(path.glob("**/*_eval_results.json"))
    return [path] if path.is_file() else []


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _prompt(video_path: str) -> str:
    """Prompt of a clip by its file name."""
    match = CLIP_NAME.fullmatch(Path(video_path).stem)
    if match is None:
        raise ValueError(f"{video_path!r} is not named {{prompt}}-{{number}}")
    return match[1]
