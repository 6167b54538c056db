import math

import torch
from torch.nn import functional as F

from scavenger.losses import activation_error, cross_entropy, hankel_tail, logit_divergence


def test_no_difference_is_no_loss_and_no_gradient():
    logits = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    divergence = logit_divergence(logits, logits.detach())
    assert abs(divergence.item()) < 1e-15
    assert torch.autograd.grad(divergence, logits)[0].abs().max() < 1e-16
    x = torch.randn(2, 5, 11)
    assert activation_error(x, x) == 0


def test_divergence_is_a_mean_over_positions_in_nats():
    certain, even = torch.tensor([[[100.0, 0.0]]]), torch.zeros(1, 1, 2)
    assert math.isclose(logit_divergence(even, certain).item(), math.log(2), rel_tol=1e-6)
    assert math.isclose(
        logit_divergence(even.expand(3, 7, 2), certain.expand(3, 7, 2)).item(), math.log(2), rel_tol=1e-6
    )
    # a constant added to all logits of a position changes nothing
    p, q = torch.randn(2, 2, 5, 11, dtype=torch.float64)
    assert math.isclose(logit_divergence(q + 3, p - 5).item(), logit_divergence(q, p).item(), rel_tol=1e-12)
    assert logit_divergence(q, p) > 0


def test_divergence_gradient():
    p = torch.randn(2, 3, 7, dtype=torch.float64)
    q = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: logit_divergence(q, p), q)


def test_activation_error_is_relative():
    teacher = torch.randn(2, 5, 11)
    assert math.isclose(activation_error(torch.zeros_like(teacher), teacher).item(), 1, rel_tol=1e-6)
    assert math.isclose(activation_error(3e-3 * teacher, 1e-3 * teacher).item(), 4, rel_tol=1e-5)
    assert activation_error(teacher.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_cross_entropy_predicts_the_next_token():
    ids = torch.tensor([[3, 1, 2]])
    logits = 50 * F.one_hot(torch.tensor([[1, 2, 0]]), 5).float()
    assert cross_entropy(logits, ids) < 1e-6
    assert cross_entropy(logits.roll(1, dims=1), ids) > 10


def test_hankel_tail_is_what_no_recurrence_reaches():
    """Against the weighted Hankel section written out; nothing is left of a filter that is a small recurrence."""
    torch.manual_seed(3)
    taps = torch.randn(3, 12, dtype=torch.float64)
    weights = [math.sqrt(math.comb(2 * i, i) / 4**i) for i in range(11)]
    for states in (0, 1, 4, 11):
        for row, tail in zip(taps, hankel_tail(taps, states), strict=True):
            ended = [*row[1:].tolist(), *[0.0] * 10]
            section = [[weights[i] * ended[i + j] * weights[j] for j in range(11)] for i in range(11)]
            section = torch.tensor(section, dtype=torch.float64)
            values = torch.linalg.svdvals(section)
            if states == 0:  # every tap counts once
                assert math.isclose(values.square().sum(), row[1:].square().sum(), rel_tol=1e-12)
            assert math.isclose(tail, values[states:].square().sum() / row.square().sum(), rel_tol=1e-12, abs_tol=1e-15)
    poles = 0.3 ** torch.arange(41, dtype=torch.float64), (-0.5) ** torch.arange(41, dtype=torch.float64)
    small = torch.stack([poles[0] - 2 * poles[1]])
    assert hankel_tail(small, 2) < 1e-22 and hankel_tail(small, 1) > 1e-3


def test_hankel_tail_gradient():
    taps = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda taps: hankel_tail(taps, 2), taps)
