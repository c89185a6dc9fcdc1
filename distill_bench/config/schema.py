"""Keys of a run (`base`, `grid`, ... of a sweep file, and run.yaml): meaning, unit, range, default.

`distill-bench keys` prints the reference table from the texts below the keys.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from distill_bench.config.validation import Count, StrictModel
from distill_bench.teachers.diffusers_folder import EXPERTS


def _named_stepping(value: Any) -> Any:
    """The ends of the scale from 0 to 1 by name, so that equal steppings have equal ids."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {0: "ode", 1: "renoise"}.get(value, value)
    return value


def _scale_per_expert(value: Any) -> Any:
    """Check the names of experts; equal scales become one number, so that they have equal ids."""
    if not isinstance(value, Mapping):
        return value
    if value.keys() != EXPERTS.keys():
        names = ", ".join(map(str, value)) or "no expert"
        raise ValueError(f"names {names}; write a number, or one for each of {', '.join(EXPERTS)}")
    scales = {expert: value[expert] for expert in EXPERTS}
    for expert, scale in scales.items():
        if isinstance(scale, bool) or not isinstance(scale, int | float) or scale < 0:
            raise ValueError(f"{expert} is {scale!r}; a guidance scale is a number of at least 0")
    return scales if len(set(scales.values())) > 1 else scales["high_noise"]


def is_scale_per_expert(value: Any) -> bool:
    """True for a mapping with a guidance scale for each expert."""
    return isinstance(value, Mapping) and value.keys() == EXPERTS.keys()


NotNegativeScale = Annotated[float, Field(ge=0)]
GuidanceKey = Annotated[
    NotNegativeScale | dict[str, NotNegativeScale], BeforeValidator(_scale_per_expert)
]
SteppingKey = Annotated[
    Literal["renoise", "ode"] | Annotated[float, Field(gt=0, lt=1)],
    BeforeValidator(_named_stepping),
]


def key(default: Any = ..., *, in_id: bool = True, added: bool = False, **bounds: Any) -> Any:
    """A key of a run.

    Args:
        default: value of an omitted key; `...`: the key is required.
        in_id: True if the key is part of a run's id; False if it does not change the numbers.
        added: True if some stored runs are older than the key. It enters the id only if it differs
            from its default, the earlier behaviour, so that the stored runs keep their ids.
        bounds: constraints of `pydantic.Field`.
    """
    extra = {"in_id": in_id, "added": added}
    return Field(default, json_schema_extra=extra, **bounds)


class ProtocolConfig(StrictModel):
    """`protocol`: how clips are drawn and scored. All rows of a table share it."""

    # below 256 clips, distances are mostly bias (eval/README.md)
    clips: int = key(256, ge=2)
    """Clips per row."""
    clips_per_prompt: Count = key(2, added=True)
    """Clips per prompt, more if there are too few prompts; scores of diversity need two."""
    seed: int = key(1000, ge=0)
    """First seed of the clips' noise, equal for every row; `seed` of a prompt in a file wins."""
    teacher_steps: Count = key(32)
    """Sampling steps of the teacher's reference clips."""
    teacher_guidance: GuidanceKey = key(3.0)
    """Guidance scale of the teacher's reference clips, as `guidance_scale` of a run."""
    teacher_shift: float | None = key(None, gt=0, added=True)
    """Shift of the noise levels of the teacher's reference clips; null: `shift` of the run."""
    teacher_stepping: SteppingKey = key("ode", added=True)
    """Stepping of the teacher's reference clips, as `stepping` of a run."""
    negative_prompt: str = key("", in_id=False)
    """Negative prompt of the teacher's reference clips, as in the run's `negative_prompt`."""
    negative_prompt_hash: str = key("", added=True)
    """Hash of its text; written when the run is resolved."""
    precision: Literal["float32", "bfloat16"] = key("float32", added=True)
    """Dtype of the sampling networks; noise levels, latents and autoencoder stay in float32."""
    fps: float = key(8.0, gt=0, added=True)
    """Frames per second; if omitted, the teacher's own if known."""
    evaluators: tuple[str, ...] | None = key(None, in_id=False)
    """Names of evaluators; null: all that apply."""
    device: Literal["cpu", "cuda"] | None = key(None, in_id=False)
    """Device of the evaluators' networks; null: the GPU of the process, or cpu without one."""


