"""All conformance checks of a method, and `check_methods`, which runs them."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_bench.config.errors import MissingPackage
from distill_bench.config.overrides import apply_overrides
from distill_bench.config.resolve import resolve
from distill_bench.config.yaml_files import dump_yaml, parse_yaml
from distill_bench.method import Method
from distill_bench.registry import find_method
from distill_bench.testing.hyperparameter_checks import check_hyperparameters
from distill_bench.testing.loss_checks import (
    check_detachment,
    check_inputs,
    check_losses,
    check_shared_graph,
)
from distill_bench.testing.ranks import check_two_ranks
from distill_bench.testing.runs import Runs, conformance, named
from distill_bench.testing.setting_checks import (
    check_discriminator,
    check_draws,
    check_settings,
)
from distill_bench.testing.training_checks import (
    check_cost,
    check_guard,
    check_hook,
    check_optimiser_steps,
    check_resume,
    check_routing,
)
from distill_bench.train.loop import update


@conformance
def check_presets(runs: Runs) -> None:
    """Every preset resolves to a complete run, survives a round trip through YAML, and trains."""
    name = runs.method["name"]
    for preset, settings in find_method(name).presets.items():
        try:
            config = resolve({"method": {"name": name, "preset": preset}})
        except MissingPackage:
            continue  # reported when such a run is resolved
        assert "preset" not in config.method, f"preset {preset} is still a key of the method"
        reread = resolve(parse_yaml(dump_yaml(config.model_dump(mode="json"))))
        assert reread == config, f"preset {preset} changes in a round trip through YAML"
        with named(f"preset {preset}", "training"):
            run = runs.build(**apply_overrides({"method": {"name": name}}, settings.overrides))
            update(run)
            for value, number in run.scalars.items():
                assert math.isfinite(number), f"{value} is {float(number)}"


CHECKS = (
    check_presets,
    check_losses,
    check_routing,
    check_detachment,
    check_inputs,
    check_discriminator,
    check_hyperparameters,
    check_draws,
    check_settings,
    check_cost,
    check_shared_graph,
    check_optimiser_steps,
    check_hook,
    check_resume,
    check_guard,
)


def check_methods(
    *methods: str | type[Method] | Mapping[str, Any],
    folder: Path | None = None,
    ranks: bool = True,
) -> None:
    """Run every conformance check on each method.

    Args:
        methods: names as in a sweep, classes, or a run's `method` with its fields.
        folder: empty, receives the runs; None: a temporary folder.
        ranks: also train with two processes; `check_two_ranks` does so for many methods in one
            launch.

    Raises:
        AssertionError: at the first failure, naming the method, the check and the fault. If the
            method itself raises, its error is the cause.
        FileExistsError: if the folder holds the runs of an earlier call.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            check_methods(*methods, folder=Path(temporary), ranks=ranks)
        return
    if (folder / "runs").exists():
        raise FileExistsError(f"{folder} has the runs of an earlier check; give an empty folder")
    for index, method in enumerate(methods):
        runs = Runs(method, folder, str(index))
        for check in CHECKS:
            check(runs)
    if ranks:
        check_two_ranks(*methods, folder=folder)
