import math

import pytest
import torch
from conftest import normal
from torch.nn import functional as F

from scavenger import losses
from scavenger.losses import activation_error, cross_entropy, hankel_tail, logit_divergence


OBJECTIVES = ["forward_kl", "reverse_kl", "jensen_shannon"]


def logits(*shape, spread=2.0, device):
    return spread * normal(*shape, device=device)


def plainly(p, q, objective):
    """Σ_v of the definition, outcome by outcome, for one position."""

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    p, q = p.softmax(-1).tolist(), q.softmax(-1).tolist()
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jensen_shannon": (kl(p, middle) + kl(q, middle)) / 2}[
        objective
    ]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_no_difference_is_no_divergence_and_no_gradient(objective, temperature, device):
    p = logits(3, 5, 11, device=device).requires_grad_()
    found = logit_divergence(p, p.detach(), objective, temperature)
    assert found.shape == (3, 5) and found.abs().max() < 1e-14
    assert torch.autograd.grad(found.sum(), p)[0].abs().max() < 1e-14
    # Nor is a constant added to all logits of a position a difference.
    assert logit_divergence(p + 3, p - 5, objective, temperature).abs().max() < 1e-14


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_divergence_is_its_definition(objective, device):
    p, q = logits(2, 7, 13, device=device)
    found = logit_divergence(q, p, objective)
    for position in range(7):
        assert found[position].item() == pytest.approx(plainly(p[position], q[position], objective), rel=1e-12)
    assert found.min() > 0
    for temperature in (0.5, 3.0):  # of both, and the square makes up for the smaller gradient
        found = logit_divergence(q, p, objective, temperature)
        expected = temperature**2 * logit_divergence(q / temperature, p / temperature, objective)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    hot = q.clone().requires_grad_()
    colder, hotter = (
        torch.autograd.grad(logit_divergence(hot, p, objective, temperature).sum(), hot)[0].norm()
        for temperature in (50.0, 500.0)
    )
    hotter, colder = hotter.item(), colder.item()
    assert hotter == pytest.approx(colder, rel=0.1), "the gradient's size does not fade with the temperature"


def test_which_divergence_is_symmetric_and_bounded(device):
    p, q = logits(2, 9, 13, spread=30.0, device=device)  # nearly all mass on tokens of their own
    both = logit_divergence(q, p, "jensen_shannon")
    torch.testing.assert_close(both, logit_divergence(p, q, "jensen_shannon"), rtol=1e-12, atol=0)
    assert 0.99 * math.log(2) < both.max() <= math.log(2) * (1 + 1e-14)  # rounded
    torch.testing.assert_close(logit_divergence(q, p, "reverse_kl"), logit_divergence(p, q), rtol=1e-12, atol=0)
    assert (logit_divergence(q, p) - logit_divergence(p, q)).abs().min() > 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_divergence_gradient(objective, device):
    p, q = logits(2, 3, 7, device=device)
    assert torch.autograd.gradcheck(lambda q: logit_divergence(q, p, objective, 1.7), q.requires_grad_())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_certainty_is_finite(objective, device):
    """Logits so far apart that a probability is zero in float32."""
    p = torch.tensor([300.0, 0.0, -300.0], device=device)
    q = -p.clone().requires_grad_()
    found = logit_divergence(q, p, objective)
    (slope,) = torch.autograd.grad(found, q)
    assert found.isfinite() and found > 0.5 and slope.isfinite().all()
    half = logit_divergence(q.detach().bfloat16(), p.bfloat16(), objective)
    assert half.dtype == torch.float32 and half.isfinite()


def kept(p, count):
    """The `count` most likely tokens of logits, and the mass of the rest."""
    log_p = p.log_softmax(-1)
    top = log_p.topk(count, -1)
    rest = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    return losses.TopK(top.values, top.indices, rest)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_kept_divergence_is_the_whole_one_where_all_is_kept_and_never_above_it(objective, device):
    p, q = logits(2, 3, 5, 11, device=device)
    whole = logit_divergence(q, p, objective)
    found = [losses.kept_divergence(q, kept(p, count), objective) for count in (1, 4, 10, 11)]
    torch.testing.assert_close(found[-1], whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[-2], whole, rtol=1e-12, atol=1e-12)  # what is left is one token
    for coarser, finer in zip(found, found[1:], strict=False):
        assert (coarser >= 0).all() and (coarser <= finer + 1e-12).all()
    assert (found[0] < found[1]).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("count", [3, 11])
def test_kept_divergence_gradient(objective, count, device):
    p, q = logits(2, 4, 11, device=device)
    assert torch.autograd.gradcheck(lambda q: losses.kept_divergence(q, kept(p, count), objective), q.requires_grad_())
    same = p.clone().requires_grad_()
    found = losses.kept_divergence(same, kept(p, count), objective)
    assert found.abs().max() < 1e-14 and torch.autograd.grad(found.sum(), same)[0].abs().max() < 1e-14


