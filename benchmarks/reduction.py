"""Errors and time of every method that turns filters into recurrences, beside what is proven of any method.

    python benchmarks/reduction.py
    python benchmarks/reduction.py --sine-frequency 2 --output benchmarks/reduction.md

The filters are implicit ones as they are initialised, spread over the decays of layers of 512, in float64. Errors are
geometric means over them: l2 relative to the taps; its ratio to the floor, which no recurrence of as many real states
goes below; the gain error, the largest on a grid of four frequencies per tap, over its own floor. The tail is the
largest l2 norm past the horizon, relative to the taps. Below stands the time for `--many` filters to `--tolerance`, by
each number of worker processes, their start included.
Gradient modal interpolation is published with 30,000 steps; it is run on `--gradient-filters` filters for `--steps`.
The last line is JSON.
"""

import argparse
import json
import platform
import sys
import time
from functools import partial
from pathlib import Path

import gradient
import numpy as np
import torch

from scavenger.model import HyenaConfig
from scavenger.model.hyena import HyenaMixer
from scavenger.recipe import Recurrence
from scavenger.recurrence import recurrence
from scavenger.recurrence.reduction import balanced, irka, projection, workers
from scavenger.recurrence.reduction.reduced import reduce_by
from scavenger.run.checkpoint import write_text


