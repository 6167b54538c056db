"""Perplexity in a sliding window, per token and per byte, by position in the context and beyond the training length."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from scavenger import measure
from scavenger.evaluation import metrics
from scavenger.evaluation.metrics import Metric
from scavenger.evaluation.models import Evaluated
from scavenger.evaluation.text import Text


BEYOND = 4  # contexts that positions are measured in, as a multiple of the window: past every training length of ours
LONG_CONTEXTS = 32  # of them at most: 32 times 1,024 tokens tell positions apart by a few per cent


@dataclass(frozen=True)
class Settings:
    """Windows of `context_length` tokens, `stride` apart; positions in contexts of `longest`."""

    context_length: int
    stride: int
    longest: int

    def __post_init__(self):
        if self.context_length < 2:
            raise ValueError(f"found a context of {self.context_length} tokens; expected 2 or more")
        if not 1 <= self.stride <= self.context_length:
            raise ValueError(
                f"found a stride of {self.stride}; expected 1 to {self.context_length}, the length of a window"
            )


def settings_for(models: list[Evaluated], context_length=None, stride=None, longest=None) -> Settings:
    """What is not given: the shortest training context, half of it, and four times it."""
    length = context_length or min(model.training_context for model in models)
    return Settings(length, stride or max(1, length // 2), longest or BEYOND * length)


def of_text(model: Evaluated, text: Text, settings: Settings) -> dict:
    """Sliding-window perplexity of documents, each on its own behind an end-of-text token, and of positions.

    A window reads `context_length` tokens and predicts each next one; those that no earlier window predicted count:
    all of the first, `stride` of the following ones. Every token of a document is predicted once, so that nats per
    byte compare models of different tokenizers (stride = context_length is lm-eval's rolling log-likelihood).
    """
    documents = text.ids(model.tokenizer)
    losses = sliding(model.model, documents, settings.context_length, settings.stride, model.tokenizer.eos_token_id)
    sizes = [len(document.encode(errors="replace")) for document in text.documents]
    found = _metrics(losses, [len(ids) - 1 for ids in documents], sizes)
    stream = np.concatenate([np.array(ids, dtype=np.int64) for ids in documents])
    return {"metrics": [metrics.packed(metric) for metric in found + by_position(model, stream, settings)]}


def of_blocks(model: Evaluated, blocks: np.ndarray, settings: Settings) -> dict:
    """Perplexity of a run's held-out blocks (block, length), each read on its own, its first token context only.

    Items are documents, which an end-of-text token begins; a document's part of a block counts to it.
    """
    loss = block_losses(model.model, blocks)
    end = model.tokenizer.eos_token_id
    document = np.cumsum(blocks.reshape(-1) == end).reshape(blocks.shape)[:, 1:]
    document -= document.min()
    sums, counts = np.bincount(document.reshape(-1), loss.reshape(-1)), np.bincount(document.reshape(-1))
    sizes = np.zeros(len(sums))
    for rows, places in zip(blocks, document, strict=True):
        for place in np.unique(places):
            own = rows[1:][places == place]
            sizes[place] += len(model.tokenizer.decode(own[own != end]).encode())
    seen = counts > 0
    found = _metrics(sums[seen], counts[seen], sizes[seen])
    return {
        "metrics": [metrics.packed(metric) for metric in found + by_position(model, blocks.reshape(-1), settings)]
    }


def by_position(model: Evaluated, stream: np.ndarray, settings: Settings) -> list[Metric]:
    """Perplexity by position, in contexts of `longest` tokens (or the most there are of), each read on its own.

    Positions are in bins that double, 1, 2-3, 4-7, …; the last metric is of those past the window.
    """
    longest = min(settings.longest, len(stream))
    count = min(LONG_CONTEXTS, len(stream) // longest)
    loss = block_losses(model.model, stream[: count * longest].reshape(count, longest))
    position = np.arange(1, longest)  # tokens read before the one that is predicted
    found = []
    for power in range(int(math.log2(longest - 1)) + 1):
        inside = (position >= 2**power) & (position < 2 ** (power + 1))
        sums, counts = loss[:, inside].sum(1), [int(inside.sum())] * count
        name = f"perplexity at {2**power:,}–{min(2 ** (power + 1), longest) - 1:,}"
        found.append(Metric(name, sums.tolist(), counts, "", "lower", True, "position", float(2**power)))
    past = position >= settings.context_length
    if past.any():
        found.append(
            Metric(
                f"perplexity past {settings.context_length:,}, up to {longest:,}",
                loss[:, past].sum(1).tolist(),
                [int(past.sum())] * count,
                "",
                "lower",
                exponential=True,
                headline=True,
            )
        )
    return found


def sliding(model: nn.Module, documents: list[list[int]], length: int, stride: int, filler: int) -> list[float]:
    """Σ -log p of all tokens of each document but its first, in nats."""
    windows = [
        (number, begin, first, end)
        for number, ids in enumerate(documents)
        for begin, first, end in _windows(len(ids) - 1, length, stride)
    ]
    windows.sort(key=lambda window: window[1] - window[3])  # the longest first: equal lengths share a batch
    sums = np.zeros(len(documents))
    rows = max(1, measure.BATCH_TOKENS // length)
    for start in tqdm(range(0, len(windows), rows), desc="perplexity", unit="batch", leave=False, dynamic_ncols=True):
        batch = windows[start : start + rows]
        width = batch[0][3] - batch[0][1]
        ids = np.full((len(batch), width + 1), filler)  # filled at the end, where a causal model does not look
        for row, (number, begin, _, end) in zip(ids, batch, strict=True):
            row[: end - begin + 1] = documents[number][begin : end + 1]
        loss = block_losses(model, ids)
        for own, (number, begin, first, end) in zip(loss, batch, strict=True):
            sums[number] += own[first - begin : end - begin].sum()
    return sums.tolist()


@torch.inference_mode()
def block_losses(model: nn.Module, blocks: np.ndarray) -> np.ndarray:
    """-log p of each token but the first of each block, (block, length - 1) float64, nats."""
    device = next(model.parameters()).device
    rows, found = max(1, measure.BATCH_TOKENS // blocks.shape[1]), []
    for start in range(0, len(blocks), rows):
        ids = torch.from_numpy(blocks[start : start + rows].astype(np.int64)).to(device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        found.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().cpu())
    return torch.cat(found).numpy()


def _windows(tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end): reads places begin … end - 1, and those that count predict first + 1 … end."""
    first, end = 0, min(length, tokens)
    while first < tokens:
        yield max(0, end - length), first, end
        first, end = end, min(end + stride, tokens)


def _metrics(losses, tokens, sizes) -> list[Metric]:
    losses, tokens, sizes = (list(map(float, each)) for each in (losses, tokens, sizes))
    bits = [loss / math.log(2) for loss in losses]
    return [
        Metric("perplexity", losses, tokens, "", "lower", exponential=True, headline=True),
        Metric("bits per byte", bits, sizes, "bits", "lower", headline=True),
    ]


def described(settings: Settings) -> dict:
    """For the record."""
    return dataclasses.asdict(settings)
