"""What one card can tell in eight minutes: correctness, decoding, prompts, training, filters into recurrences.

    python benchmarks/gpu.py --to docs/results/gpu-CARD.md
    python benchmarks/gpu.py --only decoding --minutes 30 --to docs/results/gpu-CARD.md

correctness  the tests that compare the card with the CPU (pytest -m gpu)
decoding     a step of the teacher's static cache, filled, and of three students, by batch and context
prefill      prompts, each student beside the teacher
training     stages of recipes/neox70m.yaml at three shapes, by their own code, and every mixer's forward and backward
reduction    filters into recurrences, on the card's host

Cases are in the order of their importance, and one begins only if its estimate fits into the time that is left: each
section has a share of it, what a section leaves is the next one's, and what was left out has a second chance at the
end. The page and the JSON are written after every case. The same command resumes: it measures what has no figure yet.
Measurements run in a process of their own; one that crashes it fails alone. Nothing needs a network.
"""

import argparse
import dataclasses
import gc
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import decoding
import mixers
import torch
import transfer
from accelerate import Accelerator

from scavenger import measure, student
from scavenger.model.hyena import HyenaMixer
from scavenger.recipe import RecipeError, load_recipe
from scavenger.recurrence import recurrence
from scavenger.recurrence.certificate import aligned
from scavenger.recurrence.reduction import workers as processes
from scavenger.report import contenders, timing
from scavenger.run.checkpoint import read_json, write_json, write_text
from scavenger.transfer import baseline


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "neox70m.yaml"
SHARES = {"correctness": 0.18, "decoding": 0.38, "prefill": 0.12, "training": 0.27, "reduction": 0.05}  # of the time
AROUND = 15.0  # seconds of the time that are for imports before the cases, and for the page after them
PATIENCE, GRACE = 3, 15.0  # a case is stopped after so many times its estimate and so many seconds more
STOPPING = 10.0  # seconds that pytest has to write its report when it is stopped
WORKERS = 8  # of pytest at most: each has a CUDA context of its own
ROUNDS, WARM = 5, 3  # of timed steps, and steps before them; a compiled step is captured in its second call
ROUND_SECONDS, STEPS = 0.15, (8, 64)  # of a round, and its least and most steps
FREE = 0.9  # share of the free memory that a cache may take; the rest is for what a step makes
PROMPTS = 3  # times that a prompt is read, after one that is not timed
TRAINING_SECONDS, TRAINING_STEPS = 4.0, (2, 40)  # of a stage, and its least and most timed steps
LARGE_BATCH = 16  # sequences of a step at the larger shapes: a card of 80 GB holds them, and they fill it
MIXER_LENGTHS, MIXER_ROUNDS = [1024, 4096], 3
LONGEST_NOTE = 240  # characters of an error in the table
FILTERS = 64  # of a hyena layer that are reduced, spread over its decays
LARGE = 4e8  # parameters from which on a case takes the longer estimate
LARGE_TRAINING = 2e8  # from which on a step has LARGE_BATCH sequences instead of the recipe's

MEASURED, NEEDS_CUDA, TOO_LARGE = "measured", "needs CUDA", "does not fit"  # outcomes that stay
FAILED, TIME = "failed", "not run: time"  # outcomes that the next run tries again


class Rounded(contenders.Decoded):
    """A student's Decoder that keeps the states of modes in bfloat16."""

    state_dtype = torch.bfloat16


# A teacher's contenders of decoding, with what each is called in the tables. A student has its Decoder, which captures.
FORMS = {
    "plain": (contenders.Static, ""),
    "captured": (contenders.Static, ", captured"),
    "compiled": (contenders.CompiledStatic, ", compiled"),
    "rounded": (Rounded, ", modes kept in bfloat16"),
}
STUDENTS = ("hyena", "multihyena", "windows")
MODELS = ("teacher", *STUDENTS)


@dataclass(frozen=True)
class Case:
    """One thing to measure: `facts` say what, `seconds` how long it takes on a card, about."""

    section: str
    name: str  # unique in its section
    facts: dict
    seconds: float
    kind: str = ""  # cases of one kind take about equally long: the last of them is the estimate of the next
    cuda: bool = False  # whether it needs CUDA

    def __str__(self):
        return f"{self.section}: {self.name}"


class TooLarge(Exception):
    """What does not fit the memory of the card, in a few words."""


