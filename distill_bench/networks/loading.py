"""Loads one part of a pipeline folder (transformer, autoencoder, text encoder), strictly."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from distill_bench.store.failures import first_line
from distill_bench.teachers.folder import TeacherError

if not sys.stderr.isatty():  # progress bars clutter the log of a job
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def load_part(
    part_class: type, folder: Path, dtype: torch.dtype = torch.float32, no_extra: bool = False
) -> nn.Module:
    """Load a part of a pipeline with all of its weights.

    diffusers and transformers would only warn about missing weights and initialise them randomly.

    Args:
        part_class: a model class of diffusers or transformers.
        folder: the part's own folder, with config.json and weights.
        dtype: of the loaded weights.
        no_extra: also refuse weights that the model does not use. Files of text encoders may hold
            unused weights: copies, and decoders.

    Raises:
        TeacherError: if the files cannot be read, or weights are missing or have the wrong shape.
    """
    if issubclass(part_class, transformers.PreTrainedModel):
        # report a wrong shape like a missing weight, as diffusers does, instead of raising
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}
    else:
        options = {"torch_dtype": dtype}
    with naming_folder(folder):
        part, info = part_class.from_pretrained(folder, output_loading_info=True, **options)
    wrong = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if wrong:
        raise TeacherError(
            f"{folder}: {len(wrong)} weights are missing or have the wrong shape, e.g. {wrong[0]}; "
            "download the folder again"
        )
    extra = sorted(info["unexpected_keys"]) if no_extra else []
    if extra:
        raise TeacherError(
            f"{folder}: its config.json has no place for {len(extra)} of its weights, e.g. "
            f"{extra[0]}; config.json and weights must be of the same model"
        )
    return part


@contextlib.contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """Turn library errors into one-line TeacherErrors that name the folder."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # diffusers and transformers append advice about their own arguments
        reason = first_line(error).partition(". If you want to")[0]
        reason = reason.removeprefix("Cannot load  because ")
        raise TeacherError(f"cannot load {folder}: {reason}") from error
