"""Compare models on all measurements: one table with intervals, one page, one JSON; differences are paired."""

import functools
import math
import sys
from dataclasses import dataclass

from tqdm import tqdm

from scavenger.recurrence.certificate import aligned
from scavenger.report import command, continuation, likelihood, lm_eval_tasks, metrics, retrieval, timing
from scavenger.report.evaluated import Evaluated, same_outputs, same_tokenizer
from scavenger.report.metrics import Estimate, Metric
from scavenger.report.results import Results, versions
from scavenger.report.text import Blocks, Text


# Per unit of text, with documents or questions as items: comparable between models with different tokenizers.
OF_TEXT = ("bits per byte",)
SPEED = "speed"  # the measurement in the models' own dtype
FAILURES = (ValueError, RuntimeError)  # of a measurement; running out of memory is a RuntimeError


@dataclass(frozen=True)
class Settings:
    """The settings of each measurement; None if it is skipped."""

    seed: int = 0
    perplexity: "perplexity.Settings | None" = None
    recall: "recall.Settings | None" = None
    generation: "generation.Settings | None" = None
    tasks: lm_eval_tasks.Settings | None = None
    speed: "speed.Settings | None" = None


def run(
    models: list[Evaluated], text: Text | Blocks, settings: Settings, results: Results, required: tuple[str, ...] = ()
) -> dict:
    """All measurements of all models, and their differences to the first model, the reference.

    A measurement that fails for one of the models has only a row with the reason, unless it is a required one.
    """
    reference, failed = models[0], {}
    record = text.settings

    @functools.cache
    def stream(model):
        return text.stream(model.tokenizer)

    @functools.cache
    def continuations():
        return continuation.prepare(reference, stream(reference), settings.generation)

    @functools.cache
    def questions():
        return lm_eval_tasks.questions_of(settings.tasks)

    alike, outputs = same_tokenizer(models), same_outputs(models)
    if settings.tasks:  # raises for missing documents before anything is measured
        questions()
    if settings.generation and outputs:
        continuations()
    elif settings.generation:
        failed["generation"] = "the tokens of the models are not the same"
        print("generation is not compared: the tokens of the models are not the same", file=sys.stderr)
    found, bar = {"model": []}, tqdm(models, desc="measured", unit="model", dynamic_ncols=True)
    for model in bar:
        bar.set_postfix_str(model.label)

        def attempt(name, measure, model=model):
            if name in failed:
                return
            try:
                found.setdefault(name, []).append(measure())
            except FAILURES as error:
                _failed(name, model.label, error, failed, required)
                found.pop(name)

        def measured(name, own, measure, model=model):
            attempt(name, lambda: results.of(name, model, own, measure))

        found["model"].append(results.of("model", model, {}, functools.partial(facts, model)))
        if settings.perplexity:
            beside = reference if outputs and model is not reference else None
            own = likelihood.described(settings.perplexity) | record
            own |= {"reference": beside and beside.weights}
            measured("perplexity", own, functools.partial(likelihood.of, model, text, settings.perplexity, beside))
        if settings.recall:
            own = retrieval.described(settings.recall) | record
            measured("recall", own, lambda model=model: retrieval.run(model, stream(model), settings.recall))
        if settings.generation and outputs:
            own = continuation.described(settings.generation) | record | {"reference": reference.weights}
            measured(
                "generation",
                own,
                lambda model=model: continuation.run(
                    model, reference, stream(model), settings.generation, continuations()
                ),
            )
        if settings.tasks:
            attempt("harness", lambda model=model: lm_eval_tasks.of_model(model, questions(), settings.tasks, results))
        if model is not reference:
            model.close()
    for dtype in timing.dtypes(reference.device, reference.dtype) if settings.speed else ():
        name = SPEED if dtype == reference.dtype else f"{SPEED} in {dtype}"
        own = [model if dtype == model.dtype else model.in_dtype(dtype) for model in models]
        try:
            found[name] = timing.kept(own, settings.speed, results, stream(reference) if alike else None)
        except FAILURES as error:
            _failed(name, "all models", error, failed, required)
        for model in own:  # one dtype at a time is in memory
            model.close()
    for model in models:
        model.close()
    if failed and not found.keys() - {"model"}:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    return summary(models, found, settings, alike, failed)


def facts(model: Evaluated) -> dict:
    """Properties of the model itself, shown in tables."""
    itemsize = model.model.dtype.itemsize
    return {
        "metrics": [],
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "kind": "recurrent" if model.is_recurrent else "convolution" if model.is_student else model.config.model_type,
        "training_context": model.stated_context,
        "attention_window": model.attention_window,
        "state_bytes": model.config.state_bytes_of(itemsize) if model.is_recurrent else None,
        "break_even_length": model.config.break_even_length_of(4, itemsize) if model.is_student else None,  # float32
        "break_even_length_16_bit": model.config.break_even_length_of(2, itemsize) if model.is_student else None,
    }


