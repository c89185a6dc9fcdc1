"""The cost ledger: passes in global batches, weighed by FLOPs."""

import pytest

from distill_bench.networks.ledger import Ledger


def test_passes_are_counted_in_global_batches_and_weighed_by_the_students_flops():
    """A full backward costs two forwards, one to the input costs one."""
    ledger = Ledger(8, {"student": 10.0, "teacher": 70.0, "fake_score": 20.0})
    ledger.add("student", "forward", 8)
    ledger.add("student", "full_backward", 4)
    ledger.add("teacher", "forward", 16)
    ledger.add("fake_score", "input_backward", 2)
    ledger.add("fake_score", "input_backward", 2)
    assert ledger.counts["student"] == {"forward": 1, "input_backward": 0, "full_backward": 0.5}
    assert ledger.counts["fake_score"]["input_backward"] == 0.5
    assert [ledger.weight(role) for role in ("student", "teacher", "fake_score")] == [1, 7, 2]
    assert ledger.forward_equivalents() == pytest.approx(1 + 2 * 0.5 + 7 * 2 + 2 * 1 * 0.5)


def test_a_role_without_known_flops_costs_as_much_as_the_student():
    ledger = Ledger(1, {"student": 10.0})
    ledger.add("target", "forward", 3)
    assert ledger.forward_equivalents() == 3


def test_a_disabled_ledger_counts_nothing():
    ledger = Ledger(1, enabled=False)
    ledger.add("student", "forward", 1)
    assert ledger.counts == {}


def test_flops_without_the_students_are_in_units_of_its_forward():
    assert Ledger(4).weight("teacher") == 1
    assert Ledger(4, {"teacher": 3.0}).weight("teacher") == 3


def test_an_unknown_kind_of_pass_is_refused():
    with pytest.raises(KeyError):
        Ledger(4).add("student", "backward", 4)
