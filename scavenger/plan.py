"""What a recipe would do: parameters, FLOPs, tokens, time, memory and folders, before anything is done."""

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scavenger import families, losses, measure, student, teacher, training
from scavenger.flops import Flops
from scavenger.model import HyenaForCausalLM
from scavenger.recipe import EMBEDDED_TEACHER, Activations, Logits, Recipe, Stage, TeacherTraining, require_layers
from scavenger.recurrence import allocation
from scavenger.report import report
from scavenger.run import checkpoint
from scavenger.transfer import teacher_outputs, transfer


# On a CPU no more sequences of a step are timed than take so many operations: about ten seconds on two cores. A step of
# which even one sequence takes more is not timed.
TIMED_FLOPS = 5e11


@dataclass(frozen=True)
class PlannedStage:
    """One training: its size, and the time and memory it is expected to take; neither where it is complete."""

    name: str
    steps: int
    sequences: int
    tokens: int
    flops: float
    folder: Path
    turns: int = 1  # trainings that it consists of, each with its own history
    done: float = 0.0  # share of its steps that are made
    seconds: float | None = None  # of all steps; None where no step was timed
    memory: dict[str, float] | None = None  # bytes held on a device throughout, by what they hold
    most_memory: int | None = None  # bytes of a device at the peak of the timed step; None on a CPU
    peak: float | None = None  # FLOP/s of a matrix product on all devices together

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.seconds is None else self.tokens / self.seconds

    @property
    def utilisation(self) -> float | None:
        """The model's FLOPs a second as a share of the devices' rate."""
        return None if self.seconds is None else self.flops / self.seconds / self.peak


def show(recipe: Recipe, processes: int = 1) -> str:
    """The plan as text for a terminal."""
    return text(recipe, stages(recipe, processes), processes)


