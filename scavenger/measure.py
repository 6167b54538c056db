"""What the pipeline and the reports measure on a model: loss and agreement on held-out text."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


BATCH_TOKENS = 8192  # tokens of one evaluation batch; bounds the logits in memory


@dataclass(frozen=True)
class HeldOut:
    """Means over the predicted positions of held-out blocks."""

    loss: float  # cross-entropy, nats per token
    agreement: float | None  # share of positions where the most likely token is the teacher's
    divergence: float | None  # KL(teacher || model), nats per token
    tokens: int  # predicted positions

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.inference_mode()
def held_out(model: nn.Module, blocks: np.ndarray, teacher: nn.Module | None = None) -> HeldOut:
    """Cross-entropy of `model` on blocks (block, length), and how near it is to `teacher` if one is given.

    Every block is read on its own; its first token is context only, so a block predicts length - 1 tokens.
    """
    device = next(model.parameters()).device
    rows = max(1, BATCH_TOKENS // blocks.shape[1])
    loss = agree = divergence = 0.0
    count = 0
    was_training = model.training
    model.eval()
    for start in range(0, len(blocks), rows):
        ids = torch.from_numpy(blocks[start : start + rows].astype(np.int64)).to(device)
        targets = ids[:, 1:].flatten()
        log_p = F.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float(), dim=-1)
        loss += F.nll_loss(log_p, targets, reduction="sum").double().item()
        count += len(targets)
        if teacher is not None:
            log_q = F.log_softmax(teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float(), dim=-1)
            agree += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
            divergence += (log_q.exp() * (log_q - log_p)).sum().double().item()
    model.train(was_training)
    return HeldOut(loss / count, agree / count if teacher is not None else None,
                   divergence / count if teacher is not None else None, count)
