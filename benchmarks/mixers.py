"""Speed and memory of every mixer and form beside the teacher's attention, by length, with each one's floor.

    python benchmarks/mixers.py
    python benchmarks/mixers.py --hidden-size 768 --num-heads 12 --lengths 1024 4096 --output benchmarks/mixers.md

Each is a whole layer's mixer, projections included, of one width; attention is transformers' own, by
scaled_dot_product_attention. Times are the best of `--rounds`, taken in turn. The floor of a form is the longer of its
operations at the matrix rate and its bytes (parameters, input, output, and the projections written and read once) at
the bandwidth measured at the start; forward and backward together count three times. A star marks the form that the
mixer takes by itself at that length. On a CUDA device everything runs in bfloat16, at the widths of Pythia-70m, 410m
and 1b, in batches of 65,536 tokens. The last line is JSON.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

from scavenger import families, measure
from scavenger.model import HyenaConfig
from scavenger.model.attention import WindowedAttention
from scavenger.model.hyena import HyenaMixer
from scavenger.model.modal import HEAD_CHUNK
from scavenger.model.rotary import Rotary
from scavenger.run.checkpoint import write_text


MODES = 8  # of each filter in modal form; the quickstart's reduced filters have 1 to 16
WINDOW = 256  # of kept attention
NEAR = 64  # of attention beside filters
TOO_LONG = 5.0  # seconds: what took longer is not run at greater lengths
BYTES = 1 << 29  # of the copy that measures the bandwidth: far more than a cache holds
ON_CUDA = ([512, 1024, 2048], [8, 16, 8])  # widths and heads of Pythia-70m, 410m and 1b
TOKENS = 1 << 16  # of a batch on a card, which so many fill


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    widths, heads = ON_CUDA if cuda else ([512], [8])
    parser.add_argument("--hidden-size", type=int, nargs="+", default=widths)
    parser.add_argument("--num-heads", type=int, nargs="+", default=heads, help="of each width")
    parser.add_argument("--batch-size", type=int, help=f"(1; on a GPU {TOKENS:,} tokens)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the tables there, as Markdown")
    args = parser.parse_args(words)
    shapes, least = list(zip(args.hidden_size, args.num_heads, strict=False)), min(*args.num_heads, *args.lengths)
    if (
        len(args.hidden_size) != len(args.num_heads)
        or min(least, args.rounds, 1 if args.batch_size is None else args.batch_size) < 1
        or any(width % (8 * heads) for width, heads in shapes)
    ):
        print(
            f"mixers: error: found width {args.hidden_size} with {args.num_heads} heads; expected heads of a multiple "
            "of 8 channels, as many numbers of heads as widths, and lengths, batch size and rounds of 1 or more",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda" if cuda else "cpu")
    machine = limits(device)
    found = []
    for width, heads in shapes:
        contenders = made(width, heads, device)
        own = []
        for length in args.lengths:
            batch = args.batch_size or (max(1, TOKENS // length) if cuda else 1)
            shape = Shape(width, heads, batch, length)
            own += measured(contenders, shape, args.rounds, device, machine)
            print("\n".join(table([entry for entry in own if entry["length"] == length])) + "\n", flush=True)
        for entry, contender in ((e, c) for e in own for c in contenders if c.name == e["name"]):
            entry["memory"] = peak_memory(contender, Shape.of(entry), device)
        print("\n".join(memory_table(own)))
        found += own
    summary = {"machine": machine, "rounds": args.rounds, "results": found}
    if args.output:
        write_text(args.output, page(summary, words))
    print(json.dumps(summary))
    return 0


class Shape(NamedTuple):
    """What a mixer reads: `batch_size` sequences of `length` tokens, of `hidden_size` channels in `num_heads` heads."""

    hidden_size: int
    num_heads: int
    batch_size: int
    length: int

    @classmethod
    def of(cls, entry):
        return cls(*(entry[name] for name in cls._fields))


def dtype_of(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def made(width, heads, device):
    """All contenders of a width."""
    found = [Contender(*row, width, heads) for row in rows(width // heads)]
    for contender in found:
        contender.module.to(device, dtype_of(device))
    return found


def rows(head_width):
    """Name, long filters' head width, form, and what the configuration changes."""
    return [
        ("attention (teacher)", None, "attention", {}),
        (f"attention, window {WINDOW}", None, "window", {}),
        ("hyena, FFT", 1, "fft", {}),
        ("hyena, hyena_order 2, FFT", 1, "fft", {"hyena_order": 2}),
        ("multihyena 8, Toeplitz", 8, "toeplitz", {}),
        ("multihyena 8, FFT", 8, "fft", {}),
        (f"multihyena {head_width}, Toeplitz", head_width, "toeplitz", {}),
        (f"multihyena {head_width}, FFT", head_width, "fft", {}),
        (f"multihyena {head_width}, modal scan", head_width, "scan", {"filter": "modal"}),
        (f"window {NEAR}, then multihyena {head_width}", head_width, "near and far", {"window": NEAR}),
    ]


