"""The losses of the pipeline: pure functions, computed in float32 or wider for any dtype of the model.

Losses are returned per sequence or summed over positions, and the caller divides by the size of the global batch: the
result does not depend on how the batch is split over processes and micro-batches.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from scavenger.recurrence.reduction.hankel import weighted_section


try:
    from scavenger.losses_triton import losses_and_slope_
except ImportError:  # without Triton the plain form computes the same
    losses_and_slope_ = None


# Bytes of float32 logits in memory at a time, in training, in measurements and where the teacher's outputs are written.
# Large enough for efficient matrix products (667 positions of 50,304 words, 220 of 152,000), small compared with the
# weights of a model to distil.
CHUNK_BYTES = 2**27
# Tensors as large as a chunk that exist together at most in any loss or measurement, with the rest of a step: 7.2 were
# measured (benchmarks/logits.md).
CHUNK_COPIES = 8
# The same of a training step with the kernel on a GPU: the logits of student and teacher, and a product for the head's
# gradient. Counted, not measured.
GPU_CHUNK_BYTES, GPU_CHUNK_COPIES = 2**30, 3
LEAST_LOG_MASS = -50.0  # of all tokens that were not kept: e⁻⁵⁰ is far below the float32 rounding of the others


def chunk_rows(vocabulary: int, kernel: bool = False) -> int:
    """Positions of which the logits are computed at once: CHUNK_BYTES of float32, one position at least.

    `kernel`: GPU_CHUNK_BYTES, in training where the losses are computed by the kernel.
    """
    return max(1, (GPU_CHUNK_BYTES if kernel else CHUNK_BYTES) // (4 * vocabulary))


def logit_peak(vocabulary: int, positions: int, kernel: bool = False) -> int:
    """The most bytes that logits take at a time, where batches have so many positions."""
    copies = GPU_CHUNK_COPIES if kernel else CHUNK_COPIES
    return copies * 4 * vocabulary * min(positions, chunk_rows(vocabulary, kernel))


class Head(NamedTuple):
    """A language model's last layer, logits = hidden Wᵀ + b."""

    weight: Tensor  # (vocabulary, channel)
    bias: Tensor | None  # (vocabulary)

    @classmethod
    def of(cls, model: nn.Module):
        layer = model.get_output_embeddings()
        return cls(layer.weight, layer.bias)


class TopK(NamedTuple):
    """A teacher's distribution at each position: its most likely tokens and the total mass of all others."""

    log_p: Tensor  # (…, kept)
    tokens: Tensor  # (…, kept)
    log_rest: Tensor  # (…)


def activation_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """‖student - teacher‖² / ‖teacher‖² of each sequence, over unmasked positions: 0 for a match, 1 for zero output.

    Both (batch, length, channel), mask (batch, length); returns (batch,). Relative to the teacher's energy, so that
    layers are comparable and need no weights.
    """
    student, teacher = wide(student), wide(teacher)
    if mask is not None:
        student, teacher = student * mask[..., None], teacher * mask[..., None]
    energy = teacher.square().sum((1, 2)).clamp_min(torch.finfo(teacher.dtype).tiny)
    return (student - teacher).square().sum((1, 2)) / energy


def divergence(
    log_q: Tensor, log_p: Tensor, objective: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
) -> Tensor:
    """Divergence of a student's distribution q from its teacher's p at each position, in nats.

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
    """T² D(softmax(teacher / T), softmax(student / T)) at each position, in nats; logits (…, vocabulary).

    T² keeps the gradient's size as T grows (arXiv:1503.02531, section 2). The gradient goes to the student only.
    """
    student, teacher = wide(student), wide(teacher)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    return temperature**2 * _Divergence.apply(student, teacher, objective)


class _Divergence(torch.autograd.Function):
    """`divergence` of the softmaxes of student logits z and teacher logits; the gradient is computed in `forward`.

    With q the student's and m = (p + q) / 2: ∂/∂z of forward_kl is q - p, of the others q ⊙ (g - Σ_v q_v g_v) with
    g = log q - log p (reverse_kl) and g = (log q - log m) / 2 (jensen_shannon). Computed in place where possible: at
    this size the cost is memory traffic.
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
    """Σ_v a_v b_v at each position, without a tensor of the products."""
    with torch.autocast(a.device.type, enabled=False):  # autocast would compute the products in half precision
        return torch.einsum("...v,...v->...", a, b)


def kept_divergence(student: Tensor, teacher: TopK, objective: str = "forward_kl") -> Tensor:
    """The divergence at each position, in nats, with all tokens not in `teacher` merged into one outcome.

    Never above that of the full distributions (merging outcomes loses information), equal if all tokens are kept.
    """
    log_q = F.log_softmax(wide(student), dim=-1)
    named = log_q.gather(-1, teacher.tokens)
    rest = log_q.scatter(-1, teacher.tokens, -torch.inf).logsumexp(-1, keepdim=True)
    rest = rest.clamp_min(LEAST_LOG_MASS).nan_to_num(LEAST_LOG_MASS)
    log_q = torch.cat([named, rest], -1)
    log_p = torch.cat([teacher.log_p, teacher.log_rest[..., None].clamp_min(LEAST_LOG_MASS)], -1).to(log_q.dtype)
    return divergence(log_q, log_p, objective)


def cross_entropy(logits: Tensor, following: Tensor) -> Tensor:
    """-log q(next token) at each position, in nats; logits (…, vocabulary), next tokens (…)."""
    return F.cross_entropy(wide(logits), following, reduction="none")


