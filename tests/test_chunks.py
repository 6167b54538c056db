"""Logits in chunks: the same values and gradients as of all logits at once, and never more than the budget."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_student, tiny_teacher
from reference import assert_close
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scavenger import losses, measure, teacher, training
from scavenger.recipe import Filter, Logits
from scavenger.recurrence import allocation
from scavenger.report import continuation, lm_eval_tasks, retrieval
from scavenger.transfer import teacher_outputs, transfer


WORDS, LENGTH, BATCH = 97, 19, 3
CHUNKS = [1, 5, 23, 10_000]  # positions: less than a row of the batch, more than one, all


@pytest.fixture(params=CHUNKS)
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", request.param * 4 * WORDS + 5)
    return request.param


def biased(model):
    """The model with a bias in its head."""
    head = nn.Linear(model.config.hidden_size, WORDS).double()
    with torch.no_grad():
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.normal_()
    model.set_output_embeddings(head)
    return model


@pytest.fixture(params=[False, True], ids=["plain", "biased"])
def models(request, device):
    """A student and its teacher."""
    made = [tiny_student(), tiny_teacher().requires_grad_(False)]
    return [(biased(model) if request.param else model).to(device) for model in made]


def text():
    return np.random.default_rng(4).integers(WORDS, size=(BATCH, LENGTH))


def whole(model, ids, reference):
    """The four rows of measure.by_token, (4, batch, length - 1), from all logits at once."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(ids).to(device)
    with torch.no_grad():
        log_p, log_q = (each(input_ids=ids).logits[:, :-1].log_softmax(-1) for each in (model, reference))
    following = ids[:, 1:, None]
    return torch.stack(
        [
            -log_p.gather(2, following)[..., 0],
            (log_p.argmax(-1) == log_q.argmax(-1)).double(),
            (log_q.exp() * (log_q - log_p)).sum(-1),
            -log_q.gather(2, following)[..., 0],
        ]
    ).cpu()


def test_held_out_text(chunk, models):
    model, frozen = models
    expected = whole(model, text(), frozen)
    found = measure.by_token(model, text(), frozen)
    assert_close(expected, found, 1e-11)  # measured 2e-13: a convolution of one token less is rounded differently
    assert_close(expected[:1], measure.by_token(model, text()), 1e-11)
    assert_close(expected[..., -7:], measure.by_token(model, text(), frozen, last=7), 1e-11)
    means = measure.held_out(model, text(), frozen)
    assert [means.loss, means.agreement, means.divergence] == pytest.approx(expected[:3].mean((1, 2)).tolist())
    assert measure.by_token(model, text(), model)[2].abs().max() == 0, "KL(p ‖ p) = 0"


def test_any_positions(chunk, models):
    """Those that a mask of their own picks in each sequence, in order."""
    model, _ = models
    wanted = np.random.default_rng(5).random((BATCH, LENGTH)) < 0.4
    asked = np.random.default_rng(6).integers(WORDS, size=(wanted.sum(), 3))
    found, likeliest = measure.log_probabilities(model, text(), wanted, asked)
    with torch.no_grad():
        log_p = model(input_ids=torch.from_numpy(text()).to(model.device)).logits.log_softmax(-1).cpu()
    log_p = log_p[torch.from_numpy(wanted)]
    assert_close(log_p.gather(1, torch.from_numpy(asked)), torch.from_numpy(found), 1e-12)
    assert likeliest.tolist() == log_p.argmax(-1).tolist()


class Capped(nn.Module):
    """A language model whose logits are its head's, bounded."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    @property
    def base_model(self):
        return self.model.base_model

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, input_ids, use_cache=False):
        self.sizes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=3 * torch.tanh(self.model(input_ids=input_ids, use_cache=use_cache).logits / 3))


def test_logits_that_are_not_the_heads(chunk, models):
    """Of such a model, one sequence at a time; beside another one, too."""
    model, frozen = models
    capped = Capped(frozen)
    expected = whole(model, text(), capped)
    capped.sizes.clear()
    assert_close(expected, measure.by_token(model, text(), capped), 1e-11)
    assert capped.sizes == [(1, measure.COMPARED), *[(1, LENGTH - 1)] * BATCH]


def test_not_a_number_is_said(models):
    model, _ = models
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match="logits are not numbers"):
        measure.log_probabilities(model, text(), np.ones(LENGTH, dtype=bool), np.zeros((BATCH * LENGTH, 1), dtype=int))


def slopes(value, model):
    """The gradient of every parameter that has one."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [slope for slope in torch.autograd.grad(value, trained, allow_unused=True) if slope is not None]


