"""Speed and memory of generation, teacher and student with every kind of cache, each with its floor.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --shapes 410m --cases 1x512+32 --mixers hyena multihyena --to benchmarks/decoding.md

Weights are random, at the shapes of Pythia. A case BATCHxPROMPT+NEW reads BATCH prompts of PROMPT tokens and generates
NEW more for each, greedily. Every row runs in its own process, all with the same number of threads. Where NEW steps
would take longer than `--seconds`, only some are timed, at the first, the middle and the last positions, with the cache
filled up to there; the column `timed` gives their number. Fast rows run twice and the better run counts. On a machine
with a GPU everything runs there.
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
from transformers.initialization import no_init_weights

from scavenger import families, measure
from scavenger.measure import state_bytes
from scavenger.model import HyenaConfig, HyenaForCausalLM
from scavenger.model.decoding import Decoder, PackedLinear
from scavenger.model.filters import ImplicitFilter, ModalFilter
from scavenger.model.modal import ChannelState, HeadState
from scavenger.model.online import NEAR
from scavenger.model.rotary import Rotary
from scavenger.recurrence.certificate import aligned
from scavenger.report import contenders, timing
from scavenger.report.contenders import Case, Exact, ReadAgain, begin_peak, generated, now, peak_use
from scavenger.run.checkpoint import write_text


# Width, layers, heads, width of the MLP, vocabulary.
SHAPES = {
    "70m": (512, 6, 8, 2048, 50304),
    "410m": (1024, 24, 16, 4096, 50304),
    "1b": (2048, 16, 8, 8192, 50304),
    "1.4b": (2048, 24, 16, 8192, 50304),
}
# Larger shapes read less: on two CPU cores 4 prompts of 512 tokens take about a minute at 1.4b.
CASES = {
    "70m": ["1x512+256", "64x512+256", "16x2048+256"],
    "410m": ["1x256+32", "4x128+16"],
    "1.4b": ["1x64+8", "4x32+8"],
}
MODES = {"hyena": 8, "multihyena": 2}  # of each filter; the quickstart's reduced filters have 1 to 16
FEW = 5  # steps whose median is the latency at the first and at the last new tokens
PIECE = 2048  # tokens of a long context that are read at once
ROUNDS = 8  # of a few steps at each context length, in turn
NUMBERS = 1 << 27  # float32 numbers that are read for the bandwidth; far more than a cache holds
PROMPT, FORWARDS = 2048, 5  # the prompt whose state is timed, and how often it is read without and with a cache


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
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
        print(f"{table(summary['cases'][-1])}\n", flush=True)
    name, shape, _ = plan[0]
    for mixer in args.mixers:
        began = time.perf_counter()
        summary["contexts"].append({"shape": name, "mixer": mixer, "rows": apart(contexts, mixer, shape, args)})
        print(f"{contexts_table(summary['contexts'][-1])}\n", flush=True)
        summary["prompts"].append({"shape": name, "mixer": mixer} | apart(state_share, mixer, shape, args))
        print(f"{share_text(summary['prompts'][-1])}\n", flush=True)
        progress(f"{name}, {mixer}, by context", began)
    if args.json:
        write_text(args.json, json.dumps(summary, indent=1) + "\n")
    if args.to:
        write_text(args.to, page(summary, words))
    return 0


def parser():
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--shapes", nargs="+", default=list(CASES), help=f"{', '.join(SHAPES)} or WIDTH,LAYERS,HEADS,MLP,VOCAB"
    )
    made.add_argument("--cases", nargs="+", help="BATCHxPROMPT+NEW, for every shape; each shape has its own by default")
    made.add_argument("--mixers", nargs="+", choices=list(MODES), default=["hyena"])
    made.add_argument("--modes", type=int, help="of each filter; 8 for hyena and 2 for multihyena by default")
    made.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 32768], help="of the first shape")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--seconds", type=float, default=15.0, help="of timed steps in a row, about")
    made.add_argument("--memory", type=float, default=16.0, help="GiB for which the largest batch is computed")
    made.add_argument("--json", type=Path, help="write the figures there")
    made.add_argument("--to", type=Path, help="write the tables there, as Markdown")
    return made


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


def processes():
    """How processes are started: from one that has imported everything and computed nothing; CUDA needs fresh ones."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload([f"scavenger.families.{families.TRAINED}", "scavenger.report.timing"])
    return context


