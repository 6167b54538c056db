"""Generation with every kind of cache, teacher and student side by side, each with its floor.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --shapes 410m --cases 1x512+32 --mixers hyena multihyena --to benchmarks/decoding.md

Weights are random, at the shapes of Pythia. A case BATCHxPROMPT+NEW reads BATCH prompts of PROMPT tokens and generates
NEW more for each, greedily. Every row runs in a process of its own, with as many threads. Where NEW steps would take
longer than `--seconds`, a few are timed at the first, the middle and the last positions, the cache filled up to there,
and stand for the rest; the column `timed` says how many. Rows that are quick run twice, and the better counts. On a
CUDA device everything runs there.
"""

import argparse
import copy
import json
import math
import multiprocessing
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.initialization import no_init_weights

from scavenger.measure import state_bytes
from scavenger.model import HyenaNeoXConfig, HyenaNeoXForCausalLM
from scavenger.model.decoding import Decoder, PackedLinear, packed
from scavenger.model.filters import ImplicitFilter, WideFilter
from scavenger.model.modal import ChannelState, HeadState, ring_places
from scavenger.model.online import NEAR
from scavenger.report import timing
from scavenger.report.timing import (
    Case,
    Decoded,
    DynamicTeacher,
    Exact,
    PackedTeacher,
    StaticTeacher,
    Steps,
    begin_peak,
    generated,
    in_use,
    now,
    peak_use,
)
from scavenger.run.checkpoint import write_text


# Width, layers, heads, width of the MLP, vocabulary.
SHAPES = {
    "70m": (512, 6, 8, 2048, 50304),
    "410m": (1024, 24, 16, 4096, 50304),
    "1.4b": (2048, 24, 16, 8192, 50304),
}
# The greater shapes read less: on two CPU cores 4 prompts of 512 tokens take about a minute at 1.4b.
CASES = {
    "70m": ["1x512+256", "64x512+256", "16x2048+256"],
    "410m": ["1x256+32", "4x128+16"],
    "1.4b": ["1x64+8", "4x32+8"],
}
MODES = {"hyena": 8, "multihyena": 2}  # of each filter; the quickstart's reduced filters have 1 to 16
READ_AGAIN = 4096  # tokens that are read again at once; a greater batch is timed by fewer rows and taken in proportion
FEW = 5  # steps whose median is the latency at the first and at the last new tokens
PIECE = 2048  # tokens of a long context that are read at once
ROUNDS = 8  # of a few steps at each context length, in turn
PROMPT, FORWARDS = 2048, 5  # of the state's share of a prompt, read with a cache and without, in turn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=list(SHAPES), help="70m, 410m, 1.4b or WIDTH,LAYERS,HEADS,MLP,VOCAB"
    )
    parser.add_argument("--cases", nargs="+", help="BATCHxPROMPT+NEW, for every shape; some of each shape by default")
    parser.add_argument("--mixers", nargs="+", choices=list(MODES), default=["hyena"])
    parser.add_argument("--modes", type=int, help="of each filter; 8 for hyena and 2 for multihyena by default")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 32768], help="of the first shape")
    parser.add_argument("--compile", action="store_true", help="compiled steps too, of teacher and student")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0, help="of timed steps in a row, about")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB that the largest batch is computed for")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--to", type=Path, help="write the tables there, as Markdown")
    args = parser.parse_args()
    try:
        plan = [(s, shape_of(s), Case.parsed(c)) for s in args.shapes for c in args.cases or CASES.get(s, CASES["70m"])]
        numbers = [args.threads, args.seconds, args.memory, *args.contexts, 1 if args.modes is None else args.modes]
        if min(numbers) <= 0:
            raise ValueError("found 0 or less for threads, seconds, memory, contexts or modes; expected more")
    except ValueError as error:
        print(f"decoding: error: {error}", file=sys.stderr)
        return 2
    summary = {"machine": apart(limits, args), "cases": [], "contexts": [], "prompts": []}
    for name, shape, case in plan:
        found = []
        for row, mixer in rows(args, found):
            began = time.perf_counter()
            found.append(
                {"row": name_of(row), "mixer": mixer} | apart(measured, row, mixer, shape, case, summary, args)
            )
            progress(f"{name}, {case}, {label(found[-1])}", began)
        compare(found)
        summary["cases"].append({"shape": name, "case": str(case), "rows": found})
        print("\n".join(table(summary["cases"][-1])) + "\n", flush=True)
    name, shape, _ = plan[0]
    for mixer in args.mixers:
        began = time.perf_counter()
        summary["contexts"].append({"shape": name, "mixer": mixer, "rows": apart(contexts, mixer, shape, args)})
        print("\n".join(contexts_table(summary["contexts"][-1])) + "\n", flush=True)
        summary["prompts"].append({"shape": name, "mixer": mixer} | apart(state_share, mixer, shape, args))
        print("\n".join(share_lines(summary["prompts"][-1])) + "\n", flush=True)
        progress(f"{name}, {mixer}, by context", began)
    if args.json:
        write_text(args.json, json.dumps(summary, indent=1) + "\n")
    if args.to:
        write_text(args.to, page(summary))
    return 0