class Contender:
    """One mixer in one form, and what it cannot do without."""

    def __init__(self, name, head_width, form, changes, width, heads):
        torch.manual_seed(0)
        self.name, self.head_width, self.form = name, head_width, form
        self.hyena_order = changes.get("hyena_order", 1)
        self.slow = False  # took too long at a shorter length
        if form == "attention":
            self.module = _Teacher(width, heads)
            return
        filters = width // (head_width or 1)
        config = HyenaConfig(
            hidden_size=width,
            num_attention_heads=heads,
            num_hidden_layers=1,
            rotary_channels=width // heads // 4,
            num_filters=filters,
            attention_layers=[0] if form == "window" else [],
            attention_window=WINDOW,
            state_sizes=[[MODES] * filters],
            **changes,
        )
        self.module = (WindowedAttention if form == "window" else HyenaMixer)(config, 0)
        if form == "scan":
            with torch.no_grad():
                radius = 0.7 + 0.299 * torch.rand(filters * MODES)
                self.module.filter.pole.copy_(torch.view_as_real(torch.polar(radius, 3 * torch.rand_like(radius))))
                self.module.filter.residue.normal_()

    @contextlib.contextmanager
    def forced(self):
        """The mixer takes this form, whatever it would choose."""
        with (
            mock.patch("scavenger.model.hyena.fft_pays", lambda v, width: self.form == "fft"),
            mock.patch("scavenger.model.hyena.SCAN_PAYS", -1 if self.form == "scan" else math.inf),
        ):
            yield

    def chosen(self, length):
        """Whether the mixer takes this form by itself at this length."""
        from scavenger.model import hyena

        if self.form in ("attention", "window") or self.head_width == 1:
            return True
        if self.form == "scan":
            return self.module._scan_pays(length, next(self.module.parameters()).is_cuda)
        if self.form == "near and far":
            length = max(0, length - NEAR)
        v = next(self.module.parameters()).new_empty(length, self.head_width)
        return hyena.fft_pays(v, self.head_width) == (self.form == "fft")

    def floor(self, shape, machine):
        """Seconds of a forward pass at the machine's limits."""
        width, length = shape.hidden_size, shape.length
        size = 2 * length
        transform = 2.5 * size * math.log2(size)  # operations of one real FFT
        mixing = {
            "attention": 2 * length**2 * width,
            "window": 4 * min(WINDOW, length / 2) * length * width,
            "toeplitz": 2 * length**2 * width,
            "near and far": (4 * min(NEAR, length / 2) * length + 2 * max(0, length - NEAR) ** 2) * width,
            "fft": 2 * self.hyena_order * (self.head_width or 1) * width * transform,
            "scan": 4 * HEAD_CHUNK * length * width + 8 * MODES * (self.head_width or 1) * length * width,
        }[self.form]
        operations = shape.batch_size * (8 * length * width**2 + mixing)
        bytes_moved = machine["bytes_per_number"] * (4 * width**2 + shape.batch_size * length * width * (1 + 6 + 1 + 1))
        return max(operations / machine["operations_per_second"], bytes_moved / machine["bytes_per_second"])


class _Teacher(nn.Module):
    """The attention of a teacher's layer, called as the others are."""

    def __init__(self, width, heads):
        super().__init__()
        family = families.of(families.TRAINED)
        config = family.config(
            hidden_size=width, num_attention_heads=heads, num_hidden_layers=1, intermediate_size=8, vocab_size=8
        )
        config._attn_implementation = "sdpa"
        (self.attention,) = family.attentions(family.model(config))

    def forward(self, hidden, cos, sin):
        return self.attention(
            hidden, attention_mask=None, position_embeddings=[torch.cat([x, x], dim=-1) for x in (cos, sin)]
        )[0]


def measured(contenders, shape, rounds, device, machine):
    """Best times of forward, and of forward and backward, of all contenders at one shape, taken in turn."""
    hidden, cos, sin = inputs(shape, device)
    entries = {}
    for _ in range(rounds):
        for contender in contenders:
            if contender.slow:
                continue
            with contender.forced():
                forward = timed(lambda m=contender.module: m(hidden, cos, sin), device, gradient=False)
                both = timed(lambda m=contender.module: m(hidden, cos, sin), device, gradient=True)
            entry = entries.setdefault(
                contender.name,
                {
                    "name": contender.name,
                    **shape._asdict(),
                    "forward": math.inf,
                    "both": math.inf,
                    "floor": contender.floor(shape, machine),
                    "chosen": contender.chosen(shape.length),
                },
            )
            entry["forward"], entry["both"] = min(entry["forward"], forward), min(entry["both"], both)
    for contender in contenders[1:]:
        contender.slow |= contender.name in entries and entries[contender.name]["both"] > TOO_LONG
    return list(entries.values())


