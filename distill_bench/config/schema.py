"""The border: YAML and command lines become frozen, validated configs; a resolved config is a run's identity.

Unknown keys, wrong types and impossible combinations end in a `ConfigError` of one line that names the key, the value and
what is allowed, before anything runs.
"""

import json
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill_bench.config.errors import ConfigError, hint


def config_field(
    default: Any = ..., *, counts: bool = True, came_later: bool = False, **constraints: Any
) -> Any:
    """A field of the schema that says whether it is part of a run's identity.

    Args:
        came_later: it counts only away from its default, which is what runs did before there was the field: they keep their ids.
    """
    return Field(
        default, json_schema_extra={"identity": counts, "came_later": came_later}, **constraints
    )


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Positive = Annotated[int, Field(ge=1)]


class ProtocolConfig(StrictModel):
    """How rows are sampled and scored; equal for every row of a table."""

    clips: int = config_field(
        256, ge=2
    )  # two a prompt; below 256 distances are mostly bias (eval/README.md)
    seed: int = config_field(1000, ge=0)
    teacher_steps: Positive = config_field(32)
    teacher_guidance: float = config_field(3.0, ge=0)
    # of the networks that sample, weights and passes; noise levels, latents and autoencoder stay in float32
    precision: Literal["float32", "bfloat16"] = config_field("float32", came_later=True)
    fps: float = config_field(
        8.0, gt=0, came_later=True
    )  # at which clips play; unsaid: the teacher's own, where it is known
    evaluators: tuple[str, ...] | None = config_field(
        None, counts=False
    )  # None: every one that applies


class AdapterConfig(StrictModel):
    """Low-rank adapters (Hu et al., 2021): weight + alpha / rank * B A, of which A and B alone are trained."""

    rank: Positive = config_field(32)
    alpha: float = config_field(32.0, gt=0)
    targets: tuple[str, ...] = config_field(
        ("to_q", "to_k", "to_v", "to_out.0"), min_length=1
    )  # ends of the names of linear layers


class RunConfig(StrictModel):
    """One run, resolved: `run.yaml`. Every field is equal between methods unless it is swept."""

    method: dict[str, Any] = config_field()  # name and every field of the method
    method_version: int = config_field(1)  # written on resolving
    teacher: str = config_field("mini-wan", counts=False)  # counts by content
    teacher_hash: str = config_field("")  # written on resolving
    student: str | None = config_field(
        None, counts=False
    )  # a pipeline that student and fake score begin from; None: the teacher
    student_hash: str = config_field("", came_later=True)  # written on resolving
    prompts: str | None = config_field(
        None, counts=False
    )  # a file: `distill_bench.teachers.texts`; None: the teacher's prompts.txt
    prompts_hash: str = config_field("", came_later=True)  # written on resolving
    seed: int = config_field(0, ge=0)
    student_updates: Positive = config_field(200)
    fake_score: Literal["trained", "exact"] = config_field(
        "trained"
    )  # exact: in closed form, where the teacher offers it
    fake_score_updates: Positive | None = config_field(
        5
    )  # a student update; None, written on resolving: there is none to train
    batch_size: Positive = config_field(8)
    accumulation: Positive = config_field(1)
    frames: Positive = config_field(8)
    height: Positive = config_field(32)
    width: Positive = config_field(32)
    nfe: Positive = config_field(4)
    shift: float = config_field(2.0, gt=0)
    stepping: Literal["renoise", "ode"] = config_field("renoise")
    exit_step: Literal["random", "last"] = config_field("random")
    student_input: Literal["rollout", "real_data"] = config_field(
        "rollout"
    )  # real_data: noised to one of the student's levels
    data: str | None = config_field(
        None, counts=False
    )  # a folder of real clips; counts by content; None: see `distill_bench.train.extras`
    data_hash: str = config_field("")  # written on resolving
    reuse_rollout: bool | Literal["graph"] = config_field(
        False
    )  # by the first fake-score update; graph: with its forward, too
    guidance_scale: float = config_field(3.0, ge=0)  # uncond + g (cond - uncond); 1 is none
    score_shift: float = config_field(2.0, gt=0)
    sigma_min: float = config_field(0.02, gt=0, lt=1)
    sigma_max: float = config_field(0.98, gt=0, lt=1)
    student_lr: float = config_field(1e-4, gt=0)
    fake_score_lr: float = config_field(1e-4, gt=0)
    beta1: float = config_field(0.0, ge=0, lt=1)
    beta2: float = config_field(0.999, ge=0, lt=1)
    weight_decay: float = config_field(0.0, ge=0)
    grad_clip: float = config_field(10.0, gt=0)
    ema: float | None = config_field(0.98, ge=0, lt=1)
    precision: Literal["float32", "bfloat16", "float64"] = config_field("float32")
    evaluations: Positive = config_field(
        4
    )  # evenly spaced student updates at which the student is kept and scored
    protocol: ProtocolConfig = config_field(ProtocolConfig())
    checkpoint_every: Positive = config_field(50, counts=False)
    log_every: Positive = config_field(10, counts=False)
    signals_every: Positive | None = config_field(
        20, counts=False
    )  # student updates; not part of a run's cost or seconds
    trackers: tuple[str, ...] = config_field(("tensorboard",), counts=False)
    threads: int | None = config_field(None, counts=False, ge=1)
    # how the networks are held and run; `distill-bench cost SWEEP --memory` says what each buys
    adapter: AdapterConfig | None = config_field(
        None, came_later=True
    )  # of student and fake score; None: full weights
    weights: Literal["float32", "bfloat16"] = config_field(
        "float32", came_later=True
    )  # bfloat16: masters are float32
    gradient_checkpointing: bool = config_field(False, counts=False)
    guidance_forwards: Literal["batched", "sequential"] = config_field("batched", counts=False)
    teacher_offload: bool = config_field(
        False, counts=False
    )  # the teacher's weights stay in host memory between its uses
    sharding: bool = config_field(
        False, counts=False
    )  # FSDP2: the processes of a run share each role's weights
    compile: bool = config_field(
        False, came_later=True
    )  # the blocks by torch.compile: fewer kernels, other rounding


