"""SHA-256 of the files of `results/<name>` that cannot be recomputed from the others."""

import hashlib
from pathlib import Path

DATA = ("sweep.json", "runs.csv", "clips.csv", "checkpoints.csv", "training.csv")
GIVEN = (*DATA, "report.html")  # the page holds clips of the runs


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of GIVEN and of each figure in the folder, by file name."""
    figures = [path.relative_to(folder).as_posix() for path in folder.glob("figures/*.*g")]
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in [*GIVEN, *sorted(figures)]
        if (folder / name).is_file()
    }
