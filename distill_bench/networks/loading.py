"""TODO: networks.loading."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from distill_bench.store.files import first_line
from distill_bench.teachers.folder import TeacherError

if not sys.stderr.isatty():  # a job's log has lines, not bars
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def load_part(
    kind: type, folder: Path, dtype: torch.dtype = torch.float32, every: bool = False
) -> nn.Module:
    """A part of a pipeline with its weights, all of them.

    Args:
        every: whether each weight of the files must have its place; those of text encoders hold copies and decoders.

    Raises:
        TeacherError: if they cannot be read or some are missing: the libraries would draw them at random and warn.
    """
    # of the two libraries one raises what weight has another shape, the other advice
    of_text = issubclass(kind, transformers.PreTrainedModel)
    options = (
        {"dtype": dtype, "ignore_mismatched_sizes": True} if of_text else {"torch_dtype": dtype}
    )
    with naming_folder(folder):
        part, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    wrong = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if wrong:
        raise TeacherError(
            f"{folder}: {len(wrong)} weights are missing or of another shape, for instance {wrong[0]}"
        )
    over = sorted(info["unexpected_keys"]) if every else []
    if over:
        raise TeacherError(
            f"{folder}: its config.json has no place for {len(over)} of its weights, for instance {over[0]}"
        )
    return part


@contextlib.contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """What the libraries raise inside is a TeacherError of one line that names the folder."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        said = first_line(error).partition(". If you want to")[
            0
        ]  # behind it is advice on their arguments
        raise TeacherError(
            f"cannot load {folder}: {said.removeprefix('Cannot load  because ')}"
        ) from error
