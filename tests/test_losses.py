import math

import torch
from torch.nn import functional as F

from scavenger.losses import activation_error, cross_entropy, logit_divergence


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
