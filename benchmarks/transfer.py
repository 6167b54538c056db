"""Tokens per second of each training of stage one, beside plain training of the same student and beside its floor.

    python benchmarks/transfer.py
    python benchmarks/transfer.py --shapes pythia-70m --rounds 5 --output benchmarks/transfer.md

On a GPU the shapes are Pythia-70m, 410m and 1b, in batches that fill it, under bfloat16 autocast. The weights and the
text are random; everything else is what a run has: its losses, and its loop. Each round takes every training in turn; a
figure is the median over rounds. For each training:

step             from one batch to the next in the loop
loss + backward  alone, with the teacher's part
update           clip and AdamW, alone; plain training pays it, too
log              what is looked up in the filters for the log, once in `log_every` steps, alone
floor            the same passes of the bare models, measured apart. Logits: the teacher's forward and the student's
                 forward and backward, both with their heads; activations: the teacher's forward without its head, and
                 forward and backward of the mixers alone
of the floor     floor / (loss + backward): 1 is a loss that costs nothing
of the rate      the plan's operations of a step, over the time of the step, as a share of the rate of a square matrix
                 product, measured at the start: the step's MFU
of plain         tokens per second of the step against those of next-token training

What the rows of `cached` read was written by the run's own cache before. The peak is of the tensors that the operations
of a logit step make, gradients included: in chunks, and with all logits at once. The last line is JSON.
"""

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scavenger import families, flops, losses, student, training
from scavenger.recipe import Activations, Cache, Logits, Teacher, load_recipe
from scavenger.run import checkpoint
from scavenger.run.run import Run
from scavenger.transfer import baseline, teacher_outputs, transfer


RECIPES = Path(__file__).parents[1] / "recipes"
# Recipe, and for each kind of device the sequences of a step and the steps that count in each round: of Pythia-70m what
# two cores do in minutes, and of all what a card of 80 GB holds.
SHAPES = {
    "tiny": ("quickstart", {"cpu": (2, 1), "cuda": (2, 1)}),
    "quickstart": ("quickstart", {"cpu": (8, 4), "cuda": (64, 8)}),
    "pythia-70m": ("neox70m", {"cpu": (1, 1), "cuda": (48, 8)}),
    "pythia-410m": ("neox410m", {"cpu": (1, 1), "cuda": (16, 4)}),
    "pythia-1b": ("neox1b", {"cpu": (1, 1), "cuda": (8, 4)}),
}
USUAL = {"cpu": ["quickstart", "pythia-70m"], "cuda": ["pythia-70m", "pythia-410m", "pythia-1b"]}
PEAK = {"cpu": 4, "cuda": 0.25}  # times a step's sequences, where memory is compared: all logits at once must fit
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
TEACHERS = {
    "tiny": dict(zip(SIZES, (24, 2, 4, 32, 97), strict=True)),
    "pythia-70m": dict(zip(SIZES, (512, 6, 8, 2048, 50304), strict=True)),
    "pythia-410m": dict(zip(SIZES, (1024, 24, 16, 4096, 50304), strict=True)),
    "pythia-1b": dict(zip(SIZES, (2048, 16, 8, 8192, 50304), strict=True)),
}
KEPT = 64  # tokens of each position in the cache
PLAIN = "next tokens"


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=USUAL[kind])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the tables there, as Markdown")
    args = parser.parse_args(words)
    if args.rounds < 1:
        print(f"transfer: error: --rounds: found {args.rounds}; expected 1 or more", file=sys.stderr)
        return 2
    accelerator = Accelerator(cpu=kind == "cpu", mixed_precision="bf16" if kind == "cuda" else "no")
    summary = {
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": "bfloat16 autocast" if kind == "cuda" else "float32",
        "operations_per_second": flops.peak(accelerator),
        "rounds": args.rounds,
        "shapes": {},
    }
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(shape_of(name, Path(folder), accelerator), args.rounds)
        summary["shapes"][name] = found
        print("\n".join(table(name, found)) + "\n", flush=True)
    if args.output:
        checkpoint.write_text(args.output, page(summary, words))
    print(json.dumps(summary))
    return 0