class ClusterConfig(StrictModel):
    """Where and how jobs run: never part of a run's identity."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: Positive = 1
    gpus: int = Field(0, ge=0)  # a node
    tasks: int | None = Field(
        None, ge=1
    )  # processes a node that train a run together; None: one a GPU
    cpus: Positive = 2  # a process
    mem_gb: Positive | None = 8  # a node; None: the cluster's default, or what `sbatch` says
    hours: float = Field(1.0, gt=0)
    runs_per_job: Positive = 1  # small runs that share a job and its GPUs, side by side
    jobs: int | None = Field(
        None, ge=1
    )  # at once; None: the GPUs or cores of this machine, or 16 in an array
    signal_seconds: Positive = 120  # before the time limit, to save in
    setup: tuple[str, ...] = ()  # shell lines before each job
    sbatch: dict[
        str, str | int | bool
    ] = {}  # any further sbatch parameter; false: none of that name

    @model_validator(mode="after")
    def _packed_runs_train_alone(self) -> "ClusterConfig":
        if self.runs_per_job > 1 and (self.nodes > 1 or (self.tasks or 1) > 1):
            raise ValueError(
                f"runs_per_job {self.runs_per_job} needs nodes 1 and tasks 1: runs that share a job train alone"
            )
        return self

    @property
    def processes(self) -> int:
        """Processes a node."""
        return 1 if self.runs_per_job > 1 else self.tasks or max(1, self.gpus)


def validate(model: type[BaseModel], data: Any, where: str) -> Any:
    """`data` as a `model`, or a ConfigError of one line."""
    try:
        # through JSON: lists are tuples there, while "fast" is still no number and 5.5 no integer
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ConfigError(one_line(error, where, model)) from error
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def one_line(error: ValidationError, where: str, model: type[BaseModel] | None = None) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden" and model is not None:
        at = model
        for part in first["loc"][:-1]:
            annotation = at.model_fields[part].annotation
            at = next(
                kind
                for kind in (annotation, *get_args(annotation))
                if hasattr(kind, "model_fields")
            )
        return f"{where}: unknown key {key!r}{hint(str(first['loc'][-1]), list(at.model_fields))}"
    msgs, (*parents, last) = [first["msg"]], first["loc"] or [""]
    if re.fullmatch(
        r"bool|int|float|str|literal\[.*\]", str(last)
    ):  # one kind of several that the key may have
        key = ".".join(map(str, parents))
        msgs = [each["msg"] for each in error.errors() if list(each["loc"][:-1]) == parents]
    said = " or ".join([msgs[0], *(msg.removeprefix("Input should be ") for msg in msgs[1:])])
    said = said.removeprefix("Value error, ").replace("a valid boolean", "true or false")
    if not key:  # of several fields together
        return f"{where}: {said}"
    given = "" if first["type"] == "missing" else f" = {first['input']!r}"
    return f"{where}: {key}{given}: {said}"
