"""Measurements of a model: loss and agreement on held-out text, filter taps, and state size."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


BATCH_TOKENS = 8192  # tokens per evaluation batch; limits the memory of the logits


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


def held_out(model: nn.Module, blocks: np.ndarray, teacher: nn.Module | None = None) -> HeldOut:
    """Cross-entropy of `model` on blocks (block, length), and agreement with and divergence from `teacher`, if given.

    Blocks are independent; the first token is context only, so a block has length - 1 predicted tokens.
    """
    found = by_position(model, blocks, teacher)
    return HeldOut(
        found.loss.mean().item(),
        found.agreement.mean().item() if teacher is not None else None,
        found.divergence.mean().item() if teacher is not None else None,
        len(blocks) * (blocks.shape[1] - 1),
    )


@dataclass(frozen=True)
class ByPosition:
    """Means over blocks at each predicting position, (length - 1,) float64; the first is a block's first token."""

    loss: torch.Tensor
    agreement: torch.Tensor | None
    divergence: torch.Tensor | None
    teacher_loss: torch.Tensor | None


@torch.inference_mode()
def by_position(model: nn.Module, blocks: np.ndarray, teacher: nn.Module | None = None) -> ByPosition:
    """The quantities of `held_out` at each position, averaged over blocks only."""
    device = next(model.parameters()).device
    rows = max(1, BATCH_TOKENS // blocks.shape[1])
    sums = torch.zeros(4, blocks.shape[1] - 1, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for start in range(0, len(blocks), rows):
        ids = torch.from_numpy(blocks[start : start + rows].astype(np.int64)).to(device)
        targets = ids[:, 1:, None]
        log_p = F.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)
        sums[0] -= log_p.gather(-1, targets)[..., 0].sum(0)
        if teacher is not None:
            log_q = F.log_softmax(teacher(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)
            sums[1] += (log_p.argmax(-1) == log_q.argmax(-1)).sum(0)
            sums[2] += (log_q.exp() * (log_q - log_p)).sum((0, 2))
            sums[3] -= log_q.gather(-1, targets)[..., 0].sum(0)
    model.train(was_training)
    loss, *compared = sums.cpu() / len(blocks)
    return ByPosition(loss, *(compared if teacher is not None else (None, None, None)))


@torch.no_grad()
def filter_taps(filter: nn.Module, length: int) -> torch.Tensor:
    """The first taps of a filter module in float64, (filter, length)."""
    return copy.deepcopy(filter).double()(length)


def state_bytes(cache) -> int:
    """Bytes of a cache between tokens: a HyenaCache, or the keys and values of a transformers cache."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
