"""Role of each reference row in the results. Imports no torch, since reports read it."""

STUDENT = "student"  # role of a trained run
TEACHER = "teacher"  # the clips that ratios divide by
FLOOR = "floor"  # the teacher at other seeds: the least distance to the teacher that means anything

# Kind of a reference row, as `sample.references` makes it -> role.
ROLES = {
    "data": "data",
    "data_other": "data",
    "teacher": TEACHER,
    "teacher_other": FLOOR,
    "teacher_few": "undistilled",  # the teacher at the student's number of steps
    "untrained": "undistilled",  # the student before training
    # wrong on purpose: evaluators must tell them from the teacher
    "frozen": "control",
    "shuffled": "control",
    "noise": "control",
}
OTHER = "reference"  # role of kinds that are not in ROLES


def role_of(kind: str) -> str:
    """Return the role of a kind of reference row; suffixes (`teacher_few-nfe4`) are ignored."""
    return ROLES.get(kind.partition("-")[0], OTHER)
