"""Compare transfers from finished runs of one teacher on one data set: the quality of each schedule by tokens seen.

    python eval/transfer.py runs/parallel-0 runs/parallel-1 runs/joint-0 runs/joint-1 --output eval/transfer.md

Runs that differ only in their seed form one row, mean ± standard deviation; pre-trained students have rows of their
own. Perplexities are on both complete held-out splits of each run, as multiples of the teacher's on the same text. The
tables are printed and written as Markdown with the settings of the runs; the last line is JSON.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

import mixers
import yaml
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from scavenger import data, measure, student, teacher
from scavenger.recipe import Recipe, RecipeError, load_recipe, resolved
from scavenger.recurrence import certificate
from scavenger.run import checkpoint
from scavenger.transfer import transfer


HEADER = [
    "student",
    "transfer",
    "seeds",
    "tokens seen",
    "activation error",
    "test × teacher",
    "validation × teacher",
    "agreement",
    "KL, nats",
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs whose transfer is complete")
    parser.add_argument("--output", type=Path, default=Path("eval/transfer.md"), help="default: eval/transfer.md")
    args = parser.parse_args(argv)
    try:
        if not args.output.parent.is_dir():
            raise RecipeError(f"--output: {args.output.parent} is not a folder; expected one to write into")
        found = run(args.runs)
        checkpoint.write_text(args.output, page(found))
    except (OSError, ValueError, RecipeError) as error:
        print(f"transfer: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(certificate.aligned(HEADER, cells(found)))
    print(json.dumps(found))
    return 0


def run(folders: list[Path]) -> dict:
    """All figures of the comparison; raises RecipeError, one line, for runs that cannot be compared."""
    runs = [(folder, transferred(folder)) for folder in folders]
    transformers_logging.disable_progress_bar()
    rows, teachers = [], {}
    for group in mixers.grouped(runs):
        distilled, pretrained = [], []
        for folder, recipe in tqdm(group, desc="transfer", unit="run", leave=False):
            frozen = teacher.load(recipe.teacher, folder).to(mixers.device())
            distilled.append(of_student("transfer", frozen, recipe, folder, teachers))
            if (folder / "baseline").is_dir():
                pretrained.append(of_student("baseline", frozen, recipe, folder, teachers))
        sections = yaml.safe_load(resolved(group[0][1]))
        kept = {name: sections[name] for name in ("student", "transfer", "baseline")}
        rows.append({"student": "distilled", "schedule": schedule(group[0][1]), "sections": kept, "runs": distilled})
        if pretrained:
            rows.append({"student": "pre-trained", "schedule": "", "sections": kept, "runs": pretrained})
    last_folder, last = runs[-1]
    return {
        "command": shlex.join(["python", "eval/transfer.py", *(mixers.shown(folder) for folder in folders)]),
        "parameters": {"teacher": sum(p.numel() for p in frozen.parameters())},
        "data": checkpoint.read_json(last_folder / "data" / "source.json"),
        "rows": rows,
        "environments": mixers.environments(folders),
    }


def transferred(folder: Path) -> Recipe:
    """The recipe of a run whose transfer is complete."""
    for name in ("recipe.yaml", "environment.json", "data", "transfer"):
        if not (folder / name).exists():
            raise RecipeError(f"{folder}: found no {name}; expected the folder of a run whose transfer is complete")
    return load_recipe(str(folder / "recipe.yaml"))


def of_student(kind: str, frozen, recipe: Recipe, folder: Path, teachers: dict) -> dict:
    """Held-out figures of the run's distilled (`transfer`) or pre-trained (`baseline`) student.

    `teachers` caches the teacher's perplexity by text.
    """
    model = student.load(folder / kind).to(mixers.device())
    found = {"run": mixers.shown(folder), "seed": recipe.seed}
    for split in ("test", "validation"):
        blocks = data.blocks(folder / "data", split)
        text = blocks.tobytes()  # the same for runs of one seed
        if text not in teachers:
            teachers[text] = measure.held_out(frozen, blocks).perplexity
        own = teachers[text]
        held_out = measure.held_out(model, blocks, frozen if split == "validation" else None)
        found |= {f"{split}_teacher": own, split: held_out.perplexity, f"{split}_ratio": held_out.perplexity / own}
    errors = None
    if kind == "transfer":
        errors = list(_last_errors(checkpoint.read_json(folder / kind / "activations" / "history.json")).values())
    return found | {
        "agreement": held_out.agreement,
        "divergence": held_out.divergence,
        "tokens": transfer.sequences(folder / "transfer") * recipe.data.context_length,
        "activation_error": errors and statistics.mean(errors),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def schedule(recipe: Recipe) -> str:
    """The phases of a transfer in words."""
    words = [
        f"{phase.schedule}, {phase.steps:,} × {phase.batch_size} at {phase.learning_rate:g}"
        for phase in recipe.transfer.activations
    ]
    for phase in recipe.transfer.logits:
        kind = "" if phase.objective == "forward_kl" else f" {phase.objective}"
        trained = "" if phase.trained == "everything" else ", mixers only"
        words.append(f"logits{kind}, {phase.steps:,} × {phase.batch_size} at {phase.learning_rate:g}{trained}")
    return "; ".join(words)


def cells(found: dict) -> list[list[str]]:
    """The table's rows as text, the teacher's first."""
    texts = {one["seed"]: one for row in found["rows"] for one in row["runs"]}.values()  # the seed decides the text
    own = [_spread([one[f"{split}_teacher"] for one in texts]) for split in ("test", "validation")]
    table = [["teacher", "", "", "", "", *own, "", ""]]
    for row in found["rows"]:
        runs = row["runs"]
        errors = [one["activation_error"] for one in runs if one["activation_error"] is not None]
        table.append(
            [
                row["student"],
                row["schedule"],
                ", ".join(str(one["seed"]) for one in runs),
                " / ".join(f"{count:,}" for count in sorted({one["tokens"] for one in runs})),
                _spread(errors) if errors else "",
                _spread([one["test_ratio"] for one in runs]),
                _spread([one["validation_ratio"] for one in runs]),
                _spread([100 * one["agreement"] for one in runs], 1) + " %",
                _spread([one["divergence"] for one in runs]),
            ]
        )
    return table


def page(found: dict) -> str:
    """The table as a Markdown page, with the command and settings."""
    rows = [HEADER, ["---"] * len(HEADER), *cells(found)]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    settings = "\n".join(
        f"- {row['student']}, {row['schedule'] or 'the same text'}: {', '.join(one['run'] for one in row['runs'])}; "
        + yaml.safe_dump(row["sections"], default_flow_style=True, sort_keys=False, width=10_000).strip()
        for row in found["rows"]
        if row["student"] == "distilled"
    )
    environments = "\n".join(
        "- " + ", ".join(f"{key} {value}" for key, value in one.items()) for one in found["environments"]
    )
    source = {key: item for key, item in found["data"].items() if key in ("source", "name", "overlap")}
    if "path" in found["data"]:
        source["name"] = Path(found["data"]["path"]).name
    return f"""# Transfers, measured

```bash
{found["command"]}
```

{lines}

- The teacher's row shows perplexities. The teacher has {found["parameters"]["teacher"]:,} parameters, a student
  {found["rows"][0]["runs"][0]["parameters"]:,}.
- ±: standard deviation over seeds, which decide the text, its order and the initialisation of the student.
- activation error: mean over layers of ‖student − teacher‖² / ‖teacher‖² on training text, at the end of step one.
- agreement, KL: on the validation split, against the teacher.

Text: {json.dumps(source)}

{settings}

{environments}
"""


def _last_errors(history):
    """The newest error of each layer."""
    return {key: entry[key] for entry in history for key in entry if key.startswith("layer_")}


def _spread(values, digits=3):
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
