"""What a recipe would do: parameters, FLOPs, tokens, time, memory and folders, before anything is done."""

import contextlib
import copy
import dataclasses
import itertools
import math
import os
import statistics
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from scavenger import data, losses, measure, student, teacher, training
from scavenger.model import HyenaNeoXForCausalLM
from scavenger.model.filters import ModalFilter
from scavenger.recipe import PYTHIA_SHAPES, Activations, Logits, Recipe, Stage, TeacherTraining, teacher_shape
from scavenger.recurrence import allocation, certificate, recurrence
from scavenger.run import checkpoint
from scavenger.transfer import teacher_outputs, transfer


# A step of no more operations than this is timed as it is: a second or two on two cores. For a larger one, one
# sequence in models of two depths is. On a GPU each is timed as it is, if its memory allows.
TIMED_WHOLE = 1e11
TIMED = 3  # steps; the middle one counts
SHORTER = 8  # memory is counted in a sequence this many times shorter where the step is not timed as it is
TOLERANCES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3)  # that the table of recurrences shows, beside the recipe's own
PLANNED_FILTERS = 16  # of each layer that the table is made from, so that it takes seconds
PLANNED_SEQUENCES = 8  # of held-out text, likewise: the predicted KL is good to a half


@dataclass(frozen=True)
class PlannedStage:
    """One optimisation: its size, and what its steps were found to take; not tried where it is complete."""

    name: str
    steps: int
    sequences: int
    tokens: int
    flops: float
    folder: Path
    turns: int = 1  # trainings that it consists of, each with a history of its own
    done: float = 0.0  # share of its steps that this run has made
    seconds: float | None = None  # of all steps
    memory: dict[str, float] | None = None  # bytes on a device, by what they hold
    whole: bool = True  # its own step was timed, not a smaller one


def show(recipe: Recipe, processes: int = 1) -> str:
    """The plan as text for a terminal."""
    return text(recipe, stages(recipe, processes), processes)