def apart(function, *words):
    """The result of `function` in a process of its own, so that the peak memory of one row does not hide another's."""
    try:
        with ProcessPoolExecutor(1, mp_context=processes()) as pool:
            return pool.submit(function, *words).result()
    except (BrokenProcessPool, torch.OutOfMemoryError):
        raise SystemExit("decoding: error: out of memory; expected a smaller batch or shape") from None


def rows(args, found):
    """The contenders of a case, with the mixer of those that are students; `found` has the rows measured so far."""
    yield contenders.Dynamic, None
    yield contenders.Static, None
    if args.dtype == "float32" and not torch.cuda.is_available():
        # The Decoder packs its linear layers here, so the teacher does too, with the faster of its caches.
        dynamic, static = (entry["generation"] for entry in found)
        yield contenders.PackedDynamic if dynamic < static else contenders.PackedStatic, None
    if contenders.compiles():
        yield contenders.CompiledStatic, None
    for mixer in args.mixers:
        for row in (ReadAgain, Exact, contenders.ModelCalls, contenders.Decoded):
            yield row, mixer


def name_of(row):
    """The name of a contender in the tables."""
    if row.student is None:
        return f"teacher, {row.name}"
    return f"recurrent, {row.name}" if row.student == "modal" else row.name


@torch.inference_mode()
def measured(row, mixer, shape, case, summary, args):
    """The figures of one row: a model with one kind of cache in one case."""
    device = prepare(args)
    empty = contenders.in_use(device)
    contender = row(model_of(row, mixer, shape, case.prompt + case.new, device, args), case)
    batch = contender.batch
    torch.manual_seed(1)
    ids = torch.randint(shape[-1], (batch, case.prompt), device=device)
    seconds = math.inf if row.uneven else args.seconds
    best = generated(contender, ids, seconds)
    if best["first"] + sum(best["steps"]) <= args.seconds:
        again = generated(contender, ids, seconds)
        # What is compiled has the prompts in its cache the second time.
        first = best["first"] if row.compiled else min(best["first"], again["first"])
        best = min(best, again, key=lambda entry: entry["generation"]) | {"first": first}
    peak = peak_use(device) - empty
    steps = best.pop("steps")
    share = case.batch / batch  # the times of "read again" are scaled to the whole batch
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
        "largest_batch": timing.largest_batch(args.memory, weights, each),
        "floor": share * floor["seconds"],
        "floor_bytes": share * floor["bytes"],
        "floor_operations": share * floor["operations"],
        "share_of_floor": share * floor["seconds"] * case.new / generation,
        "tokens": best["tokens"],
    }


def prepare(args):
    """Set the number of threads; the device."""
    torch.set_num_threads(args.threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_of(row, mixer, shape, length, device, args):
    """The model of a row, with random weights."""
    return random_model(configuration_of(row.student, mixer, shape, length, args.modes), device, args.dtype)


def configuration_of(student, mixer, shape, length, modes=None):
    """The configuration of a teacher (`student` None), or of a student with this kind of filter."""
    width, layers, heads, mlp, vocabulary = shape
    shared = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
    }
    if student is None:
        return families.of(families.TRAINED).config(**shared, max_position_embeddings=length)
    filters = width if mixer == "hyena" else heads
    sizes = [[modes or MODES[mixer]] * filters] * layers if student == "modal" else None
    return HyenaConfig(**shared, num_filters=filters, context_length=length, filter=student, state_sizes=sizes)


def random_model(config, device, dtype):
    """A model of this configuration with random weights."""
    torch.manual_seed(0)
    made = HyenaForCausalLM if isinstance(config, HyenaConfig) else families.of(config.model_type).model
    with no_init_weights(), device:
        model = made(config)
    randomise(model)
    return model.to(device, getattr(torch, dtype)).eval()


def randomise(model):
    """Repeat one short piece of random numbers in all weights: drawing a billion would take longer than the row."""
    # An odd length, so that no two rows of a matrix are equal.
    piece = 0.02 * torch.randn((1 << 20) + 7).to(model.device)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                flat = module.weight.view(-1)
                for start in range(0, len(flat), len(piece)):
                    flat[start : start + len(piece)] = piece[: len(flat) - start]
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
        for module in model.modules():
            if isinstance(module, (ImplicitFilter, ModalFilter, Rotary, nn.LayerNorm)):
                module.reset_parameters()


