"""What a recipe would do: parameters, tokens, time, memory and folders, before anything is done."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from scavenger import allocation, certificate, checkpoint, data, measure, recurrence, student, teacher
from scavenger.model import HyenaNeoXForCausalLM
from scavenger.model.filters import ModalFilter
from scavenger.recipe import Recipe, teacher_shape


# Share of the measured matrix rate that a training step is taken to reach: small kernels, element-wise work and the
# optimiser take the rest. Our guess; with it the quickstart's plan says 7 minutes, and the whole run took 5 to 6.
EFFICIENCY = 0.35
ADAM_BYTES = 16  # per trained parameter: weight, gradient and two moments in float32
TOLERANCES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3)  # that the table of recurrences shows, beside the recipe's own
PLANNED_FILTERS = 16  # of each layer that the table is made from, so that it takes seconds
PLANNED_SEQUENCES = 8  # of held-out text, likewise: the predicted KL is good to a half
ACTIVATION_FLOATS = 34  # per token, layer and channel kept for the backward pass of a GPT-NeoX block


@dataclass(frozen=True)
class PlannedStage:
    name: str
    steps: int
    tokens: int
    flops: float
    memory: float  # bytes, estimated
    folder: Path


def show(recipe: Recipe, processes: int = 1) -> str:
    """The plan as text for a terminal."""
    teacher_config, sizes, stages = _stages(recipe, processes)
    rate = _matrix_rate() * EFFICIENCY * processes
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    where = recipe.teacher.folder or recipe.teacher.name or "trained by this run"
    lines = [
        f"run       {recipe.run_dir}",
        f"data      {recipe.data.path or recipe.data.name or 'the Python standard library on this machine'}"
        f", contexts of {recipe.data.context_length} tokens",
        f"teacher   {where}: GPT-NeoX, {sizes['teacher']:,} parameters, {teacher_config.num_hidden_layers} layers "
        f"of width {teacher_config.hidden_size}",
    ]
    if recipe.transfer:
        config = student.configuration(recipe, teacher_config)
        if recipe.recurrence and recipe.recurrence.state_bytes is not None:
            allocation.check(config, recipe.recurrence.state_bytes)
        kept = ", ".join(map(str, config.attention_layers))
        lines.append(
            f"student   {recipe.student.mixer}, {sizes['student']:,} parameters, {config.num_filters} filters a layer, "
            f"each over {config.hidden_size // config.num_filters} channels"
            + (
                f"; layer {kept} keeps attention, in a window of {config.attention_window or 'any length'}"
                if kept
                else ""
            )
        )
    lines += ["", f"{'stage':<12}{'steps':>8}{'tokens':>14}{'time':>10}{'memory':>10}  folder"]
    for stage in stages:
        done = (
            "  (complete)"
            if stage.folder.is_dir()
            else "  (goes on)"
            if checkpoint.partial(stage.folder).is_dir()
            else ""
        )
        lines.append(
            f"{stage.name:<12}{stage.steps:>8,}{stage.tokens:>14,}{_duration(stage.flops / rate):>10}"
            f"{stage.memory / 2**30:>9.2f}G  {stage.folder}{done}"
        )
    total = sum(stage.flops for stage in stages) / rate
    lines.append(
        f"{'all':<12}{sum(s.steps for s in stages):>8,}{sum(s.tokens for s in stages):>14,}{_duration(total):>10}"
    )
    lines.append(
        f"Estimated for {processes} process{'es' if processes > 1 else ''} on {device}; "
        "time from a matrix rate measured just now."
    )
    if recipe.recurrence:
        settings = recipe.recurrence
        aim = (
            f"the fewest modes that meet {settings.tolerance:g}"
            if settings.state_bytes is None
            else f"{settings.state_bytes:,} bytes of state where they help most"
        )
        most = f"{settings.max_state_size} modes or fewer"
        lines.append(f"Then each filter becomes a recurrence of {most} ({settings.method}): {aim}.")
    if recipe.hub:
        private = ", private" if recipe.hub.private else ""
        lines.append(
            f"Then the student is pushed to {recipe.hub.name} (branch {recipe.hub.revision or 'main'}{private})."
        )
    return "\n".join(lines)


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


def _stages(recipe, processes):
    """The teacher's configuration, the parameter counts, and every optimisation of the recipe."""
    shape = teacher_shape(recipe)
    config = (
        teacher.load_configuration(recipe, Path(recipe.run_dir))
        if shape is None
        else GPTNeoXConfig(
            **{
                key: value
                for key, value in shape.items()
                if key not in ("architectures", "dtype", "transformers_version", "model_type")
            }
        )
    )
    length, run_dir = recipe.data.context_length, Path(recipe.run_dir)
    with torch.device("meta"):
        sizes = {"teacher": sum(p.numel() for p in GPTNeoXForCausalLM(config).parameters())}
    embedding = config.vocab_size * config.hidden_size
    mixing = 4 * length * config.hidden_size * config.num_hidden_layers  # scores and their product with v, per token
    teacher_forward = 2 * (sizes["teacher"] - embedding) + mixing
    kept = ACTIVATION_FLOATS * config.hidden_size * config.num_hidden_layers
    stages = []

    def add(name, steps, batch_size, flops_per_token, trained, frozen, floats_per_token, folder):
        rows = -(-batch_size // processes)
        memory = ADAM_BYTES * trained + 4 * frozen + 4 * rows * length * floats_per_token
        stages.append(
            PlannedStage(
                name,
                steps,
                steps * batch_size * length,
                steps * batch_size * length * flops_per_token,
                memory,
                run_dir / folder,
            )
        )

    with_logits = kept + 4 * config.vocab_size
    if recipe.teacher.train:
        train = recipe.teacher.train
        add("teacher", train.steps, train.batch_size, 3 * teacher_forward, sizes["teacher"], 0, with_logits, "teacher")
    if recipe.transfer:
        with torch.device("meta"):
            made = HyenaNeoXForCausalLM(student.configuration(recipe, config))
        sizes["student"] = sum(p.numel() for p in made.parameters())
        mixers = sum(p.numel() for layer in made.gpt_neox.layers for p in layer.mixer.parameters())
        forward = 2 * (sizes["student"] - embedding) + mixing
        activations, logits = recipe.transfer.activations, recipe.transfer.logits
        add(
            "activations",
            activations.steps,
            activations.batch_size,
            teacher_forward + 3 * (2 * mixers + mixing),
            mixers,
            sizes["teacher"] + sizes["student"],
            kept,
            "transfer/activations",
        )
        add(
            "logits",
            logits.steps,
            logits.batch_size,
            teacher_forward + 3 * forward,
            sizes["student"],
            sizes["teacher"],
            with_logits + 4 * config.vocab_size,
            "transfer",
        )
        if recipe.baseline:
            for stage in (activations, logits):
                add(
                    "baseline", stage.steps, stage.batch_size, 3 * forward, sizes["student"], 0, with_logits, "baseline"
                )
    return config, sizes, stages


def _matrix_rate():
    """Floating-point operations per second of a float32 matrix product on this device, over a fifth of a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, device=device)
    (a @ a).sum().item()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.2:
        (a @ a)[0, 0].item()
        count += 1
    return 2 * 1024**3 * count / (time.perf_counter() - began)


def _duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
