"""Ways to sample a network: `sampling` of a sweep file, and each way that it asks for."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from distill_bench.config.protocol import teacher_shift
from distill_bench.config.schema import GuidanceKey, RunConfig, SteppingKey
from distill_bench.config.validation import Count, StrictModel

NETWORKS = ("students", "untrained", "teacher")
Positive = Annotated[float, Field(gt=0)]


class SamplingConfig(StrictModel):
    """Entry of `sampling`: further ways to sample, without another training.

    A key takes a value or a list; lists give every combination.
    """

    of: list[Literal["students", "untrained", "teacher"]] = Field(
        ["students", "untrained"], min_length=1
    )
    """Networks: every trained student, the student before training, the guided teacher."""
    stepping: list[SteppingKey] = []
    """As `stepping` of a run; left out: the run's own, for the teacher `teacher_stepping`."""
    nfe: list[Count] = []
    """Number of steps; left out: the run's own."""
    shift: list[Positive] = []
    """Shift of the noise levels; left out: the run's own, for the teacher `teacher_shift`."""
    sigmas: list[float] = []
    """Noise levels from 1 down, one per step, instead of `nfe` and `shift`."""
    guidance_scale: list[GuidanceKey] = []
    """Guidance scale; left out: 1 for students, `protocol.teacher_guidance` for the teacher."""

    @field_validator("of", "stepping", "nfe", "shift", "guidance_scale", mode="before")
    @classmethod
    def _wrap_single_value(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @model_validator(mode="after")
    def _check_levels(self) -> "SamplingConfig":
        check_levels(self.sigmas, self.nfe, self.shift)
        return self


class Sampling(StrictModel):
    """One way to sample a network."""

    stepping: SteppingKey
    nfe: Count
    shift: float | None  # None: `sigmas` states the levels
    sigmas: tuple[float, ...] | None = None
    guidance_scale: GuidanceKey = 1.0

    @property
    def name(self) -> str:
        """Name of a folder, e.g. `ode-nfe4-shift2`; equal only for equal ways."""
        words = [f"renoise{self.stepping:g}" if self.is_mixed else str(self.stepping)]
        words.append(f"nfe{self.nfe}")
        if self.sigmas is None:
            words.append(f"shift{self.shift:g}")
        else:
            words.append(
                f"sigmas{hashlib.sha256(json.dumps(self.sigmas).encode()).hexdigest()[:8]}"
            )
        if self.guidance_scale != 1:
            words.append(f"guidance{guidance_in_words(self.guidance_scale)}")
        return "-".join(words)

    def words(self, usual: "Sampling") -> str:
        """The way in words, for labels: stepping, steps, and what else differs from `usual`."""
        steppings = {"ode": "ODE", "renoise": "renoise"}
        words = [steppings.get(str(self.stepping)) or f"stepping {self.stepping:g}"]
        if self.sigmas is None:
            words.append(f"{self.nfe} steps" if self.nfe > 1 else "1 step")
        else:
            words.append(f"levels {' '.join(f'{sigma:g}' for sigma in self.sigmas)}")
        if self.shift is not None and self.shift != usual.shift:
            words.append(f"shift {self.shift:g}")
        if self.guidance_scale != usual.guidance_scale:
            words.append(f"w={guidance_in_words(self.guidance_scale)}")
        return ", ".join(words)

    @property
    def is_mixed(self) -> bool:
        """True for a stepping between `ode` and `renoise`."""
        return not isinstance(self.stepping, str)


def guidance_in_words(scale: float | Mapping[str, float]) -> str:
    """A guidance scale, or that of the high-noise and of the low-noise expert: `3`, `4+3`."""
    scales = scale.values() if isinstance(scale, Mapping) else [scale]
    return "+".join(f"{one:g}" for one in scales)


def check_levels(sigmas: Sequence[float], nfe: Any, shift: Any) -> None:
    """Raise ValueError unless stated levels fall from 1, stay above 0, and stand alone."""
    if not sigmas:
        return
    falling = all(high > low for high, low in itertools.pairwise(sigmas))
    if sigmas[0] != 1 or sigmas[-1] <= 0 or not falling:
        raise ValueError(f"sigmas {list(sigmas)}: noise levels start at 1, fall, and stay above 0")
    if nfe or shift:
        raise ValueError("sigmas states the levels: leave out nfe and shift")


def own_sampling(config: RunConfig) -> Sampling:
    """The way in which a run's student is trained and sampled."""
    return Sampling(stepping=config.stepping, nfe=config.nfe, shift=config.shift)


def teacher_sampling(config: RunConfig, steps: int) -> Sampling:
    """The way in which the protocol samples the teacher, in a number of steps."""
    return Sampling(
        stepping=config.protocol.teacher_stepping,
        nfe=steps,
        shift=teacher_shift(config),
        guidance_scale=config.protocol.teacher_guidance,
    )


def ways(entries: Iterable[SamplingConfig], network: str, own: Sampling) -> list[Sampling]:
    """The ways that entries ask for of one network, each once.

    Args:
        network: one of `NETWORKS`.
        own: values of the keys that an entry leaves out.
    """
    found: dict[str, Sampling] = {}
    for entry in entries:
        if network not in entry.of:
            continue
        axes = {key: getattr(entry, key) for key in ("stepping", "nfe", "shift", "guidance_scale")}
        axes = {key: values for key, values in axes.items() if values}
        for values in itertools.product(*axes.values()):
            fields = own.model_dump() | dict(zip(axes, values, strict=True))
            if entry.sigmas:
                fields |= {"nfe": len(entry.sigmas), "shift": None, "sigmas": tuple(entry.sigmas)}
            if fields["nfe"] == 1:  # a single step goes to no other level
                fields["stepping"] = own.stepping
            way = Sampling(**fields)
            found.setdefault(way.name, way)
    return list(found.values())


def further_samplings(entries: Iterable[SamplingConfig], config: RunConfig) -> list[Sampling]:
    """The ways that entries ask for of a run's student, without the run's own."""
    own = own_sampling(config)
    return [way for way in ways(entries, "students", own) if way != own]
