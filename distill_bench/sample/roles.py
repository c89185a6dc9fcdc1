"""Role of each reference row in the results. Imports no torch: reports read it, too."""

STUDENT = "student"  # role of a trained run
TEACHER = "teacher"  # the clips that ratios divide by
FLOOR = "floor"  # the teacher at other seeds: no distance to the teacher below this means anything

# Kind of a reference row, as `sample.references` makes it -> role.
ROLES = {
    "data": "data",
    "data_other": "data",
    "teacher": TEACHER,
    "teacher_other": FLOOR,
    "teacher_few": "undistilled",  # the teacher at the student's number of steps
    "untrained": "undistilled",  # the student before training
    "frozen": "control",  # controls are wrong on purpose: each evaluator must tell them apart
    "shuffled": "control",
    "noise": "control",
}
OTHER = "reference"  # role of kinds that are not in ROLES


def role_of(kind: str) -> str:
    """Return the role of a kind of reference row."""
    return ROLES.get(kind, OTHER)
