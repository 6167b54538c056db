"""The kernel of the losses over a vocabulary against the plain ones: interpreted on the CPU, or compiled on a GPU."""

import math

import pytest
import torch
from conftest import compiled, normal, tiny_student, tiny_teacher, watched
from reference import assert_close

from scavenger import losses, losses_triton, teacher, training
from scavenger.recipe import Filter, Logits
from scavenger.transfer import transfer


pytestmark = pytest.mark.usefixtures("interpreted")
OBJECTIVES = ["forward_kl", "reverse_kl", "jensen_shannon"]
WORDS = 4096 + 905  # more than a block, and no multiple of anything


@pytest.fixture
def everywhere(monkeypatch):
    """The kernel on any device, and of float64 too, which it computes in float32."""
    monkeypatch.setattr(losses, "has_kernel", lambda terms, *kind: isinstance(terms, losses.Terms))


def given(rows, dtype, device, objective=None, temperature=1.0, entropy=True):
    """Logits of a student, and terms whose teacher's logits are the numbers `last`."""
    logits, last = (3 * normal(rows, WORDS, device=device).to(dtype) for _ in range(2))
    following = torch.randint(WORDS, (rows,)).to(device)
    matched, counted = torch.rand(2, rows).to(device)
    if objective is None:
        return logits, losses.Terms(following, counted)
    terms = Direct(following, counted if entropy else None, matched, None, last, objective, temperature)
    return logits, terms


class Direct(losses.Terms):
    def target(self, rows):
        return None if self.last is None else self.last[rows]


def plainly(logits, terms, factors):
    """The sums and the gradient in float64, of the numbers as they are."""
    wide = logits.double().requires_grad_()
    terms = terms._replace(last=None if terms.last is None else terms.last.double())
    sums = terms(wide, slice(None))
    return sums.detach(), torch.autograd.grad((factors.double() * sums).sum(), wide)[0]


def by_kernel(logits, terms, factors):
    logits = logits.clone()
    sums, slope = terms.in_place(logits, slice(None), factors)
    assert slope is logits
    return sums, slope


def check(logits, terms, tolerance, of_slope):
    factors = torch.tensor([0.3, 1.9])[: 2 if terms.matched is not None and terms.counted is not None else 1]
    factors = factors.to(logits.device)
    found = by_kernel(logits, terms, factors)
    for slow, fast, allowed in zip(plainly(logits, terms, factors), found, (tolerance, of_slope), strict=True):
        assert_close(slow, fast.double(), allowed)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_kernel_is_the_plain_loss(objective, temperature, device):
    """Both terms, and the divergence alone; measured 6e-7 and, of a gradient, 3.6e-6."""
    for entropy in (True, False):
        check(*given(3, torch.float32, device, objective, temperature, entropy), 6e-6, 4e-5)


def test_the_kernel_is_the_plain_cross_entropy(device):
    check(*given(3, torch.float32, device), 1e-6, 1e-6)  # measured 5e-8


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-7), (torch.float16, 2**-11)])
def test_half_precision_rounds_the_gradient_alone(dtype, tolerance, device):
    """Once, which the interpreter does towards zero in bfloat16; the losses not at all."""
    for objective in (None, *OBJECTIVES):
        check(*given(2, dtype, device, objective, 1.3), 6e-6, tolerance)


def test_a_teacher_of_another_dtype(device):
    logits, terms = given(2, torch.bfloat16, device, "forward_kl")
    check(logits, terms._replace(last=terms.last.float()), 6e-6, 2**-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_difference_is_no_divergence_and_no_gradient(objective, device):
    logits, terms = given(2, torch.float32, device, objective, 1.5, entropy=False)
    found, slope = by_kernel(logits, terms._replace(last=logits + 4), torch.ones(1, device=device))
    assert found.abs().max() < 2e-6 and slope.abs().max() < 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_certainty_is_finite(objective, device):
    """Logits so far apart that most probabilities are zero in float32."""
    logits, terms = given(2, torch.float32, device, objective)
    certain = torch.full_like(logits, -300.0)
    certain[:, 7] = 300
    terms = terms._replace(last=certain, matched=torch.ones(2, device=device))
    for own in (certain, certain.roll(1, -1), torch.zeros_like(certain)):
        found, slope = by_kernel(own, terms, torch.ones(2, device=device))
        assert found.isfinite().all() and slope.isfinite().all()
        assert (found[0] > 0.5) == (own is not certain)
    if objective == "jensen_shannon":
        found, _ = by_kernel(certain.roll(1, -1), terms, torch.ones(2, device=device))
        assert math.isclose(found[0] / 2, math.log(2), rel_tol=1e-6)


def test_rows_without_weight_have_no_gradient(device):
    logits, terms = given(3, torch.float32, device, "forward_kl")
    weights = torch.tensor([1.0, 0.0, 1.0], device=device)
    _, slope = by_kernel(logits, terms._replace(matched=weights, counted=weights), torch.ones(2, device=device))
    assert (slope.abs().amax(1) > 0).tolist() == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [4, 100])
