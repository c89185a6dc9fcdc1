"""Seeds that the declared contrasts of a sweep need, from the spread of a pilot's finished runs.

    distill-bench power SWEEP --effect 10% [--pilot OTHER] [--power 0.8]
    distill-bench power SWEEP --half-width fvd=0.2

Paired t tests over seeds. Needs no torch.
"""

import argparse
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot, isfinite, sqrt
from pathlib import Path

from rich.console import Console
from rich.table import Table
from scipy import special

from distill_bench.config.errors import ConfigError
from distill_bench.config.sweep_file import load_sweep
from distill_bench.report.csv_files import ResultsError
from distill_bench.report.data_files import data_files
from distill_bench.report.read_store import StoreReadError, read_sweep
from distill_bench.report.results import Results, load_data_files
from distill_bench.report.stats import CONFIDENCE, MOST_SEEDS, POWER, power, t_quantile
from distill_bench.report.tables.contrasts import Estimate, estimates

FEWEST = 3  # pilot seeds, below which a standard deviation says next to nothing
CAUTION = 0.8  # confidence of the upper limit of the pilot's standard deviation


class PlanError(ValueError):
    """The seeds cannot be planned; the message is one line."""


@dataclass(frozen=True)
class Target:
    """A true difference to detect, or a half width of the interval."""

    value: float
    percent: bool = False  # of the mean score of the contrast's rows

    def of(self, estimate: Estimate) -> float:
        """The target in the unit of the score."""
        return abs(estimate.level) * self.value / 100 if self.percent else self.value


@dataclass(frozen=True)
class SeedPlan:
    """Seeds that a contrast needs in one score; None: more than a thousand, or more clips."""

    estimate: Estimate
    target: float
    alone: int | None
    corrected: int | None  # at Holm's strictest level over all declared comparisons
    cautious: int | None  # as `corrected`, at the upper limit of the pilot's spread


def seeds_for_power(
    sd: float, effect: float, clip_error: float, wanted: float, confidence: float
) -> int | None:
    """Fewest paired seeds that detect an effect with the wanted power; None above a thousand.

    Args:
        sd: standard deviation of one seed's contrast.
        clip_error: standard error that more seeds do not reduce, as they share their clips.
    """

    def reached(n: int) -> bool:
        return power(n, hypot(sd, clip_error * sqrt(n)), effect, confidence) >= wanted

    return _fewest(reached)


def seeds_for_width(
    sd: float, half: float, clip_error: float, confidence: float = CONFIDENCE
) -> int | None:
    """Fewest seeds whose t interval has at most this half width; None above a thousand."""

    def reached(n: int) -> bool:
        quantile = float(t_quantile(n - 1, confidence))
        return quantile * hypot(sd / sqrt(n), clip_error) <= half

    return _fewest(reached)


def _fewest(reached: Callable[[int], bool]) -> int | None:
    counts = range(2, MOST_SEEDS + 1)
    place = bisect_left(counts, True, key=reached)
    return counts[place] if place < len(counts) else None


def upper_sd(sd: float, seeds: int) -> float:
    """One-sided upper limit of a standard deviation estimated from normal values."""
    dof = seeds - 1
    return sd * sqrt(dof / (2 * float(special.gammaincinv(dof / 2, 1 - CAUTION))))


def plan_seeds(
    found: Sequence[Estimate], targets: Mapping[str, Target], wanted: float | None
) -> list[SeedPlan]:
    """Plan every estimate of a pilot with enough seeds.

    Args:
        targets: score, or "" for all -> target.
        wanted: power; None: the targets are half widths.
    """
    strict = 1 - (1 - CONFIDENCE) / max(1, len(found))
    plans = []
    for estimate in found:
        if estimate.seeds < FEWEST or not isfinite(estimate.sd):
            continue
        target = targets.get(estimate.column.name) or targets.get("")
        if target is None:
            raise PlanError(
                f"no target for {estimate.column.name}: give {estimate.column.name}=VALUE, or "
                "VALUE for every score"
            )
        goal, cautious_sd = target.of(estimate), upper_sd(estimate.sd, estimate.seeds)
        spread = [(estimate.sd, CONFIDENCE), (estimate.sd, strict), (cautious_sd, strict)]
        if wanted is None:
            # Holm's correction is of tests; intervals are not widened
            counts = [seeds_for_width(sd, goal, estimate.clip_error) for sd, _ in spread]
        else:
            counts = [
                seeds_for_power(sd, goal, estimate.clip_error, wanted, level)
                for sd, level in spread
            ]
        plans.append(SeedPlan(estimate, goal, *counts))
    return plans


