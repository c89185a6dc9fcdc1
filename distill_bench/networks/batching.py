"""TODO: networks.batching."""

from distill_bench.config.schema import RunConfig

BATCH, VALUES = (
    16,
    2**26,
)  # clips drawn together, and values of their frames, which cuts that of large clips


def drawn_together(config: RunConfig) -> int:
    """How many clips of a run's size are drawn at once; what is drawn together is part of its bits."""
    return max(1, min(BATCH, VALUES // (3 * config.frames * config.height * config.width)))
