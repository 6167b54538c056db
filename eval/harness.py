"""Compare checkpoint folders or Hub models on tasks of the Language Model Evaluation Harness.

    python eval/harness.py EleutherAI/pythia-70m runs/neox70m/recurrence --results runs/neox70m/scores
    python eval/harness.py scavenger/assets/teacher-stdlib runs/quickstart/recurrence --local data --limit 200
    python eval/harness.py scavenger/assets/teacher-stdlib runs/quickstart/recurrence \\
        --tasks text_perplexity,text_last_word --text README.md --split all

Needs the extra `eval`. Without --tasks, zero-shot: LAMBADA, ARC easy and challenge, PIQA, SciQ, WinoGrande, LogiQA, WSC
and HellaSwag. Their documents come from the Hub or, with the same prompts and metrics, from files in the folder
--local: lambada_test.jsonl, arc_easy_test.jsonl and so on (`eval/tasks/local/*.yaml` lists the names); tasks without a
file are left out. text_perplexity and text_last_word read the documents of --text or --dataset. A recurrent student is
evaluated in its recurrent form, and all models with the same context length. Pythia models are shown with their
published scores. With --results, scores are saved by task and not measured again. Intervals are over questions; the
last line is JSON.
"""

import sys
from pathlib import Path

from scavenger.report import command, lm_eval_tasks


OWN_TASKS = str(Path(__file__).with_name("tasks"))


def main(argv: list[str] | None = None) -> int:
    made = command.parser(__doc__)
    made.add_argument("--tasks", metavar="A,B", help="tasks of the harness or of eval/tasks (the nine above)")
    made.add_argument("--context-length", type=int, help="most tokens per input (the shortest training context)")
    made.add_argument("--local", metavar="FOLDER", help="read the documents from files in it, not from the Hub")
    command.add_text(made, limit="number of questions of each task (all)")
    made.add_argument("--include-path", metavar="FOLDER", help="task files of your own")
    return command.run("harness", made, measure, argv)


def measure(args, results) -> list[dict]:
    command.positive(args, "limit", "context_length")
    models = command.models_of(args)
    tasks = tuple(args.tasks.split(",")) if args.tasks is not None else ()
    settings = lm_eval_tasks.settings_for(
        models,
        args.context_length,
        tasks=tasks,
        limit=args.limit,
        seed=args.seed,
        local=args.local,
        text=command.text_of(args, None) if lm_eval_tasks.TEXT_TASKS & set(tasks) else None,
        include=(OWN_TASKS, *([args.include_path] if args.include_path else [])),
    )
    return lm_eval_tasks.of_models(models, settings, results)


if __name__ == "__main__":
    sys.exit(main())
