"""Peak memory of everything that computes logits, with a large vocabulary and little else.

    python benchmarks/logits.py
    python benchmarks/logits.py --vocabulary 50304 --batch-size 8 --output benchmarks/logits.md

Weights and text are random. For each row:

peak    the most bytes beyond those held before, of models, inputs and gradients: of the process on a CPU, of torch's
        allocator on a GPU
chunks  the peak in chunks of logits (losses.CHUNK_BYTES in float32), which losses.CHUNK_COPIES bounds; the gradient
        of the head, which is as large as its weights, is taken off; where a kernel computes the losses, the constants
        with GPU_ before their names
whole   the bytes of one tensor of the logits of all positions, which no row makes

The last line is JSON.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mixers import memory

from scavenger import families, losses, measure, student, teacher, training
from scavenger.recipe import Filter, Logits, Student
from scavenger.recurrence import allocation
from scavenger.report import continuation, likelihood, lm_eval_tasks, retrieval
from scavenger.run.checkpoint import write_text
from scavenger.transfer import teacher_outputs, transfer


KEPT = 64  # tokens of each position in the cache
DISTANCE = 16  # of recall; a sequence of its copying is twice as long


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=152_000)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--output", type=Path, help="write the table there, as Markdown")
    args = parser.parse_args(words)
    if min(args.num_layers, args.batch_size) < 1 or args.hidden_size % 32 or args.hidden_size < 32:
        print(
            f"logits: error: found {args.num_layers} layers of width {args.hidden_size}, batch size {args.batch_size}; "
            "expected 1 or more, and a multiple of 32 channels",
            file=sys.stderr,
        )
        return 2
    if args.vocabulary <= KEPT or args.length < 2 * DISTANCE:
        print(
            f"logits: error: found {args.vocabulary} words and length {args.length}; expected more than {KEPT} words "
            f"and {2 * DISTANCE} tokens or more",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    positions = args.batch_size * args.length
    summary = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "chunk_bytes": 4 * args.vocabulary * losses.chunk_rows(args.vocabulary),
        "whole": 4 * args.vocabulary * positions,
        "planned": max(losses.logit_peak(args.vocabulary, positions, kernel) for kernel in {False, kernels(device)}),
        "results": measured(Models(args, device)),
    }
    print("\n".join(table(summary)), flush=True)
    if args.output:
        write_text(args.output, page(summary, args, words))
    print(json.dumps(summary))
    return 0


def kernels(device):
    """Whether a kernel computes the losses of a training step without a cache."""
    return device.type == "cuda" and losses.losses_and_slope_ is not None


class Models:
    """A teacher and a student with random weights, random text, and what a run does with them."""

    def __init__(self, args, device):
        torch.manual_seed(0)
        self.args, self.device = args, device
        family = families.of(families.TRAINED)
        config = family.config(
            vocab_size=args.vocabulary,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 32,
            intermediate_size=4 * args.hidden_size,
            max_position_embeddings=args.length,
        )
        self.frozen = family.model(config).requires_grad_(False).eval().to(device)
        self.student = student.from_teacher(Student(attention_layers=()), args.length, self.frozen, 0).to(device)
        self.head_bytes = self.student.get_output_embeddings().weight.nbytes

    def rows(self):
        """What is measured, by name: a function of the text (batch, length), and whether it has the head's gradient."""
        found = {"next tokens, step": (self.next_tokens, True)}
        for objective in ("forward_kl", "reverse_kl", "jensen_shannon"):
            found[f"logits {objective}, step"] = (lambda ids, o=objective: self.matching(ids, o), True)
        found[f"logits forward_kl, {KEPT} cached, step"] = (lambda ids: self.matching(ids, "forward_kl", KEPT), True)
        return found | {
            f"teacher's outputs, {KEPT} kept": (self.outputs, False),
            "held-out look": (lambda ids: measure.held_out(self.student, ids), False),
            "held-out look with teacher": (lambda ids: measure.held_out(self.student, ids, self.frozen), False),
            "sizes of recurrences": (self.scores, False),
            "report: perplexity": (lambda ids: likelihood.predictions(self.student, ids, self.frozen), False),
            "report: recall": (self.recall, False),
            "report: generated text": (self.generated, False),
            "report: tasks": (self.tasks, False),
        }

    def next_tokens(self, ids):
        self.stepped(training.NextTokens(self.student), ids, lambda module, ids, mask: module(ids, mask))

    def matching(self, ids, objective, kept=None):
        phase = Logits(steps=1, batch_size=len(ids), learning_rate=1e-4, objective=objective, cross_entropy=0.1)

        def value(module, ids, mask):
            last, _ = teacher.hidden_states(self.frozen, ids, False)
            head = losses.Head.of(self.frozen)
            aim = (head, last, []) if kept is None else (teacher_outputs.most_likely(last, head, kept), None, [])
            counts = torch.full((2,), float(ids.numel()), device=self.device)
            return module(ids, mask, counts, 1.0, *aim)[0]

        self.stepped(transfer.LogitMatching(self.student, phase, Filter()), ids, value)

    def stepped(self, module, ids, value):
        """Forward and backward; the gradients stay, as in a step that is not the first of its accumulation."""
        ids = torch.from_numpy(ids).to(self.device)
        value(module, ids, torch.ones_like(ids, dtype=torch.bool)).backward()

    def outputs(self, ids):
        last, _ = teacher.hidden_states(self.frozen, torch.from_numpy(ids).to(self.device), False)
        teacher_outputs.most_likely(last, losses.Head.of(self.frozen), KEPT)

    def scores(self, ids):
        with allocation.explicit_taps(self.student, ids.shape[1]) as leaves:
            text = torch.from_numpy(ids[:1]).to(self.device)
            allocation.score(self.student, text, leaves, torch.Generator(self.device).manual_seed(0))

    def recall(self, ids):
        retrieval.copying(self.student, ids, [], (DISTANCE, ids.shape[1] // 2), len(ids), 0)

    def generated(self, ids):
        half = ids.shape[1] // 2
        continuation.along(self.student, self.frozen, ids[:, :half], ids[:, half:])

    def tasks(self, ids):
        half = ids.shape[1] // 2
        lm_eval_tasks.log_likelihoods(
            self.student, [(row[:half].tolist(), row[half:].tolist()) for row in ids], ids.shape[1], True
        )


def measured(models):
    """Each row's peak, after a small one of its kind: what is made once is there then."""
    args, found = models.args, []
    text = np.random.default_rng(0).integers(args.vocabulary, size=(args.batch_size, args.length))
    for name, (call, trains) in models.rows().items():
        kernel = trains and "cached" not in name and kernels(models.device)
        chunk = 4 * args.vocabulary * losses.chunk_rows(args.vocabulary, kernel)
        call(text[:1, : 2 * DISTANCE])
        before, peak = memory(models.device)
        call(text)
        bytes_held = peak() - before
        found.append({"name": name, "peak": bytes_held, "chunks": (bytes_held - trains * models.head_bytes) / chunk})
    return found


def table(summary):
    lines = [f"{'':<36}{'peak MiB':>10}{'chunks':>8}"]
    lines += [f"{row['name']:<36}{row['peak'] / 2**20:>10,.0f}{row['chunks']:>8.1f}" for row in summary["results"]]
    return [
        *lines,
        f"a chunk is {summary['chunk_bytes'] / 2**20:,.0f} MiB; planned {summary['planned'] / 2**20:,.0f} MiB "
        f"at most; the logits of all positions are {summary['whole'] / 2**20:,.0f} MiB",
    ]


def page(summary, args, words):
    body = "\n".join(table(summary))
    command = " ".join(["python benchmarks/logits.py", *words])
    return f"""# Memory of logits

`{command}`, {time.strftime("%Y-%m-%d")}

{summary["device"]}, {summary["threads"]} threads, torch {summary["torch"]}, float32.
{args.vocabulary:,} words, width {args.hidden_size}, {args.num_layers} layers, {args.batch_size} × {args.length:,}
tokens, random weights and text. A peak is what is held beyond the models, their gradients and the text; `chunks` is the
peak in chunks of logits, without the gradient of the head.

```
{body}
```
"""


if __name__ == "__main__":
    sys.exit(main())
