"""The plots of a run's report: its training and the reduction of its filters."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from scavenger import student
from scavenger.report import page
from scavenger.report.page import Figure
from scavenger.transfer import transfer


NOT_WATCHED = "not measured: under sharded launches (FSDP, ZeRO-3) no process has the whole student"
NAMES = ("teacher", "pre-trained", "distilled", "recurrent")
COLOURS = dict(zip(NAMES, page.PALETTE, strict=False))


def quality(figures: dict) -> Figure:
    """Held-out perplexity against tokens seen: both steps of transfer on one axis, and pre-training."""
    trainings = {
        name: [row for row in figures["trainings"] if row["name"].startswith(name)]
        for name in ("activations", "logits", "baseline")
    }
    first = sum(row["tokens"] for row in trainings["activations"])
    points = []
    for label, name, begins in (
        ("distilled", "activations", 0),
        ("distilled", "logits", first),
        ("pre-trained", "baseline", 0),
    ):
        points += [
            (label, begins + _tokens_at(entry["step"], trainings[name]), float(np.exp(entry["held_out_loss"])))
            for entry in figures["history"].get(name, [])
            if "held_out_loss" in entry
        ]
    unseen = [name for name, own in figures["history"].items() if not any("held_out_loss" in entry for entry in own)]
    figure, axes = page.plot(6.4, 3.2)
    for label in dict.fromkeys(label for label, _, _ in points):
        own = [(tokens, value) for name, tokens, value in points if name == label]
        axes.plot(*zip(*own, strict=True), "o-", markersize=3, color=COLOURS[label], label=label)
    teachers = float(np.exp(figures["teacher_held_out_loss"]))
    axes.axhline(teachers, color=COLOURS["teacher"], linestyle=":", label="teacher")
    axes.axvline(first, color="#bbbbbb", linewidth=0.8, label="from activations to logits")
    axes.set(xlabel="tokens seen", ylabel="held-out perplexity", yscale="log")
    page.plain_ticks(axes.yaxis)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(fontsize=7)
    said = f" {', '.join(unseen)}: {NOT_WATCHED}." if unseen else ""
    return page.drawn(
        figure,
        "quality",
        f"Quality against tokens: perplexity on {transfer.HELD_OUT} sequences of the validation split.{said}",
        ["", "tokens", "perplexity"],
        [["teacher", "–", f"{teachers:.3f}"]]
        + [[name, "–", "not measured"] for name in unseen]
        + [[label, f"{tokens:,.0f}", f"{value:.3f}"] for label, tokens, value in points],
    )


def activations(figures: dict) -> Figure:
    """The activation error of the first step, by layer."""
    layers = _layers(figures["history"]["activations"], "layer_")
    return _by_layer(
        figures["history"]["activations"],
        layers,
        "activations",
        "Activation error of each layer, relative to the energy of the teacher's attention output.",
        ("step", "relative error"),
    )


def logits(figures: dict) -> Figure:
    """The loss of the second step."""
    history = figures["history"]["logits"]
    key = "divergence" if "divergence" in history[0] else "loss"
    figure, axes = page.plot()
    axes.plot(*_curve(history, key), color=COLOURS["distilled"])
    axes.set(xlabel="step of the logits stage", ylabel="KL to the teacher (nats)", yscale="log")
    page.plain_ticks(axes.yaxis)
    return page.drawn(
        figure,
        "logits",
        "Training loss on the logits: the student's divergence from its teacher.",
        ["step", key],
        [[f"{entry['step']:,}", f"{entry[key]:.4f}"] for entry in history],
    )


def floors(figures: dict) -> Figure:
    """The floor in both steps on one axis, averaged over the watched filters of each layer."""
    history = figures["history"]
    before = history["activations"][-1]["step"]
    entries = history["activations"] + [entry | {"step": before + entry["step"]} for entry in history["logits"]]
    watched = figures["student"]["filter"]["hankel_states"]
    return _by_layer(
        [entry for entry in entries if any(key.startswith("floor_") for key in entry)],
        _layers(entries, "floor_"),
        "floors",
        f"During training: lower bound on the error of a filter with {watched} real states.",
        ("step (line: from activations to logits)", "floor of the relative error"),
        line=before,
    )


def recurrence(run_dir: Path, figures: dict) -> tuple[Figure, ...]:
    """The plots of the filters' reduction."""
    return _errors(figures), _sizes(figures), _positions(figures), _spectra(figures), _filter(run_dir, figures)


def _errors(figures):
    layers = figures["recurrence"]["layers"]
    figure, axes = page.plot()
    least = 1e-9  # drawn for smaller values: a logarithmic axis cannot show zero
    for index, layer in enumerate(layers):
        if layer["filters"]:
            axes.scatter(
                *([max(least, f[key]) for f in layer["filters"]] for key in ("floor", "relative_error")),
                color=_shade(index, layers),
                s=14,
                label=f"layer {index}",
            )
    floors = [max(least, f["floor"]) for layer in layers for f in layer["filters"]]
    ends = [min(floors), max(floors)]
    axes.plot(ends, ends, color="#888888", linewidth=0.8)
    axes.set(xlabel="proven floor", ylabel="relative error", xscale="log", yscale="log")
    axes.xaxis.set_minor_formatter(NullFormatter())  # labels would overlap if the axis is shorter than a decade
    axes.legend(fontsize=7)
    return page.drawn(
        figure,
        "errors",
        "The error of each filter against its proven floor, a lower bound for every method.",
        ["layer", "filter", "modes", "floor", "error"],
        [
            [str(index), str(row), str(f["state_size"]), f"{f['floor']:.2e}", f"{f['relative_error']:.2e}"]
            for index, layer in enumerate(layers)
            for row, f in enumerate(layer["filters"][:64])  # certificate.json has all rows
        ],
    )


