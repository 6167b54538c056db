"""Teacher, pre-trained, distilled and recurrent student side by side: a table, plots, samples, and one JSON."""

import base64
import dataclasses
import html
import shutil
import statistics
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from scavenger import certificate, checkpoint, data, energy, measure, plan, teacher, transfer
from scavenger.model import HyenaNeoXForCausalLM
from scavenger.recipe import Recipe


matplotlib.use("Agg")  # files, no window
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)
from matplotlib.ticker import MaxNLocator, NullFormatter  # noqa: E402


NAMES = ("teacher", "pre-trained", "distilled", "recurrent")
COLOURS = dict(zip(NAMES, ("#333333", "#c26d2d", "#2d6fc2", "#2f9e62"), strict=True))
TIMES = ("teacher", "student", "data", "checkpoints")  # as the log of a training shares out its time
PROMPT_TOKENS = 48  # of held-out text, that every sample goes on from


def run(recipe: Recipe, run_dir: Path, accelerator, tokenizer) -> Path:
    """Make `report/`: report.html for people, report.json for programs, the plots as PNG; prints the table."""
    folder = run_dir / "report"
    if accelerator.is_main_process:
        if not checkpoint.complete(folder):
            beside = checkpoint.partial(folder)
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            figures = measure_run(recipe, run_dir, accelerator.device, tokenizer)
            plots = draw(run_dir, figures, beside)
            checkpoint.write_json(beside / "report.json", figures)
            checkpoint.write_text(beside / "report.html", page(figures, plots, beside))
            checkpoint.finish(folder)
        print(text_table(checkpoint.read_json(folder / "report.json")))
        print(f"\nreport: {folder / 'report.html'}")
    accelerator.wait_for_everyone()
    return folder


def measure_run(recipe: Recipe, run_dir: Path, device, tokenizer) -> dict:
    """Every figure of the report, from the folders of the run."""
    folders = {
        "pre-trained": run_dir / "baseline",
        "distilled": run_dir / "transfer",
        "recurrent": run_dir / "recurrence",
    }
    frozen = teacher.load(recipe, run_dir).to(device)
    models = {"teacher": frozen}
    for name, folder in folders.items():
        if folder.is_dir():
            models[name] = HyenaNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    test = data.blocks(run_dir / "data", "test")
    prompt = torch.from_numpy(test[:1, :PROMPT_TOKENS].astype(np.int64)).to(device)
    seen = {"teacher": _teacher_tokens(recipe, run_dir)} | dict.fromkeys(folders, _student_tokens(recipe, run_dir))
    rows = {}
    for name, model in tqdm(models.items(), desc="report", unit="model", dynamic_ncols=True):
        held_out = measure.held_out(model, test, None if name == "teacher" else frozen)
        rows[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_seen": seen[name],
            "loss": held_out.loss,
            "perplexity": held_out.perplexity,
            "ratio_to_teacher": held_out.perplexity / (rows["teacher"]["perplexity"] if rows else held_out.perplexity),
            "agreement": held_out.agreement if name != "teacher" else 1.0,
            "divergence": held_out.divergence if name != "teacher" else 0.0,
            "generation": [
                dataclasses.asdict(measure.generation(model, _prompt(test, length)))
                for length in recipe.report.context_lengths
            ],
            "break_even_length": model.config.break_even_length if name != "teacher" else None,
            "sample": _sample(model, prompt, recipe, tokenizer),
        }
    read = checkpoint.read_json
    recurrence = run_dir / "recurrence" / "certificate.json"
    return {
        "run": str(run_dir),
        "seed": recipe.seed,
        "student": dataclasses.asdict(recipe.student),
        "test_tokens": held_out.tokens,
        "models": rows,
        "prompt": tokenizer.decode(prompt[0]),
        "history": {
            name: read(path)
            for name, path in {
                "activations": run_dir / "transfer" / "activations" / "history.json",
                "logits": run_dir / "transfer" / "history.json",
                "baseline": run_dir / "baseline" / "history.json",
            }.items()
            if path.is_file()
        },
        "trainings": trainings(run_dir, recipe),
        "plan": plan.compared(run_dir),
        "energy": energy.rows(run_dir),
        "recurrence": read(recurrence) if recurrence.is_file() else None,
        "data": read(run_dir / "data" / "source.json"),
        "environment": read(run_dir / "environment.json"),
    }


