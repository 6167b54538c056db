"""Refinement: poles and residues after extraction, trained on what they do to the model's output.

Extraction makes the taps near; a tap's worth to the logits it does not know. Source: arXiv:2310.18780, section 3 (poles
and residues by gradient, there on the filter's error).
"""

from pathlib import Path

import torch

from scavenger import checkpoint, data, losses, teacher, training, transfer
from scavenger.model import HyenaNeoXForCausalLM
from scavenger.recipe import Recipe


def run(
    recipe: Recipe, run_dir: Path, recurrent: HyenaNeoXForCausalLM, student: HyenaNeoXForCausalLM, accelerator
) -> list[dict]:
    """Train the modal filters of `recurrent` in place on the divergence from `student`, or from the teacher.

    Nothing else is trained and the state keeps its size. The text is that of the transfer, read on from where the
    transfer ended. Returns the history; resumes.
    """
    stage = recipe.recurrence.refine
    target = (student if stage.target == "student" else teacher.load(recipe, run_dir)).to(accelerator.device)
    blocks = data.blocks(run_dir / "data", "train")
    first = transfer.sequences(recipe)
    for name, parameter in recurrent.named_parameters():
        parameter.requires_grad_(".mixer.filter." in name)

    def loss(module, ids):
        with torch.no_grad():
            wanted = target(input_ids=ids, use_cache=False).logits
        return losses.logit_divergence(module(input_ids=ids, use_cache=False).logits, wanted), {}

    history = training.train(
        "refinement",
        recurrent,
        loss,
        lambda step: data.batch(blocks, first + step * stage.batch_size, stage.batch_size, recipe.seed),
        stage,
        checkpoint.partial(run_dir / "recurrence") / "steps",
        accelerator,
        recipe.training,
        begins=recipe.transfer.activations.steps + recipe.transfer.logits.steps,
    )
    recurrent.requires_grad_(True).eval()
    return history
