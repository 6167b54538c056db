"""The comparison the project exists for: the same student, from scratch, on the text that transfer saw."""

import bisect
from functools import partial
from pathlib import Path

from scavenger import data, student, teacher, training
from scavenger.recipe import Recipe, Stage
from scavenger.run import checkpoint
from scavenger.transfer import transfer


def run(recipe: Recipe, run_dir: Path, accelerator, tokenizer) -> Path:
    """Make `baseline/`: next-token training on the blocks that transfer read, in the same batches and order."""
    folder = run_dir / "baseline"
    if checkpoint.complete(folder):
        return folder
    model = student.new(recipe, teacher.load_configuration(recipe, run_dir))
    blocks = data.blocks(run_dir / "data", "train")
    turns = checkpoint.read_json(run_dir / "transfer" / "turns.json")
    begins = [sum(turn["steps"] for turn in turns[:index]) for index in range(len(turns) + 1)]

    def batch(step):
        index = bisect.bisect_right(begins, step) - 1
        size = turns[index]["batch_size"]
        return data.batch(blocks, turns[index]["first"] + (step - begins[index]) * size, size, recipe.seed)

    warmup = min(recipe.baseline.warmup_steps, begins[-1])  # a transfer that ended early has fewer steps than planned
    stage = Stage(begins[-1], turns[-1]["batch_size"], recipe.baseline.learning_rate, warmup)
    history, model = training.train(
        "baseline",
        training.NextTokens(model),
        training.next_token_loss,
        batch,
        stage,
        checkpoint.partial(folder) / "steps",
        accelerator,
        recipe,
        begins=transfer.taught(recipe) + stage.steps,
        watch=dict if training.is_spread(accelerator) else partial(transfer.held_out_loss, model, run_dir),
    )
    checkpoint.finish_model(model, tokenizer, history, folder, accelerator)
    return folder
