"""Command line: `python -m distill_bench.sample RUN`; ranks started by torchrun share the clips."""

import argparse
from pathlib import Path

from distill_bench.sample.run import sample
from distill_bench.sample.vbench_files import CLIPS_PER_PROMPT, sample_for_vbench


def main(argv: list[str] | None = None) -> int:
    """Sample the students of a run folder and print the folders of clips; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="distill-bench sample", description="Sample the clips of a run's kept students."
    )
    parser.add_argument("run", type=Path, help="run folder with run.yaml and a checkpoint")
    parser.add_argument(
        "--vbench",
        type=Path,
        metavar="FOLDER",
        help="write clips of the last student as VBench reads them, {prompt}-{number}.mp4",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts of --vbench, e.g. VBench's vbench_full_info.json",
    )
    parser.add_argument(
        "--clips-per-prompt",
        type=int,
        default=CLIPS_PER_PROMPT,
        metavar="N",
        help=f"of --vbench (default: {CLIPS_PER_PROMPT})",
    )
    options = parser.parse_args(argv)
    try:
        if (options.vbench is None) != (options.prompts is None):
            raise ValueError(
                "--vbench and --prompts belong together: a folder, and the file of its prompts"
            )
        if options.vbench is None:
            print(*sample(options.run), sep="\n")
            return 0
        files = sample_for_vbench(
            options.run, options.vbench, options.prompts, options.clips_per_prompt
        )
        print(f"{len(files)} clips in {options.vbench}")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