def shape_of(text):
    if text in SHAPES:
        return SHAPES[text]
    shape = tuple(map(int, text.split(","))) if re.fullmatch(r"\d+(,\d+){4}", text) else (0,)
    if min(shape) < 1 or shape[0] % (8 * shape[2]):
        raise ValueError(
            f"--shapes: found {text}; expected {', '.join(SHAPES)} or WIDTH,LAYERS,HEADS,MLP,VOCAB with heads of a "
            "multiple of 8 channels"
        )
    return shape


def apart(function, *words):
    """What `function` says, in a process of its own, whose memory nobody else touches."""
    # Forked from one that has imported everything and computed nothing; CUDA wants a process that is wholly new.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload(["transformers.models.gpt_neox.modeling_gpt_neox", "scavenger.report.timing"])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *words).result()
    except (BrokenProcessPool, torch.OutOfMemoryError):
        raise SystemExit("decoding: error: out of memory; expected a smaller batch or shape") from None


def rows(args, found):
    """The rows of a case, and the mixer of those that are students; `found` has what was measured of those before."""
    yield DynamicTeacher, None
    yield StaticTeacher, None
    if args.dtype == "float32" and not torch.cuda.is_available():
        # The Decoder packs its linear layers here, so the better teacher may too.
        dynamic, static = (entry["generation"] for entry in found)
        yield PackedDynamicTeacher if dynamic < static else PackedTeacher, None
    if args.compile:
        yield CompiledTeacher, None
    for mixer in args.mixers:
        yield ReadAgain, mixer
        yield Exact, mixer
        yield Steps, mixer
        yield Decoded, mixer
        if args.compile:
            yield CompiledDecoded, mixer


def name_of(row):
    """What a row is called: whose cache, and which."""
    if row.student is None:
        return f"teacher, {row.name}"
    return f"recurrent, {row.name}" if row.student == "modal" else row.name


class PackedDynamicTeacher(DynamicTeacher):
    name = "dynamic cache, packed"

    def __init__(self, model, case):
        super().__init__(packed(model, case.batch), case)


class CompiledTeacher(StaticTeacher):
    name = "static cache, compiled"

    def __init__(self, model, case):
        super().__init__(model, case)
        if torch.cuda.is_available():
            self.step_model = torch.compile(model, mode="reduce-overhead")
        else:  # with its weights as constants, which the compiler packs by itself
            self.step_model = torch.compile(model, options={"freezing": True})


class CompiledDecoded(Decoded):
    name = "Decoder, compiled"
    compiled = True