def trainings(run_dir: Path, recipe: Recipe) -> list[dict]:
    """How each training of the student went: its tokens, time and where that went, and steps that were skipped."""
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
                    "tokens": (turn.get("sequences") or turn["steps"] * turn["batch_size"])
                    * recipe.data.context_length,
                    "seconds": entries[-1]["seconds"],
                    "loss": entries[-1]["loss"],
                    "skipped": entries[-1].get("skipped", 0),
                }
                | {f"time_in_{what}": statistics.mean(entry[f"time_in_{what}"] for entry in entries) for what in TIMES}
            )
    return found


def text_table(figures: dict) -> str:
    """The comparison as aligned text."""
    return certificate.aligned(*cells(figures))


def draw(run_dir: Path, figures: dict, folder: Path) -> dict[str, str]:
    """Write the plots; returns file name to caption."""
    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "figure.dpi": 130,
            "savefig.bbox": "tight",
            "legend.frameon": False,
        }
    )
    plots = {}

    def save(name, caption):
        plt.savefig(folder / name)
        plt.close()
        plots[name] = caption

    _draw_losses(figures)
    save("loss.png", "Training loss: the student's cross-entropy from scratch, and its divergence from the teacher.")
    _draw_activations(figures)
    save("activations.png", "Activation error of each layer, relative to the energy of the teacher's attention output.")
    if any(
        key.startswith("floor_") for key in figures["history"]["logits"][-1]
    ):  # not where processes share parameters
        _draw_floors(figures)
        watched = figures["student"]["filter"]["hankel_states"]
        save("floors.png", f"While training: the least error that {watched} real states allow a filter.")
    if figures["recurrence"]:
        _draw_errors(figures)
        save("errors.png", "The error of each filter above its proven floor, below which no method comes; its modes.")
        _draw_positions(figures)
        save(
            "positions.png", "KL to the exact student by position, in contexts of the training length and longer ones."
        )
        _draw_spectra(figures)
        save("hankel.png", "Hankel singular values: how fast they fall decides how many states a filter needs.")
        error = _draw_filter(run_dir, figures, figures["recurrence"]["settings"]["horizon"])
        save("filter.png", f"The filter with the largest error ({error:.1e}) and its recurrence.")
    _draw_generation(figures)
    save("generation.png", "Generation, one sequence: speed, and what is kept between tokens, by context length.")
    return plots


