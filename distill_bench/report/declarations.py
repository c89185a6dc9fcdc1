"""Contrasts of a sweep as sweep.json states them: their rows, and since when they are declared."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from distill_bench.config.analysis.contrasts import ContrastConfig, Selectable, contrast_terms
from distill_bench.config.errors import ConfigError
from distill_bench.config.overrides import value_at
from distill_bench.config.validation import validate
from distill_bench.report.read_store import StoredSweep, StoreReadError

# since when a contrast is declared
FIRST, ADDED, CHANGED, UNKNOWN = "before the first run", "added later", "changed later", "unknown"


def declared_contrasts(sweep: StoredSweep, swept: Sequence[str]) -> list[dict[str, Any]]:
    """Entries of `contrasts` in sweep.json: definition, terms (weight and runs), declaration.

    Args:
        swept: keys that, with the method, identify a row.

    Raises:
        StoreReadError: if the runs in the store do not fit a contrast.
    """
    try:
        configs = {
            name: validate(ContrastConfig, definition, f"contrasts.{name}")
            for name, definition in sweep.contrasts.items()
        }
        terms = contrast_terms(configs, _candidates(sweep, swept), sweep.name)
    except ConfigError as error:
        raise StoreReadError(str(error)) from error
    return [
        {"name": name}
        | configs[name].model_dump(mode="json")
        | {"terms": [{"weight": term.weight, "runs": term.runs} for term in terms[name]]}
        | _declared(name, sweep)
        for name in configs
    ]


def first_launch(sweep: StoredSweep) -> dict[str, Any] | None:
    """Time, file digest and begun runs of the first recorded launch, and contrasts dropped since.

    None if no launch is recorded.
    """
    if not sweep.launches:
        return None
    first, last = sweep.launches[0], sweep.launches[-1]
    dropped = {name for record in sweep.launches for name in record["contrasts"]}
    return {
        "time": first["time"],
        "digest": first["digest"],
        "begun": first["begun"],
        "last_digest": last["digest"],
        "dropped": sorted(dropped - set(sweep.contrasts)),
    }


def _candidates(sweep: StoredSweep, swept: Sequence[str]) -> dict[str, Selectable]:
    candidates = {}
    for run in sweep.runs:
        if run.config:
            values = [value_at(run.config, key) for key in swept]
            row = json.dumps([run.method, *values], sort_keys=True, default=str)
            candidates[run.run_id] = Selectable(run.config, row, run.as_trained)
    return candidates


def _declared(name: str, sweep: StoredSweep) -> dict[str, str]:
    """Since when a contrast has been declared, and the time of its first record."""
    now = _definition(name, sweep.contrasts)
    records = [record for record in sweep.launches if _definition(name, record["contrasts"]) == now]
    since = records[0]["time"] if records else ""
    if not sweep.launches:
        return {"declared": UNKNOWN, "since": since}
    first = sweep.launches[0]
    if records and records[0] is first:
        return {"declared": UNKNOWN if first["begun"] else FIRST, "since": since}
    differed = [r for r in sweep.launches if name in r["contrasts"] and r not in records]
    return {"declared": CHANGED if differed else ADDED, "since": since}


def _definition(name: str, contrasts: Mapping[str, Any]) -> Any:
    """A contrast's definition with those that it refers to; None if it is not there."""
    definition = contrasts.get(name)
    if definition is None:
        return None
    with contextlib.suppress(ValidationError):  # of another version of the project
        definition = ContrastConfig(**definition).model_dump(mode="json")  # with all defaults
    if not definition.get("difference_of"):
        return definition
    parts = [_definition(other, contrasts) for other in definition["difference_of"]]
    return definition | {"difference_of": parts}
