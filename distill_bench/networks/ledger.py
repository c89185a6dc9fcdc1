"""TODO: networks.ledger."""

from dataclasses import dataclass, field

PASSES = {"forward": 1.0, "input_backward": 1.0, "full_backward": 2.0}


@dataclass
class Ledger:
    """Passes by role, in units of one global batch."""

    batch_size: int
    flops: dict[str, float] = field(
        default_factory=dict
    )  # role -> FLOPs of a forward of one sample; absent: as the student
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    enabled: bool = True

    def add(self, role: str, kind: str, samples: float) -> None:
        """Count a pass of `kind` (see PASSES) of `role` over `samples` samples."""
        if self.enabled:
            row = self.counts.setdefault(role, dict.fromkeys(PASSES, 0.0))
            row[kind] += samples / self.batch_size

    def weight(self, role: str) -> float:
        """FLOPs of the role's forward over those of the student's."""
        student = self.flops.get("student", 1.0)
        return self.flops.get(role, student) / student

    def forward_equivalents(self) -> float:
        """The whole cost so far."""
        return sum(
            self.weight(role) * PASSES[kind] * count
            for role, row in self.counts.items()
            for kind, count in row.items()
        )
