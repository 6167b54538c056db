"""Teacher, pre-trained, distilled and recurrent student side by side: a table, a page of plots, and one JSON."""

import dataclasses
import html
import importlib.util
import itertools
import statistics
from pathlib import Path

import numpy as np
import torch

from scavenger import student, teacher
from scavenger.recipe import Recipe, RecipeError
from scavenger.recurrence import certificate
from scavenger.report import (
    comparison,
    contenders,
    continuation,
    drawing,
    likelihood,
    lm_eval_tasks,
    page,
    retrieval,
    timing,
)
from scavenger.report import sections as parts
from scavenger.report.evaluated import Evaluated
from scavenger.report.page import Section
from scavenger.report.results import Results
from scavenger.report.text import Blocks
from scavenger.run import checkpoint, energy
from scavenger.run.run import Run
from scavenger.transfer import transfer


NAMES = ("teacher", "pre-trained", "distilled", "recurrent")
TIMES = ("teacher", "student", "data", "checkpoints")  # shares of a training's time in its log
PROMPT_TOKENS = 48  # of held-out text, which every model continues


def run(run: Run) -> Path:
    """Write `report/`: index.html for people, report.json for programs, and the plots as SVG; print the table.

    Measurements are kept in `report.partial/results`, so that an interrupted report resumes.
    """
    folder = run.folder / "report"
    if run.accelerator.is_main_process:
        if not checkpoint.complete(folder):
            beside = checkpoint.partial(folder)
            beside.mkdir(parents=True, exist_ok=True)
            figures = measure_run(run, Results(beside / "results"))
            made = sections(run.folder, figures)
            parts.write_plots(made, beside)
            checkpoint.write_json(beside / "report.json", figures)
            title = f"scavenger: {figures['run']}"
            checkpoint.write_text(beside / "index.html", page.document(title, verdict(figures), made))
            checkpoint.finish(folder)
        print(text_table(checkpoint.read_json(folder / "report.json")))
        print(f"\nreport: {folder / 'index.html'}")
    run.accelerator.wait_for_everyone()
    return folder


def require_harness(recipe: Recipe):
    """Raise RecipeError if lm-eval is needed and not installed; called before any training."""
    if recipe.report and recipe.report.tasks and importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("report.tasks: lm_eval is not installed; expected pip install 'scavenger[eval]', or no tasks")


def work(recipe: Recipe) -> dict:
    """The cost of the report, for a plan: tokens that each model reads and generates, and seconds of timing at most."""
    asked = settings(recipe, [], recipe.data.evaluation_tokens)
    held_out = recipe.data.evaluation_tokens
    read = 2 * held_out  # measuring a student's perplexity also runs the teacher
    read += min(likelihood.LONG_CONTEXTS * asked.perplexity.longest, held_out)
    if asked.recall:
        read += retrieval.tokens_read(asked.recall, held_out)
    generated = 0
    if asked.generation:
        own = asked.generation
        read += 4 * own.prompts * (own.prompt_tokens + own.new_tokens)
        generated += 2 * own.prompts * own.new_tokens
    baseline, recurrence = recipe.baseline is not None, recipe.recurrence is not None
    # The teacher with a dynamic and a static cache, packed on a CPU and compiled; the recurrent student in two forms.
    compiled, cuda = contenders.compiles(), torch.cuda.is_available()
    kinds = 2 + (not cuda) + compiled + 1 + baseline + 2 * recurrence
    cases = len(asked.speed.cases) + len(asked.speed.contexts)
    rows = kinds * cases * len(timing.dtypes(torch.device("cuda" if cuda else "cpu")))
    return {
        "models": 2 + baseline + recurrence,
        "tokens_read": read,
        "tokens_generated": generated,
        "timing_seconds": 2 * asked.speed.seconds * rows,  # steps, and prompts; without compilation
    }


