"""Measurements of a model: loss and agreement on held-out text, filter taps, and state size."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


BATCH_TOKENS = 8192  # tokens per evaluation batch, fewer where the vocabulary is large
LOGITS_BYTES = 2**29  # of a batch's logits in float32, unless a single sequence has more
STATES = ("keys", "values", "conv_states", "recurrent_states")  # of a layer of transformers' caches
CHUNK_BYTES = 2**26  # of log-probabilities in float32: several such tensors are held at once


@dataclass(frozen=True)
class HeldOut:
    """Means over the predicted positions of held-out blocks."""

    loss: float  # cross-entropy, nats per token
    agreement: float | None  # share of positions where the most likely token is the teacher's
    divergence: float | None  # KL(teacher || model), nats per token
    tokens: int  # predicted positions that count

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def held_out(
    model: nn.Module, blocks: np.ndarray, teacher: nn.Module | None = None, counted: np.ndarray | None = None
) -> HeldOut:
    """Cross-entropy of `model` on blocks (block, length), and agreement with and divergence from `teacher`, if given.

    Blocks are independent; the first token is context only, so a block has length - 1 predicted tokens. With `counted`
    (block, length) the means are over the predictions of those tokens only.
    """
    found = by_position(model, blocks, teacher, counted)
    return HeldOut(
        found.mean("loss"),
        found.mean("agreement") if teacher is not None else None,
        found.mean("divergence") if teacher is not None else None,
        found.tokens(),
    )


@dataclass(frozen=True)
class ByPosition:
    """Means over blocks at each predicting position, (length - 1,) float64; the first is a block's first token.

    `counts` is the number of predictions in each mean; a mean of none is 0.
    """

    loss: Tensor
    agreement: Tensor | None
    divergence: Tensor | None
    teacher_loss: Tensor | None
    counts: Tensor

    def tokens(self, part: slice = slice(None)) -> int:
        """The number of predictions at some positions."""
        return int(self.counts[part].sum())

    def mean(self, name: str, part: slice = slice(None)) -> float:
        """The mean over all predictions at some positions; NaN where there is none."""
        counts = self.counts[part]
        return ((getattr(self, name)[part] * counts).sum() / counts.sum()).item()


@torch.inference_mode()
def by_position(
    model: nn.Module, blocks: np.ndarray, teacher: nn.Module | None = None, counted: np.ndarray | None = None
) -> ByPosition:
    """The quantities of `held_out` at each position, averaged over blocks only."""
    device = next(model.parameters()).device
    sums = torch.zeros(4, blocks.shape[1] - 1, dtype=torch.float64, device=device)
    counts = torch.zeros_like(sums[0])
    was_training = model.training
    model.eval()
    rows = batch_rows(model.config.vocab_size, blocks.shape[1])
    for start in range(0, len(blocks), rows):
        ids = torch.from_numpy(blocks[start : start + rows].astype(np.int64)).to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        others = None if teacher is None else teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        found = compared(logits, ids[:, 1:], others)
        own = torch.ones_like(ids[:, 1:], dtype=torch.bool)
        if counted is not None:
            own = torch.from_numpy(np.array(counted[start : start + rows, 1:])).to(device)
        sums[: len(found)] += torch.where(own, found, 0.0).sum(1)
        counts += own.sum(0)
    model.train(was_training)
    loss, *rest = sums.cpu() / counts.cpu().clamp_min(1)
    return ByPosition(loss, *(rest if teacher is not None else (None, None, None)), counts.cpu())


def batch_rows(vocabulary: int, length: int) -> int:
    """Sequences of a length that are evaluated at once, for a model with so many logits a position."""
    return max(1, min(BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary)) // length)


def compared(logits: Tensor, targets: Tensor, teacher: Tensor | None = None) -> Tensor:
    """-log p of each target, (1, batch, position) float64, nats, from logits (batch, position, vocabulary).

    With a teacher's logits, (4, …): also whether the most likely token is the teacher's, KL(teacher || model), and the
    teacher's own -log p. In chunks of positions, so that no more than CHUNK_BYTES are held beside the logits.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    found = torch.zeros(1 if teacher is None else 4, *targets.shape, dtype=torch.float64, device=logits.device)
    count = max(1, CHUNK_BYTES // (4 * len(logits) * logits.shape[-1]))
    for start in range(0, targets.shape[1], count):
        part = slice(start, start + count)
        target = targets[:, part, None]
        log_p = F.log_softmax(logits[:, part].to(wide), dim=-1)
        found[0, :, part] = -log_p.gather(-1, target)[..., 0]
        if teacher is not None:
            log_q = F.log_softmax(teacher[:, part].to(wide), dim=-1)
            found[1, :, part] = log_p.argmax(-1) == log_q.argmax(-1)
            found[2, :, part] = (log_q.exp() * (log_q - log_p)).sum(-1)
            found[3, :, part] = -log_q.gather(-1, target)[..., 0]
    return found


@torch.no_grad()
def filter_taps(filter: nn.Module, length: int) -> Tensor:
    """The first taps of a filter module in float64, (filter, length)."""
    return copy.deepcopy(filter).double()(length)


def state_bytes(cache) -> int:
    """Bytes of a cache between tokens: a HyenaCache, transformers' caches of any layers, or tensors in lists."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    if hasattr(cache, "layers"):
        return state_bytes(cache.layers)
    if isinstance(cache, dict):
        return state_bytes(list(cache.values()))
    if isinstance(cache, list | tuple):
        return sum(map(state_bytes, cache))
    return state_bytes([getattr(cache, name) for name in STATES if getattr(cache, name, None) is not None])
