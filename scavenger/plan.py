"""What a recipe would do: parameters, tokens, time, memory and folders, before anything is done."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from scavenger import checkpoint, student, teacher
from scavenger.model import HyenaNeoXForCausalLM
from scavenger.recipe import Recipe, teacher_shape


# Share of the measured matrix rate that a training step is taken to reach: small kernels, element-wise work and the
# optimiser take the rest. Our guess; with it the quickstart's plan says 7 minutes, and the whole run took 5 to 6.
EFFICIENCY = 0.35
ADAM_BYTES = 16  # per trained parameter: weight, gradient and two moments in float32
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
    if recipe.hub:
        private = ", private" if recipe.hub.private else ""
        lines.append(
            f"Then the student is pushed to {recipe.hub.name} (branch {recipe.hub.revision or 'main'}{private})."
        )
    return "\n".join(lines)


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