def measure_run(run: Run, results: Results) -> dict:
    """All figures of the report, from the folders of the run."""
    recipe, folder = run.recipe, run.folder
    models = evaluated(recipe, folder)
    test = run.blocks("test")
    text = Blocks(f"test split of {folder.name}", test, run.counted("test"))
    validation = run.blocks("validation"), run.counted("validation")
    asked = settings(recipe, models, test.size)
    try:
        found = comparison.run(models, text, asked, results, required=("perplexity", "speed"))
    except ValueError as error:  # e.g. missing documents of a task, or text that is too short
        raise RecipeError(f"report: {error}; what is measured is kept: run the same command again to resume") from error
    read = checkpoint.read_json
    recurrence = folder / "recurrence" / "certificate.json"
    return {
        "run": str(folder),
        "seed": recipe.seed,
        "student": dataclasses.asdict(recipe.student),
        "test_tokens": int(text.predictions.sum()),
        "chat_loss": recipe.data.chat_loss,
        "models": rows(found, recipe, folder),
        "teacher_held_out_loss": transfer.held_out_loss(models[0].model, *validation)["held_out_loss"],
        "comparison": found,
        "left_out": left_out(recipe, asked, test.size),
        "history": {
            name: read(path)
            for name, path in {
                "activations": folder / "transfer" / "activations" / "history.json",
                "logits": folder / "transfer" / "history.json",
                "baseline": folder / "baseline" / "history.json",
            }.items()
            if path.is_file()
        },
        "trainings": trained(folder, recipe.data.context_length),
        "plan": compared_with_plan(folder),
        "energy": energy.rows(folder),
        "recurrence": read(recurrence) if recurrence.is_file() else None,
        "recipe": (folder / "recipe.yaml").read_text(encoding="utf-8"),
        "data": read(folder / "data" / "source.json"),
        "environment": read(folder / "environment.json"),
    }


def evaluated(recipe: Recipe, run_dir: Path) -> list[Evaluated]:
    """The models of the run, its teacher first."""
    trusted = recipe.teacher.trust_remote_code  # the students have the teacher's tokenizer
    models = [
        Evaluated(
            "teacher",
            str(recipe.teacher.folder or (run_dir / "teacher" if recipe.teacher.train else recipe.teacher.name)),
            revision=recipe.teacher.revision,
            loader=lambda: teacher.load(recipe.teacher, run_dir).float(),  # the students' dtype, for comparable speeds
            trust_remote_code=trusted,
        )
    ]
    for name, place in (("pre-trained", "baseline"), ("distilled", "transfer"), ("recurrent", "recurrence")):
        folder = run_dir / place
        if folder.is_dir():
            student.require_current(folder)
            models.append(Evaluated(name, str(folder), trust_remote_code=trusted))
    return models