def stages(recipe: Recipe, processes: int = 1) -> list[PlannedStage]:
    """Every optimisation of the recipe, in order; what is not complete was tried out on this device."""
    config = _configuration(recipe)
    found, tried = [], {}
    for stage, phase, layers in _trainings(recipe, config):
        if stage.done < 1:
            rows = -(-phase.batch_size // (processes * recipe.training.accumulate))
            alike = dataclasses.replace(phase, steps=1, warmup_steps=0, learning_rate=0.1)
            if alike not in tried:
                with torch.random.fork_rng(devices=[]):  # what follows draws as if there had been no plan
                    tried[alike] = _tried(recipe, config, alike, layers, rows, stage.flops / stage.sequences)
            part, update, memory, whole = tried[alike]
            parts = stage.sequences / phase.batch_size * recipe.training.accumulate
            if processes > 1:
                memory = memory | {"gradients": 2 * memory["gradients"]}  # once more, in the buckets of DDP
            stage = dataclasses.replace(stage, seconds=parts * part + stage.steps * update, memory=memory, whole=whole)
        found.append(stage)
    return found


def text(recipe: Recipe, planned: list[PlannedStage], processes: int = 1) -> str:
    """The models, the table of stages, what they hold in memory, and what comes before and after them."""
    config = _configuration(recipe)
    where = recipe.teacher.folder or recipe.teacher.name or "trained by this run"
    lines = [
        f"run       {recipe.run_dir}",
        f"data      {recipe.data.path or recipe.data.name or 'the Python standard library on this machine'}"
        f", contexts of {recipe.data.context_length} tokens",
        f"teacher   {where}: GPT-NeoX, {_size(_empty_teacher(config)):,} parameters, "
        f"{config.num_hidden_layers} layers of width {config.hidden_size}",
    ]
    if recipe.transfer:
        lines.append(_student_line(recipe, config))
    if recipe.cache:
        lines.append(_cache_line(recipe, config))
    if planned:
        lines += ["", *_stage_table(planned), *_memory_table(planned), *_how(recipe, planned, processes)]
    if recipe.recurrence:
        settings = recipe.recurrence
        aim = (
            f"the fewest modes that meet {settings.tolerance:g}"
            if settings.state_bytes is None
            else f"{settings.state_bytes:,} bytes of state where they help most"
        )
        most = f"{settings.max_state_size} modes or fewer"
        lines.append(f"Then each filter becomes a recurrence of {most} ({settings.method}): {aim}.")
    if recipe.report:
        contexts = ", ".join(f"{length:,}" for length in recipe.report.context_lengths)
        lines.append(
            f"Then all models are measured on {recipe.data.evaluation_tokens:,} held-out tokens, in recall, in what "
            f"they write, and in speed after {contexts} tokens."
        )
    if recipe.hub:
        private = ", private" if recipe.hub.private else ""
        lines.append(
            f"Then the student is pushed to {recipe.hub.name} (branch {recipe.hub.revision or 'main'}{private})."
        )
    return "\n".join(lines)


def write(planned: list[PlannedStage], run_dir: Path):
    """`plan.json`: what was expected of the run; that of its first launch stays, which had all of it before it."""
    if not (run_dir / "plan.json").is_file():
        facts = [
            dataclasses.asdict(stage) | {"folder": stage.folder.relative_to(run_dir).as_posix()} for stage in planned
        ]
        checkpoint.write_json(run_dir / "plan.json", facts)


def compared(run_dir: Path) -> list[dict]:
    """Of each complete stage of a run, the seconds that `plan.json` expected and those that its histories say."""
    found, taken = [], {}
    for stage in checkpoint.read_json(run_dir / "plan.json") if (run_dir / "plan.json").is_file() else []:
        folder = run_dir / stage["folder"]
        if folder not in taken:
            taken[folder] = _taken(folder)
        own, taken[folder] = taken[folder][: stage["turns"]], taken[folder][stage["turns"] :]
        if own and stage["seconds"] is not None:
            found.append({"stage": stage["name"], "planned": stage["seconds"], "taken": sum(own)})
    return found


def recurrences(recipe: Recipe) -> str:
    """What the state could be, where there is a student whose filters can be asked; by balanced truncation.

    Of a layer's filters PLANNED_FILTERS are reduced; modes and bytes are those of all of them, so far as these tell.
    """
    run_dir = Path(recipe.run_dir)
    exact = HyenaNeoXForCausalLM.from_pretrained(run_dir / "transfer", dtype=torch.float32).eval()
    config, settings = exact.config, dataclasses.replace(recipe.recurrence, method="balanced")
    blocks = data.blocks(run_dir / "data", "validation")
    rows, found = {}, [[[]] for _ in exact.gpt_neox.layers]
    tolerances = sorted({*TOLERANCES, settings.tolerance}, reverse=True)
    aims = [{"tolerance": tolerance} for tolerance in tolerances]
    if settings.state_bytes is not None:
        aims = recurrence.aims(settings)
    for layer, filter in recurrence.long_filters(exact).items():
        taps = measure.filter_taps(filter, settings.horizon or config.context_length)
        rows[layer] = np.unique(np.linspace(0, len(taps) - 1, PLANNED_FILTERS).round().astype(int)).tolist()
        found[layer] = recurrence.reduce_filters(taps[rows[layer]], settings, aims)
        if isinstance(filter, ModalFilter):
            found[layer] = [recurrence.with_own_modes(filter, made, rows[layer]) for made in found[layer]]
    changes = allocation.responses(exact, found, blocks, rows, PLANNED_SEQUENCES)
    divergences = allocation.divergences(changes, blocks.shape[1] - 1)
    choices = {
        f"{tolerance:g}": [np.full(len(layer[0]), index) for layer in found]
        for index, tolerance in enumerate(tolerances)
    }
    share = sum(map(len, rows.values())) / sum(f.num_filters for f in recurrence.long_filters(exact).values())
    if settings.state_bytes is not None:
        least = allocation.state_bytes(config)
        budgets = [max(least, settings.state_bytes * times // 2) for times in (1, 2, 4)]
        bytes_ = allocation.mode_costs(config, found)
        choices = {
            f"{budget:,}": allocation.allocate(bytes_, divergences, share * (budget - least)) for budget in budgets
        }
    table = [
        line
        for name, chosen in choices.items()
        for line in _choice(config, name, found, chosen, divergences, len(exact.gpt_neox.layers))
    ]
    what = "state bytes" if settings.state_bytes is not None else "tolerance"
    header = [what, "layer", "filters", "modes", "most", "real states", "KiB", "worst error", "its floor", "KL"]
    header.append("cache is larger from")
    asked = "" if share == 1 else f" {100 * share:.0f} % of the filters were reduced."
    return (
        "\n"
        + certificate.aligned(header, table)
        + f"\nBy balanced truncation.{asked} KL: predicted of the model's output, nats per token, the layers' shares "
        "summed. KiB of all: with short convolutions and kept attention."
    )


def _choice(config, name, found, chosen, divergences, layers):
    """The lines of one choice: each layer, and all of them."""
    lines, sizes, total = [], [[] for _ in range(layers)], 0.0
    count = config.num_filters * config.hyena_order
    for layer, (rungs, own) in enumerate(zip(found, chosen, strict=True)):
        filters = [rungs[rung][index] for index, rung in enumerate(own)]
        if not filters:
            continue  # kept attention
        share = count / len(filters)
        sizes[layer] = np.resize([f.state_size for f in filters], count).tolist()
        divergence = share * float(allocation.picked(divergences[layer], own).sum())
        total += divergence
        worst = max(filters, key=lambda f: f.relative_error)
        lines.append(
            [
                name,
                str(layer),
                str(count),
                f"{sum(sizes[layer]):,}",
                str(max(sizes[layer])),
                f"{share * sum(f.real_states for f in filters):,.0f}",
                f"{allocation.mode_bytes(config) * sum(sizes[layer]) / 1024:,.1f}",
                f"{worst.relative_error:.1e}",
                f"{worst.floor:.1e}",
                f"{divergence:.1e}",
                "",
            ]
        )
    whole = recurrence.recurrent_configuration(config, sizes)
    held, even = whole.state_bytes, whole.break_even_length
    lines.append(
        [name, "all", str(count * len(lines)), f"{sum(map(sum, sizes)):,}", str(max(map(max, filter(None, sizes)))), ""]
        + ["grows" if held is None else f"{held / 1024:,.1f}", "", "", f"{total:.1e}"]
        + ["never" if even is None else f"{even:,} tokens"]
    )
    return lines


def _configuration(recipe):
    """The teacher's configuration; without the network where its shape is published."""
    shape = teacher_shape(recipe)
    if shape is None:
        return teacher.load_configuration(recipe, Path(recipe.run_dir))
    published = {"dtype": "float16"} if recipe.teacher.name in PYTHIA_SHAPES else {}
    left_out = ("architectures", "transformers_version", "model_type")
    return GPTNeoXConfig(**published | {key: value for key, value in shape.items() if key not in left_out})


def _trainings(recipe, config):
    """Each training of the recipe: what it is, its phase, and the layers whose mixers it matches."""
    run_dir, length = Path(recipe.run_dir), recipe.data.context_length
    flops = _Flops(config, length)

    def stage(name, steps, sequences, flops, folder, **more):
        return PlannedStage(name, steps, sequences, sequences * length, sequences * length * flops, folder, **more)

    if recipe.teacher.train:
        train, folder = recipe.teacher.train, run_dir / "teacher"
        made = stage("teacher", train.steps, train.steps * train.batch_size, 3 * flops.whole, folder)
        yield dataclasses.replace(made, done=_done(folder, train.steps)), train, ()
    if recipe.transfer is None:
        return
    folder = run_dir / "transfer"
    layers = tuple(layer for layer in range(config.num_hidden_layers) if layer not in recipe.student.attention_layers)
    for group, place, beside in (
        ("activations", folder / "activations", checkpoint.partial(folder) / "activations"),
        ("logits", folder, folder),
    ):
        phases, turn = getattr(recipe.transfer, group), 0
        counts = [len(layers) if getattr(phase, "schedule", None) == "progressive" else 1 for phase in phases]
        for index, (phase, turns) in enumerate(zip(phases, counts, strict=True)):
            name = group + (f" {index + 1}" if index else "")
            own = range(turn, turn + turns)
            reached = [
                beside if turn == sum(counts) - 1 else checkpoint.partial(beside) / f"turn_{turn:02d}" for turn in own
            ]
            done = sum(_done(made, phase.steps / turns, place, beside) for made in reached) / turns
            per_token = flops.of(recipe, phase, layers)
            sequences = phase.steps * phase.batch_size
            yield stage(name, phase.steps, sequences, per_token, place, turns=turns, done=done), phase, layers
            turn += turns
    if recipe.baseline:
        # One training, in the batches of all phases: the largest is tried out.
        phases, folder = recipe.transfer.phases, run_dir / "baseline"
        steps, sequences = sum(p.steps for p in phases), sum(p.steps * p.batch_size for p in phases)
        made = stage("baseline", steps, sequences, 3 * flops.whole, folder)
        largest = Stage(steps, max(phase.batch_size for phase in phases), recipe.baseline.learning_rate)
        yield dataclasses.replace(made, done=_done(folder, steps)), largest, ()


def _done(reached, steps, *later):
    """The share of a training that is made: all where `reached` is there, or a folder that is made after it."""
    if any(folder.is_dir() for folder in (reached, *later)):
        return 1.0
    made = [path.name for path in (checkpoint.partial(reached) / "steps").glob("[0-9]*")]
    return max((int(name) / steps for name in made if name.isdigit()), default=0.0)


class _Flops:
    """Operations of each token: two for each weight that it is multiplied by, and those of the mixing.

    Of attention and of its successor as matrices: the scores and their product with v, of the causal half.
    """

    def __init__(self, config, length):
        width, self.layers = config.hidden_size, config.num_hidden_layers
        self.mixer = 8 * width**2 + 2 * length * width
        self.mlp = 4 * width * config.intermediate_size
        self.head = 2 * width * config.vocab_size
        self.whole = self.layers * (self.mixer + self.mlp) + self.head

    def of(self, recipe, phase, layers):
        """Of a phase of the transfer, the teacher and the backward pass included."""
        cached = recipe.cache is not None
        if isinstance(phase, Logits):
            read = 0 if cached and recipe.cache.logits else self.whole
            rest = 1 if phase.trained == "mixers" else 2  # backward: the gradient of what goes in, and of the weights
            back = self.layers * (2 * self.mixer + rest * self.mlp) + rest * self.head
            return read + self.whole + back
        matched = len(layers)
        deep = max(layers) if phase.schedule != "progressive" else sum(layers) / matched  # layers below the last
        below = deep * (self.mixer + self.mlp)
        read = 0 if cached and recipe.cache.activations else below + self.mixer
        if phase.schedule == "parallel":
            return read + 3 * matched * self.mixer
        if phase.schedule == "progressive":
            return read + below + 3 * self.mixer
        return read + below + self.mixer + 2 * matched * self.mixer + deep * self.mlp


def _tried(recipe, config, phase, layers, rows, flops):
    """Seconds of a part of `rows` sequences and of an update, memory by what it holds, and whether it was as it is.

    `flops` are those of a sequence.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" or rows * flops <= TIMED_WHOLE:
        with contextlib.suppress(torch.OutOfMemoryError):
            return *_tried_whole(recipe, config, phase, layers, rows, device), True
    return *_tried_small(recipe, config, phase, layers, rows, device), False


def _tried_whole(recipe, config, phase, layers, rows, device):
    """The step as it is; of a progressive phase, the mean of the first layer's and the last one's."""
    progressive = getattr(phase, "schedule", None) == "progressive"
    found, length = [], recipe.data.context_length
    for matched in (layers[:1], layers[-1:]) if progressive else (layers,):
        rehearsal = _Rehearsal(recipe, config, phase, matched, device)
        held = _held(recipe, config, phase, rehearsal.trained, device)
        step = rehearsal.counted(rows, length, recipe.training.accumulate > 1)
        rehearsal.update()  # the first makes the moments
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        parts, updates = zip(*((rehearsal.part(rows, length), rehearsal.update()) for _ in range(TIMED)), strict=True)
        if device.type == "cuda":
            step = max(0, torch.cuda.max_memory_allocated() - sum(held.values()))
        found.append((statistics.median(parts), statistics.median(updates), held | {"step": step}))
    return statistics.mean(part for part, *_ in found), *found[-1][1:]


def _tried_small(recipe, config, phase, layers, rows, device):
    """One sequence in models of two depths and a smaller vocabulary; the rest is taken as linear in all of these."""
    length, matching = recipe.data.context_length, isinstance(phase, Activations)
    vocabulary = min(config.vocab_size, max(1024, losses.CHUNK_BYTES // (8 * length)))  # logits beyond any cache
    found = []
    fewest = int(matching or getattr(phase, "trained", None) == "mixers")  # layers without which nothing is trained
    for depth in (fewest, fewest + 1):
        small = copy.copy(config)
        small.num_hidden_layers, small.vocab_size = depth, 1024 if matching else vocabulary
        own = range(depth)[-1:] if matching and phase.schedule == "progressive" else range(depth)
        rehearsal = _Rehearsal(_without_attention(recipe), small, phase, tuple(own), device)
        memory = rehearsal.counted(1, length // SHORTER, True)
        rehearsal.update()
        found.append((rehearsal.part(1, length), SHORTER * memory, rehearsal.update() / rehearsal.trained))
    (base, least, _), (more, most, update) = found
    if matching:
        deep = max(layers) if phase.schedule != "progressive" else sum(layers) / len(layers)
        part, step = rows * (base + deep * (more - base)), rows * (least + max(layers) * (most - least))
    else:
        layer, kept = more - base, most - least
        head, held = base - fewest * layer, least - fewest * kept
        part = rows * (config.vocab_size / vocabulary * head + config.num_hidden_layers * layer)
        # The gradient of the head is there once; of the logits, a chunk.
        weight = 4 * vocabulary * config.hidden_size
        chunk = min(losses.CHUNK_BYTES, 4 * length // SHORTER * vocabulary)
        chunks = (held / SHORTER - weight) / chunk
        step = rows * config.num_hidden_layers * kept + 4 * config.vocab_size * config.hidden_size
        step += chunks * min(losses.CHUNK_BYTES, 4 * rows * length * config.vocab_size)
    trained = _trained(recipe, config, phase, layers)
    return part, update * trained, _held(recipe, config, phase, trained, device) | {"step": step}


class _Rehearsal:
    """A training with random weights and random text: its own modules, forward, backward and update."""

    def __init__(self, recipe, config, phase, layers, device):
        torch.manual_seed(recipe.seed)
        self.recipe, self.phase, self.layers, self.device = recipe, phase, layers, device
        self.vocabulary, self.width = config.vocab_size, config.hidden_size
        self.dtype = _teacher_dtype(recipe, config, device)
        with device:
            self.frozen = None
            if isinstance(phase, (Activations, Logits)):
                self.frozen = GPTNeoXForCausalLM(config).to(self.dtype).requires_grad_(False).eval()
            if isinstance(phase, TeacherTraining):
                model = GPTNeoXForCausalLM(config)
            else:
                model = HyenaNeoXForCausalLM(student.configuration(recipe, config))
        if isinstance(phase, Activations):
            self.module = transfer.MixerMatching(model, layers, transfer.READING[phase.schedule], recipe.student.filter)
        elif isinstance(phase, Logits):
            self.module = transfer.LogitMatching(model, phase, recipe.student.filter)
        else:
            self.module = training.NextTokens(model)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def part(self, rows, length):
        """Seconds of forward and backward."""
        ids = torch.randint(self.vocabulary, (rows, length), device=self.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        began = self._now()
        aim = self._aim(ids)
        # The launcher says so here, and accelerate asks nothing else.
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(os.environ.get("ACCELERATE_MIXED_PRECISION"))
        with torch.autocast(self.device.type, half, enabled=half is not None):
            if isinstance(self.phase, Activations):
                errors, tail = self.module(ids, mask, *aim)
                value = errors.sum() + tail
            elif isinstance(self.phase, Logits):
                counts = torch.full((2,), float(ids.numel()), device=self.device)
                value, _, tail = self.module(ids, mask, counts, 1.0, *aim)
                value = value + tail
            else:
                value = self.module(ids, mask) / ids.numel()
        value.backward()
        return self._now() - began

    def update(self):
        """Seconds of a clipped step of AdamW."""
        began = self._now()
        torch.nn.utils.clip_grad_norm_(self.parameters, training.MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - began

    def counted(self, rows, length, accumulated):
        """Bytes that a part holds at its peak, beyond weights and gradients, which may be there from the part before;
        afterwards they are.
        """
        if accumulated:
            self.part(1, 8)
        with Allocations() as found:
            self.part(rows, length)
        return found.peak if accumulated else max(0, found.peak - 4 * self.trained)

    def _aim(self, ids):
        """What the teacher says, or the place that it has in a cache."""
        cache, length = self.recipe.cache, ids.shape[1]
        if isinstance(self.phase, Activations):
            if cache and cache.activations:
                said = torch.randn(len(ids), length, self.width, device=self.device)
                return dict.fromkeys(self.layers, said), dict.fromkeys(self.layers, said)
            return teacher.attention(self.frozen, ids, self.layers)
        if isinstance(self.phase, Logits):
            if cache and cache.logits:
                shape = len(ids), length, min(cache.logits, self.vocabulary - 1)
                even = torch.full(shape, -math.log(self.vocabulary), device=self.device)
                rest = torch.full(shape[:2], math.log1p(-shape[2] / self.vocabulary), device=self.device)
                tokens = torch.arange(shape[2], device=self.device).expand(shape)
                return losses.TopK(even, tokens, rest), None, []
            return self.frozen.lm_head.weight, *teacher.hidden_states(self.frozen, ids, self.phase.hidden_states > 0)

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Allocations(TorchDispatchMode):
    """The bytes of the tensors that operations make: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        known = {item.untyped_storage()._cdata for item in _tensors((args, kwargs))}
        for item in _tensors(made):
            storage = item.untyped_storage()
            if storage._cdata not in known:  # no view, nor written in place
                known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, count):
        self.now -= count


def _tensors(values):
    return [item for item in tree_leaves(values) if isinstance(item, torch.Tensor)]


def _teacher_dtype(recipe, config, device):
    """As teacher.load keeps it."""
    if recipe.teacher.dtype != "auto":
        return getattr(torch, recipe.teacher.dtype)
    return torch.float32 if device.type == "cpu" else config.dtype or torch.float32


def _trained(recipe, config, phase, layers):
    """How many parameters a training changes."""
    model = _empty(recipe, config, phase)
    if getattr(phase, "trained", None) == "mixers":
        layers = range(config.num_hidden_layers)
    elif not isinstance(phase, Activations):
        return _size(model)
    counts = [_size(model.gpt_neox.layers[layer].mixer) for layer in layers]
    return max(counts) if getattr(phase, "schedule", None) == "progressive" else sum(counts)


def _held(recipe, config, phase, trained, device):
    """Bytes that are there all the time of a training, and its gradients, by what they hold."""
    frozen = _size(_empty_teacher(config)) if isinstance(phase, (Activations, Logits)) else 0
    return {
        "weights": 4 * _size(_empty(recipe, config, phase)),
        "gradients": 4 * trained,
        "moments": 8 * trained,
        "teacher": frozen * _teacher_dtype(recipe, config, device).itemsize,
    }


def _empty(recipe, config, phase):
    """What a phase trains, with shapes and no values."""
    if isinstance(phase, TeacherTraining):
        return _empty_teacher(config)
    with torch.device("meta"):
        return HyenaNeoXForCausalLM(student.configuration(recipe, config))


def _empty_teacher(config):
    with torch.device("meta"):
        return GPTNeoXForCausalLM(config)


def _size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def _without_attention(recipe):
    return dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, attention_layers=()))


