"""Tasks of the Language Model Evaluation Harness on any checkpoint folders or Hub names, side by side.

    python eval/harness.py scavenger/assets/teacher-stdlib runs/quickstart/recurrence \\
        --tasks text_perplexity,text_last_word --text README.md
    python eval/harness.py EleutherAI/pythia-70m runs/neox70m/recurrence --tasks lambada_openai,hellaswag --limit 200

Needs the extra `eval`. Tasks are the harness' own and those of --include-path; the last line is JSON.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import scavenger.model  # noqa: F401  (AutoModel knows the student)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoint folders or Hub names")
    parser.add_argument("--tasks", required=True, help="names of tasks, with commas between them")
    parser.add_argument("--include-path", default=Path(__file__).with_name("tasks"), help="a folder of further tasks")
    parser.add_argument("--text", help="a UTF-8 text file, for text_perplexity and text_last_word")
    parser.add_argument("--limit", type=int, help="documents of each task; all of them if not given")
    args = parser.parse_args()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        print("harness: error: lm_eval is not installed; pip install 'scavenger[eval]'", file=sys.stderr)
        return 2
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    rows = []
    try:
        names = args.tasks.split(",")
        sources = {"include_path": str(args.include_path), "metadata": {"text": args.text}}
        manager = TaskManager(include_defaults=False, **sources)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(**sources)  # reads the harness' own thousands of files
        for name in names:
            if name not in manager.all_tasks:
                raise ValueError(f"--tasks: {name} is not a task of the harness nor of {args.include_path}")
        for model in args.models:
            rows += measure(model, names, manager, args.limit)
    except (OSError, ValueError) as error:
        print(f"harness: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    width, task_width = (max(len(row[key]) for row in rows) for key in ("model", "task"))
    print(f"{'model':<{width}}  {'task':<{task_width}}  {'metric':<16}  {'value':>12}")
    for row in rows:
        print(f"{row['model']:<{width}}  {row['task']:<{task_width}}  {row['metric']:<16}  {row['value']:>12.5g}")
    print(json.dumps(rows))
    return 0


def measure(name: str, tasks: list[str], manager, limit: int | None) -> list[dict]:
    """Every metric of every task of one model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(name))
    found = simple_evaluate(model=harness, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    return [
        {"model": name, "task": task, "metric": key.removesuffix(",none"), "value": value}
        for task, values in found["results"].items()
        for key, value in values.items()
        if "," in key and isinstance(value, float) and "_stderr" not in key
    ]


if __name__ == "__main__":
    sys.exit(main())
