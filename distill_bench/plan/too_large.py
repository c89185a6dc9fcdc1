"""Error messages for runs that do not fit a device, with the settings that would help."""

from collections.abc import Mapping

from distill_bench.config.resolve import method_of
from distill_bench.config.schema import RunConfig
from distill_bench.plan.prediction import Prediction


def too_large(prediction: Prediction, available: int, config: RunConfig) -> str | None:
    """Error message with settings to try if training does not fit `available` bytes; else None."""
    if prediction.peak <= available:
        return None
    needs = (
        f"the run needs {gib(prediction.peak)} ({gib(prediction.held)} held, "
        "the rest gradients and activations)"
    )
    adapted = config.adapter is not None
    already_set = {
        "precision: bfloat16 with weights: bfloat16": config.weights == "bfloat16",
        "gradient_checkpointing: true": config.gradient_checkpointing,
        "guidance_forwards: sequential": config.guidance_forwards == "sequential"
        or config.guidance_scale == 1,
        "fake_score_rollouts: sequential": config.fake_score_rollouts == "sequential",
        "adapter: {rank: 32}": adapted or method_of(config).mixes_weights,
        "teacher_offload: true": config.teacher_offload or adapted,
        "sharding: true with more processes": config.sharding or adapted,
        f"accumulation above {config.accumulation}": config.accumulation == config.batch_size,
    }
    return _too_little(needs, available, already_set)


def too_large_to_sample(peak: int, available: int, config: RunConfig) -> str | None:
    """Error message with settings to try if sampling does not fit `available` bytes; else None."""
    if peak <= available:
        return None
    already_set = {
        "protocol.precision: bfloat16": config.protocol.precision == "bfloat16",
        "teacher_offload: true": config.teacher_offload or config.adapter is not None,
        "guidance_forwards: sequential": config.guidance_forwards == "sequential"
        or config.protocol.teacher_guidance == 1,
    }
    return _too_little(f"sampling needs {gib(peak)}", available, already_set)


def _too_little(needs: str, available: int, already_set: Mapping[str, bool]) -> str:
    settings = [setting for setting, is_set in already_set.items() if not is_set]
    return (
        f"too little memory: {needs} on a device of {gib(available)}; "
        f"set {', or '.join(settings) or 'smaller clips'} (distill-bench cost SWEEP --memory)"
    )


def gib(size: float) -> str:
    """Format bytes, e.g. `12.3 GiB`."""
    return f"{size / 2**30:.3g} GiB"