def following(ids: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """The next token at each position, and 1 where `predicted` has that token (0 elsewhere and at the end), both flat.

    ids and predicted (batch, length): the tokens whose prediction counts, those that are no padding or fewer.
    """
    return F.pad(ids[:, 1:], (0, 1)).flatten(), F.pad(predicted[:, 1:], (0, 1)).flatten().float()


class Terms(NamedTuple):
    """What distillation sums over rows: divergences from the teacher, cross-entropies of the next tokens.

    Called with logits (row, vocabulary) and their place among all rows; returns the sums (term,), in this order, of
    those that have weights.
    """

    following: Tensor  # (row), the next tokens
    counted: Tensor | None  # (row), the weights of the cross-entropies
    matched: Tensor | None = None  # (row), those of the divergences
    aim: Head | TopK | None = None  # the teacher's head, or its kept distribution
    last: Tensor | None = None  # (row, channel), the input of the teacher's head
    objective: str = "forward_kl"
    temperature: float = 1.0

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        sums = []
        if self.matched is not None:
            if isinstance(self.aim, TopK):
                found = kept_divergence(logits, TopK(*(item[rows] for item in self.aim)), self.objective)
            else:
                found = logit_divergence(logits, self.target(rows), self.objective, self.temperature)
            sums.append((found * self.matched[rows]).sum())
        if self.counted is not None:
            sums.append((cross_entropy(logits, self.following[rows]) * self.counted[rows]).sum())
        return torch.stack(sums)

    def target(self, rows: slice) -> Tensor | None:  # (row, vocabulary)
        """The teacher's logits, in its own dtype."""
        if self.last is None:
            return None
        with torch.autocast(self.last.device.type, enabled=False):
            return F.linear(self.last[rows], *self.aim)

    def in_place(self, logits: Tensor, rows: slice, factors: Tensor) -> tuple[Tensor, Tensor]:
        """The sums, and the gradient of factors · sums in place of the logits, by the kernel."""
        weights = [None if each is None else each[rows].float() for each in (self.matched, self.counted)]
        found = losses_and_slope_(
            logits, self.target(rows), self.following[rows], *weights, factors.float(), self.objective, self.temperature
        )
        return found.sum(1), logits


def has_kernel(terms: Callable, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel computes these terms of logits of a dtype: on a GPU, of all words, in 32 bits or fewer."""
    if losses_and_slope_ is None or device.type != "cuda" or dtype == torch.float64:
        return False
    return isinstance(terms, Terms) and not isinstance(terms.aim, TopK)


def projected(
    hidden: Tensor, head: Head, terms: Callable[[Tensor, slice], Tensor], factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ_n factors_n Σ_rows terms_n(hidden Wᵀ + b), without the logits of all rows in memory; and the Σ_rows of each.

    hidden (row, channel); `terms(logits, rows)` returns the sums (term,) over a chunk of rows. A chunk's gradient is
    computed while its logits exist, so nothing is recomputed, and the tensors saved for the backward pass have the
    sizes of `hidden`, W and b.
    """
    return _Projected.apply(hidden, *head, terms, factors)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, terms, factors):
        device = hidden.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        matrix, offset = weight.to(kind), None if bias is None else bias.to(kind)
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        sums = torch.zeros_like(factors)
        kernel = has_kernel(terms, kind, hidden.device)
        step = chunk_rows(len(weight), kernel)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            part = hidden[rows].to(kind)
            logits = F.linear(part, matrix, offset)
            if kernel:
                found, slope = terms.in_place(logits, rows, factors)
            else:
                logits = wide(logits).requires_grad_()
                with torch.enable_grad():
                    found = terms(logits, rows)
                    (slope,) = torch.autograd.grad((factors * found).sum(), logits)
            if to_bias is not None:
                to_bias += slope.sum(0, dtype=to_bias.dtype)
            slope = slope.to(kind)
            to_hidden[rows] = slope @ matrix
            if to_weight is not None:
                if to_weight.dtype == kind:
                    to_weight.addmm_(slope.T, part)  # in place: a second tensor could be as large as a chunk
                else:
                    to_weight += slope.T @ part
            sums += found.detach()
            del logits, found, slope  # or they would live on beside the next chunk's
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        ctx.mark_non_differentiable(sums)
        return (factors * sums).sum(), sums

    @staticmethod
    def backward(ctx, slope, _):
        return *(None if gradient is None else slope * gradient for gradient in ctx.saved_tensors), None, None


def hankel_tail(taps: Tensor, states: int) -> Tensor:
    """Σ_{k>d} σ_k(W H W)² / ‖h‖²: the share of each filter's energy that no recurrence of d real states can reproduce.

    `taps` is (filter, length), `states` is d. H is the full Hankel matrix, zero past the last tap, so that the last
    taps count as much as the first: few positions of a context use them, and stage one constrains them least. The root
    is a floor of the relative l2 error against a filter that is zero past its last tap (reduction/hankel.py).
    """
    taps = taps.double()  # in float32 the eigenvalue solver failed for filters that decay fast
    ended = F.pad(taps[:, 1:], (0, taps.shape[1] - 2))
    squares = torch.linalg.eigvalsh(weighted_section(ended)).square().sort(dim=-1, descending=True).values
    energy = taps.square().sum(-1).clamp_min(torch.finfo(taps.dtype).tiny)
    return squares[:, states:].sum(-1) / energy


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
