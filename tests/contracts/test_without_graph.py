"""Averages, buffers and logs hold no graph: nothing trains them, and earlier batches are freed."""

import pytest
import torch
from method_setting import setting
from torch import nn

from distill_bench.method import Renoised, reverse_kl
from distill_bench.registry import methods
from distill_bench.train.average import MovingAverage


def test_averaged_weights_take_no_gradient():
    student, network = nn.Linear(2, 1), nn.Linear(2, 1)
    for net, own_network in ((student, False), (network, True)):
        average = MovingAverage(student, net, 0.5, own_network)
        average.update()
        assert not any(weight.requires_grad for weight in average.sampled().values())


def test_the_log_of_the_reverse_kl_has_no_graph_to_the_student_or_the_scores():
    x0, x0_fake, x0_teacher = torch.randn(3, 2, 1, 2, 2, 1).requires_grad_()
    scores = Renoised(x0, torch.full((2,), 0.5), x0_fake, x0_teacher)
    term, logs = reverse_kl(x0, scores)
    assert term.requires_grad
    assert not any(value.requires_grad for value in logs.values())


@pytest.mark.parametrize("name", methods())
def test_logs_and_buffers_of_a_method_have_no_graph(name):
    """A buffer with a graph would keep the graphs of all earlier batches."""
    method = methods()[name]()
    nets, batch, _ = setting(method)
    kept = method.student_loss(nets, batch).logs
    kept |= {key: b for net in nets.modules.values() for key, b in net.named_buffers()}
    assert [key for key, value in kept.items() if value.requires_grad] == []
