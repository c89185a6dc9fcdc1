"""What makes two rows of a table comparable. Imports nothing heavy: the command line plans with it."""

import hashlib
import json
from typing import Any

from distill_bench.config.identity import identity_of
from distill_bench.config.schema import ProtocolConfig, RunConfig
from distill_bench.teachers.folder import is_outline, teacher_folder

PROTOCOL_VERSION = 1  # raise it when the choice of prompts, seeds or controls changes


def protocol(config: RunConfig) -> dict[str, Any]:
    """What makes two rows comparable: prompts, seeds, counts, sizes, rate, the teacher and how it is sampled."""
    found = config.protocol.model_dump(mode="json", exclude={"evaluators"})
    folder = teacher_folder(config.teacher)
    if config.prompts is not None:
        prompts = config.prompts_hash[:8]
    else:  # a dry run may be without the weights' folder
        listed = b"" if is_outline(folder) else (folder / "prompts.txt").read_bytes()
        prompts = hashlib.sha256(listed).hexdigest()[:8]
    found |= {
        "teacher": config.teacher_hash,
        "prompts": prompts,
        "sampler": "euler",
        "version": PROTOCOL_VERSION,
    }
    return found | {key: getattr(config, key) for key in ("frames", "height", "width", "shift")}


def protocol_hash(config: RunConfig) -> str:
    """Digest of what counts of `protocol` (8 digits)."""
    later = ProtocolConfig.model_fields.keys() - identity_of(config.protocol).keys()
    counted = {key: value for key, value in protocol(config).items() if key not in later}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:8]


def student_key(config: RunConfig) -> str:
    """What the rows of untrained students differ by beside the protocol."""
    return "-".join(filter(None, (f"nfe{config.nfe}", config.stepping, config.student_hash)))
