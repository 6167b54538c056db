"""Generate the README's results, docs/results/quickstart.md and its figure from the figures of the quickstart.

python eval/readme.py --run runs/quickstart     copies the figures of a finished run to eval/quickstart.json first
python eval/readme.py                           writes all three from that file
python eval/readme.py --check                   checks that they are current (exit code 1 if not)
"""

import argparse
import datetime
import difflib
import hashlib
import io
import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from scavenger.report import comparison, page, report, timing
from scavenger.run import checkpoint


ROOT = Path(__file__).parents[1]
README, FIGURES = ROOT / "README.md", ROOT / "eval" / "quickstart.json"
PAGE = ROOT / "docs" / "results" / "quickstart.md"
DRAWING = PAGE.with_suffix(".svg")
BEGINS, ENDS = "<!-- results: made by eval/readme.py -->", "<!-- end of results -->"
SHORT = 512  # tokens read before the first of the README's two speeds; the other is the longest context measured
# Rows of the README's table: the metric, and what a reader calls it.
SHOWN = (
    ("perplexity", "perplexity on held-out text"),
    ("recall of pairs", "recall of key-value pairs"),
    ("needle", "recall of a needle in real text"),
    ("gain on repeated passages", "gain on a passage read before, nats"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="DIR", help="a finished run of recipes/quickstart.yaml")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    try:
        figures = checkpoint.read_json(FIGURES) if args.run is None else taken(args.run)
        made = {README: with_results(read(README), figures), PAGE: results_page(figures)}
        drawing = DRAWING if digest(figures) in read(DRAWING) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"readme: error: {error}; expected a finished run, and a README with its two markers", file=sys.stderr)
        return 2
    if args.check:
        changes = [line for path, text in made.items() for line in differences(path, text)]
        changes += [] if drawing else [f"{DRAWING.name} was drawn from other figures"]
        print("\n".join(changes), file=sys.stderr)
        return 1 if changes else 0
    if args.run is not None:
        checkpoint.write_json(FIGURES, figures)
    for path, text in made.items():
        checkpoint.write_text(path, text)
    checkpoint.write_text(DRAWING, drawn(figures))
    return 0


def read(path: Path) -> str:
    """A file's text; none yet is an empty one."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def differences(path: Path, text: str) -> list[str]:
    """The lines in which a file differs from what it should be."""
    return list(difflib.unified_diff(read(path).splitlines(), text.splitlines(), path.name, "its figures", n=0))


def taken(run: Path) -> dict:
    """The figures of a run's report that the README and the page show, and the day it was written."""
    path = run / "report" / "report.json"
    figures = checkpoint.read_json(path)
    found = figures["comparison"]
    timings = list(found["details"]["speed"].values())
    return {
        "date": datetime.date.fromtimestamp(path.stat().st_mtime).isoformat(),
        "seed": figures["seed"],
        "test_tokens": figures["test_tokens"],
        "models": figures["models"],
        "comparison": {key: found[key] for key in ("reference", "labels", "level", "settings", "versions", "published")}
        | {"rows": [row for row in found["rows"] if row["headline"]]}
        | {"models": {label: {"attention_window": own["attention_window"]} for label, own in found["models"].items()}},
        "speed": [*timing.verdicts(timings), *timing.break_even_lines([timings[0], timings[-1]])],
        "data": {key: value for key, value in figures["data"].items() if not isinstance(value, dict)},
        "minutes": sum(row["seconds"] for row in figures["trainings"]) / 60,
        "environment": figures["environment"],
    }


def digest(figures: dict) -> str:
    """What a drawing carries of the figures it was made from."""
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def with_results(readme: str, figures: dict) -> str:
    """The README with its results replaced; raises ValueError if it has no place for them."""
    if readme.count(BEGINS) != 1 or readme.count(ENDS) != 1:
        raise ValueError(f"README.md: found no place for results; expected {BEGINS} and {ENDS}")
    start, end = readme.index(BEGINS) + len(BEGINS), readme.index(ENDS)
    return f"{readme[:start]}\n{summary(figures)}\n{readme[end:]}"


def summary(figures: dict) -> str:
    """The README's table: a row for each thing that matters to a user, a column for each model."""
    found, models = figures["comparison"], figures["models"]
    by_name = {row["metric"]: row for row in found["rows"]}
    rows = [
        [name, *(comparison.shown(by_name[metric], label).split(" [")[0] for label in found["labels"])]
        for metric, name in SHOWN
        if metric in by_name  # a short context has no room for passages
    ]
    rows.insert(1, ["× teacher, 95 % interval", *map(ratio, models.values())])
    for length in sorted({min(SHORT, last_length(models)), last_length(models)}):
        at_length = [timed(model, length) for model in models.values()]
        speeds = [f"{row['tokens_per_second']:,.0f}" for row in at_length]
        rows.append([f"tokens/s of one sequence after {length:,} tokens", *speeds])
    rows.append(
        [f"state after {last_length(models):,} tokens, KiB"]
        + [f"{timed(model, last_length(models))['state_bytes'] / 1024:,.1f}" for model in models.values()]
    )
    versions = found["versions"]
    on = f"{versions['device']}, {versions['dtype']}, torch {versions['torch']}"
    read = [f"{models[name]['tokens_seen']:,}" for name in ("distilled", "teacher")]
    said = f"The students read {read[0]} tokens, the teacher {read[1]}; {figures['date']}, {on}."
    return "\n".join([*markdown(["", *found["labels"]], rows), "", said])