def settings(recipe: Recipe, models: list[Evaluated], test_tokens: int) -> comparison.Settings:
    """The report's measurements; those that the contexts or the test split are too short for are left out."""
    own, length, seed = recipe.report, recipe.data.context_length, recipe.seed
    prompts = min(own.prompts, test_tokens // (PROMPT_TOKENS + own.sample_tokens))
    asked = {"tasks": own.tasks, "limit": own.task_limit, "seed": seed, "local": own.tasks_path}
    asked["include"] = own.task_files
    return comparison.Settings(
        seed,
        likelihood.settings_for(models, length, length),
        retrieval.settings_for(models, context_length=length, examples=own.examples, seed=seed)
        if length >= retrieval.LEAD + 2 * retrieval.PASSAGE  # room for the shortest distance
        else None,
        continuation.Settings(prompts, PROMPT_TOKENS, own.sample_tokens, seed=seed) if prompts else None,
        lm_eval_tasks.settings_for(models, length, **asked) if own.tasks else None,
        timing.Settings(tuple(map(timing.Case.parsed, own.cases)), own.context_lengths, own.rounds, seed=seed),
    )


def left_out(recipe: Recipe, asked: comparison.Settings, test_tokens: int) -> list[str]:
    """A sentence for each measurement that `settings` leaves out or shortens."""
    said, own, each = [], recipe.report, PROMPT_TOKENS + recipe.report.sample_tokens
    if asked.recall is None:
        least = retrieval.LEAD + 2 * retrieval.PASSAGE
        said.append(f"Recall is not measured: it needs contexts of {least} tokens or more.")
    if asked.generation is None:
        said.append(
            f"Generation is not measured: the test split has {test_tokens:,} tokens, and a prompt with its "
            f"continuation takes {each:,}."
        )
    elif asked.generation.prompts < own.prompts:
        said.append(
            f"Generation is measured with {asked.generation.prompts:,} of {own.prompts:,} prompts: the test split has "
            f"{test_tokens:,} tokens, and a prompt with its continuation takes {each:,}."
        )
    return said


def rows(found: dict, recipe: Recipe, run_dir: Path) -> dict[str, dict]:
    """The figures of each model for the table."""
    by_metric = {row["metric"]: row for row in found["rows"]}
    loss = by_metric["perplexity"]
    seen = dict.fromkeys(NAMES, _student_tokens(recipe, run_dir)) | {"teacher": _teacher_tokens(recipe, run_dir)}
    made = {}

    def nearness(metric, name, of_itself):
        return by_metric[metric]["models"][name]["value"] if name != "teacher" else of_itself

    for name in found["labels"]:
        value = loss["models"][name]["value"]
        ratio = loss["differences"].get(name, {"value": 1.0, "low": None, "high": None})
        timings = found["details"]["speed"][name]["contexts"]
        made[name] = {
            "parameters": found["models"][name]["parameters"],
            "tokens_seen": seen[name],
            "loss": float(np.log(value)),
            "perplexity": value,
            "ratio_to_teacher": ratio["value"],
            "ratio_interval": [ratio["low"], ratio["high"]],
            "agreement": nearness(likelihood.AGREEMENT, name, 1.0),
            "divergence": nearness(likelihood.DIVERGENCE, name, 0.0),
            "generation": [_quickest(timings, length) for length in recipe.report.context_lengths],
            "break_even_length": found["models"][name]["break_even_length"],
            # Results that an interrupted report of an earlier version kept have none.
            "break_even_length_16_bit": found["models"][name].get("break_even_length_16_bit"),
        }
    return made


def trained(run_dir: Path, context_length: int) -> list[dict]:
    """Each training of the student: its tokens, how its time was spent, and its skipped steps."""
    read, found = checkpoint.read_json, []
    turns = read(run_dir / "transfer" / "turns.json")
    first = len(read(run_dir / "transfer" / "activations" / "turns.json"))
    folders = {run_dir / "transfer" / "activations": turns[:first], run_dir / "transfer": turns[first:]}
    if (run_dir / "baseline").is_dir():
        steps, sequences = sum(turn["steps"] for turn in turns), transfer.sequences(run_dir / "transfer")
        folders[run_dir / "baseline"] = [{"name": "baseline", "steps": steps, "sequences": sequences}]
    for folder, own in folders.items():
        history, before = read(folder / "history.json"), 0
        for turn in own:
            entries = [entry for entry in history if before < entry["step"] <= before + turn["steps"]]
            before += turn["steps"]
            found.append(
                {
                    "name": turn["name"],
                    "steps": turn["steps"],
                    "tokens": (turn.get("sequences") or turn["steps"] * turn["batch_size"]) * context_length,
                    "seconds": entries[-1]["seconds"],
                    "loss": entries[-1]["loss"],
                    "skipped": entries[-1].get("skipped", 0),
                    # A run that an earlier version began has none.
                    "mfu": statistics.mean(shares) if (shares := [e["mfu"] for e in entries if "mfu" in e]) else None,
                }
                | {f"time_in_{what}": statistics.mean(entry[f"time_in_{what}"] for entry in entries) for what in TIMES}
            )
    return found


def compared_with_plan(run_dir: Path) -> list[dict]:
    """For each complete stage of a run, the seconds predicted in `plan.json` and those in its history."""
    found, taken = [], {}
    for stage in checkpoint.read_json(run_dir / "plan.json") if (run_dir / "plan.json").is_file() else []:
        folder = run_dir / stage["folder"]
        if folder not in taken:
            taken[folder] = _taken(folder)
        own, taken[folder] = taken[folder][: stage["turns"]], taken[folder][stage["turns"] :]
        if own and stage["seconds"] is not None:
            found.append({"stage": stage["name"], "planned": stage["seconds"], "taken": sum(own)})
    return found


def _taken(folder):
    """The seconds of each training whose history is in `folder`."""
    if not (folder / "history.json").is_file():
        return []
    history = checkpoint.read_json(folder / "history.json")
    if not (folder / "turns.json").is_file():
        return [history[-1]["seconds"]]
    turns = checkpoint.read_json(folder / "turns.json")
    if (folder / "activations").is_dir():  # its turns are listed before this folder's own
        turns = turns[len(checkpoint.read_json(folder / "activations/turns.json")) :]
    seconds = {entry["step"]: entry["seconds"] for entry in history}
    return [seconds[step] for step in itertools.accumulate(turn["steps"] for turn in turns)]


def text_table(figures: dict) -> str:
    """The comparison as aligned text."""
    return certificate.aligned(*cells(figures))


def sections(run_dir: Path, figures: dict) -> list[Section]:
    """The sections of the page, in order."""
    found = figures["comparison"]
    comparison, *measured = parts.sections(found)
    made = [
        Section(
            "Result",
            page.table(*cells(figures)) + _quality_note(figures) + page.points(figures["left_out"]),
            (drawing.quality(figures),),
        ),
        comparison,
        *measured,
        _transfer_section(figures),
    ]
    if figures["recurrence"]:
        made.append(_recurrence_section(run_dir, figures))
    return [*made, _trainings_section(figures), _facts_section(figures)]


def verdict(figures: dict) -> str:
    """The comparison in one or two sentences."""
    models = figures["models"]
    distilled, teacher_row = models["distilled"], models["teacher"]
    parts = [
        f"The distilled student reaches perplexity {distilled['perplexity']:.3f}, "
        f"{distilled['ratio_to_teacher']:.3f} times its teacher's {teacher_row['perplexity']:.3f}"
    ]
    if "pre-trained" in models:
        parts[0] += (
            f"; the same student pre-trained on the same {distilled['tokens_seen']:,} tokens reaches "
            f"{models['pre-trained']['perplexity']:.3f}"
        )
    if "recurrent" in models:
        change = models["recurrent"]["perplexity"] / distilled["perplexity"] - 1
        row = models["recurrent"]
        length = row.get("break_even_length")  # a report made by an earlier version has none, or only the first
        half = row.get("break_even_length_16_bit")
        parts.append(
            f"As a recurrence its perplexity changes by {100 * change:+.2f} %; it keeps "
            f"{_bytes(row['generation'][0]['state_bytes'])} between tokens"
            + (
                f" at any context length, no more than the teacher's KV cache in float32 from {length:,} tokens on"
                + (f", in 16 bits from {half:,}" if half else "")
                if length
                else ", and more with every token in its kept attention layers"
                if "break_even_length" in row
                else ""
            )
        )
    return ". ".join(parts) + "."


def cells(figures: dict) -> tuple[list[str], list[list[str]]]:
    """The comparison as a header and one row for each model; speed and state at the first and the last context."""
    timings = [row["generation"] for row in figures["models"].values()]
    ends = sorted({0, len(timings[0]) - 1})
    lengths = [timings[0][place]["context_length"] for place in ends]
    header = [
        "",
        "parameters",
        "tokens seen",
        "perplexity",
        "× teacher",
        "agreement",
        *(f"tokens/s @{length}" for length in lengths),
        *(f"state @{length}" for length in lengths),
    ]
    rows = []
    for name, row in figures["models"].items():
        low, high = row.get("ratio_interval") or (None, None)  # a report made by an earlier version has none
        rows.append(
            [
                name,
                f"{row['parameters']:,}",
                f"{row['tokens_seen']:,}" if row["tokens_seen"] else "?",
                f"{row['perplexity']:.3f}",
                f"{row['ratio_to_teacher']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else ""),
                f"{100 * row['agreement']:.1f} %",
                *(_rate(row["generation"][place]["tokens_per_second"]) for place in ends),
                *(_bytes(row["generation"][place]["state_bytes"]) for place in ends),
            ]
        )
    return header, rows


def _rate(tokens_per_second):
    return "–" if tokens_per_second is None else f"{tokens_per_second:.0f}"


def _bytes(count):
    if count is None:  # out of memory
        return "–"
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _quality_note(figures):
    # A report made by an earlier version has no chat_loss.
    whose = " that the assistant wrote" if figures.get("chat_loss") == "assistant" else ""
    return page.paragraph(
        f"Perplexity on {figures['test_tokens']:,} predicted tokens of the test split{whose}, each block read "
        "independently; intervals are paired, over documents. Agreement: positions where the most likely token is the "
        "teacher's. "
        "Speeds: one sequence, each model with its fastest cache, timed in turn on one machine.",
        "note",
    )


def _transfer_section(figures):
    plots = [drawing.activations(figures), drawing.logits(figures)]
    last, body = figures["history"]["logits"][-1], ""
    if any(key.startswith("floor_") for key in last):
        plots.append(drawing.floors(figures))
    else:
        body = page.paragraph(f"Floors of the filters during training: {drawing.NOT_WATCHED}.", "note")
    return Section("Transfer", body, tuple(plots))


def _trainings_section(figures):
    table = page.table(
        [
            "",
            "steps",
            "tokens",
            "seconds",
            "tokens/s",
            "MFU",
            *(f"in {what}" for what in TIMES),
            "skipped",
            "loss",
        ],
        [
            [
                row["name"],
                f"{row['steps']:,}",
                f"{row['tokens']:,}",
                f"{row['seconds']:,.0f}",
                f"{row['tokens'] / row['seconds']:,.0f}",
                "–" if row.get("mfu") is None else f"{100 * row['mfu']:.1f} %",
                *(f"{100 * row[f'time_in_{what}']:.0f} %" for what in TIMES),
                f"{row['skipped']:,}",
                f"{row['loss']:.4f}",
            ]
            for row in figures["trainings"]
        ],
    )
    body = table + page.paragraph(
        "MFU: the model's FLOPs a second as a share of what a square matrix product reached on the same devices.",
        "note",
    )
    if figures["plan"]:
        rows = [[row["stage"], f"{row['planned']:,.0f}", f"{row['taken']:,.0f}"] for row in figures["plan"]]
        body += page.paragraph("Seconds predicted by the plan from a few timed steps, and seconds taken.")
        body += page.table(["", "planned", "taken"], rows)
    if figures["energy"]:
        header, *rows = figures["energy"]
        body += page.paragraph("Energy and CO2 by stage, on the machine of the first process.")
        body += page.table(header, rows)
    else:
        body += page.paragraph("Energy was not measured (training.energy).", "note")
    found = figures["comparison"]
    taken = {
        name: [f"{own[label]['seconds']:,.0f}" for label in found["labels"]]
        for name, own in found["details"].items()
        if all("seconds" in own.get(label, {}) for label in found["labels"])
    }
    body += page.paragraph("Seconds taken by the measurements of this report.")
    body += page.table(["", *found["labels"]], [[name, *cells] for name, cells in taken.items()])
    return Section("Cost", body)


def _recurrence_section(run_dir, figures):
    found = figures["recurrence"]
    contexts = page.table(
        ["context", "positions", "tokens", "KL (nats)", "agreement", "perplexity", "exact student's"],
        [
            [
                str(entry["context_length"]),
                which,
                f"{part['tokens']:,}",
                f"{part['divergence']:.2e}",
                f"{100 * part['agreement']:.2f} %",
                f"{part['perplexity']:.3f}",
                f"{part['exact_perplexity']:.3f}",
            ]
            for entry in found["model"]["contexts"]
            for which, part in (("all", entry), ("beyond the horizon", entry["beyond_horizon"]))
            if part
        ],
    )
    settings = found["settings"]
    aim = (
        f"a tolerance of {settings['tolerance']:g}"
        if settings["state_bytes"] is None
        else f"{settings['state_bytes']:,} bytes of state"
    )
    body = (
        page.paragraph(found["verdict"])
        + page.paragraph(
            f"Found by the method {settings['method']} for {aim}, over {settings['horizon']:,} taps, with at most "
            f"{settings['max_state_size']} complex modes per filter. Errors are relative l2 errors of the taps; the "
            "floor is a lower bound, proven from the Hankel singular values, for recurrences of as many real states. "
            "The error of a layer's output is measured on held-out text.",
            "note",
        )
        + page.table(*certificate.table(found))
        + page.paragraph(found["model"]["compared"], "note")
        + contexts
    )
    return Section("Certificate", body, drawing.recurrence(run_dir, figures))


def _facts_section(figures):
    facts = {
        **{f"text: {key}": value for key, value in figures["data"].items() if not isinstance(value, dict)},
        "test tokens": f"{figures['test_tokens']:,}",
        "seed": figures["seed"],
        **figures["comparison"]["versions"],
        **figures["environment"],
    }
    body = page.table(["", ""], [[key, str(value)] for key, value in facts.items()])
    recipe = f"<summary>the recipe, every default written out</summary><pre>{html.escape(figures['recipe'])}</pre>"
    return Section("What was run", f"{body}<details>{recipe}</details>")


def _quickest(contexts, length):
    """Speed after a context with the model's fastest cache, and state of its smallest cache."""
    own = [row for row in contexts if row["prompt"] == length and row["step_seconds"] is not None]
    best = timing.quickest_step(own)
    if best is None:  # out of memory
        return {"context_length": length} | dict.fromkeys(
            ("cache", "prefill_seconds", "tokens_per_second", "state_bytes")
        )
    return {
        "context_length": length,
        "cache": best["cache"],
        "prefill_seconds": best["prefill_seconds"],
        "tokens_per_second": 1 / best["step_seconds"],
        "state_bytes": min(row["state_bytes"] for row in own),
    }


def _student_tokens(recipe, run_dir):
    return transfer.sequences(run_dir / "transfer") * recipe.data.context_length


def _teacher_tokens(recipe, run_dir):
    """Tokens that the teacher was trained on, if its folder records them."""
    folder = recipe.teacher.folder or run_dir / "teacher"
    try:
        found = checkpoint.read_json(folder / "training.json")
    except (OSError, ValueError):  # not there, or not of this project
        return None
    tokens = found.get("tokens") if isinstance(found, dict) else None
    return tokens if isinstance(tokens, int) else None
