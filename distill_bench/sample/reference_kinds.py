"""Kinds of reference rows, their purposes, and their roles in results.

Imports no torch, because reports read it. `sample/references.py` makes the rows.
"""

STUDENT = "student"  # role of a trained run
TEACHER = "teacher"  # the teacher's many-step clips; ratios divide by them
FLOOR = "floor"  # the teacher at other seeds: its distance to the teacher is a perfect score
DATA = "data"  # rendered clips, only if the prompts are of the embedded domain
UNDISTILLED = "undistilled"  # few steps without distillation: the baseline for students
CONTROL = "control"  # corrupted on purpose: every evaluator must detect them
ELSEWHERE = "elsewhere"  # a network that was trained elsewhere
OTHER = "reference"  # role of kinds that are not in ROLES

ROLES = {  # kind of a reference row -> role
    "data": DATA,  # the prompts, rendered
    "data_other": DATA,  # the prompts at other seeds: the floor of distances to data
    "teacher": TEACHER,  # same prompts and seeds as the students
    "teacher_other": FLOOR,
    "teacher_few": UNDISTILLED,  # the teacher at the student's number of steps
    "untrained": UNDISTILLED,  # the student before training
    "frozen": CONTROL,  # the teacher's clips, standing still
    "slowed": CONTROL,  # the teacher's clips at half their speed
    "stilled": CONTROL,  # a quarter of the teacher's clips standing still
    "equalised": CONTROL,  # the teacher's clips at the mean speed of their prompt, if the teacher
    # can make them
    "jittered": CONTROL,  # the teacher's clips with displaced frames
    "shuffled": CONTROL,  # the teacher's clips with frames in random order
    "noise": CONTROL,  # uniform noise
}

# kinds that evaluators receive; the other kinds are corrupted or depend on the run
COMPARED = ("teacher", "teacher_other", "data", "data_other")


def role_of(kind: str) -> str:
    """Role of a kind of reference row; suffixes (`teacher_few-nfe4`) are ignored."""
    return ROLES.get(kind.partition("-")[0], OTHER)