class AdapterConfig(StrictModel):
    """`adapter`: low-rank adapters (Hu et al., 2021), weight + alpha / rank * B A.

    Only A and B are trained.
    """

    rank: Count = key(32)
    """Rank of A and B."""
    alpha: float = key(32.0, gt=0)
    """Scale, divided by the rank."""
    targets: tuple[str, ...] = key(("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Suffixes of the linear layers' names."""


class RunConfig(StrictModel):
    """Keys of one run; run.yaml states all of them."""

    # ---- what is trained
    method: dict[str, Any] = key()
    """Name of a method, or `name`, `preset` and its own fields (`distill-bench list`)."""
    method_version: int = key(1)
    """Version of the method; written when the run is resolved."""
    teacher: str = key("mini-wan", in_id=False)
    """`mini-wan`, `gaussian`, `mixture`, a pipeline folder, or OWNER/NAME[@REVISION] on the hub."""
    teacher_hash: str = key("")
    """Hash of the teacher's files; written when the run is resolved."""
    student: str | None = key(None, in_id=False)
    """Pipeline whose transformer student and fake score start from; null: the teacher's."""
    student_hash: str = key("", added=True)
    """Hash of the student's transformer; written when the run is resolved."""
    student_expert: Literal["high_noise", "low_noise"] = key("high_noise", added=True)
    """Which of a pipeline's two experts (Wan2.2-A14B) the student and the fake score start from."""
    init: str | None = key(None, in_id=False, added=True)
    """Stage of the sweep, or id of a run, from whose student this one starts; null: `student`."""
    init_run: str | None = key(None, in_id=False, added=True)
    """Id of that run; written when the run is resolved."""
    init_hash: str = key("", added=True)
    """Hash of that run's config; written when the run is resolved."""
    prompts: str | None = key(None, in_id=False)
    """File of training prompts (.txt, .json, .jsonl); null: the teacher's prompts.txt."""
    prompts_hash: str = key("", added=True)
    """Hash of the prompts; written when the run is resolved."""
    launch_folder: str | None = key(None, in_id=False)
    """Folder from which plugin files were named by relative paths; written if there are any."""
    seed: int = key(0, ge=0)
    """Seed of initialisation and of every draw; set by `seeds` of a sweep."""
    # ---- schedule
    student_updates: Count = key(200)
    """Length of the training, in student updates."""
    fake_score: Literal["trained", "exact"] = key("trained")
    """Trained beside the student, or exact in closed form if the teacher offers it."""
    fake_score_updates: Count | None = key(5)
    """Fake-score updates per student update; written as null if no fake score is trained."""
    batch_size: Count = key(8)
    """Samples per update, over all processes."""
    accumulation: Count = key(1)
    """Micro-batches per update; must divide the batch."""
    # ---- clips and steps
    frames: Count = key(8)
    """Frames per clip."""
    height: Count = key(32)
    """Height of a frame, in pixels."""
    width: Count = key(32)
    """Width of a frame, in pixels."""
    nfe: Count = key(4)
    """Network evaluations per clip of the student, one per noise level."""
    shift: float = key(2.0, gt=0)
    """Resolution shift of the student's noise levels; 1 leaves them as they are."""
    stepping: SteppingKey = key("renoise")
    """Step to the student's next noise level: new noise, an ODE step, or the share of new noise."""
    exit_step: Literal["random", "last"] = key("random")
    """Step of the rollout whose prediction is trained; random: drawn per update."""
    student_input: Literal["rollout", "real_data"] = key("rollout")
    """The student's own samples, or real clips noised to one of its levels."""
    data: str | None = key(None, in_id=False)
    """Folder of real clips (clips.npy, manifest.jsonl); null: rendered or teacher-sampled clips."""
    data_hash: str = key("")
    """Hash of the clips; written when the run is resolved."""
    reuse_rollout: bool | Literal["graph"] = key(False)
    """First fake-score update: true reuses the student's samples, graph their forward pass too."""
    fake_score_rollouts: Literal["sequential", "batched"] = key("sequential", added=True)
    """Rollouts for the fake-score updates of a student update: each alone, or all in one batch."""
    guidance_scale: GuidanceKey = key(3.0)
    """g in uncond + g (cond - uncond), 1: none; or `high_noise` and `low_noise`, one per expert."""
    negative_prompt: str = key("", in_id=False)
    """Prompt of uncond: a text, `file:PATH`, or `default`, the one published with the teacher."""
    negative_prompt_hash: str = key("", added=True)
    """Hash of its text; written when the run is resolved."""
    score_shift: float = key(2.0, gt=0)
    """Shift of the noise levels at which scores are compared; 1 leaves them as they are."""
    sigma_min: float = key(0.02, gt=0, lt=1)
    """Lowest noise level at which scores are compared."""
    sigma_max: float = key(0.98, gt=0, lt=1)
    """Highest noise level at which scores are compared."""
    score_levels: Literal["sample", "batch"] = key("sample", added=True)
    """Noise levels at which scores are compared: one per sample, or one per batch."""
    # ---- optimisers
    student_lr: float = key(1e-4, gt=0)
    """Learning rate of the student (AdamW)."""
    fake_score_lr: float = key(1e-4, gt=0)
    """Learning rate of the fake score (AdamW)."""
    beta1: float = key(0.0, ge=0, lt=1)
    """AdamW's beta1."""
    beta2: float = key(0.999, ge=0, lt=1)
    """AdamW's beta2."""
    weight_decay: float = key(0.0, ge=0)
    """AdamW's weight decay."""
    grad_clip: float = key(10.0, gt=0)
    """Largest norm of a gradient, per optimiser."""
    ema: float | None = key(0.98, ge=0, lt=1)
    """Decay per update of the student's moving average, which is scored; null: no average."""
    precision: Literal["float32", "bfloat16", "float64"] = key("float32")
    """Dtype of the networks' passes in training; bfloat16: autocast."""
    # ---- scores and records
    evaluations: Count = key(4)
    """Evenly spaced student updates at which the student is kept and scored."""
    protocol: ProtocolConfig = key(ProtocolConfig())
    """Sampling and scoring of clips; see below."""
    checkpoint_every: Count = key(50, in_id=False)
    """Student updates between checkpoints."""
    log_every: Count = key(10, in_id=False)
    """Student updates between lines of train.jsonl."""
    signals_every: Count | None = key(20, in_id=False)
    """Student updates between diagnostic signals, not counted as cost or time; null: never."""
    trackers: tuple[str, ...] = key(("tensorboard",), in_id=False)
    """Trackers, by accelerate's names: tensorboard, wandb, ..."""
    threads: int | None = key(None, in_id=False, ge=1)
    """Threads of torch; null: torch's default."""
    # ---- memory; `distill-bench cost SWEEP --memory` prints the effect of each
    adapter: AdapterConfig | None = key(None, added=True)
    """Train low-rank adapters of student and fake score; null: all weights."""
    weights: Literal["float32", "bfloat16"] = key("float32", added=True)
    """Dtype of weights in memory; bfloat16: trained networks also keep float32 masters."""
    gradient_checkpointing: bool = key(False, in_id=False)
    """Recompute blocks in the backward pass instead of storing activations."""
    guidance_forwards: Literal["batched", "sequential"] = key("batched", in_id=False)
    """Conditional and unconditional pass in one forward, or in sequence with half the memory."""
    teacher_offload: bool = key(False, in_id=False)
    """Keep the teacher in host memory between uses."""
    sharding: bool = key(False, in_id=False)
    """Shard each role's weights over the processes (FSDP2)."""
    compile: bool | Literal["network"] = key(False, added=True)
    """`torch.compile`: true compiles the blocks, network whole networks; other rounding."""