def stages(recipe: Recipe, processes: int = 1) -> list[PlannedStage]:
    """Every training of the recipe, in order; one step of each that is not complete is timed on this device."""
    config = _configuration(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, times = [], {}
    for stage, phase, layers in _trainings(recipe, config):
        if stage.done < 1:
            rows = -(-phase.batch_size // (processes * recipe.training.accumulate))
            alike = dataclasses.replace(phase, steps=1, warmup_steps=0, learning_rate=0.1)
            if alike not in times:
                # The run draws the same random numbers with and without a plan.
                with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
                    times[alike] = timed(recipe, config, alike, layers, rows, stage.flops / stage.sequences, device)
            memory = _held(recipe, config, phase, layers, device)
            if processes > 1:
                memory["gradients"] *= 2  # once more, in the buckets of data parallelism
            stage = dataclasses.replace(stage, memory=memory)
            if times[alike] is not None:
                part, update, most = times[alike]
                parts = stage.sequences / phase.batch_size * recipe.training.accumulate
                peak = processes * measure.matrix_rate(device, _half() or torch.float32)
                seconds = parts * part + stage.steps * update
                stage = dataclasses.replace(stage, seconds=seconds, most_memory=most, peak=peak)
        found.append(stage)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # NCCL takes its buffers from the device, not from torch's allocator
    return found


def timed(recipe, config, phase, layers, rows, flops, device) -> tuple[float, float, int | None] | None:
    """Seconds of a micro-batch of `rows` sequences and of an optimizer update, with random weights and text.

    And on a GPU the most bytes in use. `flops` are those of one sequence. None where the step is too large for this
    device.
    """
    sequences = rows if device.type == "cuda" else min(rows, int(TIMED_FLOPS / flops))
    if sequences == 0:
        return None
    try:
        step = _Step(recipe, config, phase, layers, device)
        step.forward_backward(1, 8)  # start-up, and the optimizer's moments
        step.update()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        part, update = step.forward_backward(sequences, recipe.data.context_length), step.update()
        return rows / sequences * part, update, torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    except torch.OutOfMemoryError:
        return None


def text(recipe: Recipe, planned: list[PlannedStage], processes: int = 1) -> str:
    """The models, the table of stages, the memory that they hold, and what comes before and after them."""
    config = _configuration(recipe)
    where = recipe.teacher.folder or recipe.teacher.name or "trained by this run"
    where = "embedded" if where == EMBEDDED_TEACHER else where
    lines = [
        f"run       {recipe.run_dir}",
        f"data      {recipe.data.path or recipe.data.name or 'the Python standard library on this machine'}"
        f", contexts of {recipe.data.context_length} tokens",
        f"teacher   {where}: {config.model_type}, {_size(_empty_teacher(config)):,} parameters, "
        f"{config.num_hidden_layers} layers of width {config.hidden_size}",
    ]
    if recipe.transfer:
        lines.append(_student_line(recipe, config))
    if recipe.cache:
        lines.append(_cache_line(recipe, config))
    lines.append(_logit_line(recipe, config, processes))
    if recipe.transfer:
        lines.append(_layer_line(recipe, config, processes))
    if planned:
        lines += ["", *_stage_table(planned), *_memory_table(planned), *_notes(recipe, planned, processes)]
    if recipe.recurrence:
        settings = recipe.recurrence
        aim = (
            f"the fewest modes with a relative error of at most {settings.tolerance:g}"
            if settings.state_bytes is None
            else f"{settings.state_bytes:,} bytes of state in {settings.dtype} "
            f"({_as_cache(settings.state_bytes, config)}), spent where they lower the KL divergence most. "
            f"{_traffic(recipe, config)}"
        )
        most = f"at most {settings.max_state_size} modes"
        lines.append(f"Then each filter becomes a recurrence of {most} ({settings.method}): {aim.rstrip('.')}.")
    if recipe.report:
        lines.append(_report_line(recipe, config, planned))
    if recipe.hub:
        private = ", private" if recipe.hub.private else ""
        lines.append(
            f"Then the student is pushed to {recipe.hub.name} (branch {recipe.hub.revision or 'main'}{private})."
        )
    return "\n".join(lines)


def write(planned: list[PlannedStage], run_dir: Path):
    """Write `plan.json`, unless an earlier launch of the run has: that one planned all of it."""
    if not (run_dir / "plan.json").is_file():
        facts = [
            dataclasses.asdict(stage) | {"folder": stage.folder.relative_to(run_dir).as_posix()} for stage in planned
        ]
        checkpoint.write_json(run_dir / "plan.json", facts)


def _configuration(recipe):
    """The teacher's configuration, or that of the teacher which the recipe trains."""
    train = recipe.teacher.train
    if train is not None:
        return teacher.shape(train, recipe.data.context_length, train.vocab_size)
    config = teacher.load_configuration(recipe.teacher, Path(recipe.run_dir))
    require_layers(recipe, config.num_hidden_layers)
    return config


def _trainings(recipe, config):
    """Each training of the recipe, its phase, and the layers whose mixers it matches."""
    run_dir, length = Path(recipe.run_dir), recipe.data.context_length
    flops = Flops(config, length)

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
        # One training, in the batches of all phases: a step of the largest is timed.
        phases, folder = recipe.transfer.phases, run_dir / "baseline"
        steps, sequences = sum(p.steps for p in phases), sum(p.steps * p.batch_size for p in phases)
        made = stage("baseline", steps, sequences, 3 * flops.whole, folder)
        largest = Stage(steps, max(phase.batch_size for phase in phases), recipe.baseline.learning_rate)
        yield dataclasses.replace(made, done=_done(folder, steps)), largest, ()


def _done(reached, steps, *later):
    """The share of a training that is made; 1 if `reached` or a folder that is made after it exists."""
    if any(folder.is_dir() for folder in (reached, *later)):
        return 1.0
    made = [path.name for path in (checkpoint.partial(reached) / "steps").glob("[0-9]*")]
    return max((int(name) / steps for name in made if name.isdigit()), default=0.0)


class _Step:
    """One real step of a training with random weights and text: its module, forward and backward pass, and update."""

    def __init__(self, recipe, config, phase, layers, device):
        torch.manual_seed(recipe.seed)
        self.recipe, self.phase, self.device = recipe, phase, device
        self.vocabulary, self.width = config.vocab_size, config.hidden_size
        # A progressive phase matches one layer at a time: the middle one stands for all.
        self.layers = layers[len(layers) // 2 :][:1] if getattr(phase, "schedule", None) == "progressive" else layers
        with device:
            self.frozen = None
            if isinstance(phase, (Activations, Logits)):
                dtype = _teacher_dtype(recipe, config, device)
                self.frozen = _teacher(config).to(dtype).requires_grad_(False).eval()
            if isinstance(phase, TeacherTraining):
                model = _teacher(config)
            else:
                model = HyenaForCausalLM(_student_configuration(recipe, config))
        filter = recipe.student.filter
        if isinstance(phase, Activations):
            self.module = transfer.MixerMatching(model, self.layers, transfer.READING[phase.schedule], filter)
        elif isinstance(phase, Logits):
            self.module = transfer.LogitMatching(model, phase, filter)
        else:
            self.module = training.NextTokens(model)
        if recipe.training.checkpoint_activations:
            training.checkpoint_activations(self.module)
            self.module.train()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def forward_backward(self, rows, length):
        """Seconds of the teacher's forward pass and the student's forward and backward pass."""
        ids = torch.randint(self.vocabulary, (rows, length), device=self.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        began = self._now()
        target = self._target(ids)
        half = _half()
        with torch.autocast(self.device.type, half, enabled=half is not None):
            if isinstance(self.phase, Activations):
                errors, tail = self.module(ids, mask, *target)
                value = errors.sum() + tail
            elif isinstance(self.phase, Logits):
                counts = torch.full((2,), float(ids.numel()), device=self.device)
                value, _, tail = self.module(ids, mask, counts, 1.0, *target)
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

    def _target(self, ids):
        """The teacher's outputs, or in their place what a cache would give."""
        cache = self.recipe.cache
        if isinstance(self.phase, Activations):
            if cache and cache.activations:
                kept = torch.randn(*ids.shape, self.width, device=self.device)
                return dict.fromkeys(self.layers, kept), dict.fromkeys(self.layers, kept)
            return teacher.attention(self.frozen, ids, self.layers)
        if not isinstance(self.phase, Logits):
            return None
        if cache and cache.logits:
            shape = *ids.shape, min(cache.logits, self.vocabulary - 1)
            even = torch.full(shape, -math.log(self.vocabulary), device=self.device)
            rest = torch.full(shape[:2], math.log1p(-shape[2] / self.vocabulary), device=self.device)
            return losses.TopK(even, torch.arange(shape[2], device=self.device).expand(shape), rest), None, []
        return losses.Head.of(self.frozen), *teacher.hidden_states(self.frozen, ids, self.phase.hidden_states > 0)

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _half():
    """The dtype of autocast, by the launcher's variable (accelerate reads nothing else for this); None without it."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(os.environ.get("ACCELERATE_MIXED_PRECISION"))


def _teacher_dtype(recipe, config, device):
    """As teacher.load keeps it."""
    if recipe.teacher.dtype != "auto":
        return getattr(torch, recipe.teacher.dtype)
    return torch.float32 if device.type == "cpu" else config.dtype or torch.float32


def _held(recipe, config, phase, layers, device):
    """Bytes that a training holds on each device throughout, by what they hold."""
    frozen = _size(_empty_teacher(config)) if isinstance(phase, (Activations, Logits)) else 0
    trained = _trained(recipe, config, phase, layers)
    return {
        "weights": 4 * _size(_empty(recipe, config, phase)),
        "gradients": 4 * trained,
        "moments": 8 * trained,
        "teacher": frozen * _teacher_dtype(recipe, config, device).itemsize,
    }


def _trained(recipe, config, phase, layers):
    """How many parameters a training changes."""
    model = _empty(recipe, config, phase)
    if getattr(phase, "trained", None) == "mixers":
        layers = range(config.num_hidden_layers)
    elif not isinstance(phase, Activations):
        return _size(model)
    counts = [_size(model.model.layers[layer].mixer) for layer in layers]
    return max(counts) if getattr(phase, "schedule", None) == "progressive" else sum(counts)


def _empty(recipe, config, phase):
    """The model that a phase trains, without weights."""
    if isinstance(phase, TeacherTraining):
        return _empty_teacher(config)
    made = _student_configuration(recipe, config)
    with torch.device("meta"):
        return HyenaForCausalLM(made)


def _teacher(config):
    return families.of(config.model_type).model(config)


def _empty_teacher(config):
    with torch.device("meta"):
        return _teacher(config)


def _student_configuration(recipe, config):
    return student.configuration(recipe.student, recipe.data.context_length, config)


def _size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def _student_line(recipe, config):
    made = _student_configuration(recipe, config)
    if recipe.recurrence and recipe.recurrence.state_bytes is not None:
        allocation.check(made, recipe.recurrence.state_bytes, recipe.recurrence.itemsize)
    parts = [f"{recipe.student.mixer}, {_size(_empty(recipe, config, None)):,} parameters"]
    if made.num_filters:
        parts.append(f"{made.num_filters} filters a layer, each over {made.filter_head_width} channels")
    if made.window:
        parts.append(f"beside a window of {made.window}" if made.num_filters else f"a window of {made.window}")
    said = ", ".join(parts)
    kept = [f"layer {', '.join(map(str, made.attention_layers))}"] if made.attention_layers else []
    kept += [f"head {', '.join(recipe.student.attention_heads)}"] if recipe.student.attention_heads else []
    if kept:
        said += f"; {' and '.join(kept)} keeps attention, in a window of {made.attention_window or 'any length'}"
    return f"student   {said}"


def _as_cache(state, config):
    """The lengths from which on the teacher's KV cache holds as many bytes as a state."""
    token = families.of(config.model_type).cache_numbers(config)
    lengths = [-(-state // (size * token)) for size in (4, 2)]
    return "the teacher's KV cache of {:,} tokens in float32, of {:,} in 16 bits".format(*lengths)


def _traffic(recipe, config):
    """What a step moves of a state of the whole budget, and from which length on attention moves more."""
    settings = recipe.recurrence
    made = _student_configuration(recipe, config)
    moved = allocation.moved_bytes(made, settings.state_bytes, settings.itemsize)
    tokens = -(-moved // (2 * families.of(config.model_type).cache_numbers(config)))
    return (
        f"A step reads and writes {moved:,} bytes of such a state: where memory bounds a step, it is quicker than its "
        f"teacher's, with a KV cache in 16 bits, from {tokens:,} tokens on"
    )


def _cache_line(recipe, config):
    """The most that the cache takes on the disk."""
    settings, length = recipe.cache, recipe.data.context_length
    kinds = [teacher_outputs.ACTIVATIONS] if settings.activations else []
    kinds += [teacher_outputs.top_kind(settings.logits)] if settings.logits else []
    each = sum(teacher_outputs.row_bytes(kind, config, length) for kind in kinds) / length
    most = sum(phase.steps * phase.batch_size for phase in recipe.transfer.phases) * length
    return (
        f"cache     {settings.folder}: {each:,.0f} bytes a token, at most {each * most / 2**30:,.2f} GiB; less where "
        "text is read more than once"
    )


def _logit_line(recipe, config, processes):
    """The most memory that logits take at a time, wherever the run computes them."""
    trained = (phase.batch_size for _, phase, _ in _trainings(recipe, config))
    parts = processes * recipe.training.accumulate
    most = max((-(-size // parts) * recipe.data.context_length for size in trained), default=0)
    ways = [(max(most, measure.BATCH_TOKENS), False)]
    if torch.cuda.is_available() and losses.losses_and_slope_ is not None:
        ways.append((most, True))
    positions, kernel = max(ways, key=lambda way: losses.logit_peak(config.vocab_size, *way))
    return (
        f"logits    at most {losses.logit_peak(config.vocab_size, positions, kernel) / 2**30:.2f} GiB of memory at a "
        f"time, on top of what is held: {min(positions, losses.chunk_rows(config.vocab_size, kernel)):,} positions of "
        f"{config.vocab_size:,} words are computed at once"
    )


def _layer_line(recipe, config, processes):
    """What the student's layers keep for the backward pass of the largest micro-batch, in float32, and what else."""
    rows = -(-max(p.batch_size for p in recipe.transfer.phases) // (processes * recipe.training.accumulate))
    with FakeTensorMode():  # shapes alone
        body = HyenaForCausalLM(_student_configuration(recipe, config)).model
        hidden = torch.empty(rows, recipe.data.context_length, config.hidden_size)
        whole = kept_activations(body, hidden)
    less = len(body.layers) * hidden.nbytes + whole / len(body.layers)  # all inputs, and one layer at a time
    sizes = [f"{size / 2**20:,.0f} MiB" for size in (whole, less)]
    other = "without" if recipe.training.checkpoint_activations else "with"
    now, then = sizes[::-1] if other == "without" else sizes
    return (
        f"layers    keep about {now} for the backward pass of {rows} sequences; {then} {other} "
        "training.checkpoint_activations, which makes their forward pass twice"
    )


def kept_activations(body: torch.nn.Module, hidden: torch.Tensor) -> float:
    """Bytes that a student's layers keep for the backward pass of hidden states (batch, length, channel).

    One layer of each kind is tried.
    """
    kinds = [type(layer.mixer) for layer in body.layers]
    own = {parameter.untyped_storage()._cdata for parameter in body.parameters()}
    _, cos, sin = body.mask_and_angles(hidden)
    found = 0
    for kind in set(kinds):
        kept = {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # held, or another would get its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made = body.layers[kinds.index(kind)](hidden, cos, sin, None, None)
        found += kinds.count(kind) * sum(storage.nbytes() for storage in kept.values())
        del made
    return found


def _report_line(recipe, config, planned):
    """What the report measures, and its time and memory: that of reading at the rate of the timed steps."""
    contexts = ", ".join(f"{length:,}" for length in recipe.report.context_lengths)
    work = report.work(recipe)
    timed = [stage for stage in planned if stage.seconds]
    reading = ""
    if timed:
        rate = sum(stage.flops for stage in timed) / sum(stage.seconds for stage in timed)
        read = work["models"] * (work["tokens_read"] + work["tokens_generated"])
        seconds = read * Flops(config, recipe.data.context_length).whole / rate
        reading = f" (about {_duration(seconds)})"
    return (
        f"Then all models are measured on {recipe.data.evaluation_tokens:,} held-out tokens, in recall, in generated "
        f"text, and in speed after {contexts} tokens. Each reads {work['tokens_read']:,} tokens and generates "
        f"{work['tokens_generated']:,}{reading}; timing takes up to {_duration(work['timing_seconds'])}."
    )


def _stage_table(planned):
    lines = [
        f"{'stage':<14}{'steps':>9}{'tokens':>16}{'FLOPs':>9}{'time left':>11}{'tokens/s':>11}{'MFU':>8}{'memory':>10}"
        "  folder"
    ]
    for stage in planned:
        left = "" if stage.done >= 1 else "–" if stage.seconds is None else _duration(stage.seconds * (1 - stage.done))
        rate, share = stage.tokens_per_second, stage.utilisation
        shown = "" if rate is None else f"{rate:,.0f}", "" if share is None else f"{100 * share:.1f} %"
        held = stage.most_memory or (stage.memory and sum(stage.memory.values()))
        memory = "" if held is None else f"{held / 2**30:.2f}G"
        state = "  (complete)" if stage.done >= 1 else "  (resumes)" if stage.done else ""
        lines.append(
            f"{stage.name:<14}{stage.steps:>9,}{stage.tokens:>16,}{_prefixed(stage.flops):>9}{left:>11}{shown[0]:>11}"
            f"{shown[1]:>8}{memory:>10}  {stage.folder}{state}"
        )
    total = f"{sum(s.tokens for s in planned):>16,}{_prefixed(sum(s.flops for s in planned)):>9}"
    return [*lines, f"{'all':<14}{sum(s.steps for s in planned):>9,}{total}{_duration(_left(planned)):>11}"]


def _left(planned):
    """Seconds of all steps that are still to be made, of the stages that were timed."""
    return sum(stage.seconds * (1 - stage.done) for stage in planned if stage.seconds is not None)


def _memory_table(planned):
    """Bytes that each device holds, by what they hold, of each training that is to be made."""
    made = [stage for stage in planned if stage.memory is not None]
    if not made:
        return []
    lines = ["", f"{'MiB held':<14}" + "".join(f"{key:>11}" for key in made[0].memory)]
    for stage in made:
        lines.append(f"{stage.name:<14}" + "".join(f"{size / 2**20:>11,.0f}" for size in stage.memory.values()))
    return lines


def _notes(recipe, planned, processes):
    """How the figures were found, and what they leave out."""
    made = [stage for stage in planned if stage.memory is not None]
    if not made:
        return []
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    several = f"{processes} processes on " if processes > 1 else ""
    left_out = ["reading text", "checkpoints", "recurrence and report"]
    if recipe.cache:
        left_out.append("filling and reading the cache")
    if processes > 1:
        left_out.append("communication (memory is that of data parallelism: FSDP and ZeRO hold less)")
    on_top = any(stage.most_memory is None for stage in made)
    memory = "what is held throughout; activations come on top" if on_top else "the most that the timed step held"
    lines = [
        f"Times for {several}{device}: one step of each stage was timed just now, with random weights. Not included: "
        f"{', '.join(left_out)}. Memory is {memory}."
    ]
    if peak := next((stage.peak for stage in made if stage.peak is not None), None):
        lines.append(
            f"MFU: the share of {_prefixed(peak / processes)}FLOP/s, which a square matrix product reached just now."
            + (f" Cost: {_left(planned) * processes / 3600:.2g} GPU-hours." if cuda else "")
        )
    untimed = [stage.name for stage in made if stage.seconds is None]
    if untimed:
        why = "does not fit this GPU's memory" if cuda else "is too large to be timed on this CPU"
        lines.append(f"Not timed, as a step {why}: {', '.join(untimed)}. Run --plan on the device that will train.")
    if recipe.transfer and any(phase.flat is not None for phase in recipe.transfer.activations):
        lines.append("Activations end earlier where the held-out error no longer falls (`flat`).")
    return lines


def _prefixed(number):
    """Three digits and a prefix: 1.23T."""
    power = min(6, int(math.log10(max(1, number)) / 3))
    return f"{number / 1000**power:.3g}{['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}"


def _duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
