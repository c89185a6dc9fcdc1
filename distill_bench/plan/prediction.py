"""TODO: plan.prediction."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from distill_bench.config.resolve import method_of
from distill_bench.config.schema import RunConfig

MOMENTS = 2  # of AdamW, each as large as what it moves


@dataclass(frozen=True)
class Prediction:
    """Bytes on one device, and FLOPs of a forward of one sample, by role."""

    weights: Mapping[str, int]  # by role, as they are held
    masters: Mapping[str, int]
    gradients: Mapping[str, int]
    moments: Mapping[str, int]
    ema: int
    other: int  # autoencoder, null text, heads with their moments
    # by the role that a phase trains: the most at once that is not held, in each stage of the phase (from pass to pass)
    stages: Mapping[str, tuple[int, ...]]
    flops: Mapping[str, float]
    held_back: int = 0  # weights in host memory: the blocks of an offloaded teacher

    @property
    def held(self) -> int:
        """What is there all the time."""
        parts = (self.weights, self.masters, self.moments)
        return sum(sum(part.values()) for part in parts) + self.ema + self.other

    @property
    def activations(self) -> dict[str, int]:
        """By the role that a phase trains: the most at once beside what is held and its gradients."""
        return {
            role: max(0, max(stages) - self.gradients[role]) for role, stages in self.stages.items()
        }

    @property
    def peak(self) -> int:
        """The most at once: in one of the two phases."""
        return self.held + max(
            self.gradients[role] + size for role, size in self.activations.items()
        )


def too_large(found: Prediction, available: int, config: RunConfig) -> str | None:
    """Why a training does not fit a device of `available` bytes, in one line with what to set, or None."""
    settings = {
        "precision: bfloat16 with weights: bfloat16": config.weights == "bfloat16",
        "gradient_checkpointing: true": config.gradient_checkpointing,
        "guidance_forwards: sequential": config.guidance_forwards == "sequential"
        or config.guidance_scale == 1,
        "adapter: {rank: 32}": config.adapter is not None or method_of(config).mixes_weights,
        "teacher_offload: true": config.teacher_offload or config.adapter is not None,
        "sharding: true with more processes": config.sharding or config.adapter is not None,
        f"accumulation above {config.accumulation}": config.accumulation == config.batch_size,
    }
    what = f"the run needs {gib(found.peak)} ({gib(found.held)} held, the rest gradients and activations)"
    return None if found.peak <= available else _too_little(what, available, settings)


def too_large_to_sample(peak: int, available: int, config: RunConfig) -> str | None:
    """Why the clips of a run or their references cannot be drawn on a device of `available` bytes, or None."""
    settings = {
        "protocol.precision: bfloat16": config.protocol.precision == "bfloat16",
        "teacher_offload: true": config.teacher_offload or config.adapter is not None,
        "guidance_forwards: sequential": config.guidance_forwards == "sequential"
        or config.protocol.teacher_guidance == 1,
    }
    return (
        None
        if peak <= available
        else _too_little(f"sampling needs {gib(peak)}", available, settings)
    )


def _too_little(what: str, available: int, settings: Mapping[str, bool]) -> str:
    left = [setting for setting, there in settings.items() if not there]
    return (
        f"too little memory: {what} on a device of {gib(available)}; set {', or '.join(left) or 'smaller clips'} "
        "(distill-bench cost SWEEP --memory)"
    )


def gib(size: float) -> str:
    """`12.3 GiB`."""
    return f"{size / 2**30:.3g} GiB"


def extrapolate(low: Prediction, high: Prediction, times: float) -> Prediction:
    """`low`, and `times` as much as `high` has more."""

    def at(few: object, more: object) -> object:
        if isinstance(few, Mapping):
            return {key: at(few[key], more[key]) for key in few}
        if isinstance(few, tuple):
            return tuple(map(at, few, more))
        return type(few)(few + (more - few) * times)

    fields = (f.name for f in dataclasses.fields(Prediction))
    return Prediction(**{name: at(getattr(low, name), getattr(high, name)) for name in fields})


def sharded(found: Prediction, share: int, in_flight: int) -> Prediction:
    """The prediction for processes that share each role's weights, and have so many bytes of them whole in a phase."""

    def part(sizes: Mapping[str, int]) -> dict[str, int]:
        return {role: math.ceil(size / share) for role, size in sizes.items()}

    gradients = part(found.gradients)
    # shards of what has masters are these, and of the network beside them what is its own master: no bfloat16 is held
    own = {
        role: found.moments[role] // MOMENTS - size for role, size in found.masters.items() if size
    }
    return dataclasses.replace(
        found,
        weights=part({**found.weights, **own}),
        masters=part(found.masters),
        gradients=gradients,
        moments=part(found.moments),
        ema=math.ceil(found.ema / share),
        stages={
            role: tuple(
                size - found.gradients[role] + gradients[role] + in_flight for size in stages
            )
            for role, stages in found.stages.items()
        },
    )