def test_kept_divergence_of_certainty_is_finite(device):
    """Where nothing is left for the tokens that were not kept, on either side."""
    certain = torch.tensor([[200.0, 0.0, 0.0, 0.0, 0.0]], device=device)
    for student in (certain, certain.roll(1, -1), torch.zeros_like(certain)):
        student = student.clone().requires_grad_()
        found = losses.kept_divergence(student, kept(certain, 2))
        (slope,) = torch.autograd.grad(found.sum(), student)
        assert found.isfinite().all() and slope.isfinite().all()
    found = losses.kept_divergence(torch.zeros_like(certain), kept(certain, 2))
    assert found.item() == pytest.approx(math.log(5), rel=1e-5)


def test_activation_error_is_relative_energy_of_each_sequence(device):
    teacher = normal(3, 5, 11, device=device)
    ones = torch.ones(3, dtype=torch.float64, device=device)
    assert torch.equal(activation_error(teacher, teacher), 0 * ones)
    torch.testing.assert_close(activation_error(torch.zeros_like(teacher), teacher), ones)
    scale = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64, device=device)[:, None, None]
    torch.testing.assert_close(activation_error(3 * scale * teacher, scale * teacher), 4 * ones)
    assert activation_error(teacher.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    silent = torch.zeros(1, 5, 11, device=device)
    assert activation_error(silent, silent).item() == 0
    x = normal(3, 5, 11, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: activation_error(x, teacher), x)


def test_activation_error_does_not_see_padding(device):
    student, teacher = normal(2, 3, 7, 5, device=device)
    mask = (torch.arange(7) < torch.tensor([[7], [4], [1]])).to(device)
    found = activation_error(student, teacher, mask)
    for row, length in enumerate((7, 4, 1)):
        alone = activation_error(student[row : row + 1, :length], teacher[row : row + 1, :length])
        assert found[row].item() == pytest.approx(alone.item(), rel=1e-12)
    noisy = torch.where(mask[..., None], student, 1e6 * normal(*student.shape, device=device)).requires_grad_()
    other = torch.where(mask[..., None], teacher, 1e6 * normal(*teacher.shape, device=device))
    torch.testing.assert_close(activation_error(noisy, other, mask), found, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(activation_error(noisy, other, mask).sum(), noisy)
    assert torch.equal(slope[~mask], torch.zeros_like(slope[~mask])) and slope[mask].abs().min() > 0


def test_following_tokens(device):
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [9, 0, 0, 0]], device=device)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], device=device).bool()
    following, counts = losses.following(ids, mask)
    assert counts.tolist() == [1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert following[counts.bool()].tolist() == [6, 7, 8, 6]
    following, counts = losses.following(ids[:, :1], mask[:, :1])
    assert counts.tolist() == [0, 0, 0]


def test_cross_entropy_is_of_the_given_token(device):
    following = torch.tensor([1, 2, 0], device=device)
    certain = 50 * F.one_hot(following, 5).float()
    assert cross_entropy(certain, following).shape == (3,)
    assert cross_entropy(certain, following).max() < 1e-6 and cross_entropy(certain, following.roll(1)).min() > 10
    even = torch.zeros(3, 5, device=device)
    torch.testing.assert_close(cross_entropy(even, following), torch.full((3,), math.log(5), device=device))
    assert cross_entropy(certain.bfloat16(), following).dtype == torch.float32


# Rows, channels and words, all different; what a chunk may hold, in rows.
ROWS, CHANNELS, WORDS = 17, 7, 13


def two_terms(device):
    """The divergence from a teacher on some rows, and the cross-entropy on others."""
    aim, following = logits(ROWS, WORDS, device=device), torch.randint(WORDS, (ROWS,)).to(device)
    matched, counted = (torch.rand(2, ROWS) < 0.7).double().to(device)

    def terms(logits, rows):
        found = logit_divergence(logits, aim[rows].to(logits.dtype), "jensen_shannon", 1.5)
        entropy = cross_entropy(logits, following[rows])
        return torch.stack([(found * matched[rows]).sum(), (entropy * counted[rows]).sum()])

    return terms


@pytest.fixture(params=[1, 5, ROWS, 1000])
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", request.param * 4 * WORDS)
    return request.param


def test_projected_is_the_plain_function(chunk, device):
    hidden, weight = normal(ROWS, CHANNELS, device=device), normal(WORDS, CHANNELS, device=device)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    factors, terms, seen = torch.tensor([0.3, 1.9], dtype=torch.float64, device=device), two_terms(device), []

    def watched(logits, rows):
        seen.append(len(logits))
        return terms(logits, rows)

    value, sums = losses.projected(hidden, losses.Head(weight, None), watched, factors)
    assert max(seen) == min(chunk, ROWS) and sum(seen) == ROWS
    expected = terms(hidden @ weight.T, slice(None))
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(value, factors @ expected, rtol=1e-12, atol=0)
    assert not sums.requires_grad
    slopes = torch.autograd.grad(7 * value, (hidden, weight))
    for slope, plain in zip(slopes, torch.autograd.grad(7 * (factors @ expected), (hidden, weight)), strict=True):
        torch.testing.assert_close(slope, plain, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_projected_gradient(monkeypatch, device):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 5 * 4 * WORDS)
    hidden, weight = normal(ROWS, CHANNELS, device=device), normal(WORDS, CHANNELS, device=device)
    bias = normal(WORDS, device=device)
    factors, terms = torch.tensor([0.3, 1.9], dtype=torch.float64, device=device), two_terms(device)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: losses.projected(hidden, losses.Head(weight, bias), terms, factors)[0],
        (hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()),
    )