def summary(
    models: list[Evaluated], found: dict[str, list[dict]], settings: Settings, alike: bool, failed: dict[str, str]
) -> dict:
    """The comparison: for each metric, every model's value, interval and difference to the reference."""
    labels = [model.label for model in models]
    rows = []
    for name, results in found.items():
        by_model = {result["model"]: {m["name"]: Metric(**m) for m in result["metrics"]} for result in results}
        order = list(dict.fromkeys(metric for own in by_model.values() for metric in own))
        for metric_name in order:
            own = {label: by_model[label][metric_name] for label in by_model if metric_name in by_model[label]}
            if next(iter(own.values())).relative:
                own.pop(labels[0], None)
            if not own:
                continue
            rows.append(_row(name, metric_name, own, labels[0], settings.seed, alike or name == "harness"))
        rows += [_plain_row(name, metric_name, "share", {}) for metric_name in results[0].get("unmeasured", [])]
    if SPEED in found:
        rows.append(_state_row(found[SPEED]))
    rows += [_plain_row(name, f"{name}: not measured ({reason})", "", {}) for name, reason in failed.items()]
    return {
        "reference": labels[0],
        "labels": labels,
        "models": {result["model"]: _without_metrics(result) for result in found["model"]},
        "settings": {
            name: {key: value for key, value in results[0]["settings"].items() if key != "reference"}
            for name, results in found.items()
            if name != "model"
        },
        "rows": rows,
        "details": {
            name: {result["model"]: _without_metrics(result) for result in results}
            for name, results in found.items()
            if name != "model"
        },
        "published": {model.label: scores for model in models if (scores := lm_eval_tasks.published_of(model))},
        "seed": settings.seed,
        "level": metrics.LEVEL,
        "versions": versions() | {"device": timing.device_name(models[0].device), "dtype": models[0].dtype},
    }


def verdict(found: dict, labels: list[str] | None = None) -> str:
    """One sentence per model (by default all) on where it is better or worse than the reference."""
    sentences = []
    for label in labels or found["labels"][1:]:
        said = {"worse": [], "better": [], "alike": [], "unsure": []}
        for row in found["rows"]:
            if row["headline"] and label in row["differences"]:
                apart = row["differences"][label]
                kind = "unsure" if apart["low"] is None else apart["verdict"] or "alike"
                said[kind].append(f"{row['metric']} ({shown_difference(row, label)})")
        parts = []
        if said["worse"]:
            parts.append(f"worse at {', '.join(said['worse'])}")
        if said["better"]:
            parts.append(f"better at {', '.join(said['better'])}")
        if said["alike"]:
            parts.append(f"not significantly different at {', '.join(name.split(' (')[0] for name in said['alike'])}")
        if said["unsure"]:
            parts.append(f"not judged (too few items) at {', '.join(said['unsure'])}")
        if parts:
            sentences.append(f"Compared with {found['reference']}, {label} is {'; '.join(parts)}.")
    sentences += recall_within_window(found, labels or found["labels"][1:])
    return " ".join(sentences) or "One model was measured; nothing was compared."


def recall_within_window(found: dict, labels: list[str]) -> list[str]:
    """A sentence if no distance in the means of recall is beyond what attention in these models sees, else nothing."""
    asked = found.get("settings", {}).get("recall")
    if asked is None:
        return []
    averaged = retrieval.within(asked["distances"], asked["context_length"])
    furthest = max(*averaged, asked.get("beyond_window") or 0)  # which results of an earlier version have
    windows = {label: window for label in labels if (window := attention_window(found, label)) is not None}
    inside = [label for label, window in windows.items() if furthest <= window]
    if not inside:
        return []
    return [
        f"All distances in the means of recall, up to {furthest:,} tokens, are within what the attention of "
        f"{' and '.join(inside)} sees: they say nothing of the filters."
    ]


def attention_window(found: dict, label: str) -> float | None:
    """Tokens that a model's attention sees at most; None as in `Evaluated`, or in figures of an earlier version."""
    window = found.get("models", {}).get(label, {}).get("attention_window")
    return math.inf if window == 0 else window


def text_table(found: dict) -> str:
    """The headline metrics as aligned text, followed by the settings."""
    header, rows, _ = headline(found)
    lines = [aligned(header, rows)]
    for name, settings in found["settings"].items():
        lines.append(f"{name}: {command.described(settings)}")
    return "\n".join(lines)