class ReadAgain(DynamicTeacher):
    """The student with implicit filters and no cache: at each token it reads everything again."""

    name = "read again"
    student = "implicit"

    def __init__(self, model, case):
        super().__init__(model, case)
        self.batch = max(1, min(case.batch, READ_AGAIN // (case.prompt + case.new)))

    def read(self, ids):
        self.ids = ids
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    def step(self, tokens):
        return self.read(torch.cat([self.ids, tokens[:, None]], dim=1))

    def skip(self, count):
        self.ids = torch.cat([self.ids, self.ids[:, torch.arange(count) % self.ids.shape[1]]], dim=1)

    @property
    def kept(self):
        return self.ids.numel() * self.ids.element_size()


@torch.inference_mode()
def measured(row, mixer, shape, case, summary, args):
    """One row: a model with one kind of cache in one case."""
    device = prepare(args)
    empty = in_use(device)
    model = model_of(row, mixer, shape, case.prompt + case.new, device, args)
    contender = row(model, case)
    batch = contender.batch
    torch.manual_seed(1)
    ids = torch.randint(shape[-1], (batch, case.prompt), device=device)
    token = contender.read(ids[:, :2]).argmax(-1)  # the first calls pay for start-up, and for compiling
    for _ in range(2):
        token = contender.step(token).argmax(-1)
    seconds = math.inf if row.uneven else args.seconds
    best = generated(contender, ids, case.new, seconds)
    if best["first"] + sum(best["steps"]) <= args.seconds:
        again = generated(contender, ids, case.new, seconds)
        best = min(best, again, key=lambda entry: entry["generation"]) | {"first": min(best["first"], again["first"])}
    peak = peak_use(device) - empty
    steps = best.pop("steps")
    share = case.batch / batch  # of re-computation: what was timed is in proportion
    weights = contender.weights
    each = (peak - weights) / batch if row is ReadAgain else best["kept_last"] / batch
    floor = floor_of(contender, case.prompt + case.new / 2, summary["machine"])
    generation = share * best["generation"]
    return {
        "prefill": share * best["first"],
        "generation": generation,
        "timed": len(steps),
        "rows_timed": batch,
        "tokens_per_second": case.batch * case.new / generation,
        "latency": share * statistics.median(steps),
        "latency_first": share * statistics.median(steps[:FEW]),
        "latency_last": share * statistics.median(steps[-FEW:]),
        "peak": peak,
        "weights": weights,
        "kept_first": best["kept_first"] / batch,
        "kept_last": best["kept_last"] / batch,
        "largest_batch": max(0, int((args.memory * 2**30 - weights) / each)),
        "floor": share * floor["seconds"],
        "floor_bytes": share * floor["bytes"],
        "floor_operations": share * floor["operations"],
        "share_of_floor": share * floor["seconds"] * case.new / generation,
        "tokens": best["tokens"],
    }


def prepare(args):
    """The device, and the threads that every row has."""
    torch.set_num_threads(args.threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_of(row, mixer, shape, length, device, args):
    """The row's model with random weights."""
    torch.manual_seed(0)
    width, layers, heads, mlp, vocabulary = shape
    shared = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
    }
    with no_init_weights():
        if row.student is None:
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**shared, max_position_embeddings=length))
        else:
            filters = width if mixer == "hyena" else heads
            sizes = [[args.modes or MODES[mixer]] * filters] * layers if row.student == "modal" else None
            model = HyenaNeoXForCausalLM(
                HyenaNeoXConfig(
                    **shared, num_filters=filters, context_length=length, filter=row.student, state_sizes=sizes
                )
            )
    randomise(model)
    return model.to(device, getattr(torch, args.dtype)).eval()


def randomise(model):
    """Weights from one short piece of random numbers, as drawing a billion of them would take longer than the row."""
    piece = 0.02 * torch.randn((1 << 20) + 7)  # odd, so that no two rows of a matrix are alike
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                flat = module.weight.view(-1)
                for start in range(0, len(flat), len(piece)):
                    flat[start : start + len(piece)] = piece[: len(flat) - start]
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
        for module in model.modules():
            if isinstance(module, (WideFilter, nn.LayerNorm)):
                module.reset_parameters()


def floor_of(contender, length, machine):
    """What a step after `length` tokens cannot do without: see FLOOR."""
    model = contender.model
    embedding = 0 if model.config.tie_word_embeddings else model.gpt_neox.embed_in.weight.nbytes
    filters = sum(p.nbytes for m in model.modules() if isinstance(m, ImplicitFilter) for p in m.parameters())
    moved, operations = work(contender, length)
    moved += sum(p.nbytes for p in model.parameters()) - embedding - filters
    operations += 2 * contender.batch * multiplied(model)
    seconds = max(moved / machine["bytes_per_second"], operations / machine["operations_per_second"])
    return {"seconds": seconds, "bytes": moved, "operations": operations}