def shape_of(name, folder, accelerator):
    """The shape of this name."""
    recipe_name, sizes = SHAPES[name]
    batch_size, steps = sizes[accelerator.device.type]
    recipe = load_recipe(str(RECIPES / f"{recipe_name}.yaml"), [f"run_dir={folder}", "training.accumulate=1"])
    family = families.of(families.TRAINED).config
    config = family(**TEACHERS[name]) if name in TEACHERS else family.from_pretrained(recipe.teacher.folder)
    kept = () if name == "tiny" else recipe.student.attention_layers
    recipe = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, attention_layers=kept))
    half = accelerator.mixed_precision == "bf16"
    return Shape(recipe, config, batch_size, steps, folder, accelerator, torch.bfloat16 if half else torch.float32)


class Shape:
    """A teacher and a student of one size, a folder with what their trainings read, and those trainings."""

    def __init__(self, recipe, config, batch_size, steps, folder, accelerator, dtype=torch.float32):
        """A random teacher in this dtype; `batch_size` is of a step, `steps` are those that count in each round."""
        config.save_pretrained(folder / "teacher")
        self.recipe = dataclasses.replace(recipe, teacher=Teacher(path=str(folder / "teacher")), cache=None)
        self.batch_size, self.steps = batch_size, steps
        self.folder, self.accelerator, self.length = folder, accelerator, recipe.data.context_length
        torch.manual_seed(recipe.seed)
        with accelerator.device:
            made = families.of(config.model_type).model(config)
        self.frozen = made.requires_grad_(False).eval().to(dtype)
        kept = recipe.student.attention_layers
        self.layers = [layer for layer in range(config.num_hidden_layers) if layer not in kept]
        (folder / "data").mkdir()
        text = np.random.default_rng(0).integers(config.vocab_size, size=(4 * self.batch_size, self.length))
        for split in ("train", "validation"):  # of the second, what is looked at with every checkpoint
            np.save(folder / f"data/{split}.npy", text.astype(np.uint16))
        (folder / "transfer").mkdir()
        checkpoint.write_json(
            folder / "transfer/turns.json", [{"first": 0, "steps": 100, "batch_size": self.batch_size}]
        )

    def trainings(self):
        """The row of each training, by its name."""
        sizes = {"steps": 100, "batch_size": self.batch_size, "learning_rate": 1e-4}
        found = {PLAIN: Row(self.run(), baseline.pretraining, self.student())}
        for schedule in ("parallel", "joint", "progressive"):
            found[f"activations, {schedule}"] = self.activations(Activations(schedule=schedule, **sizes))
        found["activations, parallel, cached"] = self.activations(Activations(**sizes), Cache(activations=True))
        for objective in ("forward_kl", "reverse_kl", "jensen_shannon"):
            found[f"logits, {objective}"] = self.logits(Logits(objective=objective, **sizes))
        found[f"logits, forward_kl, cached {KEPT}"] = self.logits(Logits(**sizes), Cache(logits=KEPT))
        return found

    def larger(self):
        """The training by logits in batches where memory is compared."""
        size = max(1, int(PEAK[self.accelerator.device.type] * self.batch_size))
        return self.logits(Logits(steps=100, batch_size=size, learning_rate=1e-4))

    def floors(self):
        """The passes that no loss can do without, by what a training's name begins with."""
        model = self.student()
        ids = torch.randint(model.config.vocab_size, (self.batch_size, self.length), device=self.accelerator.device)
        hidden = torch.randn(*ids.shape, model.config.hidden_size, device=ids.device)
        positions = torch.arange(self.length, device=ids.device).expand(ids.shape)
        cos, sin = model.model.rotary(positions, hidden.dtype)
        mixers = [model.model.layers[layer].mixer for layer in self.layers]

        def whole(module, *inputs):
            with self.accelerator.autocast():
                made = module(*inputs)
            made = getattr(made, "logits", made)
            made.backward(made.detach())
            module.zero_grad()

        @torch.no_grad()
        def read(module):
            module(input_ids=ids, use_cache=False)

        return {
            PLAIN: lambda: whole(model, ids),
            "activations, parallel": lambda: (
                [read(self.frozen.base_model)] + [whole(m, hidden, cos, sin) for m in mixers]
            ),
            "activations, parallel, cached": lambda: [whole(m, hidden, cos, sin) for m in mixers],
            "logits": lambda: [read(self.frozen), whole(model, ids)],
            f"logits, forward_kl, cached {KEPT}": lambda: whole(model, ids),
        }

    def activations(self, phase, cache=None):
        """The row of a phase of step one; of a progressive phase, that of its middle layer."""
        turns = transfer.turns_of(phase, tuple(self.layers))
        return self._row(transfer.activation_matching, turns[len(turns) // 2], cache, activations=phase)

    def logits(self, phase, cache=None):
        """The row of a phase of step two."""
        return self._row(transfer.logit_matching, transfer.Turn("logits", phase, ()), cache, logits=phase)

    def _row(self, optimisation, turn, cache, **phases):
        run = self.run(cache and dataclasses.replace(cache, folder=str(self.folder / "cache")), **phases)
        kept = teacher_outputs.run(run, self.frozen)
        return Row(run, lambda *words: optimisation(run, self.frozen, kept, turn, *words[1:]), self.student())

    def run(self, cache=None, **phases):
        """A run in the shape's folder whose transfer has these phases."""
        made = {key: (phase,) for key, phase in phases.items()}
        recipe = dataclasses.replace(
            self.recipe, transfer=dataclasses.replace(self.recipe.transfer, **made), cache=cache
        )
        return Run(recipe, self.folder, self.accelerator, None)

    def student(self):
        with self.accelerator.device:
            return student.from_teacher(self.recipe.student, self.length, self.frozen, self.recipe.seed)


class Row:
    """One training, as a stage hands it to the loop."""

    def __init__(self, run, optimisation, model):
        self.run, self.accelerator = run, run.accelerator
        self.optimisation = optimisation(run, model.to(run.device), run.folder / "steps")
        self.module = self.optimisation.module
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]

    def watch(self):
        """What is logged with a checkpoint."""
        return self.optimisation.watch(self.module)

    def part(self):
        """The loss of a batch, and its gradient."""
        own, batch = self.optimisation, self.optimisation.batch(0)
        batch = batch._replace(ids=batch.ids.to(self.run.device), mask=batch.mask.to(self.run.device))
        target = own.target(batch)
        with self.accelerator.autocast():
            value = own.loss(self.module, batch, target, batch)[0]
        value.backward()

    def update(self):
        """A step of AdamW as the loop makes it; its moments exist."""
        torch.nn.utils.clip_grad_norm_(self.parameters, training.MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, times, device):
        """Seconds of each of these alone, means of so many."""
        self.module.train()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=training.BETAS, fused=True)
        parts, updates = [], []
        for _ in range(times + 1):  # the first update makes the moments
            parts.append(seconds(self.part, device))
            updates.append(seconds(self.update, device))
        del self.optimizer
        return {"loss": statistics.mean(parts), "update": statistics.mean(updates[1:])}

    def loop(self, steps, device):
        """Seconds of a step of the loop, from batch to batch; the first and the last are left out."""
        times = []

        def batch(step):
            times.append(now(device))
            return self.optimisation.batch(step)

        quiet = dataclasses.replace(self.run.recipe.training, log_every=steps + 2, checkpoint_every=steps + 2)
        run = dataclasses.replace(self.run, recipe=dataclasses.replace(self.run.recipe, training=quiet))
        shortened = dataclasses.replace(self.optimisation.settings, steps=steps + 2, warmup_steps=0)
        with tempfile.TemporaryDirectory() as folder:
            own = {
                "steps_dir": Path(folder) / "steps",
                "batch": batch,
                "settings": shortened,
                "watch": lambda module: {},
            }
            training.train(run, dataclasses.replace(self.optimisation, **own))
        return statistics.mean(after - before for before, after in itertools.pairwise(times[1:]))

    def of_the_rate(self, tokens_per_second):
        """The share of the device's matrix rate, by the operations that the plan counts."""
        return self.optimisation.flops * tokens_per_second / flops.peak(self.accelerator)

    def peak(self):
        """The most bytes of tensors that the operations of a loss and its gradient hold."""
        self.module.zero_grad()
        with Allocations() as found:
            self.part()
        self.module.zero_grad()
        return found.peak


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that operations make: `now`, and at most (`peak`)."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        known = {item.untyped_storage()._cdata for item in _tensors((args, kwargs))}
        for item in _tensors(made):
            storage = item.untyped_storage()
            if storage._cdata not in known:  # neither a view nor written in place
                known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, count):
        self.now -= count