def headline(found: dict) -> tuple[list[str], list[list[str]], dict[tuple[int, int], str]]:
    """Header, a row per headline metric, and the cells that differ significantly from the reference."""
    header = [f"{100 * found['level']:.0f} % intervals", *found["labels"]]
    header += [f"{label}, published" for label in found["published"]]
    rows, classes = [], {}
    for row in (row for row in found["rows"] if row["headline"]):
        cells = [row["metric"] + _limited(row["measurement"], found["settings"])]
        for column, label in enumerate(found["labels"], 1):
            cells.append(shown(row, label))
            kind = row["differences"].get(label, {}).get("verdict")
            if kind:
                classes[len(rows), column] = kind
        for scores in found["published"].values():
            value = scores.get(row["metric"])
            cells.append("–" if value is None else metrics.show(Estimate(value, None, None, 0), row["unit"]))
        rows.append(cells)
    return header, rows, classes


def _failed(name, label, error, failed, required):
    """Note why a measurement failed; a required one fails the whole comparison."""
    if name in required:
        raise error
    failed[name] = f"{label}: {(str(error).splitlines() or [type(error).__name__])[0]}"
    print(f"{name} failed and is left out: {failed[name]}", file=sys.stderr)


def _row(measurement, name, own, reference, seed, comparable):
    """A row of the comparison: values, and differences between models measured on the same items."""
    any_metric = next(iter(own.values()))
    estimates = {label: metrics.estimate(metric, seed) for label, metric in own.items()}
    differences = {}
    if reference in own and (comparable or name in OF_TEXT):
        for label, metric in own.items():
            if label != reference and len(metric.numerators) == len(own[reference].numerators):
                found = metrics.difference(metric, own[reference], seed)
                differences[label] = _plain(found) | {"verdict": _judged(found, metric)}
    return {
        "measurement": measurement,
        "metric": name,
        "unit": any_metric.unit,
        "better": any_metric.better,
        "exponential": any_metric.exponential,
        "ratio": any_metric.by_ratio,
        "group": any_metric.group,
        "x": any_metric.x,
        "headline": any_metric.headline,
        "models": {label: _plain(found) for label, found in estimates.items()},
        "differences": differences,
    }


def _state_row(results):
    """The memory of each model's smallest cache for one sequence, after the longest prompt measured."""
    read = [(row["prompt"], row["state_bytes"]) for result in results for row in result["rows"] + result["contexts"]]
    longest = max((prompt for prompt, state in read if state is not None), default=0)
    kept = {}
    for result in results:
        rows = [row for row in result["rows"] + result["contexts"] if row["prompt"] == longest]
        sizes = [row["state_bytes"] / 1024 for row in rows if row["state_bytes"] is not None]
        if sizes:
            kept[result["model"]] = _plain(Estimate(min(sizes), None, None, 1))
    return _plain_row(SPEED, f"KiB kept after {longest:,} tokens", "", kept)


def _plain_row(measurement, name, unit, values):
    """A row without intervals; `values` is empty if nothing was measured."""
    shared = {"unit": unit, "better": "", "exponential": False, "ratio": False, "group": "", "x": None}
    shared["headline"] = True
    return {"measurement": measurement, "metric": name, **shared, "models": values, "differences": {}}


def _judged(found, metric):
    """better, worse, or None if the difference is not significant."""
    if not metric.better or not metrics.separates(found, metric):
        return None
    larger = found.value > (1.0 if metric.by_ratio else 0.0)
    return "better" if larger == (metric.better == "higher") else "worse"


def _plain(found):
    return {"value": found.value, "low": found.low, "high": found.high, "items": found.items}


def shown(row: dict, label: str) -> str:
    """A model's value in a row, as text."""
    if label not in row["models"]:
        return "–"
    return metrics.show(Estimate(**row["models"][label]), row["unit"])


def shown_difference(row: dict, label: str) -> str:
    """A model's difference to the reference in a row, as text."""
    if label not in row["differences"]:
        return "–"
    found = {key: value for key, value in row["differences"][label].items() if key != "verdict"}
    ratio = row.get("ratio", row["exponential"])  # in a comparison made by an earlier version, speeds are subtracted
    return metrics.show(Estimate(**found), row["unit"], signed=True, ratio=ratio)


def _limited(measurement, settings):
    """A note for measurements that read only the first documents or questions."""
    limit = settings.get(measurement, {}).get("limit") if measurement in ("perplexity", "harness") else None
    return f" (first {limit})" if limit else ""


def _without_metrics(result):
    return {key: value for key, value in result.items() if key != "metrics"}
