"""Measurements of a model: loss and agreement on held-out text, filter taps, and state size."""

import copy
import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from scavenger import losses
from scavenger.model.precision import tensor_cores


BATCH_TOKENS = 8192  # tokens per evaluation batch
COMPARED = 4  # tokens on which a model's own logits are compared with its head's
MATRIX = {"cpu": 1024, "cuda": 8192}  # side of the matrices of `matrix_rate`: milliseconds a product
STATES = ("keys", "values", "conv_states", "recurrent_states")  # of a layer of transformers' caches


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


def by_position(
    model: nn.Module, blocks: np.ndarray, teacher: nn.Module | None = None, counted: np.ndarray | None = None
) -> ByPosition:
    """The quantities of `held_out` at each position, averaged over blocks only."""
    was_training = model.training
    model.eval()
    found = by_token(model, blocks, teacher)
    model.train(was_training)
    own = torch.ones(found.shape[1:], dtype=torch.bool)
    if counted is not None:
        own = torch.from_numpy(np.array(counted[:, 1:]))
    counts = own.sum(0, dtype=torch.float64)
    loss, *rest = torch.where(own, found, 0.0).sum(1) / counts.clamp_min(1)
    return ByPosition(loss, *(rest if teacher is not None else (None, None, None)), counts)


@torch.no_grad()  # what a sharded launch gathers meanwhile, its trainings use again
@tensor_cores()
def by_token(model: nn.Module, blocks: np.ndarray, teacher: nn.Module | None = None, last: int | None = None) -> Tensor:
    """-log p of the `last` tokens of each block, of all but the first by default: (1, block, token) float64, nats.

    With a teacher, (4, …): also whether the most likely token is the teacher's, KL(teacher || model), and the teacher's
    own -log p.
    """
    count = blocks.shape[1] - 1 if last is None else last
    targets = torch.from_numpy(blocks[:, -count:].astype(np.int64)).flatten()
    found = torch.empty(1 if teacher is None else 4, len(targets), dtype=torch.float64)
    predicting = np.arange(1, blocks.shape[1]) >= blocks.shape[1] - count
    models = [model] if teacher is None else [model, teacher]
    for part, logits in in_chunks(models, blocks[:, :-1], predicting):
        found[:, part] = compared(logits[0], targets[part].to(logits[0].device), *logits[1:]).cpu()
    return found.unflatten(1, (len(blocks), count))


@tensor_cores()
def log_probabilities(
    model: nn.Module, ids: np.ndarray, wanted: np.ndarray, tokens: np.ndarray, what: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """log p of `tokens` (position, choice) at the wanted positions of `in_chunks`, and the most likely token at each.

    (position, choice) float64, nats, and (position,). `what` names a progress bar. ValueError where a logit is NaN.
    """
    asked = torch.from_numpy(tokens.astype(np.int64))
    found, likeliest = torch.empty(asked.shape, dtype=torch.float64), torch.empty(len(asked), dtype=torch.long)
    # Nothing is shown in the first second: heads are ranked by hundreds of measurements that take no longer.
    options = {"leave": False, "delay": 1, "dynamic_ncols": True, "disable": not what}
    with tqdm(total=len(asked), desc=what, unit="token", **options) as bar:
        for part, (logits,) in in_chunks([model], ids, wanted):
            log_p = F.log_softmax(numbers(logits), dim=-1)
            found[part] = log_p.gather(-1, asked[part].to(log_p.device)).cpu().double()
            likeliest[part] = log_p.argmax(-1).cpu()
            bar.update(len(log_p))
    return found.numpy(), likeliest.numpy()


def numbers(found: Tensor) -> Tensor:
    """Logits, or what was made of them, unchanged; ValueError if any is NaN: every comparison with NaN is false."""
    if found.isnan().any():
        raise ValueError("a model's logits are not numbers (NaN); expected finite weights")
    return found


@torch.no_grad()
def in_chunks(models: Sequence[nn.Module], ids: np.ndarray, wanted: np.ndarray) -> Iterator[tuple[slice, list[Tensor]]]:
    """The models' logits (position, vocabulary), in float32 or wider, where `wanted` is true of ids (sequence, length).

    In chunks of at most losses.chunk_rows positions; the slice is a chunk's place among all wanted positions in order.
    `wanted` is (sequence, length), or (length,) for all sequences. The head runs on a chunk of the body's output. Where
    that does not give the model's own logits, for example because it caps them, the logits of one whole sequence are
    computed at once.
    """
    device = next(models[0].parameters()).device
    wanted = np.broadcast_to(wanted, ids.shape)
    first = torch.from_numpy(ids[:1, :COMPARED].astype(np.int64)).to(device)
    heads, sizes = zip(*(_head(model, first) for model in models), strict=True)
    count = losses.chunk_rows(max(sizes))
    rows = max(1, BATCH_TOKENS // ids.shape[1]) if all(heads) else 1
    done = 0
    for start in range(0, len(ids), rows):
        batch = torch.from_numpy(ids[start : start + rows].astype(np.int64)).to(device)
        places = torch.from_numpy(np.flatnonzero(wanted[start : start + rows])).to(device)
        states = [
            (model.base_model(input_ids=batch, use_cache=False).last_hidden_state if head else _logits(model, batch))
            for model, head in zip(models, heads, strict=True)
        ]
        for part in places.split(count):
            chosen = [state.flatten(0, 1)[part] for state in states]
            logits = [head(state) if head else state for head, state in zip(heads, chosen, strict=True)]
            yield slice(done, done + len(part)), [losses.wide(each) for each in logits]
            done += len(part)


def _head(model, ids):
    """The model's head, or None where the model's logits are not exactly head(body); and the size of the vocabulary."""
    logits, body, layer = _logits(model, ids), model.base_model, model.get_output_embeddings()
    if body is model or layer is None:
        return None, logits.shape[-1]

    def head(last):
        return layer(last.to(layer.weight.dtype))  # some bodies keep float32 whatever the dtype of their weights

    last = body(input_ids=ids, use_cache=False).last_hidden_state
    return head if torch.equal(losses.wide(head(last)), losses.wide(logits)) else None, logits.shape[-1]


def _logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def compared(logits: Tensor, targets: Tensor, teacher: Tensor | None = None) -> Tensor:
    """-log p of each target, (1, position) float64, nats, from logits (position, vocabulary); with a teacher's (4, …).

    The four are those of `by_token`.
    """
    found = [losses.cross_entropy(logits, targets)]
    if teacher is not None:
        found.append(logits.argmax(-1) == teacher.argmax(-1))
        found.append(losses.logit_divergence(logits, teacher))
        found.append(losses.cross_entropy(teacher, targets))
    return torch.stack([each.double() for each in found])


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices, the best of a few: what a device reaches at most, without a data sheet.

    In float32 with the precision that torch.set_float32_matmul_precision set.
    """
    side, row = MATRIX[device.type], 10 if device.type == "cuda" else 1  # in a row: a launch takes longer than it shows
    made = torch.ones(side, side, device=device, dtype=dtype)

    def seconds():
        began = _now(device)
        for _ in range(row):
            made @ made
        return (_now(device) - began) / row

    return 2 * side**3 / min(seconds() for _ in range(8))


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