def floor_of(contender, length, machine):
    """The least time, bytes and operations of a step after `length` tokens, `state` without weights; see FLOOR."""
    model = contender.model
    embedding = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    filters = sum(p.nbytes for m in model.modules() if isinstance(m, ImplicitFilter) for p in m.parameters())
    state, operations = work(contender, length)
    packs = [m.weight for m in model.modules() if isinstance(m, PackedLinear)]  # in place of parameters
    moved = state + sum(p.nbytes for p in model.parameters()) - embedding - filters
    moved += sum(weight.numel() * weight.itemsize for weight in packs)
    operations += 2 * contender.batch * multiplied(model)
    seconds = max(moved / machine["bytes_per_second"], operations / machine["operations_per_second"])
    return {"seconds": seconds, "bytes": moved, "operations": operations, "state": state}


def work(contender, length):
    """Bytes of state that a step after `length` tokens moves, and its operations outside the linear layers."""
    model = contender.model
    config = model.config
    width = 1 if contender.student is None else config.filter_head_width
    numbers = contender.batch * config.num_hidden_layers * config.hidden_size
    if isinstance(contender, ReadAgain):
        length += 1
        transforms = 2 * width * 2.5 * 2 * length * math.log2(2 * length)  # of each channel
        mixing = min(transforms, 2 * length**2) * numbers
        linear = 2 * (length - 1) * (multiplied(model) - model.lm_head.weight.numel())
        return 0, contender.batch * linear + mixing
    if contender.student == "modal":
        modes = sum(map(sum, config.state_sizes)) * width**2
        rings = [ring for layer in contender.cache.layers for ring in layer.rings]
        read = state_bytes([list(ring.states) for ring in rings])
        # A complex product and the added input are 8 operations, the output 4; scores and their products with values 4.
        # A step reads and writes the state; of a window's tokens it writes one.
        scores = sum(ring.keys.numel() for ring in rings)
        return 2 * (contender.kept - read) + read, 12 * contender.batch * modes + 4 * scores
    if isinstance(contender, Exact) and width == 1:
        sizes = [NEAR << level for level in range(max(0, int(math.log2(length / NEAR))))]
        # Half a block of inputs directly. For each tile size, a step reads one input and reads and writes one output,
        # and every `size` steps there are two transforms of twice the size.
        moved = NEAR / 2 + 3 * len(sizes)
        return 4 * numbers * moved, numbers * (NEAR + sum(10 * math.log2(2 * size) for size in sizes))
    # Keys and values of all tokens are read, and those of this one written; wide heads keep them in float32.
    itemsize = 4 if isinstance(contender, Exact) else model.dtype.itemsize
    return 2 * numbers * (length + 2) * itemsize, 4 * numbers * (length + 1)


def multiplied(model):
    """Number of weights that each token is multiplied by."""
    filters = {id(part) for m in model.modules() if isinstance(m, ImplicitFilter) for part in m.modules()}
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, PackedLinear)) and id(m) not in filters]
    return sum(m.weight.numel() for m in linear)


@torch.inference_mode()
def contexts(mixer, shape, args):
    """A step after contexts of several lengths, of the recurrent student's Decoder and of the teacher."""
    device = prepare(args)
    lengths = sorted(args.contexts)
    model = model_of(contenders.Decoded, mixer, shape, lengths[-1], device, args)
    ids = torch.randint(shape[-1], (1, lengths[-1]), device=device)
    found, caches = [], []
    began, cache = now(device), None
    for start, stop in zip([0, *lengths], lengths, strict=False):
        for piece in ids[:, start:stop].split(PIECE, dim=1):
            cache = model(input_ids=piece, cache=cache, use_cache=True, logits_to_keep=1).cache
        found.append({"length": stop, "prefill": now(device) - began, "kept": state_bytes(cache), "steps": []})
        caches.append(copy.deepcopy(cache))
    decoder = Decoder(model, 1)
    for _ in range(ROUNDS):
        for entry, cache in zip(found, caches, strict=True):
            put(cache, decoder.cache)
            entry["steps"] += several_steps(decoder.step, device)
    for entry, cache in zip(found, caches, strict=True):
        put(cache, decoder.cache)
        entry["step"] = statistics.median(entry.pop("steps"))
        entry["growth"] = growth(decoder.step, device)
    del decoder, model, cache, caches
    teacher = contenders.Dynamic(model_of(contenders.Dynamic, None, shape, lengths[-1], device, args), Case(1, 2, 1))
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
    """Copy the state of a prompt into the only row of a decoder's cache."""
    into.real.copy_(cache.real)
    for mine, new in zip(into.layers, cache.layers, strict=True):
        for buffer, state in zip(mine.states, new.states, strict=True):
            buffer.copy_(state)


