"""Speed and state of generation, by context length, of any checkpoint folders or Hub names, side by side.

    python eval/generation.py scavenger/assets/teacher-stdlib runs/quickstart/recurrence --context-lengths 256 2048 8192

One sequence, greedy, the mean of 32 steps; the last line is JSON.
"""

import argparse
import dataclasses
import json
import sys

import torch
from transformers import AutoModelForCausalLM

import scavenger.model  # noqa: F401  (AutoModel knows the student)
from scavenger.measure import generation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoint folders or Hub names")
    parser.add_argument("--context-lengths", type=int, nargs="+", default=[256, 2048])
    args = parser.parse_args()
    if min(args.context_lengths) < 1:
        print(
            f"generation: error: found a context length of {min(args.context_lengths)}; expected 1 or more",
            file=sys.stderr,
        )
        return 2
    rows = []
    width = max(len(model) for model in args.models)
    print(f"{'model':<{width}}  {'context':>8}  {'tokens/s':>9}  {'prefill s':>9}  {'state bytes':>12}")
    for name in args.models:
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            print(f"generation: error: {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            return 2
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        for length in args.context_lengths:
            torch.manual_seed(0)
            found = generation(model, torch.randint(0, model.config.vocab_size, (1, length)))
            state = f"{found.state_bytes:,}"
            print(
                f"{name:<{width}}  {length:>8,}  {found.tokens_per_second:>9.1f}  "
                f"{found.prefill_seconds:>9.3f}  {state:>12}",
                flush=True,
            )
            rows.append({"model": name} | dataclasses.asdict(found))
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
