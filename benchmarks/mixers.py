"""Speed and memory of every mixer and form beside the teacher's attention, by length, with each one's floor.

    python benchmarks/mixers.py
    python benchmarks/mixers.py --hidden-size 768 --num-heads 12 --lengths 1024 4096 --output benchmarks/mixers.md

Each is a whole layer's mixer, projections included, of one width; attention is transformers' own, by
scaled_dot_product_attention. Times are the best of `--rounds`, taken in turn. The floor of a form is the longer of its
operations at the matrix rate and its bytes (parameters, input, output, and the projections written and read once) at
the bandwidth measured at the start; forward and backward together count three times. A star marks the form that the
mixer takes by itself at that length. On a CUDA device everything runs in bfloat16. The last line is JSON.
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
from unittest import mock

import torch
from torch import nn

from scavenger import families
from scavenger.model import HyenaConfig
from scavenger.model.attention import WindowedAttention
from scavenger.model.hyena import HyenaMixer
from scavenger.model.modal import CHUNK
from scavenger.model.rotary import Rotary
from scavenger.run.checkpoint import write_text


MODES = 8  # of each filter in modal form; the quickstart's reduced filters have 1 to 16
WINDOW = 256  # of kept attention
TOO_LONG = 5.0  # seconds: what took longer is not run at greater lengths
MATRIX, BYTES = 2048, 1 << 27  # side of the matrices, and size of the copy, that measure the machine's limits


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the tables there, as Markdown")
    args = parser.parse_args(words)
    if min(args.num_heads, *args.lengths, args.batch_size, args.rounds) < 1 or args.hidden_size % (8 * args.num_heads):
        print(
            f"mixers: error: found width {args.hidden_size} with {args.num_heads} heads; expected heads of a multiple "
            "of 8 channels, and lengths, batch size and rounds of 1 or more",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = limits(device, dtype)
    contenders = [Contender(*row, args) for row in rows(args.hidden_size // args.num_heads)]
    for contender in contenders:
        contender.module.to(device, dtype)
    found = []
    for length in args.lengths:
        found += measured(contenders, args, length, device, dtype, machine)
        print("\n".join(table([entry for entry in found if entry["length"] == length], args)) + "\n", flush=True)
    for entry, contender in ((e, c) for e in found for c in contenders if c.name == e["name"]):
        entry["memory"] = peak_memory(contender, args, entry["length"], device, dtype)
    print("\n".join(memory_table(found, args)))
    summary = {
        "machine": machine,
        "hidden_size": args.hidden_size,
        "num_heads": args.num_heads,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "results": found,
    }
    if args.output:
        write_text(args.output, page(summary, args, words))
    print(json.dumps(summary))
    return 0


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
    ]


class Contender:
    """One mixer in one form, and what it cannot do without."""

    def __init__(self, name, head_width, form, changes, args):
        torch.manual_seed(0)
        self.name, self.head_width, self.form = name, head_width, form
        self.hyena_order = changes.get("hyena_order", 1)
        width, heads = args.hidden_size, args.num_heads
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
            return self.module._scan_pays(length)
        v = next(self.module.parameters()).new_empty(length, self.head_width)
        return hyena.fft_pays(v, self.head_width) == (self.form == "fft")

    def floor(self, args, length, machine):
        """Seconds of a forward pass at the machine's limits."""
        width = args.hidden_size
        size = 2 * length
        transform = 2.5 * size * math.log2(size)  # operations of one real FFT
        mixing = {
            "attention": 2 * length**2 * width,
            "window": 4 * min(WINDOW, length / 2) * length * width,
            "toeplitz": 2 * length**2 * width,
            "fft": 2 * self.hyena_order * (self.head_width or 1) * width * transform,
            "scan": 4 * CHUNK * length * width + 8 * MODES * (self.head_width or 1) * length * width,
        }[self.form]
        operations = args.batch_size * (8 * length * width**2 + mixing)
        bytes_moved = machine["bytes_per_number"] * (4 * width**2 + args.batch_size * length * width * (1 + 6 + 1 + 1))
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


def measured(contenders, args, length, device, dtype, machine):
    """Best times of forward, and of forward and backward, of all contenders at one length, taken in turn."""
    hidden, cos, sin = inputs(args, length, device, dtype)
    entries = {}
    for _ in range(args.rounds):
        for contender in contenders:
            if contender.name in SLOW:
                continue
            with contender.forced():
                forward = timed(lambda m=contender.module: m(hidden, cos, sin), device, gradient=False)
                both = timed(lambda m=contender.module: m(hidden, cos, sin), device, gradient=True)
            entry = entries.setdefault(
                contender.name,
                {
                    "name": contender.name,
                    "length": length,
                    "forward": math.inf,
                    "both": math.inf,
                    "floor": contender.floor(args, length, machine),
                    "chosen": contender.chosen(length),
                },
            )
            entry["forward"], entry["both"] = min(entry["forward"], forward), min(entry["both"], both)
    for name, entry in entries.items():
        if entry["both"] > TOO_LONG and name != contenders[0].name:
            SLOW.add(name)
    return list(entries.values())


SLOW: set[str] = set()  # contenders that took too long at a shorter length


def inputs(args, length, device, dtype):
    torch.manual_seed(1)
    hidden = torch.randn(args.batch_size, length, args.hidden_size, device=device, dtype=dtype, requires_grad=True)
    positions = torch.arange(length, device=device).expand(args.batch_size, length)
    return hidden, *Rotary(args.hidden_size // args.num_heads // 4, 1.0).to(device)(positions, dtype)


def timed(call, device, gradient):
    with contextlib.nullcontext() if gradient else torch.no_grad():
        began = now(device)
        y = call()
        if gradient:
            y.backward(torch.ones_like(y))
        return now(device) - began


def peak_memory(contender, args, length, device, dtype):
    """Bytes that forward and backward hold at their peak, beyond parameters and input."""
    hidden, cos, sin = inputs(args, length, device, dtype)
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


def limits(device, dtype):
    """The machine's matrix rate and memory bandwidth, best of a few."""
    a = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
    big = torch.empty(BYTES, device=device, dtype=torch.uint8)
    other = torch.empty_like(big)
    product = min(timed(lambda: a @ a, device, False) for _ in range(6))
    copy = min(timed(lambda: other.copy_(big), device, False) for _ in range(6))
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_per_number": a.element_size(),
        "operations_per_second": 2 * MATRIX**3 / product,
        "bytes_per_second": 2 * len(big) / copy,
    }


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(entries, args):
    teacher = entries[0]
    lines = [
        f"length {entries[0]['length']:,}, width {args.hidden_size}, {args.num_heads} heads, batch {args.batch_size}",
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


def memory_table(found, args):
    names = list(dict.fromkeys(entry["name"] for entry in found))
    at = {(entry["name"], entry["length"]): entry["memory"] for entry in found}
    lines = [f"{'peak MiB, with backward':<30}" + "".join(f"{length:>9,}" for length in args.lengths)]
    for name in names:
        cells = (at.get((name, length)) for length in args.lengths)
        lines.append(f"{name:<30}" + "".join(f"{'—' if cell is None else f'{cell / 2**20:.0f}':>9}" for cell in cells))
    return lines


def page(summary, args, words):
    machine = summary["machine"]
    blocks = []
    for length in args.lengths:
        blocks += [*table([entry for entry in summary["results"] if entry["length"] == length], args), ""]
    body = "\n".join([*blocks, *memory_table(summary["results"], args)])
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