def work(contender, length):
    """Bytes of state that a step after `length` tokens must move, and its operations beyond the linear layers."""
    model = contender.model
    config = model.config
    width = 1 if contender.student is None else config.hidden_size // config.num_filters
    numbers = contender.batch * config.num_hidden_layers * config.hidden_size
    if isinstance(contender, ReadAgain):
        length += 1
        transforms = 2 * width * 2.5 * 2 * length * math.log2(2 * length)  # of each channel
        mixing = min(transforms, 2 * length**2) * numbers
        linear = 2 * (length - 1) * (multiplied(model) - model.lm_head.weight.numel())
        return 0, contender.batch * linear + mixing
    if isinstance(contender, Steps):
        modes = sum(map(sum, config.state_sizes)) * width**2
        # A complex product and its input, 8 operations; one read out, 4. A wide state is written in turns, not at once.
        return contender.kept * (1 + 1 / ring_places(width)), 12 * contender.batch * modes
    if isinstance(contender, Exact) and width == 1:
        sizes = [NEAR << level for level in range(max(0, int(math.log2(length / NEAR))))]
        # Half a block of inputs directly; for each size of tile, one input read and one output read and written a step,
        # and two transforms of twice the size each time as many steps have passed.
        moved = NEAR / 2 + 3 * len(sizes)
        return 4 * numbers * moved, numbers * (NEAR + sum(10 * math.log2(2 * size) for size in sizes))
    # Keys and values of all tokens, this one included, are read, and this one's are written; by wide heads in float32.
    itemsize = 4 if isinstance(contender, Exact) else model.dtype.itemsize
    return 2 * numbers * (length + 2) * itemsize, 4 * numbers * (length + 1)


def multiplied(model):
    """Weights by which each token is multiplied."""
    filters = {id(part) for m in model.modules() if isinstance(m, ImplicitFilter) for part in m.modules()}
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, PackedLinear)) and id(m) not in filters]
    return sum(m.weight.numel() for m in linear)


@torch.inference_mode()
def contexts(mixer, shape, args):
    """A step of the recurrent student's Decoder after contexts of several lengths, in turn, and of the teacher."""
    device = prepare(args)
    lengths = sorted(args.contexts)
    model = model_of(Decoded, mixer, shape, lengths[-1], device, args)
    ids = torch.randint(shape[-1], (1, lengths[-1]), device=device)
    found, caches = [], []
    began, cache = now(device), None
    for start, stop in zip([0, *lengths], lengths, strict=False):
        for piece in ids[:, start:stop].split(PIECE, dim=1):
            cache = model(input_ids=piece, cache=cache, use_cache=True, logits_to_keep=1).cache
        found.append({"length": stop, "prefill": now(device) - began, "kept": state_bytes(cache), "steps": []})
        caches.append(copy.deepcopy(cache))
    decoder = Decoder(model, 1, compiled=args.compile)
    for _ in range(ROUNDS):
        for entry, cache in zip(found, caches, strict=True):
            put(cache, decoder.cache)
            entry["steps"] += several_steps(decoder.step, device)
    for entry, cache in zip(found, caches, strict=True):
        put(cache, decoder.cache)
        entry["step"] = statistics.median(entry.pop("steps"))
        entry["growth"] = growth(decoder.step, device)
    del decoder, model, cache, caches
    teacher = DynamicTeacher(model_of(DynamicTeacher, None, shape, lengths[-1], device, args), Case(1, 2, 1))
    teacher.read(ids[:, :2])
    read = 2
    for entry in found:
        teacher.skip(max(0, entry["length"] - read))
        entry["teacher_kept"] = teacher.kept
        entry["teacher_step"] = statistics.median(several_steps(teacher.step, device))
        entry["teacher_growth"] = growth(teacher.step, device)
        read = max(read, entry["length"]) + 2 * (FEW + 1)
    return found


def put(cache, into):
    """The state of a prompt into the only row of a decoder."""
    into.real.copy_(cache.real)
    for mine, new in zip(into.layers, cache.layers, strict=True):
        for buffer, state in zip(mine.states, new.states, strict=True):
            buffer.copy_(state)


