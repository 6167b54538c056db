"""The losses of the pipeline: pure functions, in float32 or wider whatever the model's dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F


def activation_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖student - teacher‖² / ‖teacher‖² over all elements: 0 is a perfect match, 1 is as good as silence.

    Relative to the teacher's energy, so that layers compare and none needs a weight.
    """
    student, teacher = _wide(student), _wide(teacher)
    return (student - teacher).square().sum() / teacher.square().sum().clamp_min(torch.finfo(teacher.dtype).tiny)


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
