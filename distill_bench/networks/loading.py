"""Loads one part of a pipeline folder (transformer, autoencoder, text encoder), or a checkpoint."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

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


def read_pickled(path: Path) -> Any:
    """Content of a file that `torch.save` wrote, on the CPU; old formats are read into memory.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no such file, or holds other objects than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # damaged pickles raise errors of any type
        reason = first_line(error)
        # torch advises to trust the file
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {foreign[1]} beside weights; save the weights alone"
        elif not isinstance(error, RuntimeError):
            reason = "it was not written by torch.save"
        raise ValueError(f"{path} is no checkpoint of PyTorch: {reason}") from error


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
