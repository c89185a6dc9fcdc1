"""Kinds of teachers: each implements the Protocols; a new kind is one module and one line."""

import inspect
import sys
import types

import pytest
import torch

from distill_bench.config.errors import ConfigError
from distill_bench.config.resolve import resolve
from distill_bench.domain.gaussian_teacher import GaussianPipeline, GaussianTeacher
from distill_bench.domain.mixture_teacher import MixturePipeline, MixtureTeacher
from distill_bench.networks.pipeline import DiffusersPipeline, load_pipeline
from distill_bench.teachers import kinds
from distill_bench.teachers.diffusers_folder import DiffusersTeacher
from distill_bench.teachers.folder import EMBEDDED


def members(protocol: type) -> set[str]:
    """Names that a class must have to implement a Protocol."""
    public = {name for name in vars(protocol) if not name.startswith("_")}
    return public | set(protocol.__annotations__)


@pytest.mark.parametrize(
    ("protocol", "implementation"),
    [
        (kinds.Teacher, DiffusersTeacher),
        (kinds.Teacher, GaussianTeacher),
        (kinds.Pipeline, DiffusersPipeline),
        (kinds.Pipeline, GaussianPipeline),
        (kinds.Teacher, MixtureTeacher),
        (kinds.Pipeline, MixturePipeline),
    ],
)
def test_an_implementation_has_every_member_of_its_protocol(protocol, implementation):
    fields = {
        name for base in implementation.__mro__ for name in getattr(base, "__annotations__", ())
    }
    assert members(protocol) <= fields | set(dir(implementation))
    for name, method in vars(protocol).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            implemented = inspect.signature(getattr(implementation, name))
            assert list(implemented.parameters) == list(inspect.signature(method).parameters)


def test_a_new_kind_is_one_module_and_one_line(tmp_path, monkeypatch):
    """A subclass registered by marker file resolves, loads, and has a closed form."""

    class Scaled(GaussianTeacher):
        kind = "scaled"

        def load(self, device):
            return GaussianTeacher(EMBEDDED["gaussian"]).load(device)

    module = types.ModuleType("scaled_teacher")
    module.Scaled = Scaled
    monkeypatch.setitem(sys.modules, "scaled_teacher", module)
    monkeypatch.setitem(kinds.CLOSED_FORM, "scaled.json", "scaled_teacher:Scaled")
    (tmp_path / "scaled.json").write_text("{}")
    (tmp_path / "prompts.txt").write_text("component 0\n")
    config = resolve({"method": "dmd2", "teacher": str(tmp_path), "fake_score": "exact"})
    assert config.fake_score_updates is None
    assert load_pipeline(str(tmp_path), torch.device("cpu")).prompts()[0] == "component 0"
    with pytest.raises(ConfigError, match="a scaled teacher makes its own student"):
        resolve({"method": "dmd2", "teacher": str(tmp_path), "student": "mini-wan"})
