"""The certificate of a recurrence: errors of each filter (with proven floors), of each mixer and of the whole model."""

import copy
import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from scavenger import measure
from scavenger.model import HyenaForCausalLM
from scavenger.model.filters import ModalFilter, PositiveFilter
from scavenger.recipe import Recurrence
from scavenger.recurrence import rounding
from scavenger.recurrence.reduction import hankel, positive
from scavenger.recurrence.reduction.reduced import ReducedFilter
from scavenger.recurrence.reduction.residues import gain_errors, tails


CONTEXTS = (1, 2, 4)  # context lengths of the model comparison, as multiples of that of the text
BUCKETS = 8  # number of buckets of positions in a context
SPECTRUM = 64  # Hankel values saved per filter
SPECTRA = 16  # filters per layer with that many values: for a thousand filters they would dominate the run time


def measure_all(
    student: HyenaForCausalLM,  # exact
    recurrent: HyenaForCausalLM,
    reduced: list[list[ReducedFilter]],  # per layer, the reductions the recurrent student was made from
    settings: Recurrence,
    blocks: np.ndarray | None,  # (block, length) held-out text; None: filters only
    predicted: dict | None = None,  # from the allocation of a budget
    counted: np.ndarray | None = None,  # (block, length) tokens whose predictions are compared; None: all
) -> dict:
    """The certificate: settings, every filter, every layer, the model, and a one-sentence verdict."""
    config = recurrent.config
    horizon = settings.horizon or config.horizon
    layers = [
        {
            "mode_bytes": config.mode_bytes(config.positive) * sum(f.state_size for f in filters),
            "filters": filter_facts(exact.mixer.filter, made.mixer.filter, filters, settings, horizon)
            if filters
            else [],
        }
        for exact, made, filters in zip(student.model.layers, recurrent.model.layers, reduced, strict=True)
    ]
    if blocks is not None:
        for layer, error in zip(layers, output_errors(student, recurrent, blocks), strict=True):
            layer["output_error"] = error
    if predicted is not None:
        for layer, divergence in zip(layers, predicted["layers"], strict=True):
            layer["predicted_divergence"] = divergence
    filters = [f for layer in layers for f in layer["filters"]]
    found = {
        "settings": described(settings, horizon),
        "filters": len(filters),
        "within_tolerance": sum(f["within_tolerance"] for f in filters) if settings.state_bytes is None else None,
        "incompressible": sum(not f["compressible"] for f in filters) if settings.state_bytes is None else None,
        "normalised": config.features != "none",
        "largest_radius": max(f["largest_radius"] for f in filters),
        "state_bytes": config.state_bytes_of(settings.itemsize),
        "break_even_length": config.break_even_length_of(4, settings.itemsize),  # of a KV cache in float32
        "break_even_length_16_bit": config.break_even_length_of(2, settings.itemsize),
        "moved_bytes": config.moved_bytes_of(settings.itemsize),
        "moved_break_even_length_16_bit": config.moved_break_even_length_of(2, settings.itemsize),
        "bfloat16_state": rounding.facts(recurrent, blocks, [f["rounding_bound"] for f in filters], settings.itemsize),
        "layers": layers,
        "model": model_facts(student, recurrent, blocks, horizon, predicted, counted) if blocks is not None else None,
    }
    return {"verdict": verdict(found)} | found


def described(settings: Recurrence, horizon: int) -> dict:
    """The settings the recurrences were made with."""
    return {
        "method": settings.method,
        "tolerance": settings.tolerance if settings.state_bytes is None else None,
        "state_bytes": settings.state_bytes,
        "dtype": settings.dtype,
        "max_state_size": settings.max_state_size,
        "horizon": horizon,
    }


