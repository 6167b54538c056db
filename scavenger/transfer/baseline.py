"""The comparison the project exists for: the same student from scratch, on the text that transfer read."""

import bisect
from functools import partial
from pathlib import Path

from transformers import GenerationConfig

from scavenger import data, student, teacher, training
from scavenger.flops import Flops
from scavenger.model import HyenaForCausalLM
from scavenger.recipe import Stage
from scavenger.run import checkpoint
from scavenger.run.run import Run
from scavenger.transfer import transfer


def run(run: Run) -> Path:
    """Make `baseline/`: next-token training on the blocks that transfer read, in the same batches and order."""
    recipe, folder = run.recipe, run.folder / "baseline"
    if checkpoint.complete(folder):
        return folder
    config = teacher.load_configuration(recipe.teacher, run.folder)
    model = student.new(recipe.student, recipe.data.context_length, config, recipe.seed)
    model.generation_config = GenerationConfig.from_pretrained(run.folder / "transfer")
    history, model = training.train(run, pretraining(run, model, checkpoint.partial(folder) / "steps"))
    checkpoint.finish_model(run, model, history, folder)
    return folder


def pretraining(run: Run, model: HyenaForCausalLM, steps_dir: Path) -> training.Optimisation:
    """Next-token training in the batches of the run's transfer."""
    recipe, blocks, counted = run.recipe, run.blocks("train"), run.counted("train")
    held_out = partial(transfer.held_out_loss, model, run.blocks("validation"), run.counted("validation"))
    turns = checkpoint.read_json(run.folder / "transfer" / "turns.json")
    begins = [sum(turn["steps"] for turn in turns[:index]) for index in range(len(turns) + 1)]

    def batch(step):
        index = bisect.bisect_right(begins, step) - 1
        size = turns[index]["batch_size"]
        return data.batch(blocks, turns[index]["first"] + (step - begins[index]) * size, size, recipe.seed, counted)

    warmup = min(recipe.baseline.warmup_steps, begins[-1])  # a transfer that ended early has fewer steps than planned
    settings = Stage(begins[-1], turns[-1]["batch_size"], recipe.baseline.learning_rate, warmup)
    return training.Optimisation(
        name="baseline",
        module=training.NextTokens(model),
        settings=settings,
        steps_dir=steps_dir,
        batch=batch,
        loss=training.next_token_loss,
        watch=transfer.watching(run, held_out),
        flops=3 * Flops(teacher.load_configuration(recipe.teacher, run.folder), recipe.data.context_length).whole,
        first_step=transfer.teacher_steps(recipe) + settings.steps,
    )