def _taken(folder):
    """The seconds of each training whose history is in `folder`."""
    if not (folder / "history.json").is_file():
        return []
    history = checkpoint.read_json(folder / "history.json")
    if not (folder / "turns.json").is_file():
        return [history[-1]["seconds"]]
    turns = checkpoint.read_json(folder / "turns.json")
    if (folder / "activations").is_dir():  # whose turns it names before its own
        turns = turns[len(checkpoint.read_json(folder / "activations/turns.json")) :]
    seconds = {entry["step"]: entry["seconds"] for entry in history}
    return [seconds[step] for step in itertools.accumulate(turn["steps"] for turn in turns)]


def _student_line(recipe, config):
    made = student.configuration(recipe, config)
    if recipe.recurrence and recipe.recurrence.state_bytes is not None:
        allocation.check(made, recipe.recurrence.state_bytes)
    kept = ", ".join(map(str, made.attention_layers))
    window = f"; layer {kept} keeps attention, in a window of {made.attention_window or 'any length'}" if kept else ""
    return (
        f"student   {recipe.student.mixer}, {_size(_empty(recipe, config, None)):,} parameters, {made.num_filters} "
        f"filters a layer, each over {made.hidden_size // made.num_filters} channels{window}"
    )


def _cache_line(recipe, config):
    """What the cache takes on the disk at most."""
    settings, length = recipe.cache, recipe.data.context_length
    kinds = [teacher_outputs.ACTIVATIONS] if settings.activations else []
    kinds += [teacher_outputs.top_kind(settings.logits)] if settings.logits else []
    each = sum(teacher_outputs.row_bytes(kind, config, length) for kind in kinds) / length
    most = sum(phase.steps * phase.batch_size for phase in recipe.transfer.phases) * recipe.data.context_length
    return (
        f"cache     {recipe.cache.folder}: {each:,.0f} bytes a token, {each * most / 2**30:,.2f} GiB where all text is "
        "read once and less where it is read again"
    )


