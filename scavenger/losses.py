"""The losses of the pipeline: pure functions, in float32 or wider whatever the model's dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F

from scavenger.reduction.hankel import weighted_section


def activation_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖student - teacher‖² / ‖teacher‖² of each sequence, a mean over sequences: 0 is a match, 1 is as good as silence.

    Both (batch, length, channel). Relative to the teacher's energy, so that layers compare and none needs a weight; a
    mean over sequences, so that it does not matter how a batch is spread over processes.
    """
    student, teacher = _wide(student).flatten(1), _wide(teacher).flatten(1)
    energy = teacher.square().sum(1).clamp_min(torch.finfo(teacher.dtype).tiny)
    return ((student - teacher).square().sum(1) / energy).mean()


def logit_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) = Σ_v p_v (log p_v - log q_v), nats per token, a mean over all positions.

    Logits are (…, vocabulary).
    """
    log_q, log_p = F.log_softmax(_wide(student), dim=-1), F.log_softmax(_wide(teacher), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """-log q(next token), nats per token, a mean over the positions that have a next one.

    Logits (batch, length, vocabulary), ids (batch, length).
    """
    return F.cross_entropy(_wide(logits[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


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