def _tensors(values):
    return [item for item in tree_leaves(values) if isinstance(item, torch.Tensor)]


def measured(shape, rounds):
    """The figures of every training at one shape, medians over rounds in which they take turns."""
    device = shape.accelerator.device
    trainings, floors = shape.trainings(), shape.floors()
    found, bare = {name: [] for name in trainings}, {name: [] for name in floors}
    for floor in floors.values():
        floor()
    for _ in range(rounds):
        for name, floor in floors.items():
            bare[name].append(seconds(floor, device))
        for name, row in trainings.items():
            found[name].append(row.timed(shape.steps, device) | {"step": row.loop(shape.steps, device)})
    rows = []
    for name in trainings:
        row = {key: statistics.median(entry[key] for entry in found[name]) for key in found[name][0]}
        # Ratios are taken within a round, where the machine is the same.
        own = max((floor for floor in floors if name.startswith(floor)), key=len, default=None)
        row["log"] = seconds(trainings[name].watch, device)
        row["floor"] = row["of_the_floor"] = None
        if own:
            pairs = zip(bare[own], found[name], strict=True)
            row["floor"] = statistics.median(bare[own])
            row["of_the_floor"] = statistics.median(floor / entry["loss"] for floor, entry in pairs)
        pairs = zip(found[PLAIN], found[name], strict=True)
        row["of_plain"] = statistics.median(plain["step"] / entry["step"] for plain, entry in pairs)
        row["tokens_per_second"] = shape.batch_size * shape.length / row["step"]
        row["of_the_rate"] = trainings[name].of_the_rate(row["tokens_per_second"])
        rows.append({"name": name} | row)
    larger = shape.larger()
    peaks = {"in chunks": larger.peak()}
    with mock.patch.object(losses, "CHUNK_BYTES", 2**62):
        peaks["all at once"] = larger.peak()
    facts = {
        "batch_size": shape.batch_size,
        "compared": larger.optimisation.settings.batch_size,
        "length": shape.length,
        "vocabulary": shape.frozen.config.vocab_size,
    }
    return facts | {"rows": rows, "peaks": peaks}