def several_steps(step, device):
    """Seconds of a few steps, after one that is not timed."""
    tokens = torch.zeros(1, dtype=torch.long, device=device)
    return [duration(lambda: step(tokens), device) for _ in range(FEW + 1)][1:]


def growth(step, device):
    """Peak bytes of a few steps beyond those in use before."""
    before = begin_peak(device)
    several_steps(step, device)
    return max(0, peak_use(device) - before)


@torch.inference_mode()
def state_share(mixer, shape, args):
    """The cost of a prompt's state compared with its forward pass: the calls that make it, timed inside a prefill."""
    device = prepare(args)
    model = model_of(contenders.ModelCalls, mixer, shape, PROMPT, device, args)
    ids = torch.randint(shape[-1], (1, PROMPT), device=device)
    forwards, prefills, states = [], [], []
    for _ in range(FORWARDS + 1):
        forwards.append(duration(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), device))
        spent = []
        with clocked(ChannelState, spent, device), clocked(HeadState, spent, device):
            prefills.append(duration(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), device))
        states.append(sum(spent))
    forward, prefill, state = (statistics.median(times[1:]) for times in (forwards, prefills, states))
    return {"prompt": PROMPT, "forward": forward, "prefill": prefill, "state": state, "share": state / forward}


def clocked(state, spent, device):
    """A context in which every `state.advance` appends its seconds to `spent`."""
    advance = state.advance
    return mock.patch.object(state, "advance", lambda *words: spent.append(duration(lambda: advance(*words), device)))


def limits(args):
    """The machine's matrix rate and memory bandwidth, the best of a few measurements."""
    device = prepare(args)
    return (
        timing.machine(device, args.dtype)
        | {"memory": args.memory, "seconds": args.seconds}
        | rates(device, args.dtype)
    )


def rates(device, dtype):
    """Operations a second of a square matrix product, and bytes a second of reading."""
    numbers = torch.ones(NUMBERS, device=device)
    return {
        "operations_per_second": measure.matrix_rate(device, getattr(torch, dtype)),
        "bytes_per_second": numbers.nbytes / quickest(lambda: numbers.sum(), device),
    }


def quickest(call, device):
    """Seconds of a call, the best of a few; on a GPU in a row, so that waiting for the device does not count."""
    row = 10 if device.type == "cuda" else 1
    return min(duration(lambda: [call() for _ in range(row)], device) for _ in range(8)) / row


def duration(call, device):
    began = now(device)
    call()
    return now(device) - began


