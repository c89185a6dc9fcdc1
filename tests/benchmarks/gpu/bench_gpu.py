"""All that only a GPU can show, in one table and at most eight minutes: `make bench-gpu`.

    python tests/benchmarks/gpu/bench_gpu.py --size tiny --device cpu   # rehearsal, on a processor

Each part is a process of its own with a time limit, so a part that fails or hangs loses no other.
The table is written after each part. Exits with 1 unless every part ran to its end.

Needs the package's requirements, not the package. Where nothing can be installed from a network,
carry wheels of what is missing, beside torch and transformers often diffusers, open_clip_torch,
ftfy, pydantic, pydantic-core, annotated-types, typing-inspection, ruamel.yaml and submitit: `pip
download --no-deps --only-binary=:all: -c constraints.txt --python-version 3.12 -d wheels NAME ...`,
and there `pip install --no-index --no-deps wheels/*`.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDERS = (HERE, HERE.parent, ROOT, ROOT / "tests/helpers", ROOT / "tests/references")
SIZES = ("wan-1.3b", "tiny")
OUT = "results/bench_gpu.md"
GRACE = 10.0  # seconds between the time that a part is told and the end of its process


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        title: its heading in the table.
        share: of the time of all parts that it may take; None: all the time that is left.
    """

    title: str
    share: float | None


PARTS = {  # modules of this folder, cheapest first
    "gpu_resume": Part("A run that is stopped and resumed", 0.1),
    "gpu_throughput": Part("Clips per second of the networks that score", 0.2),
    "gpu_scores": Part("Scores against the processor's", 0.25),
    "gpu_updates": Part("Updates", None),
}


def run_part(
    command: Sequence[str],
    environment: Mapping[str, str],
    seconds: float,
    show: Callable[[str], object],
) -> tuple[list[str], str | None]:
    """Run a part for at most `seconds`.

    Returns:
        The lines that it printed, and the reason why it did not run to its end; None if it did.
    """
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            os.killpg(process.pid, signal.SIGKILL)  # compiling processes too: they hold the pipe

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                show(lines[-1])
            code = process.wait()
        except BaseException:  # Ctrl-C does not reach the new session
            stop()
            raise
        finally:
            timer.cancel()
    if stopped.is_set():
        return lines, f"Stopped after {seconds:.0f} s."
    return lines, f"Ended with code {code}; its message is on the console." if code else None


def main(argv: list[str] | None = None) -> int:
    """Run the parts and write the table; returns 1 if a part did not run to its end."""
    parser = argparse.ArgumentParser(prog="bench-gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default=SIZES[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts; default: 8")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--out", type=Path, help=f"default: {OUT}, if all parts are run at full size on a GPU"
    )
    options = parser.parse_args(argv)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.exit(
            2, "bench-gpu: no GPU here; --device cpu --size tiny shows that the command runs\n"
        )
    name = "processor" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    path = os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if options.device == "cpu":
        # threads wait for one another on a busy machine
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    full_size = options.device != "cpu" and options.size != "tiny"
    whole = full_size and options.parts == list(PARTS)
    out = options.out or (ROOT / OUT if whole else None)
    end = time.monotonic() + 60 * options.minutes
    text = f"# {name}\n\nWritten by `make bench-gpu`: {options.size}, torch {torch.__version__}.\n"
    complete = True
    for part in options.parts:
        left = end - time.monotonic() - GRACE
        limit = min(left, 60 * options.minutes * (PARTS[part].share or 1))
        print(f"## {PARTS[part].title}", flush=True)
        if limit <= 0:
            lines, reason = [], "Not run: no time was left."
            print(reason, flush=True)
        else:
            command = [sys.executable, "-m", part, "--device", options.device]
            command += ["--size", options.size, "--seconds", f"{limit:.0f}"]
            lines, reason = run_part(
                command, environment, limit + GRACE, lambda line: print(line, flush=True)
            )
        complete &= reason is None
        text += "\n".join(["", f"## {PARTS[part].title}", "", *lines, ""])
        text += "" if reason is None else f"\n{reason}\n"
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
    print(
        out or f"not written: {OUT} is for all parts at full size on a GPU; name another by --out"
    )
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