def filter_facts(
    exact: nn.Module, made: ModalFilter, reduced: list[ReducedFilter], settings: Recurrence, horizon: int
) -> list[dict]:
    """Errors of each filter of a layer as plain numbers, and its floors, proven by the reduction.

    Errors are of the filter as saved, rounded. A filter is compressible if its floor at `max_state_size` does not
    exceed the tolerance, which holds for every filter that meets the tolerance.
    """
    taps = measure.filter_taps(exact, horizon)
    filters = as_saved(taps, made, reduced)
    pointwise = pointwise_facts(exact, taps, filters) if made.real else [{}] * len(filters)
    rounded = rounding.bounds(made, horizon).tolist()
    spectra = _spectra(taps)
    facts = [
        {
            "state_size": f.state_size,
            "real_states": f.real_states,
            "relative_error": f.relative_error,
            "floor": f.floor,
            "error_over_floor": _ratio(f.relative_error, f.floor),
            "gain_error": f.gain_error,
            "gain_floor": f.gain_floor,
            "gain_error_over_floor": _ratio(f.gain_error, f.gain_floor),
            "largest_radius": f.largest_radius,
            "tail": f.tail,
            "rounding_bound": rounded[index],
            "hankel_values": spectra.get(index, f.hankel_values[:SPECTRUM].tolist()),
            **pointwise[index],
        }
        for index, f in enumerate(filters)
    ]
    if settings.state_bytes is not None:
        return facts
    for entry in facts:
        entry["within_tolerance"] = entry["compressible"] = entry["relative_error"] <= settings.tolerance
    missed = [index for index, entry in enumerate(facts) if not entry["within_tolerance"]]
    if missed:
        floors = hankel.tap_floors(taps[missed])
        for index, row in zip(missed, floors, strict=True):
            floor = float(row[min(2 * settings.max_state_size, len(row) - 1)])
            facts[index] |= {"floor_at_most_modes": floor, "compressible": floor <= settings.tolerance}
    return facts


def pointwise_facts(exact: nn.Module, taps: Tensor, filters: list[ReducedFilter]) -> list[dict]:
    """The largest relative error at a tap, and the most that it moves a normalised mixer's output, for every input.

    In units of the largest value read. Within the horizon; and at every lag where the exact filter is a sum of
    exponentials too. None for a filter with a negative tap.
    """
    found = {"pointwise_error": positive.pointwise_error(taps, filters)}
    if isinstance(exact, PositiveFilter):
        wide = copy.deepcopy(exact).double()
        modes = (z.real.numpy(force=True) for z in (wide.poles, wide.residues))
        ends = np.cumsum(wide.state_sizes)[:-1]
        modes = list(zip(*(np.split(each, ends) for each in modes), strict=True))
        found["pointwise_error_at_all_lags"] = positive.pointwise_error(taps, filters, modes)
    found |= {key.replace("pointwise_error", "output_bound"): positive.output_bound(z) for key, z in found.items()}
    return [
        {key: float(error[index]) if error[index].isfinite() else None for key, error in found.items()}
        for index in range(len(filters))
    ]


@torch.no_grad()
def as_saved(taps: Tensor, made: ModalFilter, reduced: list[ReducedFilter]) -> list[ReducedFilter]:
    """The reductions with their poles, residues and errors replaced by those of the filter module."""
    wide = copy.deepcopy(made).double()
    parts = [each.to(torch.complex128).split(made.state_sizes) for each in (wide.poles, wide.residues)]
    poles, residues = (pad_sequence(list(part), batch_first=True) for part in parts)
    errors = (measure.filter_taps(made, taps.shape[1]) - taps).norm(dim=1) / taps.norm(dim=1).clamp_min(1e-300)
    gains, beyond = taps.new_zeros(2, len(taps))
    for rows in hankel.pieces(len(taps), 160 * taps.shape[1] * (poles.shape[1] + 1)):
        amplitudes = residues[rows] * poles[rows]
        gains[rows] = gain_errors(taps[rows], poles[rows], amplitudes)
        beyond[rows] = tails(taps[rows], poles[rows], amplitudes)
    return [
        dataclasses.replace(
            f,
            poles=own.cpu().numpy(),
            residues=residue.cpu().numpy(),
            direct=float(direct),
            relative_error=float(error),
            gain_error=float(gain),
            tail=float(tail),
        )
        for f, own, residue, direct, error, gain, tail in zip(
            reduced, *parts, wide.direct, errors, gains, beyond, strict=True
        )
    ]