LAYER = 512  # filters of a layer, as in the 70m student


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--filters", type=int, default=128)
    parser.add_argument("--sine-frequency", type=float, default=1.0)
    parser.add_argument("--states", type=int, nargs="+", default=[4, 8, 16, 32], help="real states, two for each mode")
    parser.add_argument(
        "--many", type=int, default=6 * LAYER, help="filters that are reduced to the tolerance; 0: none"
    )
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--many-methods", nargs="+", choices=["balanced", "irka", "projection"], default=["balanced"])
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=sorted({1, workers.available()}),
        help="for the many (1, and all cores)",
    )
    parser.add_argument("--steps", type=int, default=1000, help="of gradient modal interpolation; 0: leave it out")
    parser.add_argument("--gradient-filters", type=int, default=8)
    parser.add_argument("--output", type=Path, help="write the tables there, as Markdown")
    args = parser.parse_args(words)
    counts = (args.filters, args.gradient_filters, args.length - 1, *(states // 2 for states in args.states))
    if min(*counts, *args.workers, args.many + 1, args.steps + 1) < 1 or not args.tolerance > 0:
        print(
            "reduction: error: found a length, number of filters, states, workers or tolerance that is too small; "
            "expected 2 taps, 1 filter, 2 states, 1 worker and more than 0 or more",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    few = filters(args.filters, args).to(device)
    methods = {module.__name__.rpartition(".")[2]: module.reduce for module in (balanced, irka, projection)}
    found = [measured(name, reduce, few, states) for name, reduce in methods.items() for states in args.states]
    if args.steps:
        own = few[spread(args.gradient_filters, len(few))]
        found += [measured("gradient", partial(trained, steps=args.steps), own, states) for states in args.states]
    print("\n".join(table(found)) + "\n", flush=True)
    many = [to_tolerance(name, count, args) for name in args.many_methods for count in args.workers if args.many]
    if many:
        print("\n".join(many_table(many, args)))
    summary = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "length": args.length,
        "filters": args.filters,
        "sine_frequency": args.sine_frequency,
        "results": found,
        "many": many,
    }
    if args.output:
        write_text(args.output, page(summary, args, words))
    print(json.dumps(summary))
    return 0


@torch.no_grad()
def filters(count, args):
    """Taps of `count` filters of as many layers as it takes, spread over each layer's decays, (filter, length)."""
    config = HyenaConfig(
        hidden_size=LAYER,
        num_attention_heads=8,
        num_hidden_layers=1,
        num_filters=LAYER,
        context_length=args.length,
        sine_frequency=args.sine_frequency,
    )
    layers = []
    for seed in range(-(-count // LAYER)):
        torch.manual_seed(seed)
        layer = HyenaMixer(config, 0).filter.double()
        layers.append(layer(args.length)[spread(min(count - seed * LAYER, LAYER), LAYER)])
    return torch.cat(layers)


def spread(count, among):
    return torch.linspace(0, among - 1, min(count, among)).round().long()


def trained(taps, *, state_size, steps):
    return reduce_by(partial(gradient.choose, steps=steps), taps, None, state_size, state_size)


def measured(name, reduce, taps, states):
    """One row: a method at a number of real states, that is at half as many modes."""
    reduced, seconds = timed(lambda: reduce(taps, state_size=states // 2))
    return {
        "method": name,
        "states": states,
        "filters": len(taps),
        "error": geometric_mean([f.relative_error for f in reduced]),
        "ratio": geometric_mean([f.relative_error / f.floor for f in reduced if f.floor]),
        "gain_ratio": geometric_mean([f.gain_error / f.gain_floor for f in reduced if f.gain_floor]),
        "tail": max(f.tail for f in reduced),
        "milliseconds": 1e3 * seconds / len(taps),
    }


def to_tolerance(name, count, args):
    """Seconds for many filters by so many workers, as stage two reduces them, and what the filters need."""
    taps, settings = filters(args.many, args), Recurrence(method=name, tolerance=args.tolerance, max_state_size=64)

    def reduce():
        with workers.started(count) as each:
            return recurrence.reduce_filters(taps, settings, recurrence.aims(settings), each)[0]

    reduced, seconds = timed(reduce)
    states = [f.real_states for f in reduced]
    return {
        "method": name,
        "workers": count,
        "filters": len(reduced),
        "seconds": seconds,
        "within": sum(f.relative_error <= args.tolerance for f in reduced),
        "mean_states": float(np.mean(states)),
        "most_states": max(states),
        "tail": max(f.tail for f in reduced),
    }


def timed(call):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def geometric_mean(values):
    return float(np.exp(np.mean(np.log(np.maximum(values, 1e-300))))) if values else 1.0


def table(found):
    lines = [
        f"{'method':<12}{'real states':>12}{'filters':>9}{'error':>11}{'× floor':>9}{'gain × floor':>14}"
        f"{'largest tail':>14}{'ms/filter':>11}"
    ]
    for row in found:
        lines.append(
            f"{row['method']:<12}{row['states']:>12}{row['filters']:>9}{row['error']:>11.2e}{row['ratio']:>9.2f}"
            f"{row['gain_ratio']:>14.2f}{row['tail']:>14.1e}{row['milliseconds']:>11.1f}"
        )
    return lines


def many_table(many, args):
    lines = [
        f"{'to ' + format(args.tolerance, 'g'):<12}{'workers':>9}{'filters':>9}{'within':>9}{'mean real states':>18}"
        f"{'most':>6}{'largest tail':>14}{'seconds':>9}"
    ]
    for row in many:
        lines.append(
            f"{row['method']:<12}{row['workers']:>9}{row['filters']:>9,}{row['within']:>9,}{row['mean_states']:>18.1f}"
            f"{row['most_states']:>6}{row['tail']:>14.1e}{row['seconds']:>9.1f}"
        )
    return lines


def page(summary, args, words):
    command = " ".join(["python benchmarks/reduction.py", *words])
    body = "\n".join(
        [*table(summary["results"]), *(["", *many_table(summary["many"], args)] if summary["many"] else [])]
    )
    return f"""# From filters to recurrences

`{command}`

{summary["device"]}, {summary["threads"]} threads, torch {summary["torch"]}, float64. {args.length:,} taps, sine
frequency {args.sine_frequency:g}. Gradient modal interpolation ran for {args.steps:,} steps. Floors are proven for any
recurrence of as many real states, by any method.

```
{body}
```
"""


if __name__ == "__main__":
    sys.exit(main())
