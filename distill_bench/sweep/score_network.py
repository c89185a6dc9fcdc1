"""Sample and score one network by a sweep's protocol: `distill-bench score NETWORK`.

The row is stored as a row of the sweep, so that the sweep's `rows` may name it afterwards without
sampling it again.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from distill_bench.config.errors import ConfigError
from distill_bench.config.rows.row import ReleasedRow
from distill_bench.config.sweep_file import load_sweep
from distill_bench.config.validation import validate
from distill_bench.config.yaml_files import parse_yaml
from distill_bench.registry import RegistryError
from distill_bench.store.files import read_jsonl
from distill_bench.store.runs import run_state
from distill_bench.sweep.manifest import check_writable, open_sweep
from distill_bench.sweep.watch import console
from distill_bench.teachers.folder import TeacherError
from distill_bench.teachers.hub import make_local


def score_network(entry: ReleasedRow, protocol: Path, store: Path) -> Path:
    """Sample and score a network by the protocol of a sweep file; returns the row's folder.

    A row that has its scores is not made again.

    Raises:
        ConfigError: if the network does not fit the sweep's teacher, or the row failed.
    """
    config = load_sweep(protocol).model_copy(update={"rows": [entry], "sampling": []})
    make_local(*config.pipelines())
    sweep = open_sweep(config, store, store)
    check_writable(store)
    # torch takes seconds
    from distill_bench.sweep.job import execute
    from distill_bench.sweep.prechecks import check_rows

    check_rows(sweep)
    alone = dataclasses.replace(sweep, runs={})
    alone.write_runs()
    (row,) = alone.rows
    execute(store / row)
    if (state := run_state(store / row)) != "done":
        raise ConfigError(f"{store / row} is {state}; the lines above say why")
    return store / row


def main(argv: list[str] | None = None) -> int:
    """Score a network and print its scores; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="distill-bench score",
        description="Sample a network by a sweep's protocol and score it, without any training.",
    )
    parser.add_argument(
        "network", help="pipeline folder, file of a transformer's weights, or LoRA file"
    )
    parser.add_argument(
        "--protocol", type=Path, required=True, metavar="SWEEP", help="the sweep's YAML"
    )
    parser.add_argument("--name", help="name of the row; default: that of the folder or file")
    for key in ("stepping", "nfe", "shift", "sigmas", "guidance_scale"):
        field = ReleasedRow.model_fields[key]
        flag = f"--{key.replace('_', '-')}"
        parser.add_argument(flag, dest=key, metavar="VALUE", help=f"{field.description} (YAML)")
    parser.add_argument("--store", type=Path, default=Path("runs"), help="folder of the runs")
    options = parser.parse_args(argv)
    keys: dict[str, Any] = {
        "name": options.name or Path(options.network).stem,
        "network": options.network,
    }
    try:
        for key in ("stepping", "nfe", "shift", "sigmas", "guidance_scale"):
            if (text := getattr(options, key)) is not None:
                keys[key] = parse_yaml(text)
        entry = validate(ReleasedRow, keys, "row")
        folder = score_network(entry, options.protocol, options.store)
    except (ConfigError, RegistryError, TeacherError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    table = Table("score", "value", "unit", "clips", box=None, pad_edge=False)
    for line in read_jsonl(folder / "metrics.jsonl"):
        table.add_row(line["title"], f"{line['value']:.4g}", line["unit"] or "", str(line["n"]))
    console.print(table)
    console.print(str(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
