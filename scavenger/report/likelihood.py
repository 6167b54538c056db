"""Perplexity in a sliding window, per token and per byte, by position in the context and beyond the training length."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn
from tqdm import tqdm

from scavenger import data, measure
from scavenger.report import metrics
from scavenger.report.evaluated import Evaluated, readable
from scavenger.report.metrics import Metric
from scavenger.report.text import Blocks, Text


BEYOND = 4  # length of the contexts for positions, in windows: beyond all our training lengths
AGREEMENT = "same most likely token"
DIVERGENCE = "KL from the reference"
LONG_CONTEXTS = 32  # at most: 32 contexts of 1,024 tokens resolve differences of a few per cent


@dataclass(frozen=True)
class Settings:
    """Windows of `context_length` tokens, `stride` apart; contexts of `longest` tokens for perplexity by position."""

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
        if self.longest < 2:
            raise ValueError(f"found contexts of {self.longest} tokens for positions; expected 2 or more")


def settings_for(models: list[Evaluated], context_length=None, stride=None, longest=None) -> Settings:
    """Defaults: the shortest training context, half of it as stride, and four times it for positions."""
    asked = context_length or min(model.training_context for model in models)
    length = readable(models, asked, "perplexity")
    if stride is not None and length < asked:
        stride = min(stride, length)
    longest = readable(models, longest or BEYOND * length, "perplexity by position")
    return Settings(length, stride or max(1, length // 2), longest)


def of(model: Evaluated, text: Text | Blocks, settings: Settings, reference: Evaluated | None = None) -> dict:
    """Perplexity, agreement with a reference on the same tokens, and perplexity by position."""
    measure_all = of_blocks if isinstance(text, Blocks) else of_documents
    found = measure_all(model, text, settings, reference)
    stream, counted = text.stream(model.tokenizer), getattr(text, "counted", None)
    counted = None if counted is None else np.asarray(counted).reshape(-1)
    return {"metrics": [metrics.packed(metric) for metric in found + by_position(model, stream, settings, counted)]}


def of_documents(model: Evaluated, text: Text, settings: Settings, reference: Evaluated | None = None) -> list[Metric]:
    """Metrics in a sliding window; each document is read independently, after `data.beginning`'s token.

    A window reads `context_length` tokens and predicts the next token after each; predictions count if no earlier
    window made them: all of the first window, `stride` of each later one. Every token of a document counts once, so
    bits per byte compare models with different tokenizers (stride = context_length is lm-eval's rolling
    log-likelihood).
    """
    documents = text.ids(model.tokenizer)
    if all(len(ids) < 2 for ids in documents):
        raise ValueError(f"{text.name}: found no token to predict; expected some text")
    sums = sliding(model, documents, settings.context_length, settings.stride, reference)
    sizes = [len(document.encode(errors="replace")) for document in text.documents]
    return _metrics(sums, [len(ids) - 1 for ids in documents], sizes)


def of_blocks(model: Evaluated, text: Blocks, settings: Settings, reference: Evaluated | None = None) -> list[Metric]:
    """Metrics on a run's held-out blocks (block, length), each read independently; its first token is only context.

    Items are documents, each beginning with `data.beginning`'s token; the parts of a document in several blocks are
    summed. Only the predictions that the text counts are measured.
    """
    blocks, first = np.asarray(text.blocks).astype(np.int64), data.beginning(model.tokenizer)
    document = np.cumsum(blocks.reshape(-1) == first).reshape(blocks.shape)[:, 1:]
    count, places, counted = document.max() + 1, document.reshape(-1), text.predictions
    found = predictions(model.model, blocks, reference and reference.model)
    sums = np.stack([np.bincount(places, np.where(counted, each, 0).reshape(-1), count) for each in found])
    tokens, sizes = np.bincount(places[counted.reshape(-1)], minlength=count), np.zeros(count)
    for ids, own, counts in zip(blocks[:, 1:], document, counted, strict=True):
        for number in np.unique(own[counts]):
            part = ids[counts & (own == number)]
            frame = [first, model.tokenizer.eos_token_id]
            sizes[number] += _bytes(model.tokenizer.decode(part[~np.isin(part, frame)]))
    seen = tokens > 0
    return _metrics(sums[:, seen], tokens[seen], sizes[seen])


def by_position(
    model: Evaluated, stream: np.ndarray, settings: Settings, counted: np.ndarray | None = None
) -> list[Metric]:
    """Perplexity by position, in contexts of `longest` tokens (or the whole of a shorter text), read independently.

    Positions are in bins of doubling width, 1, 2-3, 4-7, …; the last metric covers those beyond the window. Items are
    documents, as in `of_blocks`: contexts from one document are much alike. `counted` (token,) says which predictions
    are measured (None: all); a bin without any has no metric.
    """
    longest = min(settings.longest, len(stream))
    count = min(LONG_CONTEXTS, len(stream) // longest)
    ids = stream[: count * longest].reshape(count, longest)
    loss = predictions(model.model, ids)[0]
    counted = np.ones(len(stream), dtype=bool) if counted is None else counted
    counted = counted[: ids.size].reshape(ids.shape)[:, 1:]
    document = np.cumsum(ids.reshape(-1) == data.beginning(model.tokenizer)).reshape(ids.shape)[:, 1:]
    position = np.arange(1, longest)  # tokens read before the predicted one
    found = []

    def of_places(inside):
        inside = counted & inside
        own = document[inside]
        sums = np.bincount(own, loss[inside], document.max() + 1)
        return sums.tolist(), np.bincount(own, minlength=len(sums)).astype(float).tolist()

    for power in range(int(math.log2(longest - 1)) + 1):
        inside = (position >= 2**power) & (position < 2 ** (power + 1))
        first, last = 2**power, min(2 ** (power + 1), longest) - 1
        name = f"perplexity at {first:,}" + (f"–{last:,}" if last > first else "")
        if counted[:, inside].any():
            found.append(Metric(name, *of_places(inside), "", "lower", True, "position", float(2**power)))
    past = position >= settings.context_length
    if counted[:, past].any():
        found.append(
            Metric(
                f"perplexity past {settings.context_length:,}, up to {longest:,}",
                *of_places(past),
                "",
                "lower",
                exponential=True,
                headline=True,
            )
        )
    return found


def sliding(
    model: Evaluated, documents: list[list[int]], length: int, stride: int, reference: Evaluated | None = None
) -> np.ndarray:
    """The values of `predictions` summed over each document's tokens except the first, (kind, document)."""
    windows = [
        (number, begin, first, end)
        for number, ids in enumerate(documents)
        for begin, first, end in _windows(len(ids) - 1, length, stride)
    ]
    windows.sort(key=lambda window: window[1] - window[3])  # longest first: equal lengths share a batch
    sums = np.zeros((3 if reference else 1, len(documents)))
    rows = max(1, measure.BATCH_TOKENS // length)
    for start in tqdm(range(0, len(windows), rows), desc="perplexity", unit="batch", leave=False, dynamic_ncols=True):
        batch = windows[start : start + rows]
        width = batch[0][3] - batch[0][1]
        # Padded on the right, which does not affect a causal model's predictions of the tokens before.
        ids = np.full((len(batch), width + 1), model.tokenizer.eos_token_id)
        for row, (number, begin, _, end) in zip(ids, batch, strict=True):
            row[: end - begin + 1] = documents[number][begin : end + 1]
        found = predictions(model.model, ids, reference and reference.model)
        for row, (number, begin, first, end) in enumerate(batch):
            sums[:, number] += found[:, row, first - begin : end - begin].sum(-1)
    return sums


def predictions(model: nn.Module, blocks: np.ndarray, reference: nn.Module | None = None) -> np.ndarray:
    """-log p of each token of the blocks except the first, (1, block, length - 1) float64, nats.

    With a reference, (3, …): also whether the most likely token is the reference's, and KL(reference || model).
    """
    return measure.numbers(measure.by_token(model, blocks, reference)).numpy()[:3]


def _bytes(text):
    """Size in UTF-8; a character cut by a block's edge counts as one byte on each side, about its share."""
    return len(text.replace("\ufffd", "?").encode())


def _windows(tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end): a window reads tokens begin … end - 1, and its predictions of first + 1 … end count."""
    first, end = 0, min(length, tokens)
    while first < tokens:
        yield max(0, end - length), first, end
        first, end = end, min(end + stride, tokens)


def _metrics(sums, tokens, sizes) -> list[Metric]:
    losses, *nearness = (np.asarray(each, dtype=float).tolist() for each in sums)
    tokens, sizes = (np.asarray(each, dtype=float).tolist() for each in (tokens, sizes))
    bits = [loss / math.log(2) for loss in losses]
    found = [
        Metric("perplexity", losses, tokens, "", "lower", exponential=True, headline=True),
        Metric("bits per byte", bits, sizes, "bits", "lower", headline=True),
    ]
    if nearness:
        agreed, divergence = nearness
        near = {"headline": True, "relative": True}
        found.append(Metric(AGREEMENT, agreed, tokens, "share", "higher", **near))
        found.append(Metric(DIVERGENCE, divergence, tokens, "nats", "lower", **near))
    return found


def described(settings: Settings) -> dict:
    """The settings, as recorded with a result."""
    return dataclasses.asdict(settings)