def seconds(call, device):
    began = now(device)
    call()
    return now(device) - began


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(name, found):
    lines = [
        f"{name}, {found['batch_size']} × {found['length']:,} tokens a step, milliseconds",
        f"{'':<32}{'tokens/s':>9}{'of plain':>10}{'step':>9}{'of the rate':>13}{'loss + backward':>17}{'floor':>9}"
        f"{'of the floor':>14}{'update':>8}{'log':>8}",
    ]
    for row in found["rows"]:
        floor = (
            f"{'—':>9}{'—':>14}" if row["floor"] is None else f"{1e3 * row['floor']:>9,.0f}{row['of_the_floor']:>14.2f}"
        )
        lines.append(
            f"{row['name']:<32}{row['tokens_per_second']:>9,.0f}{row['of_plain']:>10.2f}{1e3 * row['step']:>9,.0f}"
            f"{100 * row['of_the_rate']:>11.1f} %{1e3 * row['loss']:>17,.0f}{floor}{1e3 * row['update']:>8,.0f}"
            f"{1e3 * row['log']:>8,.0f}"
        )
    tokens = found["compared"] * found["length"]
    peaks = ", ".join(f"{how} {size / 2**20:,.0f} MiB" for how, size in found["peaks"].items())
    one = f"one copy of all logits is {4 * tokens * found['vocabulary'] / 2**20:,.0f} MiB"
    return [*lines, f"peak of a logit step of {tokens:,} tokens: {peaks}; {one}"]


def page(summary, words):
    body = "\n\n".join("\n".join(table(name, found)) for name, found in summary["shapes"].items())
    command = " ".join(["python benchmarks/transfer.py", *words])
    return f"""# Speed and memory of stage one

`{command}`, {time.strftime("%Y-%m-%d")}

{summary["device"]}, {summary["threads"]} threads, torch {summary["torch"]}; medians of {summary["rounds"]} rounds in
which the trainings take turns, in {summary["dtype"]}. A square matrix product reached
{summary["operations_per_second"] / 1e12:,.3g} TFLOP/s. Random weights and text. `of the floor` is floor / (loss +
backward), `of plain` tokens per second against next-token training of the same student, both within a round.

```
{body}
```
"""


if __name__ == "__main__":
    sys.exit(main())
