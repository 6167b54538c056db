"""Distil a GPT-NeoX teacher into a Hyena student, and the student's long filters into recurrences.

accelerate launch recipes/quickstart.yaml
scavenger recipes/quickstart.yaml transfer.logits.steps=100
scavenger recipes/neox70m.yaml --plan
"""

import argparse
import sys

from scavenger.recipe import RecipeError, load_recipe


def main() -> int:
    """Run the recipe named on the command line; returns the exit code, 2 for a mistake in what was given."""
    parser = argparse.ArgumentParser(
        prog="scavenger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a recipe, as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as transfer.logits.steps=100")
    parser.add_argument("--plan", action="store_true", help="print what would run, and run nothing")
    # Python has put the recipe in argv[0] where it was asked to run the recipe itself.
    arguments = sys.argv if sys.argv[0].endswith((".yaml", ".yml")) else sys.argv[1:]
    args = parser.parse_intermixed_args(arguments)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        return run(recipe, args.plan)
    except RecipeError as error:
        print(f"scavenger: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder without permission, a network that went away
        print(f"scavenger: error: {error}; what is complete is kept, the same command goes on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nscavenger: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def run(recipe, plan_only=False) -> int:
    """The whole pipeline, or its plan; a stage whose folder is complete returns at once."""
    from scavenger import baseline, checkpoint, data, plan, processes, recurrence, report, teacher, transfer

    if plan_only:
        print(plan.show(recipe))
        return 0
    accelerator = processes.start(recipe)
    accelerator.print(plan.show(recipe, accelerator.num_processes) + "\n")
    with checkpoint.open_run(recipe, accelerator) as run_dir:
        with accelerator.main_process_first():
            tokenizer = teacher.tokenizer(recipe, run_dir)
            data.run(recipe, run_dir, tokenizer)
        accelerator.init_trackers("scavenger", init_kwargs={"wandb": {"name": run_dir.name, "dir": str(run_dir)}})
        teacher.run(recipe, run_dir, accelerator, tokenizer)
        if recipe.transfer:
            transfer.run(recipe, run_dir, accelerator, tokenizer)
        if recipe.baseline:
            baseline.run(recipe, run_dir, accelerator, tokenizer)
        if recipe.recurrence:
            recurrence.run(recipe, run_dir, accelerator, tokenizer)
        if recipe.report:
            report.run(recipe, run_dir, accelerator, tokenizer)
        accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