@pytest.mark.parametrize("objective", ["forward_kl", "jensen_shannon"])
def test_the_loss_of_logits(objective, chunk, models):
    """Values and all gradients, that of a bias included."""
    model, frozen = models
    ids = torch.from_numpy(text()).to(model.device)
    phase = Logits(steps=1, batch_size=BATCH, learning_rate=0.1, objective=objective, cross_entropy=0.25)
    matching = transfer.LogitMatching(model, phase, Filter())
    counts = torch.tensor([BATCH * LENGTH, BATCH * (LENGTH - 1)], dtype=torch.float64, device=ids.device)
    last, _ = teacher.hidden_states(frozen, ids, False)
    mask = torch.ones_like(ids, dtype=torch.bool)
    value = matching(ids, mask, counts, 1.0, losses.Head.of(frozen), last, [])[0]
    own, theirs = (each(input_ids=ids).logits for each in models)
    divergence = losses.logit_divergence(own, theirs, objective).mean()
    expected = 0.75 * divergence + 0.25 * F.cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert value.item() == pytest.approx(expected.item(), rel=1e-7)  # float32 weights of the terms
    found, plain = slopes(value, model), slopes(expected, model)
    assert len(found) == len(plain)
    for slope, reference in zip(found, plain, strict=True):
        assert_close(reference, slope, 1e-6)


def test_next_tokens(chunk, models):
    model, _ = models
    ids = torch.from_numpy(text()).to(model.device)
    value = training.NextTokens(model)(ids, torch.ones_like(ids, dtype=torch.bool))
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    assert_close(expected, value, 1e-6)  # the counts of positions are float32
    for slope, plain in zip(slopes(value, model), slopes(expected, model), strict=True):
        assert_close(plain, slope, 1e-6)


def test_the_teachers_most_likely_tokens(chunk, models):
    _, frozen = models
    ids = torch.from_numpy(text()).to(frozen.device)
    last, _ = teacher.hidden_states(frozen, ids, False)
    found = teacher_outputs.most_likely(last, losses.Head.of(frozen), 6)
    log_p = frozen(input_ids=ids).logits.log_softmax(-1)
    top = log_p.topk(6)
    assert torch.equal(found.tokens, top.indices)
    assert_close(top.values, found.log_p, 1e-13)
    assert_close(log_p.exp().sum(-1) - top.values.exp().sum(-1), found.log_rest.exp(), 1e-12)


def test_scores_of_sampled_text(chunk, models, monkeypatch):
    """The gradients that sizes of recurrences are chosen by; the most likely text instead of a drawn one."""
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: p.argmax(-1, keepdim=True))
    model, _ = models
    ids = torch.from_numpy(text()[:1]).to(model.device)
    with allocation.explicit_taps(model, LENGTH) as leaves:
        found = allocation.score(model, ids, leaves, torch.Generator(model.device))
        log_p = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = torch.autograd.grad(log_p.max(-1).values.sum(), list(leaves.values()))
    for slope, plain in zip(found, expected, strict=True):
        assert_close(plain, slope, 1e-11)


PAIRS = [([5, 9, 3], [7]), ([5, 9, 3], [8]), ([5], [9, 3, 8]), ([4] * 11, [6, 2, 11, 12]), ([1], [2])]


def test_tasks_of_the_harness(chunk, models):
    """Continuations that differ in their last token alone are read once; what is too long loses its beginning."""
    model, _ = models
    read = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(len(args[0])))
    found = lm_eval_tasks.log_likelihoods(model, PAIRS, 12, True)
    hook.remove()
    assert sum(read[2:]) == 3, "of five pairs"
    for (context, continuation_), (total, greedy) in zip(PAIRS, found, strict=True):
        ids = torch.tensor([(context + continuation_)[-13:]], device=model.device)
        with torch.no_grad():
            log_p = model(input_ids=ids[:, :-1]).logits[0, -len(continuation_) :].log_softmax(-1)
        expected = log_p.gather(1, ids[0, -len(continuation_) :, None]).sum().item()
        assert total == pytest.approx(expected, rel=1e-11)
        assert greedy == (log_p.argmax(-1).tolist() == continuation_)
    best = lm_eval_tasks.log_likelihoods(model, [(PAIRS[0][0], [likeliest_after(model, PAIRS[0][0])])], 12, True)
    assert best[0][1]


