"""What the pipeline and the reports measure on a model: loss and agreement on held-out text, speed and state."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


BATCH_TOKENS = 8192  # tokens of one evaluation batch; bounds the logits in memory
TIMED_STEPS = 32  # tokens timed after a prompt; the median step is what counts
TIMED_SECONDS = 2.0  # a model that reads everything again at each token is timed no longer than this


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
    return HeldOut(
        loss / count,
        agree / count if teacher is not None else None,
        divergence / count if teacher is not None else None,
        count,
    )


@dataclass(frozen=True)
class Generation:
    """One sequence, after a prompt of `context_length` tokens."""

    context_length: int
    prefill_seconds: float
    tokens_per_second: float  # of the median step
    state_bytes: int | None  # what is kept between tokens; None where nothing is and the input is read again


@torch.inference_mode()
def generation(model: nn.Module, prompt: torch.Tensor) -> Generation:
    """Time greedy steps after a prompt (1, length), by the model's own cache where it has one."""
    device = next(model.parameters()).device
    prompt = prompt.to(device)
    model(input_ids=prompt[:, :2], use_cache=True)  # the first call pays for start-up
    began = _now(device)
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    prefill = _now(device) - began
    held = None if out.past_key_values is None else state_bytes(out.past_key_values)
    cache, ids, steps = out.past_key_values, prompt, []
    while len(steps) < TIMED_STEPS and (len(steps) < 3 or sum(steps) < TIMED_SECONDS):
        token = out.logits[:, -1:].argmax(-1)
        began = _now(device)
        if cache is None:
            ids = torch.cat([ids, token], dim=1)
            out = model(input_ids=ids, use_cache=False, logits_to_keep=1)
        else:
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
        steps.append(_now(device) - began)
    return Generation(prompt.shape[1], prefill, 1 / sorted(steps)[len(steps) // 2], held)


def state_bytes(cache) -> int:
    """Bytes that a cache keeps between tokens: a HyenaCache, or the keys and values of transformers' own."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
