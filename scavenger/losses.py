"""The losses of the pipeline: pure functions, in float32 or wider whatever the model's dtype.

Every loss is given for each sequence or summed over positions, so that whoever knows the whole batch can divide by it:
the result does not depend on how a batch is spread over processes and parts.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from scavenger.recurrence.reduction.hankel import weighted_section


# Logits that are held at once, in bytes of float32; a handful of tensors of this size live together. Large enough for
# full matrix products (667 rows of Pythia's vocabulary), small beside the weights of any model worth distilling.
CHUNK_BYTES = 2**27
LEAST_LOG_MASS = -50.0  # of all tokens that were not kept: e⁻⁵⁰ is nothing beside float32's rounding of the rest


class TopK(NamedTuple):
    """A teacher's distribution at each position, by its most likely tokens and the mass of all others."""

    log_p: Tensor  # (…, kept)
    tokens: Tensor  # (…, kept)
    log_rest: Tensor  # (…)


def activation_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """‖student - teacher‖² / ‖teacher‖² of each sequence, over its unmasked positions: 0 is a match, 1 is silence.

    Both (batch, length, channel), mask (batch, length); returns (batch,). Relative to the teacher's energy, so that
    layers compare and none needs a weight.
    """
    student, teacher = _wide(student), _wide(teacher)
    if mask is not None:
        student, teacher = student * mask[..., None], teacher * mask[..., None]
    energy = teacher.square().sum((1, 2)).clamp_min(torch.finfo(teacher.dtype).tiny)
    return (student - teacher).square().sum((1, 2)) / energy


def divergence(
    log_q: Tensor, log_p: Tensor, objective: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
) -> Tensor:
    """How far a student's distribution q is from its teacher's p, in nats, of each position.

    forward_kl: KL(p ‖ q) = Σ_v p_v (log p_v - log q_v). reverse_kl: KL(q ‖ p). jensen_shannon: with m = (p + q) / 2,
    (KL(p ‖ m) + KL(q ‖ m)) / 2. Log-probabilities (…, vocabulary).
    """
    if objective == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if objective == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2


def logit_divergence(student: Tensor, teacher: Tensor, objective: str = "forward_kl", temperature: float = 1.0):
    """T² D(softmax(teacher / T), softmax(student / T)), nats, of each position; logits (…, vocabulary).

    T² keeps the gradient's size as T grows (arXiv:1503.02531, section 2). The gradient goes to the student only.
    """
    student, teacher = _wide(student), _wide(teacher)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    return temperature**2 * _Divergence.apply(student, teacher, objective)


class _Divergence(torch.autograd.Function):
    """`divergence` of two softmaxes of logits z (student) and of the teacher's, with its slope taken at once.

    With q the student's and m = (p + q) / 2: ∂/∂z of forward_kl is q - p, of the others q ⊙ (g - Σ_v q_v g_v) with
    g = log q - log p (reverse_kl) and g = (log q - log m) / 2 (jensen_shannon). Written over what is not needed any
    more: at this size a pass over memory is what everything costs.
    """

    @staticmethod
    def forward(ctx, student, teacher, objective):
        log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
        if objective == "forward_kl":
            p = log_p.exp()
            found = _products(p, log_p.sub_(log_q))
            slope = log_q.exp_().sub_(p)
        else:
            other, found = log_p, 0.0
            if objective == "jensen_shannon":
                other = torch.logaddexp(log_p, log_q).sub_(math.log(2))
                found = _products(log_p.exp(), log_p.sub_(other)) / 2
            slope, q = log_q - other, log_q.exp_()
            own = _products(q, slope)
            slope.sub_(own[..., None]).mul_(q)
            if objective == "jensen_shannon":
                own, slope = own / 2, slope.div_(2)
            found = found + own
        ctx.save_for_backward(slope)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, weights):
        (slope,) = ctx.saved_tensors
        return slope * weights[..., None], None, None


def _products(a, b):
    """Σ_v a_v b_v of each position, without a tensor of the products."""
    with torch.autocast(a.device.type, enabled=False):  # which would take the products in half precision
        return torch.einsum("...v,...v->...", a, b)