def likeliest_after(model, context):
    """The most likely token after a context."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([context], device=model.device)).logits[0, -1].argmax().item()


class Largest(TorchDispatchMode):
    """The most positions whose logits, or anything with a number for each word, are in one tensor."""

    def __init__(self, words, weights):
        super().__init__()
        self.words, self.weights, self.rows = words, weights, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for item in tree_leaves(made):
            if isinstance(item, torch.Tensor) and self.words in item.shape and item.numel() != self.weights:
                self.rows = max(self.rows, item.numel() // self.words)
        return made


def stepped(module, *given):
    value = module(*given)
    (value if isinstance(value, torch.Tensor) else value[0]).backward()


def uses(model, frozen):
    """Every computation of a run that needs logits, by name."""
    ids = torch.from_numpy(text()).to(model.device)
    mask, counts = torch.ones_like(ids, dtype=torch.bool), torch.full((2,), 7.0, device=ids.device)
    last, _ = teacher.hidden_states(frozen, ids, False)
    head = losses.Head.of(frozen)
    kept = teacher_outputs.most_likely(last, head, 6)
    phase = Logits(steps=1, batch_size=BATCH, learning_rate=0.1, objective="jensen_shannon", cross_entropy=0.1)
    matching = transfer.LogitMatching(model, phase, Filter())

    def scores():
        with allocation.explicit_taps(model, LENGTH) as leaves:
            allocation.score(model, ids[:1], leaves, torch.Generator(model.device))

    return {
        "matching": lambda: stepped(matching, ids, mask, counts, 1.0, head, last, []),
        "matching what is cached": lambda: stepped(matching, ids, mask, counts, 1.0, kept, None, []),
        "next tokens": lambda: stepped(training.NextTokens(model), ids, mask),
        "outputs": lambda: teacher_outputs.most_likely(last, head, 6),
        "held out": lambda: measure.held_out(model, text(), frozen),
        "scores": scores,
        "generated": lambda: continuation.along(model, frozen, text()[:, :5], text()[:, 5:]),
        "copying": lambda: retrieval.copying(model, text(), [], (8, 9), BATCH, 0),
        "tasks": lambda: lm_eval_tasks.log_likelihoods(model, PAIRS, 12, True),
    }


@pytest.mark.parametrize("use", ["matching", "matching what is cached", "next tokens", "outputs", "held out"])
def test_no_tensor_is_larger_than_a_chunk(use, models, monkeypatch):
    largest_is_a_chunk(use, models, monkeypatch)


@pytest.mark.parametrize("use", ["scores", "generated", "copying", "tasks"])
def test_nor_in_the_report_and_the_recurrence(use, models, monkeypatch):
    largest_is_a_chunk(use, models, monkeypatch)


def largest_is_a_chunk(use, models, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 5 * 4 * WORDS)
    call = uses(*models)[use]
    with Largest(WORDS, models[0].get_output_embeddings().weight.numel()) as seen:
        call()
    assert seen.rows == 5
    monkeypatch.setattr(losses, "CHUNK_BYTES", 2**40)
    with Largest(WORDS, models[0].get_output_embeddings().weight.numel()) as seen:
        call()
    assert seen.rows > 5, "all at once it is seen"


def test_budget():
    assert losses.chunk_rows(50_304) == 667 and losses.chunk_rows(152_000) == 220
    assert losses.chunk_rows(2**40) == 1
    peak = losses.logit_peak(152_000, 10**6)
    assert peak == losses.CHUNK_COPIES * 4 * 152_000 * 220 <= losses.CHUNK_COPIES * losses.CHUNK_BYTES
    assert losses.logit_peak(97, 11) == losses.CHUNK_COPIES * 4 * 97 * 11