def _stage_table(planned):
    lines = [f"{'stage':<14}{'steps':>9}{'tokens':>16}{'FLOPs':>9}{'time left':>11}{'memory':>10}  folder"]
    for stage in planned:
        left = "" if stage.seconds is None else _duration(stage.seconds * (1 - stage.done))
        memory = "" if stage.memory is None else f"{sum(stage.memory.values()) / 2**30:.2f}G"
        state = "  (complete)" if stage.done >= 1 else "  (goes on)" if stage.done else ""
        lines.append(
            f"{stage.name:<14}{stage.steps:>9,}{stage.tokens:>16,}{_prefixed(stage.flops):>9}{left:>11}{memory:>10}  "
            f"{stage.folder}{state}"
        )
    left = sum(stage.seconds * (1 - stage.done) for stage in planned if stage.seconds is not None)
    total = f"{sum(s.tokens for s in planned):>16,}{_prefixed(sum(s.flops for s in planned)):>9}{_duration(left):>11}"
    return [*lines, f"{'all':<14}{sum(s.steps for s in planned):>9,}{total}"]


def _memory_table(planned):
    """Memory of a device by what it holds, of each training that is to be made."""
    tried = [stage for stage in planned if stage.memory is not None]
    if not tried:
        return []
    lines = ["", f"{'MiB':<14}" + "".join(f"{key:>11}" for key in tried[0].memory)]
    for stage in tried:
        lines.append(f"{stage.name:<14}" + "".join(f"{size / 2**20:>11,.0f}" for size in stage.memory.values()))
    return lines