def _sizes(figures):
    layers = figures["recurrence"]["layers"]
    modes = [f["state_size"] for layer in layers for f in layer["filters"]]
    figure, axes = page.plot()
    counts, _, _ = axes.hist(modes, bins=np.arange(-0.5, max(modes) + 1.5), color=COLOURS["recurrent"])
    axes.set(xlabel="complex modes", ylabel="filters")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return page.drawn(
        figure,
        "state-sizes",
        "Number of modes per filter.",
        ["modes", "filters"],
        [[str(size), f"{count:.0f}"] for size, count in enumerate(counts)],
    )


def _positions(figures):
    found = figures["recurrence"]
    contexts = found["model"]["contexts"]
    figure, axes = page.plot()
    rows = []
    for index, entry in enumerate(contexts):
        axes.plot(
            [(part["from"] + part["to"]) / 2 for part in entry["positions"]],
            [max(1e-12, part["divergence"]) for part in entry["positions"]],
            "o-",
            markersize=3,
            color=_shade(index, contexts),
            label=f"contexts of {entry['context_length']:,}",
        )
        rows += [
            [f"{entry['context_length']:,}", f"{part['from']:,}–{part['to']:,}", f"{part['divergence']:.2e}"]
            for part in entry["positions"]
        ]
    axes.axvline(found["settings"]["horizon"], color="#888888", linestyle=":", label="horizon")
    axes.set(xlabel="position", ylabel="KL (nats per token)", yscale="log")
    axes.legend(fontsize=7)
    return page.drawn(
        figure,
        "exactness",
        "KL to the exact student by position, in contexts of the training length and longer.",
        ["context", "positions", "KL"],
        rows,
    )


def _spectra(figures):
    layers = figures["recurrence"]["layers"]
    figure, axes = page.plot()
    rows = []
    for index, layer in enumerate(layers):
        if not layer["filters"]:
            continue
        count = max(len(f["hankel_values"]) for f in layer["filters"])  # only the first ones are known for some filters
        spectra = [np.array(f["hankel_values"]) for f in layer["filters"] if len(f["hankel_values"]) == count]
        curves = np.array([values / (values.max(initial=0) or 1) for values in spectra])
        states, middle = np.arange(1, count + 1), np.median(curves, axis=0)
        axes.plot(states, middle, color=_shade(index, layers), label=f"layer {index}")
        axes.fill_between(states, curves.min(0), curves.max(0), color=_shade(index, layers), alpha=0.12)
        shown = (state for state in (1, 2, 4, 8, 16, 32) if state <= count)
        rows += [[str(index), str(state), f"{middle[state - 1]:.2e}"] for state in shown]
    axes.set(xlabel="real state", ylabel="σ / σ₁ (median, range over filters)", yscale="log")
    axes.legend(ncols=2, fontsize=7)
    return page.drawn(
        figure,
        "hankel",
        "Hankel singular values: the faster they decay, the fewer states a filter needs.",
        ["layer", "state", "median"],
        rows,
    )


def _filter(run_dir, figures):
    layers, length = figures["recurrence"]["layers"], figures["recurrence"]["settings"]["horizon"]
    error, layer, row = max(
        (f["relative_error"], i, j) for i, entry in enumerate(layers) for j, f in enumerate(entry["filters"])
    )
    exact_one, recurrent = (student.load(run_dir / name) for name in ("transfer", "recurrence"))
    with torch.no_grad():
        exact, modal = (model.model.layers[layer].mixer.filter(length)[row].numpy() for model in (exact_one, recurrent))
    figure, (top, bottom) = page.plot(4.8, 3.4, rows=2, sharex=True, height_ratios=[3, 1])
    top.plot(exact, color=COLOURS["distilled"], linewidth=2.4, alpha=0.5, label=f"layer {layer}, filter {row}")
    modes = layers[layer]["filters"][row]["state_size"]
    top.plot(modal, color=COLOURS["recurrent"], linewidth=1, label=f"{modes} modes")
    top.set_ylabel("tap")
    top.legend(fontsize=7)
    bottom.plot(modal - exact, color="#b03030", linewidth=1)
    bottom.set(xlabel="time (tokens)", ylabel="difference")
    figure.tight_layout()
    return page.drawn(figure, "filter", f"The filter with the largest error ({error:.1e}) and its recurrence.")


def _by_layer(entries, layers, name, caption, axes_names, line=None):
    """A curve over the steps for each layer, and a table."""
    figure, axes = page.plot()
    if line is not None:
        axes.axvline(line, color="#bbbbbb", linewidth=1)
    for index, key in enumerate(layers):
        own = [entry for entry in entries if key in entry]
        axes.plot(*_curve(own, key), color=_shade(index, layers), label=f"layer {key.partition('_')[2]}")
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1], yscale="log")
    axes.legend(ncols=2, fontsize=7)
    rows = [
        [f"{entry['step']:,}", *(f"{entry[key]:.4f}" if key in entry else "–" for key in layers)] for entry in entries
    ]
    return page.drawn(figure, name, caption, ["step", *(key.replace("_", " ") for key in layers)], rows)


def _layers(entries, prefix):
    keys = {key for entry in entries for key in entry if key.startswith(prefix)}
    return sorted(keys, key=lambda key: int(key.removeprefix(prefix)))


def _shade(index, items):
    return page.plt.cm.viridis(index / max(1, len(items)))


def _curve(history, key):
    return [entry["step"] for entry in history], [entry[key] for entry in history]


def _tokens_at(step, turns):
    """Tokens read in the first `step` steps of consecutive trainings."""
    tokens = 0
    for row in turns:
        own = min(step, row["steps"])
        tokens, step = tokens + own * row["tokens"] / row["steps"], step - own
    return tokens
