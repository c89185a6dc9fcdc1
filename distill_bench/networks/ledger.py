"""Counts the network passes of a run by role, and weighs them by FLOPs to give the cost."""

from dataclasses import dataclass, field

# Cost of a pass, in forwards of the same network. A full backward computes the gradients of the
# input and of the weights; an input backward passes through a frozen network.
PASSES = {"forward": 1.0, "input_backward": 1.0, "full_backward": 2.0}


@dataclass
class Ledger:
    """Passes by role, in units of one global batch."""

    batch_size: int  # samples per global batch
    flops: dict[str, float] = field(default_factory=dict)  # role -> FLOPs per sample of a forward
    counts: dict[str, dict[str, float]] = field(default_factory=dict)  # role -> kind -> batches
    enabled: bool = True  # False while passes are not part of training, e.g. for signals

    def add(self, role: str, kind: str, samples: float) -> None:
        """Count a pass of `kind` (a key of PASSES) of `role` over `samples` samples."""
        if self.enabled:
            row = self.counts.setdefault(role, dict.fromkeys(PASSES, 0.0))
            row[kind] += samples / self.batch_size

    def weight(self, role: str) -> float:
        """FLOPs of the role's forward divided by those of the student's; 1 for unknown roles."""
        student = self.flops.get("student", 1.0)
        return self.flops.get(role, student) / student

    def forward_equivalents(self) -> float:
        """Total cost so far, in student forwards over one global batch."""
        return sum(
            self.weight(role) * PASSES[kind] * count
            for role, row in self.counts.items()
            for kind, count in row.items()
        )
