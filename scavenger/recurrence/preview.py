"""What each tolerance or budget would keep, before stage two is run (`scavenger RECIPE --plan`)."""

import dataclasses
from pathlib import Path

import numpy as np

from scavenger import measure, student
from scavenger.recipe import Recipe
from scavenger.recurrence import allocation, certificate, recurrence
from scavenger.recurrence.reduction import workers
from scavenger.run.run import blocks


TOLERANCES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3)  # shown besides the recipe's own
FILTERS = 16  # of each layer, so that the table takes seconds
SEQUENCES = 8  # of held-out text, for the same reason: the predicted KL is within a factor of about 1.5


def show(recipe: Recipe) -> str:
    """A table of the state and the error of each tolerance or budget, for the run's distilled student.

    By balanced truncation, or as sums of positive modes if the recipe asks for them, of FILTERS filters of each layer,
    from which modes and bytes of all of them are estimated.
    """
    run_dir = Path(recipe.run_dir)
    exact = student.load(run_dir / "transfer")
    config, positive = exact.config, recipe.recurrence.method == "positive"
    settings = dataclasses.replace(recipe.recurrence, method="positive" if positive else "balanced")
    text = blocks(run_dir / "data", "validation")
    rows, found = {}, [[[]] for _ in exact.model.layers]
    tolerances = sorted({*TOLERANCES, settings.tolerance}, reverse=True)
    aims = [{"tolerance": tolerance} for tolerance in tolerances]
    if settings.state_bytes is not None:
        aims = recurrence.aims(settings)
    length = settings.horizon or config.horizon
    filters = recurrence.long_filters(exact)
    several = FILTERS * len(filters) * len(aims) * length >= workers.WORKERS_PAY
    with workers.started(workers.available() if several else 1) as each:
        for layer, filter in filters.items():
            taps = measure.filter_taps(filter, length)
            rows[layer] = np.unique(np.linspace(0, len(taps) - 1, FILTERS).round().astype(int)).tolist()
            found[layer] = recurrence.reduce_filters(taps[rows[layer]], settings, aims, each)
            if type(filter) is recurrence.own_kind(settings):
                found[layer] = [recurrence.with_own_modes(filter, made, rows[layer]) for made in found[layer]]
    changes = allocation.responses(exact, found, text, rows, SEQUENCES, positive=positive)
    divergences = allocation.divergences(changes, text.shape[1] - 1)
    choices = {
        f"{tolerance:g}": [np.full(len(layer[0]), index) for layer in found]
        for index, tolerance in enumerate(tolerances)
    }
    share = sum(map(len, rows.values())) / sum(f.num_filters for f in filters.values())
    if settings.state_bytes is not None:
        least = allocation.state_bytes(config, settings.itemsize)
        budgets = [max(least, settings.state_bytes * times // 2) for times in (1, 2, 4)]
        bytes_ = allocation.mode_costs(config, found, positive)
        choices = {
            f"{budget:,}": allocation.allocate(bytes_, divergences, share * (budget - least)) for budget in budgets
        }
    table = [
        line
        for name, chosen in choices.items()
        for line in _choice(config, positive, name, found, chosen, divergences, settings.itemsize)
    ]
    what = "state bytes" if settings.state_bytes is not None else "tolerance"
    header = [what, "layer", "filters", "modes", "most", "real states", "KiB", "worst error", "its floor", "KL"]
    header += ["float32 cache is larger from", "16-bit cache from", "a step moves KiB", "as the 16-bit cache of"]
    asked = "" if share == 1 else f" {100 * share:.0f} % of the filters were reduced."
    return (
        "\n"
        + certificate.aligned(header, table)
        + f"\n{'As positive modes' if positive else 'By balanced truncation'}.{asked} "
        "KL: predicted for the model's output, nats per token, summed over layers. "
        f"KiB of `all`: with short convolutions, windows and kept attention, in {settings.dtype}; a step moves what it "
        "reads and writes."
    )


def _choice(config, positive, name, found, chosen, divergences, itemsize):
    """The rows of one choice: one per layer, and one for all."""
    lines, sizes, total = [], [[] for _ in found], 0.0
    for layer, (rungs, own) in enumerate(zip(found, chosen, strict=True)):
        filters = [rungs[rung][index] for index, rung in enumerate(own)]
        if not filters:
            continue  # kept attention
        count = config.filters(layer)
        share = count / len(filters)
        sizes[layer] = np.resize([f.state_size for f in filters], count).tolist()
        divergence = share * float(allocation.picked(divergences[layer], own).sum())
        total += divergence
        worst = max(filters, key=lambda f: f.relative_error)
        lines.append(
            [
                name,
                str(layer),
                str(count),
                f"{sum(sizes[layer]):,}",
                str(max(sizes[layer])),
                f"{share * sum(f.real_states for f in filters):,.0f}",
                f"{config.mode_bytes(positive) * sum(sizes[layer]) / 1024:,.1f}",
                f"{worst.relative_error:.1e}",
                f"{worst.floor:.1e}",
                f"{divergence:.1e}",
                *4 * [""],
            ]
        )
    whole = recurrence.recurrent_configuration(config, sizes, positive)
    held, moved = whole.state_bytes_of(itemsize), whole.moved_bytes_of(itemsize)
    even = [whole.break_even_length_of(size, itemsize) for size in (4, 2)]
    tokens = ["never" if length is None else f"{length:,} tokens" for length in even]
    traffic = whole.moved_break_even_length_of(2, itemsize)
    lines.append(
        [
            name,
            "all",
            str(sum(map(len, sizes))),
            f"{sum(map(sum, sizes)):,}",
            str(max(map(max, filter(None, sizes)))),
            "",
        ]
        + ["grows" if held is None else f"{held / 1024:,.1f}", "", "", f"{total:.1e}"]
        + tokens
        + ["grows" if moved is None else f"{moved / 1024:,.1f}", "" if traffic is None else f"{traffic:,} tokens"]
    )
    return lines
