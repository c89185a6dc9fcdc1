"""Networks that were trained elsewhere: pipelines, weights of a transformer, LoRA files.

Names of weights may be diffusers' or another code's: the architecture translates them. Wrappers
that codes put around a network (`model.`, `_fsdp_wrapped_module.`) are removed.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from distill_bench.networks.loading import read_pickled
from distill_bench.networks.pipeline import load_networks, load_transformer
from distill_bench.store.failures import first_line
from distill_bench.teachers.architecture import Architecture, architecture_of
from distill_bench.teachers.contents import weight_shapes
from distill_bench.teachers.diffusers_folder import transformer_folders
from distill_bench.teachers.folder import TeacherError

WRAPPERS = re.compile(r"(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?=\.)")
PREFIX = re.compile(r"^(base_model|module|model|generator|student|diffusion_model|transformer)\.")
# entries of a training checkpoint that hold a student, its moving average first
STUDENTS = ("generator_ema", "ema", "generator", "student", "model", "state_dict")
LORA = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_down|lora_up|alpha|diff|diff_b)(\.default)?(\.weight)?"
)
FACTORS = {"lora_down": "lora_A", "lora_up": "lora_B"}  # names of other codes -> diffusers'
LORA_METADATA = "lora_adapter_metadata"  # of diffusers' LoRA files: rank and alpha
Shape = tuple[int, ...]
T = TypeVar("T")


def load_released(path: Path, teacher: Path) -> nn.Module:
    """The network in a pipeline folder or a file of weights, trainable, in float32.

    Args:
        path: pipeline folder; file of a transformer's weights; or LoRA file for the teacher.
        teacher: pipeline folder, whose architecture the weights of a file must fit.

    Raises:
        TeacherError: if a file cannot be read, or its weights do not fit.
    """
    if path.is_dir():
        return load_networks(path)
    weights, metadata = _read_weights(path)
    net = load_transformer(teacher)
    if is_lora(weights):
        _check_one_transformer(net.architecture, path)
        _merge_lora(net, weights, metadata, path)
        return net
    names = _diffusers_names(weights, net.architecture)
    check_names({names[name]: tuple(weights[name].shape) for name in names}, _shapes(net), path)
    net.load_state_dict({names[name]: tensor.float() for name, tensor in weights.items()})
    return net


def check_released(path: Path, teacher: Path) -> None:
    """Compare names and shapes of a file's weights with the teacher's, without loading them.

    Raises:
        TeacherError: if the file is missing or unreadable, or its weights do not fit.
    """
    architecture = architecture_of(teacher)
    if path.is_dir():
        _check_pipeline(path, architecture)
        return
    expected = weight_shapes(teacher / "transformer")
    shapes = _shapes_in_file(path)
    names = _diffusers_names(shapes, architecture)
    if is_lora(shapes):
        _check_one_transformer(architecture, path)
        _check_layers({names[name]: shape for name, shape in shapes.items()}, expected, path)
    elif expected:  # an outline has no weights
        check_names({names[name]: shape for name, shape in shapes.items()}, expected, path)


def _check_pipeline(folder: Path, teacher: Architecture) -> None:
    architecture = architecture_of(folder)
    reason = architecture.mismatch() or teacher.unlike(architecture)
    if reason is not None:
        raise TeacherError(f"{folder}: {reason}")
    for part in transformer_folders(folder):
        weight_shapes(part)


def _check_one_transformer(teacher: Architecture, path: Path) -> None:
    if teacher.boundary is not None:
        raise TeacherError(
            f"{path} is a LoRA for one transformer, but the teacher has two: merge it with "
            "diffusers, and name the folder of the whole pipeline"
        )


def is_lora(names: Iterable[str]) -> bool:
    """True for the names of a LoRA file."""
    return any(".lora_" in name for name in names)


def check_names(found: Mapping[str, Shape], expected: Mapping[str, Shape], path: Path) -> None:
    """Raise TeacherError in one line unless names and shapes of weights agree."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    unlike = sorted(
        name for name in found.keys() & expected.keys() if found[name] != expected[name]
    )
    problems = [
        f"{len(names)} {problem}, e.g. {names[0]}"
        for names, problem in (
            (missing, "weights of the teacher's transformer are missing"),
            (extra, "names are unknown"),
            (unlike, "weights have another shape"),
        )
        if names
    ]
    if problems:
        raise TeacherError(
            f"{path} does not fit the teacher's transformer: {'; '.join(problems)}; "
            "name weights of the teacher's architecture and size"
        )