def inputs(shape, device):
    torch.manual_seed(1)
    size, dtype = (shape.batch_size, shape.length, shape.hidden_size), dtype_of(device)
    hidden = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
    positions = torch.arange(shape.length, device=device).expand(size[:2])
    return hidden, *Rotary(shape.hidden_size // shape.num_heads // 4, 1.0).to(device)(positions, dtype)


def timed(call, device, gradient):
    with contextlib.nullcontext() if gradient else torch.no_grad():
        began = now(device)
        y = call()
        if gradient:
            y.backward(torch.ones_like(y))
        return now(device) - began


def peak_memory(contender, shape, device):
    """Bytes that forward and backward hold at their peak, beyond parameters and input."""
    hidden, cos, sin = inputs(shape, device)
    contender.module.zero_grad()
    before, peak = memory(device)
    with contender.forced():
        y = contender.module(hidden, cos, sin)
        y.backward(torch.ones_like(y))
    return peak() - before


def memory(device):
    """What is in use now, and a function that says the peak since."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    # Large blocks go back to the system when they are freed, so that what is resident is what is in use.
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again

    def resident(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    return resident("VmRSS"), lambda: resident("VmHWM")


def limits(device):
    """The machine's matrix rate and memory bandwidth, best of a few."""
    big, dtype = torch.empty(BYTES, device=device, dtype=torch.uint8), dtype_of(device)
    other = torch.empty_like(big)
    copy = min(timed(lambda: other.copy_(big), device, False) for _ in range(6))
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_per_number": dtype.itemsize,
        "operations_per_second": measure.matrix_rate(device, dtype),
        "bytes_per_second": 2 * len(big) / copy,
    }


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(entries):
    teacher, shape = entries[0], Shape.of(entries[0])
    lines = [
        f"length {shape.length:,}, width {shape.hidden_size:,}, {shape.num_heads} heads, batch {shape.batch_size}",
        f"{'':<30}  {'forward ms':>10}  {'× attention':>11}  {'× floor':>7}  {'with backward ms':>16}  "
        f"{'× attention':>11}  {'× floor':>7}",
    ]
    for entry in entries:
        lines.append(
            f"{entry['name'] + (' *' if entry['chosen'] else ''):<30}  {1e3 * entry['forward']:>10.1f}  "
            f"{entry['forward'] / teacher['forward']:>11.2f}  {entry['forward'] / entry['floor']:>7.1f}  "
            f"{1e3 * entry['both']:>16.1f}  {entry['both'] / teacher['both']:>11.2f}  "
            f"{entry['both'] / entry['floor'] / 3:>7.1f}"
        )
    return lines


def memory_table(found):
    """Of one width, by length."""
    names, lengths = (list(dict.fromkeys(entry[key] for entry in found)) for key in ("name", "length"))
    at = {(entry["name"], entry["length"]): entry["memory"] for entry in found}
    lines = [f"{'peak MiB, with backward':<30}" + "".join(f"{length:>9,}" for length in lengths)]
    for name in names:
        cells = (at.get((name, length)) for length in lengths)
        lines.append(f"{name:<30}" + "".join(f"{'—' if cell is None else f'{cell / 2**20:.0f}':>9}" for cell in cells))
    return lines


def page(summary, words):
    machine, blocks = summary["machine"], []
    for width in dict.fromkeys(entry["hidden_size"] for entry in summary["results"]):
        own = [entry for entry in summary["results"] if entry["hidden_size"] == width]
        for length in dict.fromkeys(entry["length"] for entry in own):
            blocks += [*table([entry for entry in own if entry["length"] == length]), ""]
        blocks += [*memory_table(own), ""]
    body = "\n".join(blocks[:-1])
    command = " ".join(["python benchmarks/mixers.py", *words])
    return f"""# Speed and memory of the mixers

`{command}`

{machine["device"]}, {machine["threads"]} threads, torch {machine["torch"]}, {machine["dtype"]}. Measured limits:
{machine["operations_per_second"] / 1e9:.0f} Gflop/s and {machine["bytes_per_second"] / 1e9:.1f} GB/s. A star marks
the form that the mixer takes by itself; times are the best of {summary["rounds"]}, taken in turn.

```
{body}
```
"""


if __name__ == "__main__":
    sys.exit(main())
