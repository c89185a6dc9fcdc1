"""Methods with special demands on the networks, an adapter, and a comparison of finished runs."""

from pathlib import Path

from runs import weights

ADAPTER = {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_v", "ffn.net.2"]}
SHARED_GRAPH = {"name": "sgmd", "preset": "paper"}  # both phases go backwards through one graph
ON_FEATURES = {"name": "dmd2", "preset": "paper"}  # its discriminator stops a forward half-way


def largest_difference(run: Path, other: Path) -> float:
    """Largest difference of any weight at the end of two runs."""
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[k] - second[k]).abs().max()) for k in first if first[k].numel())