def _shapes(net: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def _shapes_in_file(path: Path) -> dict[str, Shape]:
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in _read_weights(path)[0].items()}
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # a safe_open file is not iterable
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"cannot load {path}: {first_line(error)}") from error


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the metadata of a safetensors file.

    Raises:
        TeacherError: if the file cannot be read or holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return load_file(path), file.metadata() or {}
        content = read_pickled(path)
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"cannot load {path}: {first_line(error)}") from error
    except ValueError as error:
        raise TeacherError(str(error)) from error
    while isinstance(content, dict):
        inner = next((content[key] for key in STUDENTS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    tensors = isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())
    if not tensors or not content:
        raise TeacherError(
            f"{path} holds no weights by name; known entries of a training checkpoint: "
            f"{', '.join(STUDENTS)}"
        )
    return content, {}


def _diffusers_names(names: Iterable[str], architecture: Architecture) -> dict[str, str]:
    """Each name -> the name without wrappers, as diffusers has it."""
    bare = {name: _without_wrappers(name) for name in names}
    translated = architecture.diffusers_names(list(bare.values()))
    return {name: translated[own] for name, own in bare.items()}


def _without_wrappers(name: str) -> str:
    name = WRAPPERS.sub("", name).removeprefix(".")
    while (shorter := PREFIX.sub("", name)) != name:
        name = shorter
    return name


# --- LoRA ---


def _by_layer(entries: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Entries of a LoRA file by layer and kind: factor, `alpha`, or change of weight or bias."""
    parts: dict[str, dict[str, T]] = {}
    for name, entry in entries.items():
        if match := LORA.fullmatch(name):
            parts.setdefault(match[1], {})[FACTORS.get(match[2], match[2])] = entry
    return parts


def _check_layers(found: Mapping[str, Shape], expected: Mapping[str, Shape], path: Path) -> None:
    """Raise TeacherError unless every entry of a LoRA file fits a layer of the network.

    Args:
        found: shapes of the entries, by diffusers' names.
        expected: shapes of the network's weights; empty if they are unknown.
        path: the file.
    """
    layers = {name.rpartition(".")[0] for name in expected}
    unknown = sorted(
        name for name in found if not (match := LORA.fullmatch(name)) or match[1] not in layers
    )
    fault = f"{path} does not fit the teacher's transformer"
    advice = "name a LoRA of the teacher's architecture and size"
    if unknown and layers:
        raise TeacherError(
            f"{fault}: {len(unknown)} entries belong to no layer of it, e.g. {unknown[0]}; {advice}"
        )
    parts = _by_layer(found)
    if halves := sorted(
        layer for layer, part in parts.items() if ("lora_A" in part) != ("lora_B" in part)
    ):
        raise TeacherError(
            f"{path} has one factor of two for {len(halves)} layers, e.g. {halves[0]}: it is cut "
            "off; save or download it again"
        )
    if layers and (unlike := sorted(x for x in parts if not _fits(x, parts[x], expected))):
        raise TeacherError(
            f"{fault}: its entries for {len(unlike)} layers have another shape, e.g. for "
            f"{unlike[0]}; {advice}"
        )


def _fits(layer: str, part: Mapping[str, Shape], expected: Mapping[str, Shape]) -> bool:
    """True if the entries of a layer can be added to its weight and bias."""
    weight, bias = (expected.get(f"{layer}.{kind}") for kind in ("weight", "bias"))
    if part.get("diff", weight) != weight or part.get("diff_b", bias) != bias:
        return False
    if "lora_A" not in part:
        return True
    down, up = part["lora_A"], part["lora_B"]
    own = up[0], math.prod(up[1:]), math.prod(down[1:])
    return weight is not None and own == (weight[0], down[0], math.prod(weight[1:]))


@torch.no_grad()
def _merge_lora(
    net: nn.Module, weights: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> None:
    """Add alpha / rank * B A of each layer to its weight, in place; without alpha, B A.

    Entries `diff` and `diff_b` are added to weight and bias.
    """
    names = _diffusers_names(weights, net.architecture)
    entries = {names[name]: tensor.float() for name, tensor in weights.items()}
    state = net.state_dict()
    _check_layers({name: tuple(x.shape) for name, x in entries.items()}, _shapes(net), path)
    stated = _stated_alpha(metadata)
    for layer, part in _by_layer(entries).items():
        if "lora_A" in part:
            down, up = part["lora_A"], part["lora_B"]
            alpha = float(part["alpha"]) if "alpha" in part else stated or len(down)
            weight = state[f"{layer}.weight"]
            weight += alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if "diff" in part:
            state[f"{layer}.weight"] += part["diff"]
        if "diff_b" in part:
            state[f"{layer}.bias"] += part["diff_b"]


def _stated_alpha(metadata: Mapping[str, str]) -> float | None:
    """alpha in the metadata of diffusers' LoRA files."""
    stated = json.loads(metadata.get(LORA_METADATA, "{}"))
    alpha = next((v for key, v in stated.items() if key.endswith("lora_alpha")), None)
    return None if alpha is None else float(alpha)