def _how(recipe, planned, processes):
    """What the figures come from, and what is not in them."""
    tried = [stage for stage in planned if stage.seconds is not None]
    if not tried:
        return []
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    several = f"{processes} processes on " if processes > 1 else ""
    lines = [f"For {several}{device}, from steps made just now with random weights; the teacher's part is in them."]
    whole = [stage.name for stage in tried if stage.whole]
    small = [stage.name for stage in tried if not stage.whole]
    how = "as measured" if cuda else "of the tensors that its operations made"
    if whole:
        lines.append(f"As they are: {', '.join(whole)}; memory of the step: its peak, {how}.")
    if small:
        lines.append(
            f"From one sequence in models of two depths and a smaller vocabulary: {', '.join(small)}; time and memory "
            "are taken as linear in layers, sequences, vocabulary and parameters."
        )
    left_out = ["reading text", "checkpoints"]
    if recipe.cache:
        left_out.append("filling and reading the cache")
    if processes > 1:
        left_out.append("what the processes tell each other (memory is that of DDP: FSDP and ZeRO hold less)")
    lines.append(f"Not in it: {', '.join(left_out)}.")
    if recipe.transfer and any(phase.flat is not None for phase in recipe.transfer.activations):
        lines.append("Activations end sooner where the held-out error is flat.")
    return lines


def _prefixed(number):
    """Three digits and a prefix: 1.23T."""
    power = min(6, int(math.log10(max(1, number)) / 3))
    return f"{number / 1000**power:.3g}{['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}"


def _duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