def several_steps(step, device):
    """Seconds of a few steps, after one that is not timed."""
    tokens, times = torch.zeros(1, dtype=torch.long, device=device), []
    for _ in range(FEW + 1):
        began = now(device)
        step(tokens)
        times.append(now(device) - began)
    return times[1:]


def growth(step, device):
    """Bytes that a few steps take at their peak beyond what was in use."""
    before = begin_peak(device)
    several_steps(step, device)
    return max(0, peak_use(device) - before)


@torch.inference_mode()
def state_share(mixer, shape, args):
    """What the state of a prompt costs beside its forward pass: the calls that make it, timed inside a prefill."""
    device = prepare(args)
    model = model_of(Steps, mixer, shape, PROMPT, device, args)
    ids = torch.randint(shape[-1], (1, PROMPT), device=device)
    forwards, prefills, states = [], [], []
    for _ in range(FORWARDS + 1):
        began = now(device)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        forwards.append(now(device) - began)
        spent = []
        with clocked(ChannelState, spent, device), clocked(HeadState, spent, device):
            began = now(device)
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
            prefills.append(now(device) - began)
        states.append(sum(spent))
    forward, prefill, state = (statistics.median(times[1:]) for times in (forwards, prefills, states))
    return {"prompt": PROMPT, "forward": forward, "prefill": prefill, "state": state, "share": state / forward}


def clocked(state, spent, device):
    """`state.advance` adds its seconds to `spent`."""
    advance = state.advance

    def timed(*words):
        began = now(device)
        advance(*words)
        spent.append(now(device) - began)

    return mock.patch.object(state, "advance", timed)


def limits(args):
    """The machine's matrix rate and memory bandwidth, best of a few."""
    device = prepare(args)
    numbers = torch.ones(1 << 27, device=device)
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=getattr(torch, args.dtype))
    return timing.machine(device, args.dtype) | {
        "memory": args.memory,
        "seconds": args.seconds,
        "operations_per_second": 2 * size**3 / quickest(lambda: a @ a, device),
        "bytes_per_second": numbers.nbytes / quickest(lambda: numbers.sum(), device),
    }


def quickest(call, device):
    times = []
    for _ in range(8):
        began = now(device)
        call()
        times.append(now(device) - began)
    return min(times)


