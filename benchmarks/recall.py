"""Associative recall of the mixers, trained from scratch on it: accuracy by the bytes of a sequence's state.

    python benchmarks/recall.py                                            on a GPU; about an hour
    python benchmarks/recall.py --tasks mqar --mixers attention window multihyena --widths 64 --output recall.md
    python benchmarks/recall.py --widths 32 --steps 400 --train 64x4 --test 64x4 128x8 --rates 3e-3        on a CPU

mqar        key-value pairs, then every key again at a random place between random tokens: which value? Lengths, pairs,
            vocabulary and the distribution of places as published (arXiv:2312.04927, multi-query associative recall)
in-context  keys and values in pairs throughout, a key's value always the same within a sequence: which value follows a
            key that was seen before? (arXiv:2403.17844, in-context recall)

A model has two layers with MLPs, as its students have; the published ones of mqar have none, but a short convolution
before each mixer, which ours have inside. Each row trains once for each learning rate and takes the best. State: what
is kept between tokens for one sequence in float32; attention keeps all keys and values, here of the longest test. A
window is one of `--window` tokens in every layer. The last line is JSON.
"""

import argparse
import json
import math
import platform
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from scavenger.model import HyenaConfig, HyenaForCausalLM
from scavenger.run.checkpoint import write_text


HEAD = 32  # channels of a head: at width 64 two of them
POWER = 0.01  # of the distribution of places: most queries soon after the pairs
SYMBOLS = 16  # keys, and as many values, of in-context recall
POSITIVE = {"filter": "modal", "positive": True}
# By name: what is changed of a student whose every layer has a modal filter for each head.
MIXERS = {
    "attention": {"attention": True},
    "window": {"window": True, "num_filters": 0},
    "hyena": {"by_channel": True},
    "multihyena": {},
    "window + multihyena": {"window": True},
    "window + positive": {"window": True, **POSITIVE},
    "features": {"features": "hedgehog", **POSITIVE},
    "window + features": {"window": True, "features": "hedgehog", **POSITIVE},
}


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["mqar", "in-context"], choices=["mqar", "in-context"])
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=MIXERS, metavar="NAME")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--modes", type=int, default=2, help="of each filter (2)")
    parser.add_argument("--window", type=int, default=32, help="tokens (32)")
    parser.add_argument("--train", nargs="+", default=["64x4", "128x8", "256x16", "256x32", "256x64"], metavar="LxP")
    parser.add_argument("--test", nargs="+", default=["64x4", "128x32", "256x64", "512x128"], metavar="LxP")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of mqar (8192)")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2], help="learning rates")
    parser.add_argument("--examples", type=int, default=512, help="sequences of each test (512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the tables there, as Markdown")
    args = parser.parse_args(words)
    try:
        args.train, args.test = ([shape(word) for word in given] for given in (args.train, args.test))
        check(args)
    except ValueError as error:
        print(f"recall: error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    summary = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "results": [],
    }
    rows = [(task, width, name) for task in args.tasks for width in args.widths for name in args.mixers]
    with tqdm(total=len(rows) * len(args.rates) * args.steps, unit="step", dynamic_ncols=True) as bar:
        for task, width, name in rows:
            bar.set_description(f"{task}, {name}, {width}")
            summary["results"].append(best(args, task, width, name, device, bar))
    print("\n".join(table(summary["results"], args)), flush=True)
    if args.output:
        write_text(args.output, page(summary, args, words))
    print(json.dumps(summary))
    return 0


def shape(word: str) -> tuple[int, int]:
    """LENGTHxPAIRS as two numbers."""
    found = re.fullmatch(r"(\d+)x(\d+)", word)
    length, pairs = map(int, found.groups()) if found else (0, 0)
    if not 1 <= pairs <= length // 4:
        raise ValueError(f"found {word}; expected LENGTHxPAIRS with 4 tokens or more for each pair, as 64x4")
    return length, pairs


def check(args):
    """ValueError for numbers that cannot be."""
    most = max(pairs for _, pairs in args.train + args.test)
    if args.vocabulary < 4 * most:
        raise ValueError(f"found --vocabulary {args.vocabulary}; expected {4 * most} or more for {most} pairs")
    if min(args.widths) < HEAD or any(width % HEAD for width in args.widths):
        raise ValueError(f"found --widths {args.widths}; expected multiples of {HEAD}")
    for name in ("modes", "window", "steps", "batch_size", "examples"):
        if getattr(args, name) < 1:
            raise ValueError(f"found --{name.replace('_', '-')} {getattr(args, name)}; expected 1 or more")


def best(args, task: str, width: int, name: str, device, bar) -> dict:
    """The run of the learning rate with the highest mean accuracy."""
    runs = [trained(args, task, width, name, rate, device, bar) for rate in args.rates]
    return max(runs, key=lambda run: sum(run["accuracy"].values()))


