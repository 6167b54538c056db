"""Shared by the commands in `eval/`: arguments, tables, files of results and error reporting."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from scavenger.recipe import RecipeError
from scavenger.recurrence.certificate import aligned
from scavenger.report import metrics, text
from scavenger.report.evaluated import Evaluated
from scavenger.report.metrics import Metric
from scavenger.report.results import Results


def parser(doc: str) -> argparse.ArgumentParser:
    """The parser of a command: the models and the options common to all measurements."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("models", nargs="+", metavar="MODEL", help="checkpoint folder or Hub name, or LABEL=FOLDER")
    made.add_argument("--seed", type=int, default=0, help="seed of sampling and of the intervals (0)")
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    made.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with a checkpoint: read it first"
    )
    made.add_argument(
        "--results", type=Path, metavar="DIR", help="store measurements in this folder and reuse those it has"
    )
    return made


def add_text(made: argparse.ArgumentParser, limit: str = "read only the first N documents (all)"):
    """Add the options that select the held-out text, and --limit, whose help is given where it limits another thing."""
    made.add_argument("--text", metavar="PATH", help=".txt, .jsonl or .parquet, file or folder (the standard library)")
    made.add_argument("--dataset", metavar="NAME", help="or a data set on the Hub")
    made.add_argument("--subset", help="subset of the data set")
    made.add_argument("--revision", help="revision of the data set")
    made.add_argument(
        "--split",
        choices=["validation", "test", "all"],
        default="test",
        help="the documents that a run on this text holds out, by file names or a hash; or all (test)",
    )
    made.add_argument("--text-column", default="text", help="column of tables that holds the text (text)")
    made.add_argument("--limit", type=int, metavar="N", help=limit)


def text_of(args: argparse.Namespace, limit: int | None) -> text.Text:
    """The text selected by the options of `add_text`, its first `limit` documents."""
    positive(args, "limit")
    if args.text is not None and not Path(args.text).exists():
        raise ValueError(f"--text: {args.text} is not there; expected a file or folder of text")
    if args.text is not None and args.dataset is not None:
        raise ValueError("found --text and --dataset; expected one of them")
    return text.read(args.text, args.dataset, args.subset, args.revision, args.split, args.text_column, limit)


def models_of(args: argparse.Namespace) -> list[Evaluated]:
    """The models; ValueError if two have the same label."""
    found = [Evaluated.parsed(word, args.dtype, args.trust_remote_code) for word in args.models]
    labels = [model.label for model in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"found {label} {labels.count(label)} times; expected models that differ, or LABEL=FOLDER")
    if args.seed < 0:
        raise ValueError(f"--seed: found {args.seed}; expected 0 or more")
    return found


def positive(args: argparse.Namespace, *names: str):
    """Raise ValueError if one of these arguments was given and is less than 1."""
    for name in names:
        found = getattr(args, name)
        for value in found if isinstance(found, list) else [found]:
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: found {value}; expected 1 or more")


def run(
    name: str,
    made: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Results], list[dict]],
    argv: list[str] | None = None,
) -> int:
    """Measure, print a table and a line of JSON; a mistake is one line and exit code 2."""
    args = made.parse_args(argv)
    try:
        found = measure(args, Results(args.results))
    except (OSError, ValueError, RecipeError) as error:
        print(f"{name}: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; what --results holds is kept: run the same command again to resume" if args.results else ""
        print(f"\n{name}: interrupted{kept}", file=sys.stderr)
        return 130
    print(table(found, args.seed))
    print(json.dumps([summary(result, args.seed) for result in found]))
    return 0


def summary(result: dict, seed: int = 0) -> dict:
    """A result with values and intervals in place of the sums over items."""
    rows = {}
    for entry in result["metrics"]:
        metric = Metric(**entry)
        found = metrics.estimate(metric, seed)
        rows[metric.name] = {"value": found.value, "low": found.low, "high": found.high, "items": found.items}
    return result | {"metrics": rows}


def table(results: list[dict], seed: int = 0) -> str:
    """A row per metric and a column per model, values with their intervals; the settings are below the table."""
    labels = list(dict.fromkeys(result["model"] for result in results))
    cells = {}
    for result in results:
        for entry in result["metrics"]:
            metric = Metric(**entry)
            shown = metrics.show(metrics.estimate(metric, seed), metric.unit)
            cells.setdefault(metric.name, {})[result["model"]] = shown
        for name in result.get("unmeasured", []):
            cells.setdefault(name, {})
    rows = [[name, *(row.get(label, "–") for label in labels)] for name, row in cells.items()]
    settings = {}
    for result in results:
        settings |= result["settings"]
    return f"{aligned(['', *labels], rows)}\n\n{described(settings)}; intervals: {100 * metrics.LEVEL:.0f} %"


def described(settings: dict) -> str:
    """The settings, including limits, in one line."""
    shown = {key: "none" if value is None else value for key, value in settings.items()}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())
