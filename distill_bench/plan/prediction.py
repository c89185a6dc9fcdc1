"""The predicted memory of a run: its parts, its peak, and how it scales with depth and sharding."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

MOMENTS = 2  # of AdamW, each as large as the trained weights


@dataclass(frozen=True)
class Prediction:
    """Bytes on one device, and FLOPs of one forward per sample, by role.

    Attributes:
        other: autoencoder, null text, and the method's modules with their moments.
        stages: by phase, the peak bytes of each stage (from one network pass to the next), without
            the bytes in `held`.
        held_back: bytes in host memory: the blocks of an offloaded teacher.
    """

    weights: Mapping[str, int]
    masters: Mapping[str, int]
    gradients: Mapping[str, int]
    moments: Mapping[str, int]
    ema: int
    other: int
    stages: Mapping[str, tuple[int, ...]]
    flops: Mapping[str, float]
    held_back: int = 0

    @property
    def held(self) -> int:
        """Bytes that are allocated throughout the training."""
        parts = (self.weights, self.masters, self.moments)
        return sum(sum(part.values()) for part in parts) + self.ema + self.other

    @property
    def activations(self) -> dict[str, int]:
        """Peak bytes by phase, without `held` and the gradients of the phase."""
        return {
            role: max(0, max(stages) - self.gradients[role]) for role, stages in self.stages.items()
        }

    @property
    def peak(self) -> int:
        """Peak bytes of the run: the larger peak of the two phases."""
        return self.held + max(
            self.gradients[role] + size for role, size in self.activations.items()
        )


def extrapolate(low: Prediction, high: Prediction, times: float) -> Prediction:
    """`low` plus `times` the difference between `high` and `low`, in every field."""

    def at(few: object, more: object) -> object:
        if isinstance(few, Mapping):
            return {key: at(few[key], more[key]) for key in few}
        if isinstance(few, tuple):
            return tuple(map(at, few, more))
        return type(few)(few + (more - few) * times)

    names = [field.name for field in dataclasses.fields(Prediction)]
    return Prediction(**{name: at(getattr(low, name), getattr(high, name)) for name in names})


def sharded(prediction: Prediction, share: int, in_flight: int) -> Prediction:
    """Scale a one-process prediction to `share` FSDP ranks; add the unsharded bytes in flight."""

    def part(sizes: Mapping[str, int]) -> dict[str, int]:
        return {role: math.ceil(size / share) for role, size in sizes.items()}

    gradients = part(prediction.gradients)
    # Ranks shard the masters, and the weights that are their own masters, without a bfloat16 copy.
    own_masters = {
        role: prediction.moments[role] // MOMENTS - size
        for role, size in prediction.masters.items()
        if size
    }
    stages = {
        role: tuple(
            size - prediction.gradients[role] + gradients[role] + in_flight for size in sizes
        )
        for role, sizes in prediction.stages.items()
    }
    return dataclasses.replace(
        prediction,
        weights=part({**prediction.weights, **own_masters}),
        masters=part(prediction.masters),
        gradients=gradients,
        moments=part(prediction.moments),
        ema=math.ceil(prediction.ema / share),
        stages=stages,
    )