def ratio(model: dict) -> str:
    """A perplexity as a multiple of the teacher's, with its interval where there is one."""
    low, high = model["ratio_interval"]
    return f"{model['ratio_to_teacher']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def last_length(models: dict) -> int:
    """The longest context that speed was measured after."""
    return max(row["context_length"] for row in models["teacher"]["generation"])


def timed(model: dict, length: int) -> dict:
    """Speed and state of a model after a context, or after the next longer one measured."""
    return min(
        (row for row in model["generation"] if row["context_length"] >= length), key=lambda row: row["context_length"]
    )


def results_page(figures: dict) -> str:
    """docs/results/quickstart.md: both tables with intervals, the verdicts, and how to read them."""
    return f"""# The quickstart's results

Made by `python eval/readme.py` from the figures of a run ([eval/quickstart.json](../../eval/quickstart.json)):

    accelerate launch recipes/quickstart.yaml
    python eval/readme.py --run runs/quickstart

{environment(figures)}

![Perplexity, recall, speed and state of the four models](quickstart.svg)

{results(figures)}

## How to read the tables

- **pre-trained** is the same student, trained from scratch on the tokens that the distilled one read.
- **× teacher** and its interval are paired by document: both models read the same text.
- **agreement** is the share of positions where the most likely token is the teacher's.
- **perplexity past the training length** is measured in contexts of four times that length.
- **tokens/s** are of one sequence. Each model generates with its quickest cache, chosen in a round of its own.
- **state** is what one sequence keeps between tokens: keys and values, or the state of a recurrence.
- The measurements are explained in [Evaluation](../evaluation.md).
"""


def results(figures: dict) -> str:
    """Both tables with their verdicts."""
    header, rows, _ = comparison.headline(figures["comparison"])
    found = figures["comparison"]
    perplexity = next(row for row in found["rows"] if row["metric"] == "perplexity")
    documents = perplexity["models"][found["reference"]]["items"]
    return "\n".join(
        [
            "## The four models",
            "",
            *markdown(*report.cells(figures)),
            "",
            report.verdict(figures),
            "",
            "## Comparison with the teacher",
            "",
            f"Intervals ({100 * found['level']:.0f} %) are over the {documents} documents of the test split "
            f"({figures['test_tokens']:,} tokens), the sequences of recall, the prompts and the rounds of timing.",
            "",
            *markdown(["", *header[1:]], rows),
            "",
            comparison.verdict(found, found["labels"][-1:]),
            "",
            "## Speed",
            "",
            *(line for verdict in figures["speed"] for line in (f"- {verdict}",)),
        ]
    )


def environment(figures: dict) -> str:
    """When, where and on what text it was measured, in one line."""
    text = figures["data"]
    source = text.get("path") or text.get("name") or f"the {text['source']} of Python {text['python']}"
    versions = ", ".join(f"{name} {version}" for name, version in figures["comparison"]["versions"].items())
    return f"{figures['date']}; seed {figures['seed']}; text: {source}; {versions}."


def drawn(figures: dict) -> str:
    """The figure, as SVG: perplexity and recall as bars, speed and state by the tokens that were read."""
    models, found = figures["models"], figures["comparison"]
    by_name = {row["metric"]: row["models"] for row in found["rows"]}
    colours = dict(zip(models, page.PALETTE, strict=False))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scavenger", "font.size": 8}):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained", facecolor="white")
        perplexity, recall, speed, state = figure.subplots(1, 4)
        for place, (label, model) in enumerate(models.items()):
            perplexity.bar(place, model["perplexity"], color=colours[label])
            recalled = [100 * by_name[name][label]["value"] for name in ("recall of pairs", "needle")]
            recall.bar([place * 0.2, 1 + place * 0.2], recalled, width=0.2, color=colours[label])
            lengths = [row["context_length"] for row in model["generation"]]
            for axes, key, unit in ((speed, "tokens_per_second", 1), (state, "state_bytes", 1024)):
                values = [row[key] / unit for row in model["generation"]]
                axes.plot(lengths, values, "o-", markersize=3, color=colours[label], label=label)
        perplexity.set(title="perplexity", xticks=range(len(models)))
        perplexity.set_xticklabels(list(models), rotation=30, ha="right")
        recall.set(title="recall, %", xticks=[0.3, 1.3], xticklabels=["pairs", "needle"])
        speed.set(title="tokens/s, one sequence", xlabel="tokens read", xscale="log", ylim=(0, None))
        state.set(title="state, KiB", xlabel="tokens read", xscale="log", yscale="log")
        for axes in (speed, state):
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30, ha="right")
            axes.minorticks_off()
        figure.legend(*state.get_legend_handles_labels(), loc="outside upper center", ncols=len(models), frameon=False)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Description": f"figures {digest(figures)}"})
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


if __name__ == "__main__":
    sys.exit(main())
