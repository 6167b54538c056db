"""Speed, memory and state of generation, of any checkpoint folders or Hub names, side by side in one run.

    python eval/speed.py teacher=scavenger/assets/teacher-stdlib recurrent=runs/quickstart/recurrence
    python eval/speed.py EleutherAI/pythia-70m runs/neox70m/recurrence --cases 1x512+256 64x512+256 --memory 24

Name the teacher first: ratios and break-even lengths are relative to it. A case BATCHxPROMPT+NEW reads BATCH prompts of
PROMPT random tokens and generates NEW more for each, greedily, with every cache of a model: a Transformer's dynamic and
static cache, the latter also packed (on a CPU) and compiled; a convolutional student's exact one; a recurrent student's
state through model(...) and its Decoder. Where NEW steps would take longer than --seconds, only some are timed; the
column `timed` gives their number in each round. On a GPU everything is timed in float32 and in bfloat16, unless --dtype
names one. The last line is JSON.
"""

import argparse
import dataclasses
import sys

import torch

from scavenger.recurrence.certificate import aligned
from scavenger.report import command, timing
from scavenger.report.contenders import Case
from scavenger.report.timing import Settings


def main(argv: list[str] | None = None) -> int:
    made = command.parser(__doc__)
    usual = Settings()
    cases, contexts = " ".join(map(str, usual.cases)), " ".join(map(str, usual.contexts))
    made.add_argument("--cases", nargs="*", help=f"BATCHxPROMPT+NEW ({cases})")
    made.add_argument("--contexts", nargs="*", type=int, help=f"lengths a step is timed after ({contexts})")
    made.add_argument("--rounds", type=int, default=usual.rounds, help=f"through all of a case ({usual.rounds})")
    made.add_argument("--seconds", type=float, default=usual.seconds, help=f"of steps in a row ({usual.seconds:g})")
    made.add_argument("--memory", type=float, default=usual.memory, help=f"GiB for a batch ({usual.memory:g})")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (all)")
    made.set_defaults(dtype=None)
    return command.run("speed", made, measure, argv)


def measure(args: argparse.Namespace, results) -> list[dict]:
    command.positive(args, "threads")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = timing.dtypes(device) if args.dtype is None else [args.dtype]
    args.dtype = dtypes[0]
    models, settings, found = command.models_of(args), settings_of(args), []
    torch.set_num_threads(args.threads)
    print("\n".join(plan(models, settings, dtypes)), flush=True)
    for dtype in dtypes:
        beside = f", {dtype}" if len(dtypes) > 1 else ""
        own = [dataclasses.replace(model, label=model.label + beside, dtype=dtype) for model in models]
        found += shown(timing.kept(own, settings, results))
        for model in own:
            model.close()
    return found


def shown(found: list[dict]) -> list[dict]:
    """The results of one dtype, printed."""
    for tabled in (timing.table, timing.context_table):
        header, rows = tabled(found)
        if rows:
            print(f"\n{aligned(header, rows)}")
    print("\n" + "\n".join([*timing.verdicts(found), *timing.break_even_lines(found)]))
    print(
        f"\n{command.described(found[0]['machine'])}\n"
        "above: speeds of all rounds together, other times medians; compile: once, in no speed; peak: growth while a "
        "row runs, without weights\n"
        "below: of each model's best cache; intervals over rounds\n"
    )
    return found


def settings_of(args: argparse.Namespace) -> Settings:
    """Settings as given, with defaults for the rest."""
    given = {} if args.cases is None else {"cases": tuple(map(Case.parsed, args.cases))}
    given |= {} if args.contexts is None else {"contexts": tuple(args.contexts)}
    return Settings(**given, rounds=args.rounds, seconds=args.seconds, memory=args.memory, seed=args.seed)


def plan(models, settings: Settings, dtypes: list[str]) -> list[str]:
    """What will be timed, in lines."""
    lines = [f"{model.label}: {', '.join(kind.name for kind in timing.kinds(model))}" for model in models]
    rows = sum(len(timing.kinds(model)) for model in models)
    return [
        *lines,
        f"{rows} rows in each of {len(settings.cases)} cases and at {len(settings.contexts)} context lengths, in "
        f"{' and '.join(dtypes)}, {settings.rounds} rounds; of a row about {settings.seconds:g} s of steps and of "
        "prompts at most",
    ]


if __name__ == "__main__":
    sys.exit(main())
