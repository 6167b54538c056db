"""The comparison the project exists for: the same student, from scratch, on the text that transfer saw."""

from pathlib import Path

from scavenger import checkpoint, data, losses, student, teacher, training, transfer
from scavenger.recipe import Recipe, Stage


def run(recipe: Recipe, run_dir: Path, accelerator, tokenizer) -> Path:
    """Make `baseline/`: next-token training on the blocks of both steps of transfer, in the same batches and order."""
    folder = run_dir / "baseline"
    if checkpoint.complete(folder):
        return folder
    model = student.new(recipe, teacher.load_configuration(recipe, run_dir))
    activations, logits = recipe.transfer.activations, recipe.transfer.logits
    blocks = data.blocks(run_dir / "data", "train")

    def batch(step):
        if step < activations.steps:
            return data.batch(blocks, step * activations.batch_size, activations.batch_size, recipe.seed)
        first = transfer.sequences_of_activations(recipe) + (step - activations.steps) * logits.batch_size
        return data.batch(blocks, first, logits.batch_size, recipe.seed)

    def loss(module, ids):
        return losses.cross_entropy(module(input_ids=ids, use_cache=False).logits, ids), {}

    stage = Stage(
        activations.steps + logits.steps, logits.batch_size, recipe.baseline.learning_rate, recipe.baseline.warmup_steps
    )
    beside = checkpoint.partial(folder)
    history = training.train(
        "baseline", model, loss, batch, stage, beside / "steps", accelerator, recipe.training, begins=stage.steps
    )
    checkpoint.finish_model(model, tokenizer, history, folder, accelerator)
    return folder