def kept_divergence(student: Tensor, teacher: TopK, objective: str = "forward_kl") -> Tensor:
    """The divergence with all tokens that `teacher` does not name taken as one; nats, of each position.

    Never above that of the whole distributions (merging outcomes loses information), equal where all are kept.
    """
    log_q = F.log_softmax(_wide(student), dim=-1)
    named = log_q.gather(-1, teacher.tokens)
    rest = log_q.scatter(-1, teacher.tokens, -torch.inf).logsumexp(-1, keepdim=True)
    rest = rest.clamp_min(LEAST_LOG_MASS).nan_to_num(LEAST_LOG_MASS)
    log_q = torch.cat([named, rest], -1)
    log_p = torch.cat([teacher.log_p, teacher.log_rest[..., None].clamp_min(LEAST_LOG_MASS)], -1).to(log_q.dtype)
    return divergence(log_q, log_p, objective)


def cross_entropy(logits: Tensor, following: Tensor) -> Tensor:
    """-log q(next token), nats, of each position; logits (…, vocabulary), the next tokens (…)."""
    return F.cross_entropy(_wide(logits), following, reduction="none")


def following(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each position, and 1 where there is one (0 at the end, on padding and before it), both flat.

    ids and mask (batch, length).
    """
    counts = mask & F.pad(mask[:, 1:], (0, 1))
    return F.pad(ids[:, 1:], (0, 1)).flatten(), counts.flatten().float()


def projected(
    hidden: Tensor, weight: Tensor, terms: Callable[[Tensor, slice], Tensor], factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ_n factors_n Σ_rows terms_n(hidden Wᵀ), without holding the logits of all rows; and the Σ_rows of each term.

    hidden (row, channel), W (vocabulary, channel); `terms(logits, rows)` gives the sums (term,) over a chunk of rows.
    The gradient of a chunk is taken while its logits are there, so nothing is computed twice and what is kept for the
    backward pass is as large as `hidden` and `weight`.
    """
    return _Projected.apply(hidden, weight, terms, factors)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, terms, factors):
        device = hidden.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        matrix = weight.to(kind)
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        sums = torch.zeros_like(factors)
        step = max(1, CHUNK_BYTES // (4 * len(weight)))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            part = hidden[rows].to(kind)
            logits = _wide(part @ matrix.T).requires_grad_()
            with torch.enable_grad():
                found = terms(logits, rows)
                (slope,) = torch.autograd.grad((factors * found).sum(), logits)
            slope = slope.to(kind)
            to_hidden[rows] = slope @ matrix
            if to_weight is not None:
                if to_weight.dtype == kind:
                    to_weight.addmm_(slope.T, part)  # no second tensor of its size, which can be that of a chunk
                else:
                    to_weight += slope.T @ part
            sums += found.detach()
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.mark_non_differentiable(sums)
        return (factors * sums).sum(), sums

    @staticmethod
    def backward(ctx, slope, _):
        to_hidden, to_weight = ctx.saved_tensors
        return slope * to_hidden, None if to_weight is None else slope * to_weight, None, None


def hankel_tail(taps: Tensor, states: int) -> Tensor:
    """Σ_{k>d} σ_k(W H W)² / ‖h‖² of each filter: the share of its energy that no recurrence of d real states reaches.

    `taps` is (filter, length), `states` is d. H is the whole Hankel matrix, zero past the last tap, so that the last
    taps count as the first ones do: they are read in few places of a context, and are what stage one controls least.
    The root is a floor of the relative l2 error against a filter that ends there (reduction/hankel.py).
    """
    taps = taps.double()  # in float32 the eigenvalues of filters that fade fast were not found
    ended = F.pad(taps[:, 1:], (0, taps.shape[1] - 2))
    squares = torch.linalg.eigvalsh(weighted_section(ended)).square().sort(dim=-1, descending=True).values
    energy = taps.square().sum(-1).clamp_min(torch.finfo(taps.dtype).tiny)
    return squares[:, states:].sum(-1) / energy


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))