def progress(what, began):
    print(f"decoding: {what}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def compare(found):
    """Speed of each row of a case as a multiple of the teacher's, with its dynamic cache and with its best one."""
    teachers = [entry for entry in found if entry["mixer"] is None]
    for entry in found:
        for key, seconds in (("new", lambda e: e["generation"]), ("whole", lambda e: e["prefill"] + e["generation"])):
            entry[f"{key}_to_dynamic"] = seconds(teachers[0]) / seconds(entry)
            entry[f"{key}_to_best"] = min(map(seconds, teachers)) / seconds(entry)


def label(entry):
    return entry["row"] if entry["mixer"] is None else f"{entry['mixer']}, {entry['row']}"


def table(case):
    lines = [
        f"{case['shape']}, batch x prompt + new tokens: {case['case']}",
        f"{'':<42}{'prefill':>9}{'tokens':>10}{'× teacher, new':>16}{'× with prefill':>16}"
        f"{'ms a step':>27}{'':>7}{'peak':>9}{'KiB a sequence':>18}{'largest':>10}{'floor':>9}{'floor /':>8}",
        f"{'':<42}{'s':>9}{'a second':>10}{'dynamic':>9}{'best':>7}{'dynamic':>9}{'best':>7}"
        f"{'median':>9}{'first':>9}{'last':>9}{'timed':>7}{'MiB':>9}{'first':>9}{'last':>9}{'batch':>10}{'ms':>9}{'time':>8}",
    ]
    for e in case["rows"]:
        lines.append(
            f"{label(e):<42}{e['prefill']:>9.3f}{e['tokens_per_second']:>10.1f}"
            f"{e['new_to_dynamic']:>9.2f}{e['new_to_best']:>7.2f}{e['whole_to_dynamic']:>9.2f}{e['whole_to_best']:>7.2f}"
            f"{1e3 * e['latency']:>9.1f}{1e3 * e['latency_first']:>9.1f}{1e3 * e['latency_last']:>9.1f}{e['timed']:>7}"
            f"{e['peak'] / 2**20:>9.0f}{e['kept_first'] / 2**10:>9.0f}{e['kept_last'] / 2**10:>9.0f}"
            f"{e['largest_batch']:>10,}{1e3 * e['floor']:>9.1f}{e['share_of_floor']:>8.2f}"
        )
    return lines


def contexts_table(found):
    lines = [
        f"{found['shape']}, {found['mixer']}: one sequence, by the tokens it has read",
        f"{'':<10}{'student, recurrent, Decoder':>44}{'teacher, dynamic cache':>34}",
        f"{'context':>10}{'prefill s':>12}{'ms a token':>12}{'KiB kept':>10}{'step MiB':>10}"
        f"{'ms a token':>14}{'KiB kept':>10}{'step MiB':>10}",
    ]
    for e in found["rows"]:
        lines.append(
            f"{e['length']:>10,}{e['prefill']:>12.2f}{1e3 * e['step']:>12.2f}{e['kept'] / 2**10:>10.0f}"
            f"{e['growth'] / 2**20:>10.1f}{1e3 * e['teacher_step']:>14.2f}{e['teacher_kept'] / 2**10:>10.0f}"
            f"{e['teacher_growth'] / 2**20:>10.1f}"
        )
    return lines


def share_lines(found):
    return [
        f"{found['shape']}, {found['mixer']}: a prompt of {found['prompt']:,} tokens takes {found['forward']:.3f} s "
        f"without a cache, {found['prefill']:.3f} s with one,",
        f"of which its state takes {found['state']:.4f} s: {100 * found['share']:.1f} % of the forward pass",
    ]


FLOOR = """The floor of a step is the longer of two times, as moving and computing can go on
at once: the bytes it must move over the measured bandwidth, and its operations over the measured matrix rate. Bytes:
all weights once, but for the embedding; of every row, the state read and what is written of it (teacher: keys and
values of all tokens read, one token written; recurrent: the state read and written, of wide heads the part that a step
settles; exact: a block of inputs and its part of the tiles). Operations: two for each weight and row, and those of the
mixers."""


def page(summary):
    machine = summary["machine"]
    blocks = []
    for case in summary["cases"]:
        blocks += [*table(case), ""]
    for found, share in zip(summary["contexts"], summary["prompts"], strict=True):
        blocks += [*contexts_table(found), "", *share_lines(share), ""]
    body = "\n".join(blocks).rstrip()
    command = " ".join(["python benchmarks/decoding.py", *sys.argv[1:]])
    return f"""# Speed and memory of generation

`{command}`

{machine["device"]}, {machine["threads"]} threads, Python {machine["python"]}, torch {machine["torch"]}, transformers
{machine["transformers"]}, {machine["dtype"]}; random weights. Measured limits:
{machine["operations_per_second"] / 1e9:.0f} Gflop/s in a square matrix product of that type, and
{machine["bytes_per_second"] / 1e9:.1f} GB/s reading float32 numbers. {FLOOR}

Every row runs in a process of its own. In float32 on a CPU the linear layers of the Decoder, of the teacher's row
"packed" (the better of its two caches) and of the compiled rows lie in oneDNN's layout. A step takes its own argmax.
`timed`: steps timed; where fewer than the new tokens, at the first, the middle and the last of them, about
{machine["seconds"]:g} s in all. Re-computation ("read again") reads at most {READ_AGAIN:,} tokens at a time; times of a
greater batch are taken in proportion, and its largest batch follows from its peak. The largest batch of the others is
what {machine["memory"]:g} GiB hold of weights and of the measured bytes of a sequence after its last token. Peak:
growth of the process, or of what is allocated on the GPU, weights included. The state's share of a prompt is timed
inside a prefill, at the calls that make the state, beside forward passes without a cache, in turn; medians of
{FORWARDS}. Contexts: medians of {ROUNDS} times {FEW} steps, in turn, after a prompt read in pieces of {PIECE:,} tokens.

```
{body}
```
"""


if __name__ == "__main__":
    sys.exit(main())
