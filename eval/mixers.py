"""Compare students from finished runs of one teacher on one data set: quality, recall and memory.

    python eval/mixers.py runs/a runs/b --tolerances 0.1 0.3 --output eval/mixers.md
    python eval/mixers.py runs/a runs/b --tolerances 0.1 --state-bytes 300000 --output eval/filters.md
    python eval/mixers.py runs/a runs/b --figure frontier.png

Runs that differ only in their seed form one row, mean ± standard deviation. With --tolerances or --state-bytes the
filters of each row's first run are reduced again to each of these values, which shows the cost of a smaller state. The
tables are printed and written as Markdown with the settings of the runs; the last line is JSON. A student of windows
alone has no filters: its state is constant without a recurrence.
"""

import argparse
import copy
import json
import os
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import torch
import yaml
from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from scavenger import data, families, measure, teacher
from scavenger import student as students
from scavenger.model import HyenaConfig, HyenaForCausalLM
from scavenger.recipe import Filter, Recipe, RecipeError, differences, load_recipe, resolved
from scavenger.recurrence import recurrence
from scavenger.report import retrieval
from scavenger.run import checkpoint


matplotlib.use("Agg")  # files, no window
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)


PROMPT_TOKENS = 300  # prompt after which the state is measured; a longer attention window is filled
HEADER = [
    "row",
    "mixer",
    "seeds",
    "tokens seen",
    "distilled, test (× teacher)",
    "validation (× teacher)",
    "agreement",
    "recurrent, test (× teacher)",
    "validation (× teacher)",
    "pairs",
    "passages",
    "state, bytes",
    "break-even, tokens",
]
ALONE = {"filters": 0, "window": 1}  # the half of the gates that is open when a branch is by itself


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--tolerances", type=float, nargs="*", default=[], help="tolerances for reducing the filters")
    parser.add_argument("--state-bytes", type=int, nargs="*", default=[], help="budgets for reducing the filters")
    parser.add_argument("--output", type=Path, default=Path("eval/mixers.md"), help="default: eval/mixers.md")
    parser.add_argument("--figure", type=Path, help="draw state against perplexity and recall there, as PNG or SVG")
    args = parser.parse_args(argv)
    try:
        if not args.output.parent.is_dir():
            raise RecipeError(f"--output: {args.output.parent} is not a folder; expected one to write into")
        if args.output.is_dir():
            raise RecipeError(f"--output: {args.output} is a folder; expected the name of a file")
        if args.figure and args.figure.suffix not in (".png", ".svg"):
            raise RecipeError(f"--figure: found {args.figure}; expected a name that ends in .png or .svg")
        if any(not 0 < tolerance < 1 for tolerance in args.tolerances):
            raise RecipeError(f"--tolerances: found {args.tolerances}; expected relative errors between 0 and 1")
        if any(budget < 1 for budget in args.state_bytes):
            raise RecipeError(f"--state-bytes: found {args.state_bytes}; expected positive numbers of bytes")
        aims = [{"tolerance": tolerance} for tolerance in args.tolerances]
        found = run(args.runs, aims + [{"state_bytes": budget} for budget in args.state_bytes])
        if args.figure:
            draw(found, args.figure)
        checkpoint.write_text(args.output, page(found, args.figure))
    except (OSError, ValueError, RecipeError) as error:
        print(f"mixers: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(table(found) + "\n\n" + recall_table(found))
    if any("controls" in run for row in found["students"] for run in row["runs"]):
        print("\n" + control_table(found))
    if any(row["reduced"] for row in found["students"]):
        print("\n" + reduction_table(found))
    print(json.dumps(found))
    return 0


def run(folders: list[Path], aims: list[dict]) -> dict:
    """All figures of the comparison; raises RecipeError, one line, for runs that cannot be compared."""
    runs = [(folder, finished(folder)) for folder in folders]
    rows = grouped(runs)
    recipe = runs[0][1]
    distances = distances_within(recipe.data.context_length)
    transformers_logging.disable_progress_bar()
    bar = tqdm(total=len(runs), desc="mixers", unit="run", leave=False)
    teachers = {}  # by held-out text, since the seed decides the order of a data set's documents
    students = []
    for row in rows:
        measured = []
        for folder, recipe in row:
            frozen = teacher.load(recipe.teacher, folder).to(device())
            text = _held_out_text(folder)
            if text not in teachers:
                teachers[text] = {"seed": recipe.seed} | of_teacher(frozen, recipe, folder, distances)
            measured.append(of_student(frozen, teachers[text], recipe, folder, distances))
            bar.update()
        students.append(
            {
                "mixer": mixer(folder, recipe),
                "tokens_seen": tokens_seen(recipe),
                "sections": {
                    name: section
                    for name, section in yaml.safe_load(resolved(recipe)).items()
                    if name in ("student", "transfer", "recurrence")
                },
                "runs": measured,
                "reduced": [reduced_again(*row[0], aim) for aim in aims] if recipe.recurrence else [],
            }
        )
    bar.close()
    config = frozen.config
    pairs = retrieval.pairs_shown(retrieval.fitting(distances, recipe.data.context_length))
    return {
        "command": shlex.join(
            ["python", "eval/mixers.py", *(shown(folder) for folder, _ in runs)]
            + _option("--tolerances", [aim["tolerance"] for aim in aims if "tolerance" in aim])
            + _option("--state-bytes", [aim["state_bytes"] for aim in aims if "state_bytes" in aim])
        ),
        "teacher": {
            "name": f"teacher: {config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size} channels",
            "bytes_per_token": _bytes_per_token(config),
            "texts": list(teachers.values()),
        },
        "students": students,
        "recall": {"distances": distances, "pairs": pairs, "examples": retrieval.EXAMPLES},
        "tokens": recipe.data.evaluation_tokens,
        "environments": environments(folders),
    }


def distances_within(length: int) -> list[int]:
    """Distances of passages that double from the shortest as far as they fit a context, and the furthest that fits."""
    furthest = length - retrieval.LEAD - retrieval.PASSAGE
    doubling = [retrieval.PASSAGE << step for step in range(length.bit_length())]
    return sorted({*retrieval.within(doubling, length), furthest})


def finished(folder: Path) -> Recipe:
    """The recipe of a finished run."""
    for name in ("recipe.yaml", "environment.json", "data", "transfer"):
        if not (folder / name).exists():
            raise RecipeError(f"{folder}: found no {name}; expected the folder of a finished run")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    if not recurrent_folder(folder, recipe).exists():
        raise RecipeError(f"{folder}: found no recurrence; expected the folder of a finished run")
    return recipe


def recurrent_folder(folder: Path, recipe: Recipe) -> Path:
    """The student that generates in constant memory: a window alone does without another stage."""
    return folder / ("transfer" if recipe.student.mixer == "window" else "recurrence")


def grouped(runs: list[tuple[Path, Recipe]]) -> list[list[tuple[Path, Recipe]]]:
    """Runs grouped by configuration: those that differ only in seed and folder are together, in the order given."""
    first_folder, first = runs[0]
    rows = []
    for folder, recipe in runs:
        for name, same in {
            # A teacher trained by the run depends on the seed.
            "teacher": recipe.teacher == first.teacher and (recipe.teacher.train is None or recipe.seed == first.seed),
            "data": recipe.data == first.data,
        }.items():
            if not same:
                raise RecipeError(
                    f"{folder}: found another {name} than in {first_folder}; "
                    "expected runs of one teacher on one data set"
                )
        row = next((row for row in rows if _same_configuration(row[0][1], recipe)), None)
        if row is None:
            rows.append([(folder, recipe)])
            continue
        for other, its_recipe in row:
            if its_recipe.seed == recipe.seed:
                raise RecipeError(
                    f"{folder}: found the configuration and the seed ({recipe.seed}) of {other}; expected another seed"
                )
        row.append((folder, recipe))
    return rows


def of_teacher(model, recipe: Recipe, folder: Path, distances: list[int]) -> dict:
    """Perplexity and recall of the teacher."""
    test, validation = (data.blocks(folder / "data", split) for split in ("test", "validation"))
    return {
        "test": measure.held_out(model, test).perplexity,
        "validation": measure.held_out(model, validation).perplexity,
    } | recalled(model, recipe, folder, distances)


def of_student(frozen, its_teacher: dict, recipe: Recipe, folder: Path, distances: list[int]) -> dict:
    """Perplexity, agreement, recall and state of a run's students; ratios to the teacher on the same text."""
    test, validation = (data.blocks(folder / "data", split) for split in ("test", "validation"))
    figures = {"run": shown(folder), "seed": recipe.seed}
    for name, stage in (("distilled", folder / "transfer"), ("recurrent", recurrent_folder(folder, recipe))):
        model = students.load(stage).to(device())
        on_test = measure.held_out(model, test, frozen if name == "distilled" else None)
        figures[name] = {"test": on_test.perplexity, "validation": measure.held_out(model, validation).perplexity}
        figures[name] |= {f"{split}_ratio": figures[name][split] / its_teacher[split] for split in list(figures[name])}
        if name == "distilled":
            figures["agreement"] = on_test.agreement
    state = constant_state(model, test)
    if any(getattr(layer.mixer, "join", None) is not None for layer in model.model.layers):
        exact = students.load(folder / "transfer").to(device())
        validation_ratio = {}
        for branch in ALONE:
            alone = measure.held_out(with_one_branch(exact, branch), validation).perplexity
            validation_ratio[branch] = alone / its_teacher["validation"]
        figures["controls"] = validation_ratio
    return (
        figures
        | {"window": model.config.window, "widest_window": model.config.widest_window}
        | recalled(model, recipe, folder, distances)
        | {
            "state_bytes": state,
            "break_even": None if state is None else -(-state // _bytes_per_token(frozen.config)),
        }
    )


@torch.no_grad()
def with_one_branch(model: HyenaForCausalLM, branch: str) -> HyenaForCausalLM:
    """The student with the other branch's gates shut: `filters` or `window` by itself."""
    alone = copy.deepcopy(model)
    for layer in alone.model.layers:
        if getattr(layer.mixer, "join", None) is not None:
            weight, bias = (z.chunk(2)[ALONE[branch]] for z in (layer.mixer.join.weight, layer.mixer.join.bias))
            weight.zero_()
            bias.fill_(-torch.inf)
    return alone


def reduced_again(folder: Path, recipe: Recipe, aim: dict) -> dict:
    """State and quality of the run's student with its filters reduced to `aim`, relative to exact filters."""
    exact = students.load(folder / "transfer").to(device())
    horizon = recipe.recurrence.horizon or recipe.data.context_length - recipe.student.window
    settings = replace(recipe.recurrence, **{"state_bytes": None} | aim)
    blocks = data.blocks(folder / "data", "validation")
    with tempfile.TemporaryDirectory() as scratch:
        reduced, _ = recurrence.reduced(exact, settings, horizon, blocks, Path(scratch), PartialState())
    model = recurrence.recurrent_student(exact, reduced).to(device())
    alone, against = measure.held_out(exact, blocks), measure.held_out(model, blocks, exact)
    sizes = [one.state_size for layer in reduced for one in layer]
    return {
        "seed": recipe.seed,
        **({"state_bytes_asked": aim["state_bytes"]} if "state_bytes" in aim else aim),
        "modes": statistics.fmean(sizes),
        "most_modes": max(sizes),
        "state_bytes": model.config.state_bytes,
        "break_even": model.config.break_even_length,
        "ratio": against.perplexity / alone.perplexity,
        "divergence": against.divergence,
        "agreement": against.agreement,
    }


def recalled(model, recipe: Recipe, folder: Path, distances: list[int]) -> dict:
    """Recall on the run's test split: the share of correct values, and the mean gain on repeated passages."""
    test = data.blocks(folder / "data", "test")
    special = teacher.tokenizer(recipe, folder).all_special_ids
    asked = (distances, retrieval.EXAMPLES, 0)
    found = [
        *retrieval.associative_recall(
            model, test, special, retrieval.fitting(distances, recipe.data.context_length), *asked[1:]
        ),
        *retrieval.repeated_passages(model, test, *asked),
    ]
    means = {metric.name: sum(metric.numerators) / sum(metric.denominators) for metric in found}
    return {
        "pairs": means["recall of pairs"],
        "passages": means["gain on repeated passages"],
        "by_distance": [means[f"passages at {distance}"] for distance in distances],
    }


def constant_state(model: HyenaForCausalLM, blocks) -> int | None:
    """Bytes of the student's cache for one sequence; None if they grow with its length."""
    config = model.config
    if config.state_grows:
        return None
    length = max(PROMPT_TOKENS, config.widest_window or 0)
    prompt = torch.from_numpy(blocks.reshape(-1)[:length].astype("int64"))[None].to(model.device)
    with torch.inference_mode():
        cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).cache
    return measure.state_bytes(cache)


def mixer(folder: Path, recipe: Recipe) -> str:
    """The mixer in words, with the filter settings that differ from the defaults."""
    config = HyenaConfig.from_pretrained(recurrent_folder(folder, recipe))
    if not config.num_filters:
        words = f"window {config.window}"
    elif config.filter_head_width == 1:
        words = "hyena" if config.hyena_order == 1 else f"hyena of order {config.hyena_order}"
    else:
        words = f"multihyena, {config.num_filters} filters of {config.filter_head_width} channels"
    if config.window and config.num_filters:
        words += f", window {config.window}"
    if config.features != "none":
        words += f", {config.features} features"
    kept = [f"layer {layer}" for layer in config.attention_layers] + list(recipe.student.attention_heads)
    if kept:
        window = f"window {config.attention_window}" if config.attention_window else "no window"
        words += f", {' and '.join(kept)} kept, {window}"
    filters, plain = asdict(recipe.student.filter), asdict(Filter())
    changed = [f"{key} {value}" for key, value in filters.items() if value != plain[key]]
    return "; ".join([words, *changed])


def tokens_seen(recipe: Recipe) -> int:
    """Training tokens of the student in both steps of transfer, according to the recipe."""
    return sum(phase.steps * phase.batch_size for phase in recipe.transfer.phases) * recipe.data.context_length


def page(found: dict, figure: Path | None = None) -> str:
    """The tables as a Markdown page, with the command and settings."""
    asked, students = found["recall"], found["students"]
    distances = ", ".join(map(str, asked["distances"]))
    sections = [
        f"{number}. {row['mixer']}: {', '.join(run['run'] for run in row['runs'])}\n\n   ```yaml\n"
        + "".join(
            f"   {name}: {yaml.safe_dump(section, default_flow_style=True, sort_keys=False, width=10_000)}"
            for name, section in row["sections"].items()
        )
        + "   ```\n"
        for number, row in enumerate(students, 1)
    ]
    environments = [", ".join(f"{key} {value}" for key, value in one.items()) for one in found["environments"]]
    return f"""# Mixers, measured

```bash
{found["command"]}
```

{table(found)}
{"" if figure is None else f"{chr(10)}![State against perplexity and recall]({figure.name}){chr(10)}"}
- ±: standard deviation over seeds. The seed also decides which held-out text is read, so compare the ratios
  (× teacher): both models are measured on the same text, at most {found["tokens"]:,} tokens of each split.
- agreement: positions of the test split where the distilled student's most likely token is the teacher's.
- pairs, passages: recall of the recurrent student on the test split, as `eval/recall.py` measures it;
  {asked["examples"]} sequences of pairs, and as many passages at each distance, the same for all students of a seed.
- pairs: when a key that was read with its value is repeated, how often that value is the most likely of the
  {asked["pairs"]} shown; by chance {100 / asked["pairs"]:.1f} % over all distances.
- passages: how much lower the loss is when a passage is repeated after {distances} tokens,
  mean over these distances, nats per token; also positive for a model that remembers tokens but not their order.
- a row that keeps attention recalls by it what is no further back than its window; only from beyond do its filters
  recall.
- state: the recurrent student's cache for one sequence in float32 after a prompt of
  {PROMPT_TOKENS:,} tokens, or of its window where that is longer.
- break-even: the length at which the teacher's KV cache has as many bytes, both in float32.

## Passages by distance

Gain of the recurrent student on a passage that is repeated so many tokens on, nats per token. † beyond the row's widest
window: only filters reach there.

{recall_table(found)}

{control_section(found)}{reduction_section(found)}## The rows

{chr(10).join(sections)}
## Environment

{chr(10).join("- " + line for line in environments)}
"""


def table(found: dict) -> str:
    """The comparison as a Markdown table whose columns are aligned."""
    texts = found["teacher"]["texts"]
    lines = [
        HEADER,
        [
            "",
            found["teacher"]["name"],
            _seeds(texts),
            "",
            _spread([text["test"] for text in texts], ".3f"),
            _spread([text["validation"] for text in texts], ".3f"),
            "",
            "",
            "",
            *_recall_cells(texts),
            f"{found['teacher']['bytes_per_token']:,} a token",
            "",
        ],
    ]
    for number, row in enumerate(found["students"], 1):
        runs = row["runs"]
        distilled, recurrent = ([run[name] for run in runs] for name in ("distilled", "recurrent"))
        lines.append(
            [
                str(number),
                row["mixer"],
                _seeds(runs),
                f"{row['tokens_seen']:,}",
                _against_teacher(distilled, "test"),
                _against_teacher(distilled, "validation"),
                _spread([100 * run["agreement"] for run in runs], ".1f") + " %",
                _against_teacher(recurrent, "test"),
                _against_teacher(recurrent, "validation"),
                *_recall_cells(runs),
                _count([run["state_bytes"] for run in runs]),
                _count([run["break_even"] for run in runs]),
            ]
        )
    return _aligned(lines)


def recall_table(found: dict) -> str:
    """Gains on repeated passages by distance; those beyond a row's widest window are marked."""
    distances = found["recall"]["distances"]
    lines = [
        ["row", "mixer", "widest window", *map(str, distances)],
        ["", "teacher", "", *_by_distance(found["teacher"]["texts"], distances, None)],
    ]
    for number, row in enumerate(found["students"], 1):
        widest = row["runs"][0]["widest_window"]
        said = "–" if widest is None else str(widest or "all")
        lines.append([str(number), row["mixer"], said, *_by_distance(row["runs"], distances, widest)])
    return _aligned(lines)


def _by_distance(runs, distances, widest):
    gains = zip(*(run["by_distance"] for run in runs), strict=True)
    marks = ["" if widest == 0 or widest is None or distance <= widest else " †" for distance in distances]
    return [_spread(list(gain), ".3f") + mark for gain, mark in zip(gains, marks, strict=True)]


def control_section(found: dict) -> str:
    """The section on each branch by itself, if a student has both."""
    if not any("controls" in run for row in found["students"] for run in row["runs"]):
        return ""
    return f"""## One branch by itself

Perplexity on the validation split (× teacher) of the distilled student with the gates of its filters, or those of its
windows, shut after training. The teacher itself, through the same transfer, does not change: against its own
distribution its loss and its gradient are zero.

{control_table(found)}

"""


def control_table(found: dict) -> str:
    lines = [["row", "mixer", "both", "window alone", "filters alone"]]
    for number, row in enumerate(found["students"], 1):
        runs = [run for run in row["runs"] if "controls" in run]
        if runs:
            cells = [_spread([run["controls"][branch] for run in runs], ".3f") for branch in ("window", "filters")]
            both = _spread([run["distilled"]["validation_ratio"] for run in runs], ".3f")
            lines.append([str(number), row["mixer"], both, *cells])
    return _aligned(lines)


def draw(found: dict, path: Path):
    """State against perplexity on the validation split, and against the gain on passages at the furthest distance."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8), dpi=130, layout="constrained")
    furthest = found["recall"]["distances"][-1]
    for number, row in enumerate(found["students"], 1):
        runs = [run for run in row["runs"] if run["state_bytes"] is not None]
        if not runs:
            continue
        state = statistics.fmean(run["state_bytes"] for run in runs) / 1024
        for place, values in zip(
            axes,
            ([run["recurrent"]["validation_ratio"] for run in runs], [run["by_distance"][-1] for run in runs]),
            strict=True,
        ):
            spread = statistics.stdev(values) if len(values) > 1 else None
            mean, color = statistics.fmean(values), f"C{number - 1}"
            name = f"{number} {row['mixer']}"
            place.errorbar(state, mean, yerr=spread, fmt="o", capsize=2, label=name, color=color)
            aside = 4 + 7 * (number % 3)  # rows of one budget are close together
            place.annotate(str(number), (state, mean), xytext=(aside, 3), textcoords="offset points", color=color)
    gains = [text["by_distance"][-1] for text in found["teacher"]["texts"]]
    axes[0].axhline(1, color="0.6", linestyle="--", linewidth=1)
    axes[1].axhline(statistics.fmean(gains), color="0.6", linestyle="--", linewidth=1)
    axes[0].set_title("perplexity, × teacher (dashed)", fontsize=9)
    axes[1].set_title(f"gain on passages repeated after {furthest} tokens, nats (dashed: teacher)", fontsize=9)
    for place in axes:
        place.set_xlabel("state of a sequence, KiB")
        place.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    beside = checkpoint.partial(path).with_suffix(path.suffix)
    figure.savefig(beside)
    plt.close(figure)
    os.replace(beside, path)


def reduction_section(found: dict) -> str:
    """The section on the cost of a smaller state, if it was measured."""
    if not any(row["reduced"] for row in found["students"]):
        return ""
    return f"""## State against quality

Each row's first student with its filters reduced to a tolerance (relative l2 error of the taps) or to bytes of state
(allocated to the filters by their effect on the logits), compared with the same
student with exact filters on the validation split.

{reduction_table(found)}

"""


def reduction_table(found: dict) -> str:
    header = (
        "row",
        "mixer",
        "reduced to",
        "modes a filter",
        "most",
        "state, bytes",
        "break-even, tokens",
        "perplexity ×",
    )
    lines = [[*header, "KL, nats", "agreement"]]
    for number, row in enumerate(found["students"], 1):
        for one in row["reduced"]:
            lines.append(
                [
                    str(number),
                    row["mixer"],
                    f"{one['tolerance']:g}" if "tolerance" in one else f"{one['state_bytes_asked']:,} bytes",
                    f"{one['modes']:.1f}",
                    str(one["most_modes"]),
                    _count([one["state_bytes"]]),
                    _count([one["break_even"]]),
                    f"{one['ratio']:.4f}",
                    f"{one['divergence']:.4f}",
                    f"{100 * one['agreement']:.1f} %",
                ]
            )
    return _aligned(lines)


def _aligned(lines):
    """A Markdown table, the second column left-aligned and all others right-aligned."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width if column == 1 else "-" * (width - 1) + ":" for column, width in enumerate(widths)])
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def _option(name, values):
    return [name, *map(str, values)] if values else []


def shown(folder):
    """The folder as it is published: only the last component of an absolute path."""
    return folder.name if folder.is_absolute() else str(folder)


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def _held_out_text(folder):
    """Checksums that identify a run's held-out text."""
    sums = checkpoint.read_json(folder / "data" / "source.json")["sha256"]
    return sums["test"], sums["validation"]


def _same_configuration(one, other):
    return not differences(resolved(replace(one, seed=other.seed, run_dir=other.run_dir)), other)


def _bytes_per_token(config):
    """Bytes of one token's keys and values in all layers, float32."""
    return 4 * families.of(config.model_type).cache_numbers(config)


def environments(folders):
    """Python, torch and machine of the runs, each combination once."""
    found = []
    for folder in folders:
        values = checkpoint.read_json(folder / "environment.json")
        one = {key: values[key] for key in ("python", "torch", "machine")}
        if one not in found:
            found.append(one)
    return found


def _seeds(measured):
    return ", ".join(str(one["seed"]) for one in measured)


def _recall_cells(measured):
    return (
        _spread([100 * one["pairs"] for one in measured], ".1f") + " %",
        _spread([one["passages"] for one in measured], ".3f"),
    )


def _against_teacher(measured, split):
    ratios = _spread([one[f"{split}_ratio"] for one in measured], ".3f")
    return f"{_spread([one[split] for one in measured], '.3f')} ({ratios})"


def _count(values):
    return "grows" if None in values else _spread(values, ",.0f")


def _spread(values, form):
    """The mean, and the standard deviation if there are several values."""
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


if __name__ == "__main__":
    sys.exit(main())
