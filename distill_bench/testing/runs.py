"""TODO: testing.runs."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from distill_bench.config.resolve import resolve
from distill_bench.method import Method
from distill_bench.testing.tiny import tiny_clips, tiny_pipeline
from distill_bench.train.trainer import Trainer

BASE = {
    "student_updates": 1,
    "fake_score_updates": 2,
    "batch_size": 4,
    "nfe": 2,
    "frames": 5,
    "height": 16,
    "width": 16,
    "checkpoint_every": 1,
    "log_every": 1,
    "signals_every": 1,
    "trackers": [],
    "evaluations": 1,
    "protocol": {"clips": 2, "teacher_steps": 2},
}


class Runs:
    """Makes run folders of one method on a tiny pipeline in `folder`; all with `fields`, for instance an adapter."""

    def __init__(
        self,
        method: str | type[Method] | Mapping[str, Any],
        folder: Path,
        prefix: str = "0",
        fields: Mapping[str, Any] = {},
    ) -> None:  # noqa: B006 - never changed
        if isinstance(method, type):
            method = f"{method.__module__}:{method.__qualname__}"
        self.method = {"name": method} if isinstance(method, str) else dict(method)
        self.folder, self.prefix, self.fields, self.made = folder, prefix, fields, 0
        self.name = ", ".join(str(value) for value in self.method.values())

    def make(self, **fields: Any) -> Path:
        """A run folder with the given fields over BASE."""
        teacher, data = self.folder / "tiny-wan", self.folder / "clips"
        if not teacher.is_dir():
            tiny_pipeline(teacher)
            tiny_clips(data)
        self.made += 1
        run = self.folder / "runs" / f"conformance-{self.prefix}-{self.made}"
        run.mkdir(parents=True)
        config = resolve(
            BASE
            | {"teacher": str(teacher), "data": str(data), "method": self.method}
            | dict(self.fields)
            | fields
        )
        (run / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return run

    def trainer(self, **fields: Any) -> Trainer:
        """The trainer of such a run."""
        return Trainer(self.make(**fields))

    @functools.cached_property
    def untrained(self) -> Trainer:
        """One that stays as it began, for checks that only look at losses."""
        return self.trainer()


@contextmanager
def named(method: str, check: str) -> Iterator[None]:
    """Whatever goes wrong inside is an AssertionError that names the method and the check."""
    try:
        yield
    except Exception as error:
        said = str(error).strip() or "no message"
        if not isinstance(error, AssertionError):
            said = f"{type(error).__name__}: {said.splitlines()[0]}"
        raise AssertionError(f"{method}: {check}: {said}") from error


def conformance(check: Callable[[Runs], None]) -> Callable[[Runs], None]:
    "A conformance test, all of whose failures are `named`."

    @functools.wraps(check)
    def checked(runs: Runs) -> None:
        with named(runs.name, check.__name__):
            check(runs)

    return checked