@torch.no_grad()
def output_errors(student: HyenaForCausalLM, recurrent: HyenaForCausalLM, blocks: np.ndarray) -> list[float | None]:
    """‖y - ŷ‖ / ‖y‖ of each mixer's output, both given the exact student's inputs; None for kept attention."""
    layers = list(zip(student.model.layers, recurrent.model.layers, strict=True))
    sums = torch.zeros(len(layers), 2, dtype=torch.float64, device=student.device)
    hooks = []
    for index, (exact, approximate) in enumerate(layers):
        if not hasattr(exact.mixer, "filter"):
            continue

        def compare(module, args, kwargs, output, index=index, mixer=approximate.mixer):
            difference = mixer(*args, **kwargs) - output
            sums[index] += torch.stack([difference.double().square().sum(), output.double().square().sum()])

        hooks.append(exact.mixer.register_forward_hook(compare, with_kwargs=True))
    rows = max(1, measure.BATCH_TOKENS // blocks.shape[1])
    try:
        for start in range(0, len(blocks), rows):
            ids = torch.from_numpy(blocks[start : start + rows].astype(np.int64)).to(student.device)
            student.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        float((error / energy.clamp_min(1e-300)).sqrt()) if hasattr(exact.mixer, "filter") else None
        for (exact, _), (error, energy) in zip(layers, sums, strict=True)
    ]


