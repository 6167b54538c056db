"""Generate the README's results from the figures of the quickstart.

python eval/readme.py --run runs/quickstart     copies the figures of a finished run to eval/quickstart.json
python eval/readme.py                           writes the README's results from that file
python eval/readme.py --check                   checks that they are current (exit code 1 if not)
"""

import argparse
import difflib
import sys
from pathlib import Path

from scavenger.report import comparison, report, timing
from scavenger.run import checkpoint


ROOT = Path(__file__).parents[1]
README, FIGURES = ROOT / "README.md", ROOT / "eval" / "quickstart.json"
BEGINS, ENDS = "<!-- results: made by eval/readme.py -->", "<!-- end of results -->"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="DIR", help="a finished run of recipes/quickstart.yaml")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    try:
        source = FIGURES if args.run is None else args.run / "report" / "report.json"
        figures = checkpoint.read_json(source)
        figures = figures if args.run is None else taken(figures)
        before = README.read_text(encoding="utf-8")
        after = with_results(before, figures)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"readme: error: {error}; expected a finished run, and a README with its two markers", file=sys.stderr)
        return 2
    if args.check and before != after:
        changes = difflib.unified_diff(before.splitlines(), after.splitlines(), "README.md", "its results", n=0)
        print("\n".join(changes), file=sys.stderr)
        return 1
    if not args.check:
        if args.run is not None:
            checkpoint.write_json(FIGURES, figures)
        checkpoint.write_text(README, after)
    return 0


def taken(figures: dict) -> dict:
    """The figures of a report that the README shows."""
    found = figures["comparison"]
    timings = list(found["details"]["speed"].values())
    return {
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


def with_results(readme: str, figures: dict) -> str:
    """The README with its results replaced; raises ValueError if it has no place for them."""
    if readme.count(BEGINS) != 1 or readme.count(ENDS) != 1:
        raise ValueError(f"README.md: found no place for results; expected {BEGINS} and {ENDS}")
    start, end = readme.index(BEGINS) + len(BEGINS), readme.index(ENDS)
    return f"{readme[:start]}\n{results(figures)}\n{readme[end:]}"


def results(figures: dict) -> str:
    """Both tables, with the data and versions they were measured with."""
    header, rows, _ = comparison.headline(figures["comparison"])
    found, text = figures["comparison"], figures["data"]
    perplexity = next(row for row in found["rows"] if row["metric"] == "perplexity")
    documents = perplexity["models"][found["reference"]]["items"]
    source = text.get("path") or text.get("name") or f"the {text['source']} of Python {text['python']}"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join(
        [
            *markdown(*report.cells(figures)),
            "",
            report.verdict(figures),
            "",
            f"Comparison with the teacher, with intervals ({100 * found['level']:.0f} %) over the {documents} "
            f"documents of the test split ({figures['test_tokens']:,} tokens), the sequences of recall, the prompts "
            "and the rounds of timing:",
            "",
            *markdown(["", *header[1:]], rows),
            "",
            comparison.verdict(found, found["labels"][-1:]),
            "",
            " ".join(figures["speed"]),
            "",
            f"Seed {figures['seed']}; text: {source}; {versions}.",
        ]
    )


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


if __name__ == "__main__":
    sys.exit(main())