def main(argv: list[str] | None = None) -> int:
    began, words = time.time(), sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    try:
        figures = Figures(args, words)
    except ValueError as error:
        print(f"gpu: error: {error}", file=sys.stderr)
        return 2
    cases = [case for name in args.only for case in SECTIONS[name].cases(args) if not figures.has(case)]
    end = began + 60 * args.minutes - AROUND
    until = deadlines(dict.fromkeys(case.section for case in cases), began, end)
    here = [case for case in cases if case.section == "correctness"]  # pytest is a process of its own
    carried_out(here, args, None, until, end, figures.take)
    apart([case for case in cases if case not in here], args, figures, until, end)
    figures.write()
    print(figures.page(), end="")
    return 1 if figures.wrong() else 0


def parser():
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", default=list(SHARES), help=f"sections: {', '.join(SHARES)}")
    made.add_argument("--again", action="store_true", help="measure these sections anew, whatever the JSON has of them")
    made.add_argument("--minutes", type=float, default=8.0, help="at most, for everything")
    made.add_argument("--shapes", nargs="+", default=["70m", "1.4b"], help="as decoding.py's; the first is reduced")
    made.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256], help="of decoding")
    made.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 32768], help="of decoding")
    made.add_argument("--prompts", type=int, nargs="+", default=[512, 2048, 4096, 8192], help="lengths")
    made.add_argument("--prompt-tokens", type=int, default=32768, help="of a batch of prompts; one alone is read too")
    made.add_argument("--train-shapes", nargs="+", default=["70m", "410m", "1b"], help="every stage of the first")
    made.add_argument("--train-length", type=int, help="tokens of a sequence, instead of the recipe's")
    made.add_argument("--train-batch-size", type=int, help="sequences of a step, instead of the recipe's")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="autocast in training")
    made.add_argument("--to", type=Path, help="write the page there, as Markdown")
    made.add_argument("--json", type=Path, help="keep the figures there; beside --to by default")
    return made


def deadlines(sections, began, end):
    """When the last case of each section has to end: shares of the time, in order."""
    found, passed = {}, 0.0
    for name in sections:
        passed += SHARES[name] / sum(SHARES[own] for own in sections)
        found[name] = began + passed * (end - began)
    return found


class Figures:
    """The records of all cases, in memory and in files; ValueError for flags or files that cannot be taken."""

    def __init__(self, args, words):
        check(args)
        self.args = args
        self.json = args.json or (args.to and args.to.with_suffix(".json"))
        settings = ("shapes", "batches", "contexts", "prompts", "prompt_tokens")
        settings += ("train_shapes", "train_length", "train_batch_size")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.found = {
            "machine": timing.machine(device, args.dtype),
            "settings": {name: getattr(args, name) for name in settings},
            "rates": None,
            "runs": [],
            "sections": {},
        }
        if self.json and self.json.is_file():
            self.found = self._kept()
        for name in args.only if args.again else ():
            self.found["sections"].pop(name, None)
        command = " ".join(["python benchmarks/gpu.py", *words])
        self.run = {"date": time.strftime("%Y-%m-%d"), "command": command}

    def _kept(self):
        """The figures of the file, which the same command on the same machine left."""
        try:
            found = read_json(self.json)
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or found.keys() != self.found.keys():
            raise ValueError(f"--json: {self.json} is not a file of this command; expected one, or a new name")
        for part in ("machine", "settings"):
            for name, value in self.found[part].items():
                own = found[part].get(name)
                if own != value:
                    raise ValueError(
                        f"--json: {self.json} has figures with {name} {own}; expected {value}, or a new name"
                    )
        return found

    def has(self, case):
        """Whether a case has an outcome that stays."""
        record = self.found["sections"].get(case.section, {}).get(case.name)
        return record is not None and record["outcome"] not in (FAILED, TIME)

    def take(self, what: str, *found):
        """Keep what a process has to say: that a case began, its record, or the rates of the card."""
        if what == "rates":
            (self.found["rates"],) = found
        if what == "record":
            case, record = found
            self.found["sections"].setdefault(case.section, {})[case.name] = case.facts | record
            said = record.get("note") or record["outcome"]
            print(f"gpu: {case}: {said}, {record.get('seconds', 0):.1f} s", file=sys.stderr, flush=True)
            if self.run not in self.found["runs"]:
                self.found["runs"].append(self.run)
            self.write()

    def write(self):
        if self.json:
            write_json(self.json, self.found)
        if self.args.to:
            write_text(self.args.to, self.page())

    def records(self, name):
        return self.found["sections"].get(name, {})

    def of(self, outcome):
        """Names of the cases with an outcome, with their sections and records."""
        return [
            (section, name, record)
            for section in SHARES
            for name, record in self.records(section).items()
            if record["outcome"] == outcome
        ]

    def wrong(self):
        """Whether a case or a test failed."""
        return bool(self.of(FAILED) or any(record.get("failures") for record in self.records("correctness").values()))

    def page(self):
        machine, rates = self.found["machine"], self.found["rates"]
        runs = [f"`{run['command']}`, {run['date']}\n" for run in self.found["runs"]]
        limits = "" if rates is None else f" Measured limits:\n{described(rates)}."
        parts = [
            f"# Everything on one card: {machine['device']}\n",
            *runs,
            f"{machine['device']}, {machine['threads']} threads of its host, Python {machine['python']}, torch "
            f"{machine['torch']}, transformers\n{machine['transformers']}, {machine['dtype']}; random weights and text."
            f"{limits}\n",
        ]
        for name, section in SECTIONS.items():
            if records := [record | {"name": case} for case, record in self.records(name).items()]:
                tables = "\n\n".join(section.tables(records))
                parts.append(f"## {section.title}\n\n{section.text}\n\n```\n{tables}\n```\n")
        if failed := self.of(FAILED):
            lines = [f"| {section} | {name} | {record['note']} |" for section, name, record in failed]
            parts.append("\n".join(["## Failed\n", "| section | case | error |", "|---|---|---|", *lines, ""]))
        if left := self.of(TIME):
            lines = [f"{section}: {name}: {record.get('note', TIME)}" for section, name, record in left]
            said = "The same command goes on with these."
            parts.append("\n".join([f"## Not run\n\n{said}\n\n```", *lines, "```\n"]))
        return "\n".join(parts)


