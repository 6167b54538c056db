"""The page of a comparison, and its part in a run's report: tables, curves with intervals, tasks, speed, samples."""

import html
import itertools
import math
from pathlib import Path

from scavenger.report import command, comparison, metrics, page, retrieval, timing
from scavenger.report.metrics import Metric
from scavenger.report.page import Figure, Section
from scavenger.run import checkpoint


GROUPS = {  # curves over x: title, axis
    "position": ("Perplexity by position in the context", "tokens read before"),
    "pairs": ("Recall of pairs: the correct value is the likeliest shown", "distance to the pair, tokens (at most)"),
    "copying": ("Copying: correct tokens at the second occurrence", "distance, tokens"),
    "passkey": ("Passkey: the whole key is correct", "distance to the key, tokens"),
    "needle": ("Needle in real text: more right tokens where it was shown", "distance to the needle, tokens"),
    "needle gain": ("Needle in real text: gain in loss where it was shown", "distance to the needle, tokens"),
    "passages": ("Gain in loss when a passage is repeated", "distance, tokens"),
    "repeats": ("Loss of tokens that complete a trigram again", "distance to the trigram, tokens (at most)"),
    "divergence": ("KL to the reference along its own text", "position among the new tokens (last of a bin)"),
}
RECALL = ("pairs", "copying", "passkey", "needle", "needle gain", "passages", "repeats")
BINNED = ("pairs", "pairs gain", "repeats")  # groups whose distances are from the one before to this one
BEYOND, PARTLY = "†", "(†)"  # values measured beyond a model's own window of attention, or in part beyond it


def write(found: dict, folder: Path) -> Path:
    """Write `compare.json`, the plots and `index.html`; return the path of the page."""
    made = sections(found)
    write_plots(made, folder)
    checkpoint.write_json(folder / "compare.json", found)
    title = f"{' · '.join(found['labels'])}"
    checkpoint.write_text(folder / "index.html", page.document(title, comparison.verdict(found), made))
    return folder / "index.html"


def write_plots(made: list[Section], folder: Path):
    """Write every plot of the sections as `plots/NAME.svg`."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for section in made:
        for figure in section.figures:
            checkpoint.write_text(folder / "plots" / f"{figure.name}.svg", figure.svg)


def sections(found: dict) -> list[Section]:
    """The page's sections, for what was measured."""
    header, rows, classes = comparison.headline(found)
    reference = found["reference"]
    note = page.paragraph(
        f"▲ and ▼: significantly better and worse than {reference}; the interval of the difference is paired by "
        "document, question, sequence, prompt or round (bootstrap, wider if they are few or unequal; of speeds the t "
        f"interval of the logarithm of their ratio; none for fewer than {metrics.LEAST_ITEMS} or where two have nearly "
        "all the weight). For equal models one mark in twenty, or a few more, appears by chance. A dash means not "
        "measured.",
        "note",
    )
    differing = [row for row in found["rows"] if row["headline"] and row["differences"]]
    others = found["labels"][1:]
    apart = page.table(
        [f"difference to {reference}", *others],
        [[row["metric"], *(comparison.shown_difference(row, label) for label in others)] for row in differing],
    )
    settings = page.table(
        ["measured with", ""], [[name, command.described(own)] for name, own in found["settings"].items()]
    )
    in_words = "".join(page.paragraph(comparison.verdict(found, [label])) for label in found["labels"][1:-1])
    made = [
        Section(
            "Comparison",
            page.paragraph(comparison.verdict(found, found["labels"][-1:]))
            + page.table(header, rows, classes)
            + note
            + (f"<details><summary>summary of the other models</summary>{in_words}</details>" if in_words else "")
            + f"<details><summary>differences, with intervals</summary>{apart}</details>"
            + f"<details><summary>settings</summary>{settings}</details>",
        )
    ]
    for title, groups in (
        ("By position", ["position"]),
        ("Recall", RECALL),
        ("Generation", ["divergence"]),
    ):
        figures = tuple(figure for group in groups if (figure := curves(found, group)))
        body = samples(found) if title == "Generation" else window_note(found) if title == "Recall" and figures else ""
        if figures or body:
            made.append(Section(title, _all_figures(found, title.lower()) + body, figures))
    if "harness" in found["details"]:
        made.append(Section("Tasks", _all_figures(found, "harness"), (tasks_plot(found),)))
    return made + [speed_section(found, name) for name in found["details"] if name.startswith(comparison.SPEED)]


def window_note(found: dict) -> str:
    """What attention in the models sees, and how distances beyond it are marked."""
    windows = {label: comparison.attention_window(found, label) for label in found["labels"]}
    seen = [
        f"{label}: {'all' if window == math.inf else f'the last {window:,}'} tokens"
        for label, window in windows.items()
        if window is not None
    ]
    if not seen:
        return ""
    said = (
        f"Attention sees at most, of {'; '.join(seen)}. {BEYOND}: beyond a model's own window, {PARTLY}: partly; what "
        "is recalled from there comes through its filters, or from window to window through several layers."
    )
    return page.paragraph(" ".join([said, *comparison.recall_within_window(found, found["labels"])]), "note")


