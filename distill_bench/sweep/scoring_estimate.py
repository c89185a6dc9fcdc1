"""Estimate of the time and memory of scoring a sweep's clips, for --dry-run."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from distill_bench.config.resolve import evaluated_updates
from distill_bench.evaluate.cache import clips_per_pass
from distill_bench.evaluate.device import running_on, scoring_device
from distill_bench.evaluate.estimate import NetworkPass, estimating
from distill_bench.evaluator import Clips, Evaluator
from distill_bench.registry import find_evaluator
from distill_bench.store.durations import duration
from distill_bench.store.failures import first_line
from distill_bench.store.runs import unsampled
from distill_bench.sweep.manifest import OpenSweep
from distill_bench.sweep.prechecks import evaluators_of, missing_references, stand_in_clips
from distill_bench.sweep.status import ENDED, Status

SHORT = 1.0  # seconds per set of clips up to which a network has no line of its own


def scoring_estimate(sweep: OpenSweep, statuses: Sequence[Status], measure: bool) -> Iterator[str]:
    """Lines on the sets of clips that are left to score, and their time and memory here.

    Args:
        measure: run one batch of clips of noise through each network, which takes minutes for large
            networks on a processor; without it, time and memory stay unknown. Statistics of
            features are not counted.
    """
    sets = clip_sets_left(sweep, statuses)
    if not sets:
        return
    config = next(iter(sweep.runs.values()))  # all runs share a protocol
    if not measure:
        yield (
            f"{sets} sets of {config.protocol.clips} clips are left to score; --measure times a "
            "batch of each evaluator's network on this machine"
        )
        return
    black = stand_in_clips(config)
    passes: list[NetworkPass] = []
    for name in evaluators_of(config):
        evaluator = find_evaluator(name)()
        if set(evaluator.needs_facts) - black.facts.keys() or evaluator.reason_to_skip(black):
            continue
        with running_on(scoring_device(config.protocol.device)):
            own, error = network_passes(evaluator, black)
        passes += own
        if error is not None:
            yield f"scoring by {name} is not or not fully estimated: {error}"
    if not passes:
        return
    count = len(black.frames)
    total = count * sum(each.seconds for each in passes)
    where = " + ".join(dict.fromkeys(each.device for each in passes))
    peak = max(each.peak for each in passes)
    yield (
        f"scoring {count} clips takes about {duration(total)} on {where} of this machine, "
        f"{peak / 1e9:.1f} GB; {sets} sets of clips are left: {duration(sets * total)}"
    )
    for each in sorted(passes, key=lambda each: -each.seconds):
        if count * each.seconds > SHORT:
            yield f"  {each.name}: {duration(count * each.seconds)}, {each.peak / 1e9:.1f} GB"


def clip_sets_left(sweep: OpenSweep, statuses: Sequence[Status]) -> int:
    """Sets of clips that are not scored yet: of runs, further ways, rows and references."""
    sets = len(missing_references(sweep))
    for s in statuses:
        if s.run in sweep.rows:
            sets += s.state not in ENDED
            continue
        if s.state not in (*ENDED, "unsampled"):
            sets += len(evaluated_updates(sweep.runs[s.run]))
        if s.state != "collapsed":  # its student is sampled in no further way
            further = (way.name for way in sweep.samplings[s.run])
            sets += len(unsampled(sweep.store / s.run, further))
    return sets


def network_passes(evaluator: Evaluator, clips: Clips) -> tuple[list[NetworkPass], str | None]:
    """Passes of an evaluator's networks over clips like these, and an error that ended them."""
    draws = np.random.default_rng(0)
    shape = clips.frames.shape[1:]
    count = min(len(clips.frames), max(2, clips_per_pass(int(np.prod(shape)))))

    def noise() -> Clips:
        frames = draws.integers(0, 256, (count, *shape), dtype=np.uint8)
        prompts, seeds = clips.prompts[:count], clips.seeds[:count]
        return dataclasses.replace(clips, frames=frames, prompts=prompts, seeds=seeds)

    error = None
    with estimating() as estimate, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noise makes poor scores
        try:
            evaluator.scores(noise(), {"teacher": noise()})
        except Exception as failure:  # noise need not be scorable: the estimate is only a service
            error = first_line(failure)
    return estimate.passes, error