def check(args):
    """ValueError, one line, for flags that cannot be taken."""
    strange = [name for name in args.only if name not in SHARES]
    if strange:
        raise ValueError(f"--only: found {', '.join(strange)}; expected some of {', '.join(SHARES)}")
    args.only = [name for name in SHARES if name in args.only]
    for shape in args.shapes + args.train_shapes:
        if decoding.shape_of(shape)[1] < 2:
            raise ValueError(f"--shapes: found {shape}; expected two layers or more, one of which keeps attention")
    lengths = {"contexts": args.contexts, "prompts": args.prompts}
    counts = {"minutes": [args.minutes], "batches": args.batches, "prompt_tokens": [args.prompt_tokens]}
    counts |= {"train_batch_size": [args.train_batch_size]}
    for least, flags in ((0, counts), (1, lengths)):
        for name, values in flags.items():
            small = [value for value in values if value is not None and value <= least]
            if small:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option}: found {small[0]:g}; expected more than {least}")
    for path in (args.to, args.json):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"found {path}, but no folder {path.parent}; expected one that is there")
    try:
        recipe_of(args, args.shapes[0])
    except RecipeError as error:
        raise ValueError(error) from None


def recipe_of(args, shape, *changes):
    """The recipe whose stages are timed, with its kept layer in the middle of a shape's layers."""
    layers = decoding.shape_of(shape)[1]
    own = [f"student.attention_layers=[{layers // 2}]", "training.accumulate=1"]
    if args.train_length is not None:
        own.append(f"data.context_length={args.train_length}")
    made = load_recipe(str(RECIPE), [*own, *changes])
    if made.student.window >= made.data.context_length:
        raise RecipeError(
            f"--train-length: found {args.train_length}; expected more than the window of {made.student.window} tokens"
        )
    return made


def apart(cases, args, figures, until, end):
    """Carry out cases in a process of its own, and in a new one what is left after a crash or an endless case."""
    context = decoding.processes()
    while cases:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_tell, args=(cases, args, figures.found["rates"], until, end, sender))
        child.start()
        sender.close()
        running, stop_at, done = None, end, []
        why = {"outcome": TIME, "note": f"stopped, after {PATIENCE} times its estimate or at the end"}
        try:
            while receiver.poll(max(0.0, stop_at - time.time())):
                what, *found = receiver.recv()
                if what == "began":
                    running, stop_at = found
                if what == "record":
                    running, stop_at = None, end
                    done.append(found[0])
                figures.take(what, *found)
        except (EOFError, OSError):  # it has ended
            child.join()
            why = {"outcome": FAILED, "note": f"the process ended with code {child.exitcode}"}
        finally:
            child.kill()
            child.join()
        cases = [case for case in cases if case not in done]
        if running is not None:
            figures.take("record", running, why)
            cases.remove(running)
        elif why["outcome"] == TIME or not done:  # another process would not come further
            for case in cases:
                figures.take("record", case, why if why["outcome"] == FAILED else {"outcome": TIME})
            return


def _tell(cases, args, rates, until, end, sender):
    gc.freeze()  # what is imported by now is not looked through after every case
    carried_out(cases, args, rates, until, end, lambda *found: sender.send(found))


