"""Compare two or more models on perplexity, recall, generation, tasks and speed; one table, one page, one JSON file.

    python eval/compare.py teacher=scavenger/assets/teacher-stdlib recurrent=runs/quickstart/recurrence --to comparison
    python eval/compare.py EleutherAI/pythia-70m runs/neox70m/recurrence --dataset NAME --measure perplexity tasks

The first model is the reference: differences from it are paired by document, question or sequence, with bootstrap
intervals. Results are kept in DIR/results, or in the folder --results, one file for each measurement of each
model: a command that was stopped resumes, and another model is added without measuring the others again (but for
speeds, which are timed together). DIR/index.html is the page, DIR/compare.json has all its figures; the last line is
the verdict as JSON.
"""

import json
import sys
from pathlib import Path

from scavenger.recipe import RecipeError
from scavenger.report import command, comparison, continuation, likelihood, lm_eval_tasks, retrieval, sections, timing
from scavenger.report.results import Results


MEASUREMENTS = ("perplexity", "recall", "generation", "tasks", "speed")
OWN_TASKS = str(Path(__file__).with_name("tasks"))


def main(argv: list[str] | None = None) -> int:
    made = command.parser(__doc__)
    command.add_text(made)
    made.add_argument("--to", type=Path, default=Path("comparison"), metavar="DIR", help="the folder (comparison)")
    made.add_argument(
        "--measure",
        nargs="+",
        choices=MEASUREMENTS,
        default=["perplexity", "recall", "generation", "speed"],
        help="measurements (all but tasks, which need the extra `eval` and the Hub or --local)",
    )
    made.add_argument("--context-length", type=int, help="tokens (the shortest training context)")
    made.add_argument("--stride", type=int, help="tokens between windows of perplexity (half a context)")
    made.add_argument("--examples", type=int, default=retrieval.EXAMPLES, help="sequences of each kind of recall")
    made.add_argument(
        "--prompts", type=int, default=continuation.Settings.prompts, help="prompts that every model continues"
    )
    made.add_argument("--tasks", help="comma-separated names (the paper's and Pythia's)")
    made.add_argument("--local", metavar="DIR", help="a folder with the tasks' documents, instead of the Hub")
    made.add_argument("--task-limit", type=int, metavar="N", help="questions of each task (all)")
    made.add_argument("--cases", nargs="+", metavar="BATCHxPROMPT+NEW", help="cases whose speed is measured")
    made.add_argument("--contexts", type=int, nargs="+", help="lengths after which one sequence's speed is measured")
    made.add_argument("--rounds", type=int, default=timing.Settings.rounds, help="of all timings, in turn")
    args = made.parse_args(argv)
    try:
        found = measure(args)
        page = sections.write(found, args.to)
    except (OSError, ValueError, RecipeError) as error:
        print(f"compare: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\ncompare: interrupted; {args.results or args.to} has the results: run the same command again to resume",
            file=sys.stderr,
        )
        return 130
    print(comparison.text_table(found))
    print(f"\npage: {page}")
    print(json.dumps({"verdict": comparison.verdict(found), "figures": str(args.to / "compare.json")}))
    return 0


def measure(args) -> dict:
    """All requested measurements of all models."""
    command.positive(args, "context_length", "stride", "examples", "prompts", "task_limit", "rounds")
    models, text = command.models_of(args), command.text_of(args, args.limit)
    length, asked = args.context_length, set(args.measure)
    timings = {"rounds": args.rounds, "seed": args.seed}
    if args.cases:
        timings["cases"] = tuple(map(timing.Case.parsed, args.cases))
    if args.contexts:
        timings["contexts"] = tuple(args.contexts)
    tasks = {
        "tasks": tuple(args.tasks.split(",")) if args.tasks else (),
        "limit": args.task_limit,
        "seed": args.seed,
        "local": args.local,
        "include": (OWN_TASKS,) if args.local else (),
    }
    settings = comparison.Settings(
        args.seed,
        likelihood.settings_for(models, length, args.stride) if "perplexity" in asked else None,
        retrieval.settings_for(models, context_length=length, examples=args.examples, seed=args.seed)
        if "recall" in asked
        else None,
        continuation.Settings(args.prompts, seed=args.seed) if "generation" in asked else None,
        lm_eval_tasks.settings_for(models, length, **tasks) if "tasks" in asked else None,
        timing.Settings(**timings) if "speed" in asked else None,
    )
    return comparison.run(models, text, settings, Results(args.results or args.to / "results"))


if __name__ == "__main__":
    sys.exit(main())