def progress(what, began):
    print(f"decoding: {what}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def compare(found):
    """Add the speed of each row of a case as a multiple of the teacher's, with its dynamic and with its best cache."""
    teachers = [entry for entry in found if entry["mixer"] is None]
    for entry in found:
        for key, seconds in (("new", lambda e: e["generation"]), ("whole", lambda e: e["prefill"] + e["generation"])):
            entry[f"{key}_to_dynamic"] = seconds(teachers[0]) / seconds(entry)
            entry[f"{key}_to_best"] = min(map(seconds, teachers)) / seconds(entry)


def label(entry):
    return entry["row"] if entry["mixer"] is None else f"{entry['mixer']}, {entry['row']}"


def table(case):
    header = ["", "prefill s", "tokens/s", "new × dynamic", "new × best", "whole × dynamic", "whole × best", "step ms"]
    header += ["first ms", "last ms", "timed", "peak MiB", "first KiB", "last KiB", "largest batch", "floor ms"]
    rows = [
        [
            label(e),
            f"{e['prefill']:.3f}",
            f"{e['tokens_per_second']:.1f}",
            *(f"{e[f'{part}_to_{cache}']:.2f}" for part in ("new", "whole") for cache in ("dynamic", "best")),
            *(f"{1e3 * e[key]:.1f}" for key in ("latency", "latency_first", "latency_last")),
            f"{e['timed']}",
            f"{e['peak'] / 2**20:.0f}",
            *(f"{e[key] / 2**10:.0f}" for key in ("kept_first", "kept_last")),
            f"{e['largest_batch']:,}",
            f"{1e3 * e['floor']:.1f}",
            f"{e['share_of_floor']:.2f}",
        ]
        for e in case["rows"]
    ]
    title = f"{case['shape']}, batch x prompt + new tokens: {case['case']}"
    return f"{title}\n{aligned([*header, 'floor / time'], rows)}"


def contexts_table(found):
    header = ["context", "prefill s", "ms a token", "KiB kept", "step MiB"]
    header += ["teacher ms a token", "teacher KiB kept", "teacher step MiB"]
    rows = []
    for e in found["rows"]:
        cells = [f"{e['length']:,}", f"{e['prefill']:.2f}"]
        for whose in ("", "teacher_"):
            cells += [f"{1e3 * e[f'{whose}step']:.2f}", f"{e[f'{whose}kept'] / 2**10:.0f}"]
            cells.append(f"{e[f'{whose}growth'] / 2**20:.1f}")
        rows.append(cells)
    title = f"{found['shape']}, {found['mixer']}: one sequence, by the tokens it has read; student, recurrent, Decoder"
    return f"{title}; teacher, dynamic cache\n{aligned(header, rows)}"


def share_text(found):
    return (
        f"{found['shape']}, {found['mixer']}: a prompt of {found['prompt']:,} tokens takes {found['forward']:.3f} s "
        f"without a cache, {found['prefill']:.3f} s with one,\n"
        f"of which its state takes {found['state']:.4f} s: {100 * found['share']:.1f} % of the forward pass"
    )


FLOOR = """The floor of a step is the longer of two times, since moving
and computing can overlap: the bytes it must move at the measured bandwidth, and its operations at the measured matrix
rate. Bytes: all weights once, except the embedding; for each row, the state that is read and the part of it that is
written (teacher: keys and values of all tokens read, one token written; recurrent: the state read and written, windows
of attention read; exact: a block of inputs and its part of the tiles). Operations: two for each
weight and row, and those of the mixers."""


def page(summary, words):
    machine = summary["machine"]
    blocks = [table(case) for case in summary["cases"]]
    for found, share in zip(summary["contexts"], summary["prompts"], strict=True):
        blocks += [contexts_table(found), share_text(share)]
    body = "\n\n".join(blocks)
    command = " ".join(["python benchmarks/decoding.py", *words])
    return f"""# Speed and memory of generation

`{command}`

{machine["device"]}, {machine["threads"]} threads, Python {machine["python"]}, torch {machine["torch"]}, transformers
{machine["transformers"]}, {machine["dtype"]}; random weights. Measured limits:
{machine["operations_per_second"] / 1e9:.0f} Gflop/s in a square matrix product of that dtype, and
{machine["bytes_per_second"] / 1e9:.1f} GB/s reading float32 numbers. {FLOOR}

Every row runs in its own process. In float32 on a CPU the linear layers of the Decoder, of the teacher's row "packed"
(the faster of its two caches) and of the compiled rows are in oneDNN's layout. A step includes its argmax. `new` and
`whole`: new tokens a second, without and with the prompt, as a multiple of the teacher's. `timed`: number of timed
steps; if fewer than the new tokens, they are at the first, the middle and the last of them, about
{machine["seconds"]:g} s in all. `step`: their median; `first` and `last` ms: medians of {FEW}. `first` and `last` KiB:
kept for a sequence after its prompt and after its last token. "read again" reads at most {contenders.READ_AGAIN:,}
tokens at a time; its times for a larger batch are scaled up, and its largest batch follows from its peak. The largest
batch of the others is what {machine["memory"]:g} GiB hold: the weights, and the bytes of each sequence after its last
token. Peak: growth of the process, or of what is allocated on the GPU, weights included. The state's share of a prompt
is timed inside a prefill, at the calls that make the state, alternating with forward passes without a cache; medians of
{FORWARDS}. Contexts: medians of {ROUNDS} times {FEW} steps, in turn, after a prompt read in pieces of {PIECE:,} tokens.

```
{body}
```
"""


if __name__ == "__main__":
    sys.exit(main())
