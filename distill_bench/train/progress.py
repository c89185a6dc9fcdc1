"""TODO: train.progress."""

import sys
from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Progress_:
    """A rich bar in a terminal, a plain line a log elsewhere; nothing on other ranks."""

    def __init__(self, main: bool) -> None:
        self.main, self.bar = main, None
        if main and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("student updates"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                transient=True,
            )

    def __enter__(self) -> Callable[[dict, int], None]:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("train", total=None)
        return self

    def __call__(self, line: dict, total: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=line["student_updates"], total=total)
        elif self.main:
            shown = "  ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "student_updates")
            print(f"student update {line['student_updates']}/{total}  {shown}", flush=True)

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