def _cells(found, row):
    """Every model's value in a row, marked where a distance is beyond its window of attention."""
    return [comparison.shown(row, label) + _mark(found, row, label) for label in found["labels"]]


def _mark(found, row, label):
    window = comparison.attention_window(found, label)
    measured = row["measurement"] == "recall" and row["x"] is not None and label in row["models"]
    if not measured or window is None or row["x"] <= window:
        return ""
    same = [other["x"] for other in found["rows"] if other["group"] == row["group"] and other["x"] < row["x"]]
    partly = row["group"] in BINNED and max(same, default=0) < window
    return f" {PARTLY if partly else BEYOND}"


def curves(found: dict, group: str) -> Figure | None:
    """Every model's metrics of a group over x, with intervals; None if there are none.

    Of the losses of repeats, the differences to the reference where there are any, beside those of all other tokens.
    """
    rows = [row for row in found["rows"] if row["group"] == group]
    if not rows:
        return None
    title, axis = GROUPS[group]
    apart = group == "repeats" and any(row["differences"] for row in rows)
    if apart:
        title += f", minus {found['reference']}'s; dotted: of all other tokens"
    drawn = "differences" if apart else "models"
    figure, axes = page.plot()
    percent = 100 if rows[0]["unit"] == "share" else 1
    for number, (colour, label) in enumerate(zip(itertools.cycle(page.PALETTE), found["labels"], strict=False)):
        own = [(row["x"], row[drawn][label]) for row in rows if label in row[drawn]]
        if not own:
            continue
        x = [place for place, _ in own]
        style = {"linestyle": page.LINES[number % len(page.LINES)], "marker": "o", "markersize": 3, "color": colour}
        axes.plot(x, [percent * value["value"] for _, value in own], label=page.named(label), **style)
        low, high = ([percent * _end(value, end) for _, value in own] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        for row in found["rows"] if apart else ():
            if row["metric"] == retrieval.OTHERS and label in row["differences"]:
                axes.axhline(row["differences"][label]["value"], color=colour, linewidth=0.8, linestyle=":")
    chance = _chance(found, group)
    if chance is not None:
        axes.axhline(percent * chance, color="#888888", linestyle=":", label="chance")
    axes.set_xlabel(axis)
    _powers_of_two(axes)
    if rows[0]["exponential"] or group == "divergence":
        axes.set_yscale("log")
        page.plain_ticks(axes.yaxis)
    furthest = max(row["x"] for row in rows)
    contexts = {found["models"][label]["training_context"] for label in found["labels"]}
    if len(contexts) == 1 and None not in contexts and furthest >= max(contexts):
        axes.axvline(max(contexts), color="#888888", linewidth=0.8, linestyle="-.", label="training context")
    if rows[0]["measurement"] == "recall" and _draw_windows(axes, found, furthest):
        title += f". Dashed, in a model's colour: its window of attention; {BEYOND}: beyond it, {PARTLY}: partly"
    axes.set_ylabel({"share": "%", "nats": "nats per token"}.get(rows[0]["unit"], "perplexity"))
    axes.legend(fontsize=7)
    table = [[f"{row['x']:g}", *_cells(found, row)] for row in rows]
    return page.drawn(figure, group.replace(" ", "-"), f"{title}.", [axis, *found["labels"]], table)


def _draw_windows(axes, found, furthest):
    """A dashed line at each model's window up to the furthest distance, in its colour; whether there are any."""
    by_window = {}
    for colour, label in zip(itertools.cycle(page.PALETTE), found["labels"], strict=False):
        window = comparison.attention_window(found, label)
        if window is not None and window < furthest:
            by_window.setdefault(window, []).append(colour)
    for window, colours in by_window.items():
        for number, colour in enumerate(colours):  # of models with one window, the dashes take turns
            dashes = (6 * number, (4, 6 * len(colours) - 4))
            axes.axvline(window, color=colour, linewidth=0.9, linestyle=dashes)
    return bool(by_window)


def tasks_plot(found: dict) -> Figure:
    """Every task's headline score with its interval, and published scores."""
    tasks = [row for row in found["rows"] if row["measurement"] == "harness" and row["headline"]]
    rows = [row for row in tasks if row["unit"] == "share"]  # perplexities do not fit on the axis
    figure, axes = page.plot(height=0.5 + 0.45 * max(1, len(rows)))
    legend = {label: page.named(label) for label in found["labels"]} | {"": "published"}  # each appears once
    for number, (colour, label) in enumerate(zip(itertools.cycle(page.PALETTE), found["labels"], strict=False)):
        for place, row in enumerate(rows):
            if label not in row["models"]:
                continue
            value = row["models"][label]
            y = -place + 0.12 * (number - len(found["labels"]) / 2)
            ends = [100 * _end(value, end) for end in ("low", "high")]
            axes.plot(ends, [y, y], color=colour, linewidth=1)
            axes.plot(100 * value["value"], y, "o", color=colour, markersize=4, label=legend.pop(label, None))
            known = found["published"].get(label, {}).get(row["metric"])
            if known is not None:
                axes.plot(100 * known, y, "|", color=colour, markersize=9, label=legend.pop("", None))
    axes.set_yticks([-place for place in range(len(rows))], [row["metric"] for row in rows])
    axes.set_xlabel("%")
    axes.legend(fontsize=7)
    table = [[row["metric"], *(comparison.shown(row, label) for label in found["labels"])] for row in tasks]
    return page.drawn(figure, "tasks", "Zero-shot tasks.", ["task", *found["labels"]], table)


def speed_section(found: dict, name: str = comparison.SPEED) -> Section:
    """Throughput, latency and memory, and the lengths from which students are better than the teacher."""
    results = list(found["details"][name].values())
    body = page.points([*timing.verdicts(results), *timing.break_even_lines(results)])
    if results[0]["rows"]:
        body += page.table(*timing.table(results)) + _all_figures(found, name)
    beside = name.removeprefix(comparison.SPEED)  # " in bfloat16"
    return Section(f"Speed and memory{beside}", body, speed_plots(results, beside.replace(" ", "-")))


def speed_plots(results: list[dict], suffix: str = "") -> tuple[Figure, ...]:
    """Time per step and state by context length, and the lengths from which a student's are smaller."""
    header, rows = timing.context_table(results)
    even, made = timing.break_even(results), []
    for name, key, scale, length, label, caption in (
        ("step", "step_seconds", 1e3, "tokens", "ms per step", "Time per step after a context"),
        ("state", "state_bytes", 2**-10, "bytes", "KiB", "State of one sequence after a context"),
    ):
        figure, axes = page.plot(4.8, 3.6)
        for colour, result in zip(itertools.cycle(page.PALETTE), results, strict=False):
            caches = dict.fromkeys(row["cache"] for row in result["contexts"])
            for style, cache in zip(("-", "--", ":", "-."), caches, strict=False):
                own = [row for row in result["contexts"] if row["cache"] == cache and row[key] is not None]
                x, y = [row["prompt"] for row in own], [scale * row[key] for row in own]
                named = page.named(f"{result['model']}, {cache}")
                axes.plot(x, y, "o" + style, markersize=3, color=colour, label=named)
            place = even.get(result["model"], {}).get(length)
            if place is not None:
                axes.axvline(place, color=colour, linewidth=0.8, linestyle=":")
                where = {"xycoords": ("data", "axes fraction"), "fontsize": 7, "color": colour}
                axes.annotate(f" {place:,}", (place, 0.96), **where)
        axes.set(xlabel="context, tokens", ylabel=label, yscale="log")
        page.plain_ticks(axes.yaxis)
        _powers_of_two(axes)
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))  # below the curves
        caption = f"{caption}; dotted: better than {results[0]['model']}'s from there on."
        made.append(page.drawn(figure, name + suffix, caption, header, rows))
    return tuple(made)