def test_training_with_the_kernel_is_training_without(autocast, rows, everywhere, monkeypatch, device):
    """Distillation and next tokens, with a bias: values, what is logged, all gradients; a launch for each chunk."""
    monkeypatch.setattr(losses, "GPU_CHUNK_BYTES", rows * 4 * 97)
    model = tiny_student(num_hidden_layers=1, head_bias=True).float().to(device)
    frozen = tiny_teacher().float().to(device).requires_grad_(False)
    ids = torch.randint(97, (2, 5)).to(device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 3:] = False
    phase = Logits(steps=1, batch_size=2, learning_rate=0.1, objective="jensen_shannon", cross_entropy=0.25)
    last, _ = teacher.hidden_states(frozen, ids, False)
    counts = torch.tensor([8.0, 6.0], device=device)

    def values():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            matching = transfer.LogitMatching(model, phase, Filter())
            value, logged, _ = matching(ids, mask, counts, 1.0, losses.Head.of(frozen), last, [])
            value = value + training.NextTokens(model)(ids, mask) / 6
        return [value, *logged.values(), *torch.autograd.grad(value, list(model.parameters()), allow_unused=True)]

    (kernel,) = watched(monkeypatch, losses_triton, ["_losses"])
    found = values()
    assert len(kernel.launches) == 2 * math.ceil(10 / rows)
    monkeypatch.setattr(losses, "has_kernel", lambda *given: False)
    for plain, each in zip(values(), found, strict=True):
        if plain is not None:
            assert plain.dtype == each.dtype
            assert_close(plain, each, 5e-2 if autocast else 1e-4)
    assert len(kernel.launches) == 2 * math.ceil(10 / rows)


def test_what_the_kernel_is_for(device):
    _, terms = given(2, torch.float32, device, "forward_kl")
    kept = losses.TopK(*torch.zeros(3, 2, 1, device=device))
    gpu = device.type == "cuda"
    assert losses.has_kernel(terms, torch.bfloat16, device) == gpu
    assert losses.has_kernel(terms._replace(matched=None, last=None), torch.float32, device) == gpu
    assert not losses.has_kernel(terms, torch.float64, device)
    assert not losses.has_kernel(terms._replace(aim=kept), torch.float32, device)
    assert not losses.has_kernel(lambda logits, rows: logits, torch.float32, device)


def test_memory_of_logits_with_the_kernel():
    assert losses.chunk_rows(50_304, True) == 5336 and losses.chunk_rows(2**40, True) == 1
    assert losses.logit_peak(97, 11, True) == losses.GPU_CHUNK_COPIES * 4 * 97 * 11
    peak = losses.logit_peak(152_000, 10**6, True)
    assert peak == losses.GPU_CHUNK_COPIES * 4 * 152_000 * 1766


@pytest.mark.slow
def test_the_kernel_compiles_without_a_gpu():
    kernels = []
    for objective, own in (("jensen_shannon", "*bf16"), ("none", "*fp32")):
        matrices = {"student": own, "teacher": "*fp32", "following": "*i64"}
        vectors = dict.fromkeys(["matched", "counted", "factors", "found"], "*fp32")
        constants = {"OBJECTIVE": objective, "ENTROPY": True, "HOT": objective != "none", "BLOCK": 4096}
        kernels.append(("_losses", {**matrices, **vectors, "temperature": "fp32"}, constants, {"num_warps": 8}))
    assert len(compiled(losses_triton, kernels, 90)) == 2