def carried_out(cases, args, rates, until, end, tell: Callable):
    """Measure cases one after the other, as far as the time goes; what their section has no time for comes last.

    `tell` hears of each case that begins, with the time at which to stop it, and of each record.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, rates, Path(folder), tell)
        section, name, spent = None, None, {}
        for last in (False, True):
            left = []
            for case in cases:
                if case.cuda and bench.device.type != "cuda":
                    tell("record", case, {"outcome": NEEDS_CUDA})
                    continue
                began, limit = time.time(), end if last else until[case.section]
                estimate = spent.get(case.kind, case.seconds)
                if began + estimate > limit:
                    left.append(case)
                    continue
                tell("began", case, min(end, began + PATIENCE * estimate + GRACE))
                if case.section != name:
                    bench.forget()
                    section, name = SECTIONS[case.section](bench), case.section
                record = attempted(section, case, limit)
                seconds = time.time() - began
                if case.kind and record["outcome"] == MEASURED:
                    spent[case.kind] = seconds
                tell("record", case, record | {"seconds": seconds})
                gc.collect()
                if bench.device.type == "cuda":
                    torch.cuda.synchronize()  # after an error of the device nothing works: this process ends here
                    torch.cuda.empty_cache()
            cases = left
        for case in cases:
            tell("record", case, {"outcome": TIME})


def attempted(section, case, limit):
    """The record of a case, whatever happens."""
    try:
        return {"outcome": MEASURED} | section.measured(limit=limit, **case.facts)
    except (TooLarge, torch.OutOfMemoryError) as error:
        more = {"note": f"{TOO_LARGE}: {error}"} if isinstance(error, TooLarge) else {}
        return {"outcome": TOO_LARGE} | more
    except Exception as error:
        lines = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {lines[0] if lines else ''}"
        return {"outcome": FAILED, "note": said[:LONGEST_NOTE].replace("|", "/")}  # a cell of a table


class Bench:
    """What all sections work on: the device, its rates, a folder, and one model at a time."""

    def __init__(self, args, rates, folder, tell):
        self.args, self._rates, self.folder, self.tell = args, rates, folder, tell
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.forget()

    @property
    def rates(self):
        """Operations and bytes a second, measured where they are first needed."""
        if self._rates is None:
            self._rates = decoding.rates(self.device, self.args.dtype)
            self.tell("rates", self._rates)
        return self._rates

    def forget(self):
        self.key = self.model = None

    def model_of(self, kind, shape):
        """The teacher or a student of a shape, with random weights."""
        if self.key != (kind, shape):
            self.forget()
            gc.collect()
            config = configuration(kind, decoding.shape_of(shape), self.args)
            self.key, self.model = (kind, shape), decoding.random_model(config, self.device, self.args.dtype)
        return self.model


def configuration(kind, shape, args):
    """Of a teacher, or of a recurrent student: one of decoding.py's, or that of the recipe, with windows."""
    longest = max(*args.contexts, *args.prompts) + STEPS[1] + WARM + 1
    teacher = decoding.configuration_of(None, None, shape, longest)
    if kind == "teacher":
        return teacher
    if kind in decoding.MODES:
        return decoding.configuration_of("modal", kind, shape, longest)
    recipe = recipe_of(args, args.shapes[0])
    own = dataclasses.replace(recipe.student, attention_layers=(shape[1] // 2,))
    made = student.configuration(own, recipe.data.context_length, teacher)
    sizes = [[decoding.MODES["multihyena"]] * made.filters(layer) for layer in range(shape[1])]
    return recurrence.recurrent_configuration(made, sizes)


def parameters(shape):
    """Of a shape, about."""
    width, layers, _, mlp, vocabulary = decoding.shape_of(shape)
    return layers * (4 * width**2 + 2 * width * mlp) + 2 * width * vocabulary


class Correctness:
    title = "Correctness"
    text = "`pytest -m gpu`: what the tests compare on a CPU, on this card."

    def __init__(self, bench):
        self.args = bench.args

    @staticmethod
    def cases(args) -> Iterator[Case]:
        yield Case("correctness", "pytest -m gpu", {}, 60, cuda=True)

    def measured(self, limit):
        cores = len(os.sched_getaffinity(0))
        alongside = min(WORKERS, cores // 2)
        several = ["-n", str(alongside)] if alongside > 1 and importlib.util.find_spec("xdist") else []
        return suite(["-m", "gpu", *several], limit - time.time() - STOPPING)

    @staticmethod
    def tables(records):
        (record,) = records
        if record["outcome"] != MEASURED:
            yield record["outcome"]
            return
        stopped = ", stopped before the end: time" if record["stopped"] else ""
        counts = ", ".join(f"{record[name]:,} {name}" for name in ("passed", "failed", "skipped"))
        yield "\n".join([f"{counts}; {record['seconds']:.0f} s{stopped}", *record["failures"]])


def suite(words, seconds):
    """Run pytest and count its tests; it is stopped after so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *words]
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=os.environ | offline, **streams) as process:
            try:
                said, stopped = process.communicate(timeout=max(1.0, seconds))[0], False
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # pytest writes its report and ends
                stopped = True
                try:
                    said = process.communicate(timeout=STOPPING)[0]
                except subprocess.TimeoutExpired:
                    process.kill()
                    said = process.communicate()[0]
        suites = list(ElementTree.parse(report).iter("testsuite")) if report.is_file() else []
    # A test that was stopped is an element without an outcome; the counts leave it out.
    ran, failures, errors, skipped = (
        sum(int(found.get(name)) for found in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    if not ran:
        lines = said.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"pytest ran no test: {next((x for x in lines if x.startswith('ERROR')), lines[-1])}")
    tests = [test for found in suites for test in found.iter("testcase")]
    wrong = [test for test in tests if test.find("failure") is not None or test.find("error") is not None]
    return {
        "passed": ran - failures - errors - skipped,
        "failed": failures + errors,
        "skipped": skipped,
        "stopped": stopped,
        "failures": [f"{test.get('classname')}::{test.get('name')}" for test in wrong],
    }


class Decoding:
    title = "Decoding"
    text = """Greedy steps of all sequences, argmax included; medians. The teacher's static cache is filled up to the
context before any is timed; a student's state has one size. "captured": by hand in a CUDA graph, as the Decoder does
by itself; "compiled": by torch.compile with reduce-overhead; "modes kept in bfloat16": between tokens, sums are in
float32. hyena: 8 modes a filter; multihyena: 2; windows: the student of recipes/neox70m.yaml, 2 modes. The floor is the
longer of two times: the bytes that a step moves at the bandwidth above, and its operations at the matrix rate.
`× teacher`: speed as a multiple of the teacher's best form at that context; ≤ where its compiled form, mostly the best,
was not measured."""

    def __init__(self, bench):
        self.bench = bench

    @staticmethod
    def cases(args) -> Iterator[Case]:
        """First the forms that need no compiler, model by model; then those that do, the shortest contexts first.

        At last the students of the largest batch with states in bfloat16.
        """
        for shape in args.shapes:
            for model in MODELS:
                for context in args.contexts if model == "teacher" else [None]:
                    for batch in args.batches:
                        for form in ("plain", "captured") if model == "teacher" else ("plain",):
                            yield Decoding.case(shape, model, form, batch, context)
        for context in args.contexts:
            for shape in args.shapes:
                for batch in args.batches:
                    yield Decoding.case(shape, "teacher", "compiled", batch, context)
        for shape in args.shapes:
            for model in STUDENTS:
                yield Decoding.case(shape, model, "rounded", max(args.batches), None)

    @staticmethod
    def case(shape, model, form, batch, context):
        facts = {"shape": shape, "model": model, "form": form, "batch": batch, "context": context}
        compiled, large = form == "compiled", parameters(shape) > LARGE
        seconds = (90 if large else 40) if compiled else (8 if large else 4)
        where = f"{batch}" if context is None else f"{batch} x {context}"
        kind = f"decoding {shape} {model} {form}"
        cuda = form in ("captured", "compiled")
        return Case("decoding", f"{shape}, {model}, {form}, {where}", facts, seconds, kind, cuda)

    @torch.inference_mode()
    def measured(self, shape, model, form, batch, context, limit):
        bench, device = self.bench, self.bench.device
        own, filled = bench.model_of(model, shape), context or 2
        case = contenders.Case(batch, filled, STEPS[1] + WARM)
        if model == "teacher":
            require(
                2 * own.config.num_hidden_layers * own.config.hidden_size * own.dtype.itemsize * batch * filled, device
            )
        torch.compiler.reset()  # frees the graphs of the case before; and after eight shapes it would compile no more
        contender = (contenders.Decoded if model in STUDENTS and form == "plain" else FORMS[form][0])(own, case)
        if model == "teacher":
            contender.read(torch.zeros(batch, 2, dtype=torch.long, device=device))
            contender.skip(filled - 2)
        seconds = step_seconds(contender, form == "captured", device)
        floor = decoding.floor_of(contender, filled + STEPS[1] / 2, bench.rates)
        return {
            "step": seconds,
            "weights": floor["bytes"] - floor["state"],
            "state": floor["state"],
            "floor": floor["seconds"],
        }

    @staticmethod
    def tables(records):
        for shape, batch in dict.fromkeys((record["shape"], record["batch"]) for record in records):
            own = [record for record in records if (record["shape"], record["batch"]) == (shape, batch)]
            yield f"{shape}, {'1 sequence' if batch == 1 else f'{batch} sequences'}\n{decoding_table(own)}"


def require(size, device):
    """Raise TooLarge where so many bytes do not fit the card's free memory."""
    if device.type == "cuda" and size > FREE * torch.cuda.mem_get_info()[0]:
        raise TooLarge(f"{size / 2**30:,.0f} GiB of keys and values")


def step_seconds(contender, capture, device):
    """Median seconds of a greedy step, over rounds of steps that do not wait for the device in between."""
    tokens = torch.zeros(contender.batch, dtype=torch.long, device=device)

    def step():
        tokens.copy_(contender.step(tokens).argmax(-1))

    def seconds(call, count):
        began = contenders.now(device)
        for _ in range(count):
            call()
        found = (contenders.now(device) - began) / count
        contender.skip(-count)  # back to where it was: the cache has room for one round
        return found

    call = step
    if capture:
        call = captured(step)
        contender.skip(-WARM)
    seconds(call, WARM)
    count = int(ROUND_SECONDS / seconds(call, WARM))
    count = min(max(count, STEPS[0]), STEPS[1])
    return statistics.median(seconds(call, count) for _ in range(ROUNDS))


def captured(step):
    """A step as a CUDA graph, recorded after WARM steps as they are."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def decoding_table(records):
    """Every form of every model with one batch of one shape."""
    teachers = [record for record in records if record["model"] == "teacher"]
    contexts = sorted({record["context"] for record in teachers})
    best, compiled = {}, set()
    for record in teachers:
        if record["outcome"] == MEASURED:
            context = record["context"]
            best[context] = min(best.get(context, record["step"]), record["step"])
            compiled |= {context} if record["form"] == "compiled" else set()

    def ratio(record, context):
        if record["context"] not in (None, context) or context not in best:
            return ""
        return f"{'' if context in compiled else '≤ '}{best[context] / record['step']:.2f}"

    header = ["", "context", "step ms", "tokens/s", "weights MB", "state MB", "floor ms", "floor / time"]
    header += [f"× teacher {context:,}" for context in contexts]
    rows = []
    forms = list(FORMS)
    for record in sorted(records, key=lambda r: (MODELS.index(r["model"]), r["context"] or 0, forms.index(r["form"]))):
        name = "static cache" if record["model"] == "teacher" else "Decoder"
        context = "any" if record["context"] is None else f"{record['context']:,}"
        label = [f"{record['model']}, {name}{FORMS[record['form']][1]}", context]
        if record["outcome"] != MEASURED:
            rows.append([*label, record["outcome"], *[""] * (len(header) - 3)])
            continue
        step = record["step"]
        rows.append(
            [
                *label,
                f"{1e3 * step:.3f}",
                f"{record['batch'] / step:,.0f}",
                *(f"{record[key] / 1e6:,.1f}" for key in ("weights", "state")),
                f"{1e3 * record['floor']:.3f}",
                f"{record['floor'] / step:.2f}",
                *(ratio(record, context) for context in contexts),
            ]
        )
    return aligned(header, rows)


class Prefill:
    title = "Prompts"
    text = """Reading prompts with a cache, up to the logits of the next token; medians. The teacher's attention is
scaled_dot_product_attention, students are recurrent. `× teacher`: speed as a multiple of the teacher's."""

    def __init__(self, bench):
        self.bench = bench

    @staticmethod
    def cases(args) -> Iterator[Case]:
        for shape in args.shapes:
            for model in MODELS:
                for prompt in args.prompts:
                    for batch in dict.fromkeys((max(1, args.prompt_tokens // prompt), 1)):
                        facts = {"shape": shape, "model": model, "batch": batch, "prompt": prompt}
                        seconds = 6 if parameters(shape) > LARGE else 3
                        kind = f"prefill {shape} {model} {batch > 1}"
                        yield Case("prefill", f"{shape}, {model}, {batch} x {prompt}", facts, seconds, kind)

    @torch.inference_mode()
    def measured(self, shape, model, batch, prompt, limit):
        own, device = self.bench.model_of(model, shape), self.bench.device
        ids = torch.randint(own.config.vocab_size, (batch, prompt), device=device)

        def read():
            own(input_ids=ids, use_cache=True, logits_to_keep=1)

        times = [decoding.duration(read, device) for _ in range(PROMPTS + 1)]
        return {"prompt_seconds": statistics.median(times[1:])}

    @staticmethod
    def tables(records):
        header = ["", *(part for model in MODELS for part in (f"{model} ms", *(["× teacher"] * (model != "teacher"))))]
        for shape in dict.fromkeys(record["shape"] for record in records):
            rows = []
            at = {(r["batch"], r["prompt"], r["model"]): r for r in records if r["shape"] == shape}
            for batch, prompt in sorted({key[:2] for key in at}, key=lambda pair: (pair[0] > 1, pair[1])):
                row, teacher = [f"{batch} x {prompt:,}"], at.get((batch, prompt, "teacher"), {}).get("prompt_seconds")
                for model in MODELS:
                    record = at.get((batch, prompt, model), {"outcome": TIME})
                    own = record.get("prompt_seconds")
                    row.append(f"{1e3 * own:,.1f}" if own else record["outcome"])
                    if model != "teacher":
                        row.append(f"{teacher / own:.2f}" if own and teacher else "")
                rows.append(row)
            yield f"{shape}, batch x prompt\n{aligned(header, rows)}"


class Training:
    title = "Training"
    text = """The stages of recipes/neox70m.yaml with random teachers, each in the loop of a run, from batch to batch.
Operations are the plan's; their share is of the matrix rate above. On a card under autocast, with the most memory that
was allocated. Below: one layer's mixer forward, and forward and backward, of batches that fill a card, beside the
teacher's attention; its floor is that of benchmarks/mixers.py."""

    def __init__(self, bench):
        self.bench, self.name, self.shape = bench, None, None

    @staticmethod
    def cases(args) -> Iterator[Case]:
        """All stages at the first shape; at the others the ends of transfer, the cheapest and the dearest step."""
        for place, shape in enumerate(args.train_shapes):
            phases = recipe_of(args, shape).transfer
            stages = [("activations", index, phase.schedule) for index, phase in enumerate(phases.activations)]
            stages += [("logits", index, f"{index + 1}" if index else "") for index in range(len(phases.logits))]
            stages.append(("baseline", 0, ""))
            for stage, index, beside in stages if place == 0 else (stages[0], stages[-2]):
                name = ", ".join(filter(None, (shape, stage, beside)))
                seconds = 20 if parameters(shape) > LARGE else 12
                yield Case("training", name, {"shape": shape, "stage": stage, "index": index}, seconds)
        for shape in args.train_shapes:
            for length in MIXER_LENGTHS:
                facts = {"shape": shape, "stage": "mixers", "index": length}
                yield Case("training", f"{shape}, mixers, {length}", facts, 6, f"mixers {length}")

    def measured(self, shape, stage, index, limit):
        if stage == "mixers":
            self.forget()
            return self._mixers(shape, index)
        device, own = self.bench.device, self._shape(shape)
        phases = getattr(own.recipe.transfer, stage, ())
        size = phases[index].batch_size if phases else own.batch_size
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if stage == "baseline":
            row = transfer.Row(own.run(), baseline.pretraining, own.student())
        else:
            row = getattr(own, stage)(phases[index])
        quickest = row.loop(1, device)
        steps = min(max(int(TRAINING_SECONDS / quickest), TRAINING_STEPS[0]), TRAINING_STEPS[1])
        seconds = row.loop(steps, device)
        tokens = size * own.length
        return {
            "step": seconds,
            "sequences": size,
            "length": own.length,
            "flops": row.optimisation.flops * tokens,
            "share": row.optimisation.flops * tokens / seconds / self.bench.rates["operations_per_second"],
            "memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        }

    def forget(self):
        self.name = self.shape = None
        gc.collect()

    def _shape(self, name):
        """A shape with the recipe's phases, in a folder of its own; one at a time is in memory."""
        if self.name != name:
            self.forget()
            args, device, folder = self.bench.args, self.bench.device, self.bench.folder / f"shape {name}"
            folder.mkdir(exist_ok=True)
            recipe = recipe_of(args, name, f"run_dir={folder}")
            size = args.train_batch_size or (LARGE_BATCH if parameters(name) > LARGE_TRAINING else None)
            if size is not None:
                made = {
                    group: tuple(
                        dataclasses.replace(phase, batch_size=size) for phase in getattr(recipe.transfer, group)
                    )
                    for group in ("activations", "logits")
                }
                recipe = dataclasses.replace(recipe, transfer=dataclasses.replace(recipe.transfer, **made))
            half = device.type == "cuda" and args.dtype == "bfloat16"
            accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if half else "no")
            config = decoding.configuration_of(None, None, decoding.shape_of(name), recipe.data.context_length)
            largest = max(phase.batch_size for phase in recipe.transfer.phases)
            dtype = torch.bfloat16 if half else torch.float32
            self.shape = transfer.Shape(recipe, config, largest, 1, folder, accelerator, dtype)
            self.name = name
        return self.shape

    def _mixers(self, name, length):
        """Every form of every mixer at a shape's width."""
        width, _, heads, *_ = decoding.shape_of(name)
        device, rates = self.bench.device, self.bench.rates
        contenders = mixers.made(width, heads, device)
        tokens = mixers.TOKENS if device.type == "cuda" else length
        shape = mixers.Shape(width, heads, max(1, tokens // length), length)
        limits = rates | {"bytes_per_number": mixers.dtype_of(device).itemsize}
        mixers.measured(contenders, shape, 1, device, limits)  # start-up: kernels are chosen and loaded
        return {"mixers": mixers.measured(contenders, shape, MIXER_ROUNDS, device, limits)}

    @staticmethod
    def tables(records):
        header = ["", "sequences x tokens", "step ms", "tokens/s", "TFLOP/s", "of the matrix rate", "peak GB"]
        rows = []
        for record in records:
            label = record["name"]
            if record["outcome"] != MEASURED:
                rows.append([label, "", record["outcome"], *[""] * (len(header) - 3)])
            elif record["stage"] != "mixers":
                tokens = record["sequences"] * record["length"]
                rows.append(
                    [
                        label,
                        f"{record['sequences']} x {record['length']:,}",
                        f"{1e3 * record['step']:,.1f}",
                        f"{tokens / record['step']:,.0f}",
                        f"{record['flops'] / record['step'] / 1e12:,.2f}",
                        f"{100 * record['share']:.1f} %",
                        "" if record["memory"] is None else f"{record['memory'] / 1e9:,.1f}",
                    ]
                )
        yield aligned(header, rows)
        for record in records:
            if "mixers" in record:
                yield "\n".join(mixers.table(record["mixers"]))


class Reduction:
    title = "From filters to recurrences"
    text = """Filters of the first shape as they are initialised, in float64. multihyena: a layer of
recipes/neox70m.yaml, to all sizes of its ladder, as a budget of bytes needs them; hyena: to the default tolerance.
The method is the recipe's. On the card's host, by one process and by as many as a run starts, their start included."""

    def __init__(self, bench):
        self.bench = bench

    @staticmethod
    def cases(args) -> Iterator[Case]:
        for mixer, seconds in (("multihyena", 10), ("hyena", 25)):
            for count in dict.fromkeys((processes.available(), 1)):
                facts = {"mixer": mixer, "workers": count}
                yield Case("reduction", f"{mixer}, {count} worker{'s' if count > 1 else ''}", facts, seconds)

    @torch.no_grad()
    def measured(self, mixer, workers, limit):
        args = self.bench.args
        recipe = recipe_of(args, args.shapes[0])
        settings, own = recipe.recurrence, recipe.student
        if mixer == "hyena":
            own = dataclasses.replace(own, mixer="hyena", window=0)
            settings = dataclasses.replace(settings, state_bytes=None)
        length = recipe.data.context_length
        teacher = decoding.configuration_of(None, None, decoding.shape_of(args.shapes[0]), length)
        config = student.configuration(own, length, teacher)
        torch.manual_seed(0)
        taps = measure.filter_taps(HyenaMixer(config, 0).filter, config.horizon)
        taps = taps[torch.linspace(0, len(taps) - 1, min(FILTERS, len(taps))).round().long()]
        aims = recurrence.aims(settings)

        def reduce():
            with processes.started(workers) as each:
                recurrence.reduce_filters(taps, settings, aims, each)

        seconds = decoding.duration(reduce, torch.device("cpu"))
        facts = {"filters": len(taps), "length": taps.shape[1], "sizes": len(aims), "method": settings.method}
        return facts | {"reduction_seconds": seconds}

    @staticmethod
    def tables(records):
        rows = []
        for record in records:
            label = record["name"]
            if record["outcome"] != MEASURED:
                rows.append([label, "", "", "", record["outcome"], ""])
                continue
            seconds = record["reduction_seconds"]
            counts = [f"{record[key]:,}" for key in ("filters", "length", "sizes")]
            rows.append([label, *counts, f"{seconds:.2f}", f"{record['filters'] / seconds:,.1f}"])
        yield aligned(["", "filters", "taps", "sizes", "seconds", "filters/s"], rows)


def described(rates):
    """The limits of a card."""
    operations, moved = rates["operations_per_second"], rates["bytes_per_second"]
    return f"{operations / 1e12:,.2f} TFLOP/s in a square matrix product, and {moved / 1e9:,.1f} GB/s reading"


SECTIONS = {
    "correctness": Correctness,
    "decoding": Decoding,
    "prefill": Prefill,
    "training": Training,
    "reduction": Reduction,
}


if __name__ == "__main__":
    sys.exit(main())