def samples(found: dict) -> str:
    """Continuations of the same prompts side by side; the part equal to the reference's is marked."""
    details = found["details"].get("generation")
    if not details:
        return ""
    shown = []
    for number, first in enumerate(details[found["labels"][0]]["samples"]):
        columns = []
        for label in found["labels"]:
            sample = details[label]["samples"][number]
            same = sample["greedy"][: sample["agreed_characters"]]
            columns.append(
                f'<div><h3>{html.escape(label)}</h3><pre><span class="same">{html.escape(same)}</span>'
                f"{html.escape(sample['greedy'][len(same) :])}</pre>"
                f"<details><summary>sampled</summary><pre>{html.escape(sample['sampled'])}</pre></details></div>"
            )
        shown.append(
            f'<h3>Prompt {number + 1}</h3><pre class="given">{html.escape(first["prompt"])}</pre>'
            f'<div class="columns">{"".join(columns)}</div>'
        )
    return page.paragraph(
        "Greedy continuations of held-out text; green: equal to the reference's, up to the first difference.", "note"
    ) + "".join(shown)


def _powers_of_two(axes):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")


def _all_figures(found, measurement):
    """A folded table of every metric of a measurement; for generation, also of the text that really follows."""
    name = {"by position": "perplexity"}.get(measurement, measurement)
    rows = [row for row in found["rows"] if row["measurement"] == name]
    header, cells = ["", *found["labels"]], []
    reference = found["details"][name].get(found["reference"], {})
    follows = {entry["name"]: Metric(**entry) for entry in reference.get("held_out", [])}
    for row in rows:
        cells.append([row["metric"], *_cells(found, row)])
        if follows:
            own = follows.get(row["metric"])
            cells[-1].append("–" if own is None else metrics.show(metrics.estimate(own, found["seed"]), own.unit))
    header += ["held-out text"] if follows else []
    return f"<details><summary>all metrics</summary>{page.table(header, cells)}</details>"


def _end(value, end):
    return value["value"] if value[end] is None else value[end]


def _chance(found, group):
    for result in found["details"].get("recall", {}).values():
        return result.get("chance", {}).get(group)
    return None