def test_projected_with_a_frozen_head(chunk, device):
    hidden, weight = normal(ROWS, CHANNELS, device=device).requires_grad_(), normal(WORDS, CHANNELS, device=device)
    factors, terms = torch.tensor([1.0, 0.5], dtype=torch.float64, device=device), two_terms(device)
    value, _ = losses.projected(hidden, losses.Head(weight, None), terms, factors)
    (slope,) = torch.autograd.grad(value, hidden)
    (plain,) = torch.autograd.grad(factors @ terms(hidden @ weight.T, slice(None)), hidden)
    torch.testing.assert_close(slope, plain, rtol=1e-11, atol=1e-13)
    assert weight.grad is None


def test_projected_without_rows_and_without_a_gradient(device):
    weight, terms = normal(WORDS, CHANNELS, device=device), two_terms(device)
    factors = torch.ones(2, dtype=torch.float64, device=device)
    value, sums = losses.projected(weight.new_zeros(0, CHANNELS), losses.Head(weight, None), terms, factors)
    assert value == 0 and sums.tolist() == [0, 0]
    with torch.no_grad():
        hidden = normal(ROWS, CHANNELS, device=device)
        value, _ = losses.projected(hidden, losses.Head(weight, None), terms, factors)
    torch.testing.assert_close(value, terms(hidden @ weight.T, slice(None)).sum(), rtol=1e-12, atol=0)


def test_projected_in_bfloat16_is_near(chunk, device):
    """Products in bfloat16, sums and losses in float32: 2⁻⁸ of a logit, and what a sum of them makes of it."""
    hidden, weight = (torch.randn(count, CHANNELS).to(device).requires_grad_() for count in (ROWS, WORDS))
    factors, terms = torch.tensor([0.3, 1.9], device=device), two_terms(device)

    def found():
        value, sums = losses.projected(hidden, losses.Head(weight, None), terms, factors)
        return value, sums, *torch.autograd.grad(value, (hidden, weight))

    exact = found()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        near = found()
    for reference, x in zip(exact, near, strict=True):
        assert x.dtype == torch.float32
        assert 0 < (x - reference).norm() < 0.05 * reference.norm()


def test_hankel_tail_is_what_no_recurrence_reaches(device):
    """Against the weighted Hankel section written out; nothing is left of a filter that is a small recurrence."""
    torch.manual_seed(3)
    taps = normal(3, 12, device=device)
    weights = [math.sqrt(math.comb(2 * i, i) / 4**i) for i in range(11)]
    for states in (0, 1, 4, 11):
        for row, tail in zip(taps, hankel_tail(taps, states), strict=True):
            ended = [*row[1:].tolist(), *[0.0] * 10]
            section = [[weights[i] * ended[i + j] * weights[j] for j in range(11)] for i in range(11)]
            section = torch.tensor(section, dtype=torch.float64, device=device)
            values = torch.linalg.svdvals(section)
            if states == 0:  # every tap counts once
                assert math.isclose(values.square().sum(), row[1:].square().sum(), rel_tol=1e-12)
            assert math.isclose(tail, values[states:].square().sum() / row.square().sum(), rel_tol=1e-12, abs_tol=1e-15)
    time = torch.arange(41, dtype=torch.float64, device=device)
    small = (0.3**time - 2 * (-0.5) ** time)[None]
    assert hankel_tail(small, 2) < 1e-22 and hankel_tail(small, 1) > 1e-3


def test_hankel_tail_gradient(device):
    taps = normal(2, 9, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda taps: hankel_tail(taps, 2), taps)
