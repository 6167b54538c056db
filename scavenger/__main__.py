"""Distil a Transformer into a Hyena student, and the student's long filters into recurrences.

accelerate launch recipes/quickstart.yaml
scavenger recipes/quickstart.yaml transfer.logits.steps=100
scavenger recipes/neox70m.yaml --plan
scavenger rank recipes/quickstart.yaml --keep 1 --to kept.yaml
scavenger rank recipes/quickstart.yaml --heads 2 --to kept.yaml
scavenger recur runs/quickstart/transfer --tolerance 1e-2
scavenger push runs/quickstart --to user/repo
scavenger serve runs/quickstart/recurrence
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from scavenger.recipe import Hub, RecipeError, Recurrence, load_recipe
from scavenger.run import interruption


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 for a mistake of the user, 75 after a SIGTERM."""
    if argv is None:  # as `python recipe.yaml`, the recipe is argv[0]
        argv = sys.argv if sys.argv[0].endswith((".yaml", ".yml")) else sys.argv[1:]
    try:
        with interruption.handled():
            code = command(argv)
    except RecipeError as error:
        print(f"scavenger: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder without permission, a network that went away
        print(
            f"scavenger: error: {error}; what is complete is kept: run the same command again to resume",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(
            "\nscavenger: interrupted; run the same command again to resume from the last checkpoint", file=sys.stderr
        )
        return 130
    except interruption.Stopped as stopped:
        how = f" ({stopped})" if str(stopped) else ""
        print(f"\nscavenger: ended by SIGTERM{how}; run the same command again to resume", file=sys.stderr)
        return interruption.EXIT_CODE
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or os.environ.get("WORLD_SIZE", "1") != "1":
        # Threads of process groups outlive the interpreter and sometimes abort the process although all is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def command(arguments) -> int:
    """The command that the first word names, else a recipe."""
    if arguments[:1] == ["push"]:
        return push(arguments[1:])
    if arguments[:1] == ["rank"]:
        return rank(arguments[1:])
    if arguments[:1] == ["recur"]:
        return recur(arguments[1:])
    if arguments[:1] == ["serve"]:
        return serve(arguments[1:])
    args = parsed(arguments)
    return run(load_recipe(args.recipe, args.overrides), args.plan)


def parsed(arguments) -> argparse.Namespace:
    """The recipe, its overrides and --plan."""
    parser = argparse.ArgumentParser(
        prog="scavenger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a recipe, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as transfer.logits.steps=100")
    parser.add_argument("--plan", action="store_true", help="print what would run, without running it")
    return parser.parse_intermixed_args(arguments)


def run(recipe, plan_only=False) -> int:
    """The whole pipeline, or its plan; a stage whose folder is complete returns at once."""
    from scavenger import hub, plan
    from scavenger.recurrence import preview, recurrence
    from scavenger.report import report
    from scavenger.run import energy, processes
    from scavenger.transfer import baseline, transfer

    if plan_only:
        print(plan.show(recipe))
        if recipe.recurrence and (Path(recipe.run_dir) / "transfer").is_dir():
            print(preview.show(recipe))
        return 0
    if recipe.hub:
        hub.require_token()
    report.require_harness(recipe)
    accelerator = processes.start(recipe)
    planned = plan.stages(recipe, accelerator.num_processes)
    accelerator.print(plan.text(recipe, planned, accelerator.num_processes) + "\n")
    with opened(recipe, accelerator) as run:
        if accelerator.is_main_process:
            plan.write(planned, run.folder)
        for stage in (transfer, baseline, recurrence, report):
            name = stage.__name__.rpartition(".")[2]
            if getattr(recipe, name):  # a section has the name of the file that reads it
                with energy.measured(run, name):
                    stage.run(run)
        accelerator.end_training()
        hub.run(run)
    return 0


@contextlib.contextmanager
def opened(recipe, accelerator):
    """The run, its text and teacher ready; its folder is locked until the context ends."""
    from scavenger import data, teacher
    from scavenger.run import checkpoint, energy
    from scavenger.run.run import Run

    with checkpoint.open_run(recipe, accelerator) as folder:
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                inputs = {"teacher": teacher.identities(recipe.teacher), "data": data.identities(recipe.data, folder)}
                checkpoint.require_same_inputs(folder, inputs)
            tokenizer = teacher.tokenizer(recipe, folder)
            if accelerator.is_main_process and recipe.teacher.train is None and not (folder / "data").is_dir():
                teacher.load(recipe.teacher, folder)  # whole and finite, or nothing is tokenised
            data.run(recipe, folder, tokenizer)
        run = Run(recipe, folder, accelerator, tokenizer)
        names = {"wandb": {"name": folder.name, "dir": str(folder)}}
        names["trackio"] = {"name": folder.name, "resume": "allow"}  # an interrupted run stays one
        accelerator.init_trackers("scavenger", init_kwargs=names)
        if recipe.teacher.train:
            with energy.measured(run, "teacher"):
                teacher.run(run)
        yield run


def rank(arguments) -> int:
    """Rank layers or heads by what is lost without their attention, and write the recipe that keeps the first ones."""
    parser = argparse.ArgumentParser(
        prog="scavenger rank", description="Find the layers, or the single heads, that should keep their attention."
    )
    parser.add_argument("recipe", help="a recipe, such as recipes/quickstart.yaml; --keep needs its transfer section")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as transfer.activations.steps=100")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--keep", type=int, metavar="N", help="rank the layers by training their mixers; N layers keep attention (1)"
    )
    what.add_argument(
        "--heads", type=int, metavar="N", help="rank the heads of k and v without training; N heads keep attention"
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the recipe that keeps them to FILE (none)")
    args = parser.parse_intermixed_args(arguments)
    recipe = load_recipe(args.recipe, args.overrides)
    from scavenger.report import heads
    from scavenger.run import processes
    from scavenger.transfer import ranking

    ranked, count = ranking, 1 if args.keep is None else args.keep
    if args.heads is not None:
        ranked, count = heads, args.heads
    ranked.check(recipe, count, args.to)
    alone = ranking.without_attention(recipe)
    accelerator = processes.start(alone)
    with opened(alone, accelerator) as run:
        found = ranked.run(run)
        accelerator.end_training()
        if accelerator.is_main_process:
            made = ranked.recommended(recipe, found, count)
            if args.to is not None:
                ranked.write_recipe(made, found, args.to)
            print(ranked.table(found))
            if args.to is not None:
                print(f"\nrecipe that keeps {ranked.kept_in(made)}: {args.to}")
    return 0


def recur(arguments) -> int:
    """Turn the filters of any student of ours into recurrences."""
    parser = argparse.ArgumentParser(
        prog="scavenger recur",
        description="Turn the long filters of a student into recurrences, with a certificate of what that costs.",
    )
    parser.add_argument("folder", type=Path, help="a student, such as runs/quickstart/transfer")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument("--tolerance", type=float, help="relative l2 error of each filter's taps (1e-2)")
    aim.add_argument(
        "--state-bytes", type=int, metavar="N", help="bytes of state per sequence, spent where they help most"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of decoding: the budget counts windows and short convolutions in it (float32)",
    )
    parser.add_argument(
        "--method", choices=["balanced", "irka", "projection", "positive"], help="method that finds the poles (irka)"
    )
    parser.add_argument("--max-state-size", type=int, metavar="N", help="most complex modes of a filter (32)")
    parser.add_argument("--horizon", type=int, metavar="N", help="taps to match (the student's context length)")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder for the result (FOLDER-recurrent)")
    parser.add_argument("--text", type=Path, metavar="PATH", help="text, file or folder (standard library)")
    parser.add_argument(
        "--split",
        choices=["validation", "test", "all"],
        default="validation",
        help="which documents of the text: a split, as a run on this text makes it, or all (validation)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code in the tokenizer's folder; read it first"
    )
    args = parser.parse_args(arguments)
    names = ("tolerance", "state_bytes", "dtype", "method", "max_state_size", "horizon")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings = Recurrence.from_command_line(**given)
    if args.text is not None and not args.text.exists():
        raise RecipeError(f"--text: {args.text} is not there; expected a file or folder of text")
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from scavenger.recurrence import recurrence
    from scavenger.run import processes

    folder = args.folder.resolve()
    to = args.to or folder.with_name(folder.name + "-recurrent")
    patience = InitProcessGroupKwargs(timeout=processes.PATIENCE)  # the others wait while the first one measures
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    recurrence.of_folder(args.folder, settings, to, args.text, args.split, accelerator, args.trust_remote_code)
    return 0


def push(arguments) -> int:
    """Push a finished run by hand."""
    parser = argparse.ArgumentParser(prog="scavenger push", description="Push a finished run to the Hub.")
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/quickstart")
    parser.add_argument("--to", required=True, metavar="user/repo", help="the repository; created if there is none")
    parser.add_argument("--private", action="store_true", help="a private repository")
    parser.add_argument("--revision", metavar="branch", help="a branch other than main; created if there is none")
    args = parser.parse_args(arguments)
    target = Hub.from_command_line(args.to, args.private, args.revision)
    from scavenger import hub

    hub.push(args.run, target)
    return 0


def serve(arguments) -> int:
    """Serve a recurrent student until a signal."""
    parser = argparse.ArgumentParser(
        prog="scavenger serve",
        description="Serve a recurrent student behind the API of OpenAI. SCAVENGER_API_KEY is the key, if it is set.",
    )
    parser.add_argument(
        "model", help="a student, such as runs/quickstart/recurrence; LABEL=FOLDER: its name for clients"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="the port; 0 for any free one (8000)")
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="sequences that run at the same time (16)")
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="sequences that may wait (256)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of prompt and answer together (four training contexts)"
    )
    parser.add_argument(
        "--grace", type=float, default=30, metavar="SECONDS", help="time for running requests to end after SIGTERM (30)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--state-dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the modes' states between tokens; certificate.json says what bfloat16 costs (float32)",
    )
    args = parser.parse_args(arguments)
    try:
        from scavenger.serve import serve
    except ModuleNotFoundError as error:
        raise RecipeError(f"serve: {error.name} is not installed; expected pip install 'scavenger[serve]'") from error
    names = ("host", "port", "rows", "queue", "max_length", "grace", "state_dtype")
    serve.run(args.model, args.dtype, serve.Settings(**{name: getattr(args, name) for name in names}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
