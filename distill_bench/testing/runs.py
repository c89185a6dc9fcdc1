"""Runs of one method on a tiny pipeline, and the decorator of conformance checks."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill_bench.config.resolve import resolve
from distill_bench.config.yaml_files import dump_yaml
from distill_bench.method import Method
from distill_bench.testing.tiny import tiny_clips, tiny_pipeline
from distill_bench.train.run import Run
from distill_bench.train.setup import build_from

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
    """Makes runs of one method on a tiny pipeline.

    Args:
        method: a name as in a sweep, a class, or a run's `method` with its fields.
        folder: receives the pipeline, its clips and the run folders.
        prefix: prefix of the run folders; two `Runs` in one folder need different prefixes.
        fields: fields of every run, for instance an adapter.
    """

    def __init__(
        self,
        method: str | type[Method] | Mapping[str, Any],
        folder: Path,
        prefix: str = "0",
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(method, type):
            method = f"{method.__module__}:{method.__qualname__}"
        if not isinstance(method, str | Mapping):
            raise TypeError(f"a method is a name, a class or a mapping, not {method!r}")
        self.method = {"name": method} if isinstance(method, str) else dict(method)
        self.name = ", ".join(str(value) for value in self.method.values())
        self.folder = folder
        self.prefix = prefix
        self.fields = dict(fields or {})
        self.made = 0

    def make(self, **fields: Any) -> Path:
        """Make a run folder; `fields` override the fields of all runs, which override BASE."""
        teacher, data = self.folder / "tiny-wan", self.folder / "clips"
        if not teacher.is_dir():
            tiny_pipeline(teacher)
            tiny_clips(data)
        self.made += 1
        run_dir = self.folder / "runs" / f"conformance-{self.prefix}-{self.made}"
        run_dir.mkdir(parents=True)
        own = {"teacher": str(teacher), "data": str(data), "method": self.method}
        config = resolve(BASE | own | self.fields | fields)
        (run_dir / "run.yaml").write_text(
            dump_yaml(config.model_dump(mode="json")), encoding="utf-8"
        )
        return run_dir

    def build(self, **fields: Any) -> Run:
        """Build a new run without training it."""
        return build_from(self.make(**fields))

    @functools.cached_property
    def untrained(self) -> Run:
        """A run that is never trained, for checks that only inspect losses."""
        return self.build()


@contextmanager
def named(plugin: str, check: str) -> Iterator[None]:
    """Turn any error inside into an AssertionError that names the plugin and the check."""
    try:
        yield
    except Exception as error:
        message = str(error).strip() or "no message"
        if not isinstance(error, AssertionError):
            message = f"{type(error).__name__}: {message.splitlines()[0]}"
        raise AssertionError(f"{plugin}: {check}: {message}") from error


def conformance(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Decorate a conformance check: its failures name the plugin and the check.

    Args:
        check: takes the `Runs` of a method, or another subject with a `name`.
    """

    @functools.wraps(check)
    def checked(subject: Any) -> None:
        with named(subject.name, check.__name__):
            check(subject)

    return checked