def trained(args, task, width, name, rate, device, bar) -> dict:
    """Train a model from scratch on fresh sequences, with a linear warm-up and a cosine decay; and test it."""
    torch.manual_seed(args.seed)
    words = args.vocabulary if task == "mqar" else 2 * SYMBOLS
    model = HyenaForCausalLM(configuration(args, width, name, words)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1, step / args.steps)))),
    )
    rng = np.random.default_rng(args.seed)
    began = time.monotonic()
    for step in range(args.steps):
        ids, following = sequences(task, *args.train[step % len(args.train)], args.batch_size, words, rng)
        loss = F.cross_entropy(asked(model, ids.to(device), following), following[following >= 0].to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        for module in model.modules():
            if hasattr(module, "stabilise"):
                module.stabilise()
        bar.update()
    seconds = time.monotonic() - began
    model.eval()
    rng = np.random.default_rng(args.seed + 1)
    accuracy = {
        f"{length}x{pairs}": accurate(model, task, length, pairs, args, words, rng) for length, pairs in args.test
    }
    longest = max(length for length, _ in args.test)
    whole = 2 * 4 * width * longest * model.config.num_hidden_layers
    return {
        "task": task,
        "mixer": name,
        "width": width,
        "state_bytes": model.config.state_bytes or whole,
        "rate": rate,
        "seconds": seconds,
        "accuracy": accuracy,
    }


def configuration(args, width: int, name: str, words: int) -> HyenaConfig:
    """A model of two layers of a width, with this mixer in both."""
    changes, heads = dict(MIXERS[name]), width // HEAD
    longest = max(length for length, _ in args.train + args.test)
    whole = changes.pop("attention", False)
    filters = width if changes.pop("by_channel", False) else changes.pop("num_filters", heads)
    if changes.pop("window", False):
        changes |= {"window": args.window, "short_filter_length": 1 if filters == 0 else 3}
    return HyenaConfig(
        **{
            "vocab_size": words,
            "hidden_size": width,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "intermediate_size": 2 * width,
            "parallel_residual": False,
            "rotary_channels": HEAD // 4,
            "context_length": longest,
            "num_filters": filters,
            "attention_layers": [0, 1] if whole else [],
            "attention_window": 0,
            "filter": "modal",
            "state_sizes": [[] if whole else [args.modes] * filters] * 2,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        | changes
    )


def sequences(task: str, length: int, pairs: int, count: int, words: int, rng) -> tuple[Tensor, Tensor]:
    """Ids (sequence, token), and at each position the value that is asked for next, or -1 where none is."""
    make = pairs_and_queries if task == "mqar" else interleaved
    ids, following = make(length, pairs, count, words, rng)
    return torch.from_numpy(ids), torch.from_numpy(following)


def pairs_and_queries(length, pairs, count, words, rng):
    """k₁ v₁ … k_n v_n, then every key once, at even distances after them, all else random; its value is asked for."""
    half = words // 2
    keys = rng.random((count, half)).argpartition(pairs, axis=1)[:, :pairs]  # distinct
    values = rng.integers(half, words, (count, pairs))
    ids = rng.integers(0, words, (count, length))
    ids[:, : 2 * pairs] = np.stack([keys, values], axis=-1).reshape(count, -1)
    room = (length - 2 * pairs) // 2
    weights = POWER * np.arange(1, room + 1) ** (POWER - 1)
    # The places with the largest weight^(1 / uniform) keys are a draw without replacement (Efraimidis and Spirakis).
    draws = np.log(rng.random((count, room))) / weights
    places = 2 * pairs + 2 * np.argsort(-draws, axis=1)[:, :pairs]
    following = np.full((count, length), -1)
    np.put_along_axis(ids, places, keys, axis=1)
    np.put_along_axis(following, places, values, axis=1)
    return ids, following


def interleaved(length, pairs, count, words, rng):
    """Random keys, each followed by its value of this sequence; asked for wherever the key was read before.

    `pairs` keys occur in a sequence, SYMBOLS at most.
    """
    half = words // 2
    values = rng.integers(half, words, (count, half))
    keys = rng.integers(0, min(pairs, half), (count, length // 2))
    shown = np.take_along_axis(values, keys, axis=1)
    ids = np.stack([keys, shown], axis=-1).reshape(count, -1)
    seen = (keys[:, :, None] == keys[:, None, :]) & np.tri(keys.shape[1], k=-1, dtype=bool)
    following = np.full(ids.shape, -1)
    following[:, ::2] = np.where(seen.any(2), shown, -1)
    return ids, following


def asked(model, ids: Tensor, following: Tensor) -> Tensor:
    """Logits at the positions that are asked, (position, vocabulary)."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[(following >= 0).to(hidden.device)])


@torch.no_grad()
def accurate(model, task, length, pairs, args, words, rng) -> float:
    """The share of asked positions where the value is the most likely of all tokens."""
    right = total = 0
    for start in range(0, args.examples, args.batch_size):
        count = min(args.batch_size, args.examples - start)
        ids, following = sequences(task, length, pairs, count, words, rng)
        found = asked(model, ids.to(model.device), following).argmax(-1).cpu()
        wanted = following[following >= 0]
        right, total = right + (found == wanted).sum().item(), total + len(wanted)
    return right / total


def table(found: list[dict], args) -> list[str]:
    tests = [f"{length}x{pairs}" for length, pairs in args.test]
    head = f"{'task':<10}  {'mixer':<20}  {'width':>5}  {'state, bytes':>12}  {'rate':>6}"
    lines = [head + "".join(f"  {test:>8}" for test in tests)]
    for run in found:
        row = f"{run['task']:<10}  {run['mixer']:<20}  {run['width']:>5}  {run['state_bytes']:>12,}  {run['rate']:>6g}"
        lines.append(row + "".join(f"  {100 * run['accuracy'][test]:>6.1f} %" for test in tests))
    return lines


def page(summary, args, words):
    body = "\n".join(table(summary["results"], args))
    command = shlex.join(["python", "benchmarks/recall.py", *words])
    return f"""# Recall of the mixers, trained from scratch

`{command}`

{summary["device"]}, {summary["threads"]} threads, torch {summary["torch"]}. Accuracy over {args.examples} sequences of
each test, LENGTHxPAIRS, of the best of {len(args.rates)} learning rates after {args.steps:,} steps of
{args.batch_size} sequences; seed {args.seed}. State: float32, of one sequence; attention's is that of its longest test.

```
{body}
```
"""


if __name__ == "__main__":
    sys.exit(main())