def page(figures: dict, plots: dict[str, str], folder: Path) -> str:
    """One self-contained HTML page."""
    header, rows = cells(figures)
    table = _html_table(header, rows)
    images = "\n".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode((folder / name).read_bytes()).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for name, caption in plots.items()
    )
    samples = "\n".join(
        f"<h3>{html.escape(name)}</h3><pre><span>{html.escape(figures['prompt'])}</span>"
        f"{html.escape(row['sample'])}</pre>"
        for name, row in figures["models"].items()
    )
    facts = _html_table(
        ["", ""],
        [
            [key, str(value)]
            for key, value in {
                **{f"text: {key}": value for key, value in figures["data"].items() if not isinstance(value, dict)},
                "test tokens": f"{figures['test_tokens']:,}",
                "seed": figures["seed"],
                "student": figures["student"]["mixer"],
                **figures["environment"],
            }.items()
        ],
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>scavenger: {html.escape(figures["run"])}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
.wide {{ overflow-x: auto }}
figure {{ display: inline-block; margin: .5rem; vertical-align: top; max-width: 29rem }} img {{ width: 100% }}
figcaption {{ font-size: .85rem; color: #555 }}
pre {{ background: #f6f6f4; padding: .8rem; white-space: pre-wrap; font-size: .82rem }} pre span {{ color: #888 }}
</style>
<h1>{html.escape(figures["run"])}</h1>
<p>{html.escape(verdict(figures))}</p>
<div class="wide">{table}</div>
{images}
{_trainings_section(figures)}
{_recurrence_section(figures)}
<h2>What each model writes</h2>
<p>The grey text is held-out; each model goes on from it, sampled with the same seed.</p>
{samples}
<h2>What was run</h2>
<div class="wide">{facts}</div>
</html>
"""


def verdict(figures: dict) -> str:
    """The comparison in a sentence or two."""
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
        length = row.get("break_even_length")  # a report made by an earlier version has none
        parts.append(
            f"As a recurrence it changes by {100 * change:+.2f} % and keeps "
            f"{_bytes(row['generation'][0]['state_bytes'])} between tokens"
            + (
                f", whatever the length: less than the teacher's cache from {length:,} tokens on"
                if length
                else ", and its kept attention more with every token"
                if "break_even_length" in row
                else ""
            )
        )
    return ". ".join(parts) + "."


def cells(figures: dict) -> tuple[list[str], list[list[str]]]:
    """The comparison as a header and one row for each model."""
    lengths = [entry["context_length"] for entry in figures["models"]["teacher"]["generation"]]
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
        rows.append(
            [
                name,
                f"{row['parameters']:,}",
                f"{row['tokens_seen']:,}" if row["tokens_seen"] else "?",
                f"{row['perplexity']:.3f}",
                f"{row['ratio_to_teacher']:.3f}",
                f"{100 * row['agreement']:.1f} %",
                *(f"{entry['tokens_per_second']:.0f}" for entry in row["generation"]),
                *(_bytes(entry["state_bytes"]) for entry in row["generation"]),
            ]
        )
    return header, rows


def _bytes(count):
    if count is None:
        return "none"
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _html_table(header, rows):
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _trainings_section(figures):
    table = _html_table(
        [
            "",
            "steps",
            "tokens",
            "seconds",
            "tokens/s",
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
                *(f"{100 * row[f'time_in_{what}']:.0f} %" for what in TIMES),
                f"{row['skipped']:,}",
                f"{row['loss']:.4f}",
            ]
            for row in figures["trainings"]
        ],
    )
    section = f'<h2>Trainings</h2><div class="wide">{table}</div>'
    if figures["plan"]:
        rows = [[row["stage"], f"{row['planned']:,.0f}", f"{row['taken']:,.0f}"] for row in figures["plan"]]
        section += (
            "<p>Seconds as the plan saw them, from a few timed steps, and as they were.</p>"
            f'<div class="wide">{_html_table(["", "planned", "taken"], rows)}</div>'
        )
    if figures["energy"]:
        header, *rows = figures["energy"]
        section += (
            "<p>Energy and CO2 by stage, of the first process's machine.</p>"
            f'<div class="wide">{_html_table(header, rows)}</div>'
        )
    return section


def _recurrence_section(figures):
    found = figures["recurrence"]
    if not found:
        return ""
    contexts = _html_table(
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
    return (
        f"<h2>Certificate of the recurrence</h2><p>{html.escape(found['verdict'])}</p>"
        f"<p>Found by the method {settings['method']} for {aim}, over {settings['horizon']:,} taps, with at most "
        f"{settings['max_state_size']} complex modes a filter. Errors are relative l2 errors of the taps; the floor is "
        "proven from the Hankel singular values: no recurrence with as many real states has a smaller one. The error "
        'of a layer\'s output is measured on held-out text.</p><div class="wide">'
        f"{_html_table(*certificate.table(found))}</div>"
        f"<p>{html.escape(found['model']['compared'])}</p>"
        f'<div class="wide">{contexts}</div>'
    )


def _draw_losses(figures):
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
    history = figures["history"]
    if "baseline" in history:
        left.plot(*_curve(history["baseline"], "loss"), color=COLOURS["pre-trained"], label="pre-trained student")
    for name in ("teacher", "distilled"):
        left.axhline(figures["models"][name]["loss"], color=COLOURS[name], linestyle=":", label=f"{name}, held-out")
    left.set(xlabel="step", ylabel="cross-entropy (nats)")
    left.legend()
    right.plot(
        *_curve(history["logits"], "divergence" if "divergence" in history["logits"][0] else "loss"),
        color=COLOURS["distilled"],
    )
    right.set(xlabel="step of the logits stage", ylabel="KL to the teacher (nats)", yscale="log")
    figure.tight_layout()


def _draw_activations(figures):
    history = figures["history"]["activations"]
    layers = sorted(
        {key for entry in history for key in entry if key.startswith("layer_")}, key=lambda key: int(key[6:])
    )
    plt.figure(figsize=(4.6, 2.8))
    for index, layer in enumerate(layers):
        entries = [entry for entry in history if layer in entry]
        plt.plot(*_curve(entries, layer), color=plt.cm.viridis(index / max(1, len(layers))), label=f"layer {layer[6:]}")
    plt.yscale("log")
    plt.xlabel("step")
    plt.ylabel("relative error")
    plt.legend(ncols=2)


def _draw_floors(figures):
    """Both steps on one axis, the mean over the watched filters of a layer."""
    history = figures["history"]
    before = history["activations"][-1]["step"]
    entries = history["activations"] + [entry | {"step": before + entry["step"]} for entry in history["logits"]]
    keys = sorted((key for key in entries[-1] if key.startswith("floor_")), key=lambda key: int(key[6:]))
    plt.figure(figsize=(4.6, 2.8))
    plt.axvline(before, color="#bbbbbb", linewidth=1)
    for index, key in enumerate(keys):
        colour = plt.cm.viridis(index / max(1, len(keys)))
        plt.plot(*_curve([entry for entry in entries if key in entry], key), color=colour, label=f"layer {key[6:]}")
    plt.yscale("log")
    plt.xlabel("step (the line: from activations to logits)")
    plt.ylabel("floor of the relative error")
    plt.legend(ncols=2)


def _draw_errors(figures):
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
    layers = figures["recurrence"]["layers"]
    least = 1e-9  # of what is drawn: a floor of zero has no place on a logarithmic axis
    for index, layer in enumerate(layers):
        if layer["filters"]:
            left.scatter(
                *([max(least, f[key]) for f in layer["filters"]] for key in ("floor", "relative_error")),
                color=plt.cm.viridis(index / max(1, len(layers))),
                s=14,
                label=f"layer {index}",
            )
    low, high = (pick(*left.get_xlim(), *left.get_ylim()) for pick in (min, max))
    left.plot([max(low, least), high], [max(low, least), high], color="#888888", linewidth=0.8)
    left.set(xlabel="proven floor", ylabel="relative error", xscale="log", yscale="log")
    left.xaxis.set_minor_formatter(NullFormatter())  # less than a decade would have labels upon labels
    left.legend()
    modes = [f["state_size"] for layer in layers for f in layer["filters"]]
    right.hist(modes, bins=np.arange(-0.5, max(modes) + 1.5), color=COLOURS["recurrent"])
    right.set(xlabel="complex modes", ylabel="filters")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()


def _draw_positions(figures):
    found = figures["recurrence"]
    plt.figure(figsize=(4.6, 2.8))
    contexts = found["model"]["contexts"]
    for index, entry in enumerate(contexts):
        plt.plot(
            [(part["from"] + part["to"]) / 2 for part in entry["positions"]],
            [max(1e-9, part["divergence"]) for part in entry["positions"]],  # less is rounding of float32 logits
            "o-",
            markersize=3,
            color=plt.cm.viridis(index / max(1, len(contexts))),
            label=f"contexts of {entry['context_length']:,}",
        )
    plt.axvline(found["settings"]["horizon"], color="#888888", linestyle=":", label="horizon")
    plt.xlabel("position")
    plt.ylabel("KL (nats per token)")
    plt.yscale("log")
    plt.legend()


def _draw_spectra(figures):
    layers = figures["recurrence"]["layers"]
    plt.figure(figsize=(4.6, 2.8))
    for index, layer in enumerate(layers):
        if not layer["filters"]:
            continue
        count = max(len(f["hankel_values"]) for f in layer["filters"])  # of some only the first ones are known
        spectra = [np.array(f["hankel_values"]) for f in layer["filters"] if len(f["hankel_values"]) == count]
        curves = np.array([values / (values.max(initial=0) or 1) for values in spectra])
        colour = plt.cm.viridis(index / max(1, len(layers)))
        plt.plot(np.arange(1, count + 1), np.median(curves, axis=0), color=colour, label=f"layer {index}")
        plt.fill_between(np.arange(1, count + 1), curves.min(0), curves.max(0), color=colour, alpha=0.12)
    plt.yscale("log")
    plt.xlabel("real state")
    plt.ylabel("σ / σ₁ (median, range over filters)")
    plt.legend(ncols=2)


def _draw_filter(run_dir, figures, length):
    layers = figures["recurrence"]["layers"]
    error, layer, row = max(
        (f["relative_error"], i, j) for i, entry in enumerate(layers) for j, f in enumerate(entry["filters"])
    )
    student, recurrent = (
        HyenaNeoXForCausalLM.from_pretrained(run_dir / name, dtype=torch.float32) for name in ("transfer", "recurrence")
    )
    with torch.no_grad():
        exact, modal = (
            model.gpt_neox.layers[layer].mixer.filter(length)[row].numpy() for model in (student, recurrent)
        )
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(4.6, 3.2), sharex=True, height_ratios=[3, 1])
    top.plot(exact, color=COLOURS["distilled"], linewidth=2.4, alpha=0.5, label=f"layer {layer}, filter {row}")
    top.plot(
        modal, color=COLOURS["recurrent"], linewidth=1, label=f"{layers[layer]['filters'][row]['state_size']} modes"
    )
    top.set_ylabel("tap")
    top.legend()
    bottom.plot(modal - exact, color="#b03030", linewidth=1)
    bottom.set(xlabel="time (tokens)", ylabel="difference")
    figure.tight_layout()
    return error


def _draw_generation(figures):
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
    for name, row in figures["models"].items():
        lengths = [str(entry["context_length"]) for entry in row["generation"]]
        left.plot(
            lengths, [entry["tokens_per_second"] for entry in row["generation"]], "o-", color=COLOURS[name], label=name
        )
        held = [entry["state_bytes"] for entry in row["generation"]]
        if None not in held:
            right.plot(lengths, [size / 2**10 for size in held], "o-", color=COLOURS[name], label=name)
    left.set(xlabel="context length", ylabel="tokens per second", yscale="log")
    right.set(xlabel="context length", ylabel="state (KiB)", yscale="log")
    left.legend()
    figure.tight_layout()


def _curve(history, key):
    return [entry["step"] for entry in history], [entry[key] for entry in history]


def _prompt(blocks, length):
    """Held-out text of a length, over again where there is too little."""
    return torch.from_numpy(np.resize(blocks[: -(-length // blocks.shape[1])], length).astype(np.int64))[None]


def _sample(model, prompt, recipe, tokenizer):
    torch.manual_seed(recipe.seed)
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=recipe.report.sample_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=50,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


def _student_tokens(recipe, run_dir):
    return transfer.sequences(run_dir / "transfer") * recipe.data.context_length


def _teacher_tokens(recipe, run_dir):
    """What the teacher's folder says of its training, where it says so."""
    folder = recipe.teacher.folder or run_dir / "teacher"
    facts = folder / "training.json"
    return checkpoint.read_json(facts)["tokens"] if facts.is_file() else None
