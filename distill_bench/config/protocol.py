"""The protocol of a run: everything that rows must share for their scores to be comparable."""

import hashlib
import json
from typing import Any

from distill_bench.config.identity import hashed_fields
from distill_bench.config.schema import ProtocolConfig, RunConfig
from distill_bench.teachers.folder import is_outline, teacher_folder

PROTOCOL_VERSION = 1  # raise it when the choice of prompts, seeds or controls changes


def protocol(config: RunConfig) -> dict[str, Any]:
    """The protocol: prompts, seed, counts, sizes, frame rate, the teacher and its sampler."""
    folder = teacher_folder(config.teacher)
    if config.prompts is not None:
        prompts = config.prompts_hash[:8]
    else:
        # an outline, which stands in for a teacher in plans, has no prompts
        listed = b"" if is_outline(folder) else (folder / "prompts.txt").read_bytes()
        prompts = hashlib.sha256(listed).hexdigest()[:8]
    return {
        **config.protocol.model_dump(mode="json", exclude={"evaluators", "device"}),
        "teacher": config.teacher_hash,
        "prompts": prompts,
        "sampler": "euler",
        "version": PROTOCOL_VERSION,
        "frames": config.frames,
        "height": config.height,
        "width": config.width,
        "shift": teacher_shift(config),
    }


def teacher_shift(config: RunConfig) -> float:
    """Shift of the noise levels of the teacher's reference clips."""
    stated = config.protocol.teacher_shift
    return config.shift if stated is None else stated


def protocol_hash(config: RunConfig) -> str:
    """Hash (8 hex digits) of the protocol, without `added` keys at their default (`schema.key`)."""
    omitted = ProtocolConfig.model_fields.keys() - hashed_fields(config.protocol).keys()
    hashed = {key: value for key, value in protocol(config).items() if key not in omitted}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]


def student_key(config: RunConfig) -> str:
    """Key of the untrained student's clips: all settings outside the protocol that change them."""
    # without `teacher_shift` the protocol's hash covers the shift
    shift = "" if config.protocol.teacher_shift is None else f"shift{config.shift:g}"
    words = (f"nfe{config.nfe}", str(config.stepping), shift, student_start(config))
    return "-".join(filter(None, words))


def student_start(config: RunConfig) -> str:
    """Key of the weights that the student starts from; "" for the teacher's first network."""
    if config.student_hash:
        return config.student_hash  # that of the expert, if the pipeline has two
    return "" if config.student_expert == "high_noise" else config.student_expert