def pilot_results(sweep: str, pilot: str | None, store: Path) -> Results:
    """Results of the pilot with the contrasts of the sweep.

    Args:
        sweep: YAML of the sweep, or the name of a sweep in the store.
        pilot: YAML or name of the sweep whose runs are the pilot; None: the sweep's own.

    Raises:
        ConfigError: if the sweep file is invalid.
        StoreReadError: if the store does not know the pilot, or its runs do not fit a contrast.
        PlanError: if the sweep declares no contrast.
    """
    name = sweep
    if Path(sweep).suffix in (".yaml", ".yml"):
        config = load_sweep(Path(sweep))
        name = config.name
        contrasts = {key: one.model_dump(mode="json") for key, one in config.contrasts.items()}
    else:
        contrasts = read_sweep(sweep, store).contrasts
    if not contrasts:
        raise PlanError(f"{sweep} declares no contrasts: write `contrasts:` into the sweep file")
    stored = replace(read_sweep(pilot or name, store), contrasts=contrasts)
    return load_data_files(data_files(stored))


def parse_targets(texts: Sequence[str]) -> dict[str, Target]:
    """Parse `0.2`, `10%` or `fvd=0.2`, per score; "" is every score.

    Raises:
        PlanError: if a value is not a positive number.
    """
    targets = {}
    for text in texts:
        column, _, value = text.rpartition("=")
        try:
            number = float(value.removesuffix("%"))
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise PlanError(f"{text!r}: write a number above 0, with % if relative, as in fvd=10%")
        targets[column] = Target(number, value.endswith("%"))
    return targets


def print_plan(
    found: Sequence[Estimate], plans: Sequence[SeedPlan], wanted: float | None, console: Console
) -> None:
    """Print one line per contrast and score."""
    goal = "half width" if wanted is None else f"difference, power {wanted:.0%}"
    heads = ["contrast", "score", "pilot seeds", "sd of a seed", goal, "seeds"]
    if wanted is not None:
        heads.append(f"seeds (Holm over {len(found)})")
    heads.append(f"seeds at the upper {CAUTION:.0%} limit of the sd")
    table = Table(*heads, box=None, pad_edge=False)
    for plan in plans:
        one = plan.estimate
        counts = [plan.alone, plan.corrected, plan.cautious]
        counts = counts if wanted is not None else [plan.alone, plan.cautious]
        texts = [f"{one.seeds}", f"{one.sd:.3g}", f"{plan.target:.3g}"]
        texts += [_count(count, plan) for count in counts]
        table.add_row(one.contrast["name"], one.column.title, *texts)
    console.print(table)


def _count(seeds: int | None, plan: SeedPlan) -> str:
    if seeds is not None:
        return str(seeds)
    return "more clips" if plan.estimate.clip_error * 1.96 >= plan.target else f"over {MOST_SEEDS}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 if no contrast can be planned."""
    parser = argparse.ArgumentParser(
        prog="distill-bench power",
        description="Print the seeds that each declared contrast needs, from a pilot's spread.",
    )
    parser.add_argument("sweep", help="YAML with `contrasts`, or the name of a sweep in the store")
    parser.add_argument(
        "--pilot", metavar="SWEEP", help="sweep whose finished runs are the pilot; default: SWEEP"
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--effect",
        action="append",
        metavar="[SCORE=]VALUE[%]",
        help="true difference to detect, in the score's unit or relative to its mean; repeatable",
    )
    goal.add_argument(
        "--half-width",
        action="append",
        metavar="[SCORE=]VALUE[%]",
        help="largest half width of the 95 %% interval; repeatable",
    )
    parser.add_argument("--power", type=float, default=POWER, help="default: %(default)s")
    parser.add_argument("--store", type=Path, default=Path("runs"), help="folder of the runs")
    options = parser.parse_args(argv)
    wanted = options.power if options.effect else None
    try:
        if not 0 < options.power < 1:
            raise PlanError(f"--power {options.power:g}: must be between 0 and 1")
        targets = parse_targets(options.effect or options.half_width)
        found = estimates(pilot_results(options.sweep, options.pilot, options.store))
        if unknown := set(targets) - {"", *(estimate.column.name for estimate in found)}:
            known = ", ".join(dict.fromkeys(estimate.column.name for estimate in found))
            raise PlanError(f"no contrast on the score {unknown.pop()!r}; known: {known}")
        plans = plan_seeds(found, targets, wanted)
        lacking = [one for one in found if one.seeds < FEWEST]
        for one in lacking:
            print(
                f"{parser.prog}: {one.contrast['name']}, {one.column.name}: the pilot has "
                f"{one.seeds} finished seeds that all its rows share; give at least {FEWEST}",
                file=sys.stderr,
            )
    except (ConfigError, PlanError, ResultsError, StoreReadError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if not plans:
        return 2
    width = None if sys.stdout.isatty() else 160
    print_plan(found, plans, wanted, Console(width=width, markup=False, emoji=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
