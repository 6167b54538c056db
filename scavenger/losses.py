"""The losses of the pipeline: pure functions, in float32 or wider whatever the model's dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F


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


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))
