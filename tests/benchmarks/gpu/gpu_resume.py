"""A run that is stopped and resumed against one that is not: the same bits on a device or not.

Trains mini-wan three times: twice whole, to see if the device repeats its own bits, and once
stopped after its first update and resumed. Fails if the resumed run alone differs.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import torch
from gpu_rows import part_parser
from safetensors.torch import load_file

from distill_bench.config.resolve import resolve
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.train import checkpoint
from distill_bench.train.loop import train

SIZES = {
    "wan-1.3b": {"student_updates": 4, "checkpoint_every": 4, "batch_size": 8},
    "tiny": {"student_updates": 2, "checkpoint_every": 2, "batch_size": 1},
}
RUNS = {
    "dmd2": {"method": {"name": "dmd2", "preset": "video"}},
    "sgmd, bfloat16": {
        "method": {"name": "sgmd", "preset": "official"},
        "precision": "bfloat16",
        "gradient_checkpointing": True,
    },
}
BASE = {"teacher": "mini-wan", "nfe": 2, "trackers": [], "signals_every": None}


def trained(folder: Path, fields: dict, stopped: bool) -> dict[str, torch.Tensor]:
    """Weights of the last checkpoint of a run, which is stopped after its first update or not."""
    folder.mkdir(parents=True)
    config = resolve(BASE | fields)
    (folder / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    with contextlib.redirect_stdout(sys.stderr):  # the progress of training is no line of the table
        if stopped:
            assert train(folder, stop=lambda: True)["status"] == "stopped"
        assert train(folder)["status"] == "done"
    return load_file(checkpoint.folders(folder)[-1] / "weights.safetensors")


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    """Number of tensors that differ in a bit."""
    assert one.keys() == other.keys()
    return sum(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def main(argv: list[str] | None = None) -> int:
    """Print a line per run; returns 1 if a resumed run differs where a repeated one does not."""
    options = part_parser("gpu_resume", __doc__).parse_args(argv)
    worse = False
    print("| run | tensors | differ when repeated | differ when resumed |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as store:
        for index, (name, fields) in enumerate(RUNS.items()):
            whole, again, resumed = (
                trained(Path(store) / f"{index}-{kind}", SIZES[options.size] | fields, stopped)
                for kind, stopped in (("whole", False), ("again", False), ("resumed", True))
            )
            repeated, difference = differing(whole, again), differing(whole, resumed)
            worse |= difference > 0 and repeated == 0
            print(f"| {name} | {len(whole)} | {repeated} | {difference} |", flush=True)
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
