"""The name of a closed-form teacher in messages is that of the file that marks its folder."""

import importlib

import pytest

from distill_bench.teachers.kinds import CLOSED_FORM


@pytest.mark.parametrize("marker", CLOSED_FORM)
def test_a_kind_has_the_name_of_its_marker_in_its_folder_and_once_loaded(marker):
    module_name, _, class_name = CLOSED_FORM[marker].partition(":")
    module = importlib.import_module(module_name)
    teacher = getattr(module, class_name)
    pipeline = getattr(module, class_name.replace("Teacher", "Pipeline"))
    assert marker == module.MARKER
    assert f"{teacher.kind}.json" == f"{pipeline.kind}.json" == marker
