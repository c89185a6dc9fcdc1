"""TODO: sweep.manifest."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from distill_bench import ROOT
from distill_bench.config.conditions import check_condition, holds
from distill_bench.config.errors import ConfigError
from distill_bench.config.identity import group_id, run_id
from distill_bench.config.protocol import protocol, protocol_hash
from distill_bench.config.schema import RunConfig
from distill_bench.config.sweep_file import SweepConfig
from distill_bench.store.files import kind_of_write, unwritable, write_bytes, write_json
from distill_bench.store.nested import differences
from distill_bench.store.runs import record_outside, result_of, state
from distill_bench.sweep.queue import Queue
from distill_bench.sweep.status import Known


@dataclass(frozen=True)
class OpenSweep:
    """A sweep file laid over a store: its runs by id."""

    config: SweepConfig
    runs: dict[str, RunConfig]
    store: Path
    out: Path

    @property
    def known(self) -> dict[str, Known]:
        """What a status needs of each run."""
        return {
            run: Known(config.method["name"], config.student_updates)
            for run, config in self.runs.items()
        }

    def states(self, queue: Queue = Queue()) -> dict[str, str]:  # noqa: B008 - never changed
        """Every run's state, from its folder and what is in the scheduler's queue."""
        return {run: state(self.store / run, bool(queue.active(run))) for run in self.runs}

    def only(self, condition: str | None) -> "OpenSweep":
        """The runs for which an expression over dotted keys holds."""
        if condition is None:
            return self
        check_condition(condition)
        kept = {r: c for r, c in self.runs.items() if holds(condition, c.model_dump(mode="json"))}
        if not kept:
            raise ConfigError(f"--only {condition!r}: no run of the sweep is like that")
        return dataclasses.replace(self, runs=kept)

    def write_runs(self) -> None:
        """Write run.yaml into every run folder that lacks one."""
        for run, config in self.runs.items():
            path = self.store / run / "run.yaml"
            if not path.is_file():
                try:
                    write_bytes(
                        path,
                        yaml.dump(
                            config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False
                        ).encode(),
                    )
                except OSError as error:  # this run's trouble alone
                    record_outside(
                        path.parent,
                        error=f"cannot write into {path.parent}: {error.strerror}",
                        kind=kind_of_write(error),
                    )

    def write(self) -> None:
        """Write run.yaml into every run folder that lacks one, and the sweep's manifest."""
        self.write_runs()
        results = [result for run in self.runs if (result := result_of(self.store / run))]
        found = dict.fromkeys(
            pair for result in results for pair in result.get("references", {}).items()
        )
        presets = self.config.presets()
        kinds = Counter(
            kind for kind, _ in found
        )  # a sweep over the student's steps has rows of one kind for each
        references = {
            kind if kinds[kind] == 1 else Path(folder).name: folder for kind, folder in found
        }
        manifest = {
            "name": self.config.name,
            "question": self.config.question,
            "baseline": self.config.baseline,
            "axes": self.config.axes(self.runs.values()),
            "presets": {
                run: presets[group]
                for run, config in self.runs.items()
                if (group := group_id(config)) in presets
            },
            "run_ids": list(self.runs),
            "groups": {run: group_id(config) for run, config in self.runs.items()},
            "references": references,
            "spec": spec_digest(self.config),
            "runs": {run: dataclasses.asdict(known) for run, known in self.known.items()},
        }
        write_json(manifest_path(self.store, self.config.name), manifest)


_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def manifest_path(store: Path, name: str) -> Path:
    """Where a sweep says which runs are its own."""
    return store / "sweeps" / f"{name}.json"


def spec_digest(config: SweepConfig) -> str:
    """What a sweep's run ids follow from, but for weights and clips: its file, files that it names, the code that resolves it."""
    spec = config.model_dump(mode="json", exclude={"cluster"})
    sources = [ROOT / "method.py"]
    for folder in (ROOT / "config", ROOT.parent / "methods", ROOT / "methods"):
        sources += sorted(folder.glob("*.py"))
    sources += [
        Path(text.partition(":")[0]) for text in _texts(spec) if len(text.encode()) < 256
    ]  # prompts, methods by path
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for path in sources:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _texts(value: object) -> Iterator[str]:
    """Every text in a tree of mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def open_sweep(config: SweepConfig, store: Path, out: Path) -> OpenSweep:
    """A sweep, expanded.

    Raises:
        ConfigError: for a run that cannot be.
    """
    runs = {run_id(run): run for run in config.expand()}
    _refuse_protocols(config.name, runs.values())
    return OpenSweep(config, runs, store, out)


def check_writable(*folders: Path) -> None:
    """ConfigError for a folder that cannot be written, or not be made: before anything is launched into it."""
    for folder in folders:
        if (why := unwritable(folder)) is not None:
            raise ConfigError(f"cannot write into {folder}: {why}")


def _refuse_protocols(name: str, runs: Iterable[RunConfig]) -> None:
    """ConfigError for runs whose scores could share no table: better now than when all have been trained."""
    first, *others = {protocol_hash(run): protocol(run) for run in runs}.values()
    if others:
        raise ConfigError(
            f"{name}: its runs are of {1 + len(others)} protocols, and scores of unlike ones share no table; the first two "
            f"differ in {differences(first, others[0])}: make a sweep of each"
        )
