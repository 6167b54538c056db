"""Allocation of a state budget: modes go to the filters where they reduce the output's divergence most per byte.

The effect on the output of changes δ_f of the taps of every filter f is, to second order, a quadratic form. With p the
exact student's distribution, labels y drawn from it and g_f the gradient of log p(y) over T tokens w.r.t. the taps,

    KL per token ≈ 1/(2T) E (Σ_f ⟨g_f, δ_f⟩)²

(the Fisher information; scores of different tokens are uncorrelated, so a sequence's square sums over its tokens).
The share of one filter is the same without the other filters: 1/(2T) E ⟨g_f, δ_f⟩².
"""

import contextlib

import numpy as np
import torch
from torch import Tensor, nn

from scavenger import losses, measure
from scavenger.model import HyenaConfig, HyenaForCausalLM
from scavenger.model.filters import ModalFilter, PositiveFilter
from scavenger.recipe import RecipeError
from scavenger.recurrence.reduction.reduced import ReducedFilter


SEQUENCES = 64  # sequences to measure on: the relative standard error of a mean square over them is √(2/64), 18 %
GRADIENT_BYTES = 1 << 28  # gradients in memory at a time


def ladder(max_state_size: int) -> list[int]:
    """Candidate state sizes, in steps of a third to a half: 1, 2, 3, 4, 6, 8, 12, …, max_state_size."""
    sizes = {size for power in range(max_state_size.bit_length()) for size in (2**power, 3 * 2**power // 2)}
    return sorted(size for size in sizes if size < max_state_size) + [max_state_size]


def check(config: HyenaConfig, budget: int, itemsize: int):
    """Raise RecipeError for a budget that cannot be met, before any work; `itemsize` is that of decoding."""
    least = state_bytes(config, itemsize)
    if least is None:
        raise RecipeError(
            f"recurrence.state_bytes: found {budget}; expected no value: the kept attention has no window, so the "
            "state grows with every token"
        )
    if budget < least:
        raise RecipeError(
            f"recurrence.state_bytes: found {budget}; expected {least} or more: short convolutions and kept "
            "attention take that much before any mode"
        )


def spread(
    student: HyenaForCausalLM,
    found: list[list[list[ReducedFilter]]],  # by layer, size and filter
    budget: int,  # bytes per sequence
    blocks: np.ndarray,  # (block, length) held-out text
    positive: bool = False,  # whether the recurrences have real modes
    itemsize: int = 4,  # bytes of the other numbers of the state
) -> tuple[list[list[int]], dict]:
    """The size of each filter, by layer, and the predicted divergence, in total and by layer.

    The sizes are chosen on the same draws, so the prediction is biased low; the certificate measures the divergence,
    on other text.
    """
    changes, tokens = responses(student, found, blocks, positive=positive), blocks.shape[1] - 1
    for_modes = budget - state_bytes(student.config, itemsize)
    chosen = allocate(mode_costs(student.config, found, positive), divergences(changes, tokens), for_modes)
    taken = [picked(layer, own) for layer, own in zip(changes, chosen, strict=True)]  # (sequence, filter) each
    together = sum(layer.sum(1) for layer in taken)
    alone = [float(layer.sum()) for layer in divergences(taken, tokens)]
    return [own.tolist() for own in chosen], {
        "divergence": float(divergences([together], tokens)[0]),
        "sum_of_filters": sum(alone),
        "layers": alone,
        "sequences": len(together),
    }


def mode_costs(config: HyenaConfig, found: list[list[list[ReducedFilter]]], positive: bool = False) -> list[np.ndarray]:
    """Bytes of each recurrence, (size, filter) per layer."""
    each = config.mode_bytes(positive)
    return [each * np.array([[f.state_size for f in row] for row in layer], dtype=int) for layer in found]


def divergences(changes: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """KL per token from changes of the log-probability of `tokens` tokens, (sequence, ...) per layer."""
    return [(layer**2).mean(0) / (2 * tokens) for layer in changes]


def picked(layer: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The entries at each filter's chosen size: (..., size, filter) to (..., filter)."""
    return layer[..., chosen, np.arange(len(chosen))]


def allocate(costs: list[np.ndarray], losses: list[np.ndarray], budget: float) -> list[np.ndarray]:
    """The index of each filter's size, (filter,) per layer, from costs and losses (size, filter) per layer.

    Every filter starts at its cheapest size. Steps along the lower convex hulls of the filters' curves are taken in
    order of gain per byte; a filter ends at the first step that does not fit. The bytes left are then fewer than that
    step's, and all later steps gain less per byte, so a larger budget never gives a larger sum of losses.
    """
    chosen = [np.lexsort((loss, size), axis=0)[:1].reshape(-1) for size, loss in zip(costs, losses, strict=True)]
    left = budget - sum(picked(size, own).sum() for size, own in zip(costs, chosen, strict=True))
    steps = []
    for layer, (size, loss) in enumerate(zip(costs, losses, strict=True)):
        for filter in range(size.shape[1]):
            place = chosen[layer][filter]
            for gain, bytes_, to in _hull_steps(size[:, filter], loss[:, filter], place):
                steps.append((-gain, layer, filter, bytes_, to))
    ended = set()
    for _, layer, filter, bytes_, to in sorted(steps):
        if bytes_ > left:
            ended.add((layer, filter))
        if (layer, filter) not in ended:
            chosen[layer][filter] = to
            left -= bytes_
    return chosen


def _hull_steps(size, loss, place):
    """Gain per byte, bytes and end point of each step along the lower convex hull of a curve, starting at `place`."""
    steps = []
    while True:
        ahead = np.flatnonzero((size > size[place]) & (loss < loss[place]))
        if not len(ahead):
            return steps
        gains = (loss[place] - loss[ahead]) / (size[ahead] - size[place])
        best = max(zip(gains, size[ahead], ahead, strict=True))
        steps.append((best[0], best[1] - size[place], best[2]))
        place = best[2]


def responses(
    student: HyenaForCausalLM,
    found: list[list[list[ReducedFilter]]],
    blocks: np.ndarray,
    rows: dict[int, list[int]] | None = None,
    sequences: int = SEQUENCES,
    seed: int = 0,
    positive: bool = False,
) -> list[np.ndarray]:
    """⟨g_f, ĥ_f - h_f⟩ for each sequence, size and filter, (sequence, size, filter) per layer.

    The gradients of as many sequences as fit into GRADIENT_BYTES are computed first, then the recurrences' taps, one
    layer at a time.
    """
    length = blocks.shape[1]
    generator = torch.Generator(student.device).manual_seed(seed)
    picked = np.linspace(0, len(blocks) - 1, sequences).round().astype(int)  # repeats where there are few
    with explicit_taps(student, length) as leaves:
        taken = {layer: (rows or {}).get(layer, list(range(len(leaf)))) for layer, leaf in leaves.items()}
        at_once = max(1, GRADIENT_BYTES // (8 * length * sum(map(len, taken.values()))))
        parts = []
        for start in range(0, sequences, at_once):
            gradients = {layer: [] for layer in leaves}
            for block in picked[start : start + at_once]:
                ids = torch.from_numpy(blocks[block].astype(np.int64))[None].to(student.device)
                for layer, gradient in zip(leaves, score(student, ids, leaves, generator), strict=True):
                    gradients[layer].append(gradient[taken[layer]].double())
            parts.append(
                [
                    _products(torch.stack(gradients[layer]), sizes, leaves[layer][taken[layer]], positive)
                    if layer in leaves
                    else np.zeros((len(picked[start : start + at_once]), len(sizes), 0))
                    for layer, sizes in enumerate(found)
                ]
            )
    return [np.concatenate(layer) for layer in zip(*parts, strict=True)]


def score(student, ids: Tensor, leaves: dict[int, Tensor], generator: torch.Generator) -> tuple[Tensor, ...]:
    """The gradient of log p(y) w.r.t. each layer's taps, y sampled from p at each position of `ids` (1, length)."""

    def terms(logits, rows):
        log_p = logits.log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        return log_p.gather(1, drawn).sum()[None]

    with torch.enable_grad():
        hidden = student.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        weight, bias = losses.Head.of(student)
        head = losses.Head(weight.detach(), None if bias is None else bias.detach())
        value, _ = losses.projected(hidden, head, terms, hidden.new_ones(1))
        return torch.autograd.grad(value, list(leaves.values()))


@contextlib.contextmanager
def explicit_taps(student: HyenaForCausalLM, length: int):
    """Replace the student's filters by their taps as parameters; yields these, (filter, length) by layer."""
    mixers = {i: layer.mixer for i, layer in enumerate(student.model.layers) if hasattr(layer.mixer, "filter")}
    filters = {layer: mixer.filter for layer, mixer in mixers.items()}
    try:
        for layer, mixer in mixers.items():
            with torch.no_grad():
                mixer.filter = Taps(filters[layer](length))
        yield {layer: mixer.filter.taps for layer, mixer in mixers.items()}
    finally:
        for layer, mixer in mixers.items():
            mixer.filter = filters[layer]


class Taps(nn.Module):
    """Filters parametrised by their taps."""

    def __init__(self, taps: Tensor):
        super().__init__()
        self.taps = nn.Parameter(taps)

    def forward(self, length: int) -> Tensor:  # (filter, length)
        return self.taps[:, :length]


@torch.no_grad()
def _products(gradients, sizes, exact, positive):
    """(sequence, size, filter) from gradients (sequence, filter, length) and exact taps (filter, length)."""
    exact = exact.double()
    return np.stack(
        [
            torch.einsum(
                "nft,ft->nf", gradients, saved_taps(filters, exact.shape[1], positive).to(exact.device) - exact
            )
            .cpu()
            .numpy()
            for filters in sizes
        ],
        axis=1,
    )


def saved_taps(filters: list[ReducedFilter], length: int, positive: bool = False) -> Tensor:
    """The taps, (filter, length), of recurrences rounded to float32 as in a saved student; computed in float64."""
    return measure.filter_taps(modal_filter(filters, positive).float(), length)


@torch.no_grad()
def modal_filter(filters: list[ReducedFilter], positive: bool = False) -> ModalFilter:
    """The recurrences of a layer as a module, in float64; positive ones have real poles and residues above zero."""
    if positive:
        made = PositiveFilter([f.state_size for f in filters]).double()
        for parameter, parts in (
            (made.log_rate, [-np.log(f.poles.real) for f in filters]),
            (made.log_weight, [f.residues.real for f in filters]),
        ):
            parameter.copy_(torch.from_numpy(np.log(np.concatenate(parts))))
    else:
        made = ModalFilter([f.state_size for f in filters]).double()
        for parameter, parts in (
            (made.pole, [f.poles for f in filters]),
            (made.residue, [f.residues for f in filters]),
        ):
            parameter.copy_(torch.view_as_real(torch.from_numpy(np.concatenate(parts))))
    made.direct.copy_(torch.tensor([f.direct for f in filters], dtype=torch.float64))
    return made


def without_modes(config: HyenaConfig) -> HyenaConfig:
    """The configuration of a recurrence whose filters have no mode."""
    sizes = [[0] * config.filters(layer) for layer in range(config.num_hidden_layers)]
    return HyenaConfig.from_dict(config.to_dict() | {"filter": "modal", "state_sizes": sizes})


def state_bytes(config: HyenaConfig, itemsize: int) -> int | None:
    """Bytes per sequence without any mode; None if they grow with the sequence length."""
    return without_modes(config).state_bytes_of(itemsize)


def moved_bytes(config: HyenaConfig, budget: int, itemsize: int) -> int:
    """Bytes that a step reads and writes of a state that takes the whole budget."""
    return without_modes(config).moved_bytes_of(itemsize) + 2 * (budget - state_bytes(config, itemsize))