def model_facts(
    student, recurrent, blocks: np.ndarray, horizon: int, predicted: dict | None, counted: np.ndarray | None = None
) -> dict:
    """Comparison of the recurrent and the exact student on the same text, at its context length and longer ones."""
    length = blocks.shape[1]
    whose = ""
    if counted is None or not counted[:, 1:].any():  # half of a very short split may have none
        counted = np.ones_like(blocks, dtype=bool)
    else:
        whose = " Measured where the next token is the assistant's; a budget's predicted KL is that of all tokens."

    def joined(array, times):
        return array[: len(array) // times * times].reshape(-1, times * length)

    contexts = [
        context_facts(student, recurrent, joined(blocks, times), horizon, joined(counted, times))
        for times in CONTEXTS
        if len(blocks) >= times and joined(counted, times)[:, 1:].any()
    ]
    return {
        "compared": "KL(exact student || recurrent student), both reading the same text. Past the horizon the exact "
        f"student's implicit filters continue by their formula, while a recurrence continues to decay.{whose}",
        **{key: value for key, value in contexts[0].items() if key not in ("context_length", "positions")},
        "predicted_divergence": predicted["divergence"] if predicted is not None else None,
        "predicted_sum_of_filters": predicted["sum_of_filters"] if predicted is not None else None,
        "contexts": contexts,
    }


def context_facts(student, recurrent, blocks: np.ndarray, horizon: int, counted: np.ndarray | None = None) -> dict:
    """Means over all positions of a context, over buckets of positions, and over positions beyond the horizon.

    Of the predictions of `counted` tokens (block, length) where it is given; positions without any have no means.
    """
    found = measure.by_position(recurrent, blocks, student, counted)
    positions = blocks.shape[1] - 1  # predicted; at position t the filters reach back t tokens
    edges = np.unique(np.linspace(0, positions, BUCKETS + 1).round().astype(int)).tolist()

    def mean(first, end):
        part = slice(first, end)
        return {
            "tokens": found.tokens(part),
            "divergence": found.mean("divergence", part),
            "agreement": found.mean("agreement", part),
            "perplexity": float(np.exp(found.mean("loss", part))),
            "exact_perplexity": float(np.exp(found.mean("teacher_loss", part))),
        }

    return {
        "context_length": blocks.shape[1],
        **mean(0, positions),
        "positions": [
            {"from": first, "to": end - 1} | mean(first, end)
            for first, end in zip(edges, edges[1:], strict=False)
            if found.tokens(slice(first, end))
        ],
        "beyond_horizon": mean(horizon, positions) if found.tokens(slice(horizon, positions)) else None,
    }


def verdict(found: dict) -> str:
    """The certificate in one sentence."""
    filters = [f for layer in found["layers"] for f in layer["filters"]]
    settings, model = found["settings"], found["model"]
    modes = [f["state_size"] for f in filters]
    ratios = sorted(f["error_over_floor"] for f in filters if f["error_over_floor"] is not None)
    size = f"{min(modes)} to {max(modes)} modes" + (
        f", errors at a median of {ratios[len(ratios) // 2]:.2f} times their proven floors" if ratios else ""
    )
    if settings["state_bytes"] is not None:
        parts = [f"{len(filters)} filters share {settings['state_bytes']:,} bytes ({size})"]
    else:
        met, hopeless = found["within_tolerance"], found["incompressible"]
        which = f"All {met}" if met == len(filters) else f"{met} of {len(filters)}"
        parts = [f"{which} filters meet {settings['tolerance']:g} ({size})"]
        if hopeless:
            parts.append(f"{hopeless} provably cannot with {settings['max_state_size']} modes")
        if len(filters) - met - hopeless:
            parts.append(f"{len(filters) - met - hopeless} miss it although their floors allow it")
    if found.get("normalised"):
        worst = max(filters, key=lambda f: f["pointwise_error"] or 0)
        parts.append(
            f"each tap of the horizon is right within {100 * worst['pointwise_error']:.2g} %, which moves a normalised "
            f"sum by {worst['output_bound']:.2g} times the largest value that it reads at most, for every input"
        )
    if model is not None:
        change = 100 * (model["perplexity"] / model["exact_perplexity"] - 1)
        where = "above" if change >= 0 else "below"
        parts.append(f"the recurrent student's perplexity is {abs(change):.2g} % {where} the exact student's")
        predicted = model["predicted_divergence"]
        parts.append(
            f"KL {model['divergence']:.1e} nats per token"
            + (f" ({predicted:.1e} predicted)" if predicted is not None else "")
            + f", {100 * model['agreement']:.1f} % equal top-1"
        )
    else:
        parts.append("nothing was measured on text: there is no tokenizer")
    held = found["state_bytes"]
    parts.append(
        f"state {held / 1024:,.0f} KiB; a step reads and writes {found['moved_bytes'] / 1024:,.0f} KiB of it, as "
        f"attention reads of {found['moved_break_even_length_16_bit']:,} tokens in 16 bits"
        if held is not None
        else "the state grows: the kept attention has no window"
    )
    rounded = found["bfloat16_state"]
    if rounded is not None and rounded["model"] is not None:
        moved, divergence = rounded["moved_bytes"] / 1024, rounded["model"]["divergence"]
        parts.append(f"modes kept in bfloat16 make that {moved:,.0f} KiB, at a KL of {divergence:.1e} nats per token")
    return "; ".join(parts) + "."


def table(found: dict) -> tuple[list[str], list[list[str]]]:
    """The layers of a certificate as a header and rows; kept attention has no filter and no row."""
    header = ["layer", "filters", "modes", "most", "real states", "KiB", "mean error", "worst error", "its floor"]
    header += ["largest tail", "largest |pole|", "error of output"]
    rows = []
    for index, layer in enumerate(found["layers"]):
        filters = layer["filters"]
        if not filters:
            continue
        worst = max(filters, key=lambda f: f["relative_error"])
        error = layer.get("output_error")
        rows.append(
            [
                str(index),
                str(len(filters)),
                str(sum(f["state_size"] for f in filters)),
                str(max(f["state_size"] for f in filters)),
                str(sum(f["real_states"] for f in filters)),
                f"{layer['mode_bytes'] / 1024:,.1f}",
                f"{np.mean([f['relative_error'] for f in filters]):.2e}",
                f"{worst['relative_error']:.2e}",
                f"{worst['floor']:.2e}",
                f"{max(f['tail'] for f in filters):.1e}",
                f"{max(f['largest_radius'] for f in filters):.4f}",
                "?" if error is None else f"{error:.2e}",
            ]
        )
        if "predicted_divergence" in layer:
            rows[-1].append(f"{layer['predicted_divergence']:.1e}")
        if "pointwise_error" in worst:
            errors = [f["pointwise_error"] for f in filters]
            rows[-1].append("?" if None in errors else f"{max(errors):.1e}")
    layers = [layer for layer in found["layers"] if layer["filters"]]
    header += ["predicted KL"] if any("predicted_divergence" in layer for layer in layers) else []
    header += ["worst tap"] if any("pointwise_error" in layer["filters"][0] for layer in layers) else []
    return header, rows


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """A table for a terminal, with numbers aligned to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def _spectra(taps):
    """The leading Hankel values of SPECTRA filters spread over a layer; other filters keep those of their reduction."""
    length, found = taps.shape[1], {}
    rows = np.unique(np.linspace(0, len(taps) - 1, SPECTRA).round().astype(int))
    for piece in hankel.pieces(len(rows), 96 * length * min(length, 2 * SPECTRUM + 64)):
        values = hankel.hankel_eigen(taps[rows[piece], 1:], SPECTRUM)[0].abs()
        found |= zip(rows[piece].tolist(), values[:, : length - 1].tolist(), strict=True)
    return found


def _ratio(error, floor):
    """error / floor, or None where the floor is only rounding and the ratio is meaningless."""
    return error / floor if floor > 1e-9 else None
