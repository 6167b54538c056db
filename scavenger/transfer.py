"""Stage one: what the teacher knows goes to the student, first by activations, then by logits.

Sources: arXiv:2401.17574 (the two steps, layer by layer from the bottom), arXiv:2505.03005 (all layers in parallel,
then everything free).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from scavenger import checkpoint, data, losses, student, teacher, training
from scavenger.model import HyenaNeoXForCausalLM
from scavenger.recipe import Recipe, Stage
from scavenger.reduction import hankel


SEEN = 16  # filters of a layer whose Hankel values are taken at once: O(length³) each, and a layer can have thousands


def run(recipe: Recipe, run_dir: Path, accelerator, tokenizer) -> Path:
    """Make `transfer/`, the distilled student; `transfer/activations` is the student between the two steps."""
    folder = run_dir / "transfer"
    if checkpoint.complete(folder):
        return folder
    beside = checkpoint.partial(folder)
    frozen = teacher.load(recipe, run_dir).to(accelerator.device)
    model = match_activations(recipe, run_dir, frozen, beside / "activations", accelerator, tokenizer)
    history = match_logits(recipe, run_dir, frozen, model, beside / "steps", accelerator)
    checkpoint.finish_model(model, tokenizer, history, folder, accelerator)
    return folder


def match_activations(recipe, run_dir, frozen, folder, accelerator, tokenizer) -> HyenaNeoXForCausalLM:
    """Step one: each mixer learns to give out what the teacher's attention gives out; nothing else is trained.

    `parallel`: every layer reads the teacher's activations, so one teacher forward serves all and no gradient crosses a
    layer. `progressive`: from the bottom, each layer in its turn reads the student's own; the steps are shared out.
    """
    if checkpoint.complete(folder):
        return HyenaNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).to(accelerator.device)
    stage = recipe.transfer.activations
    model = student.from_teacher(recipe, frozen)
    layers = [layer for layer in range(model.config.num_hidden_layers) if layer not in model.config.attention_layers]
    turns = [list(layers)] if stage.schedule == "parallel" else [[layer] for layer in layers]
    blocks = data.blocks(run_dir / "data", "train")
    history = []
    for turn, (matched, first, steps) in enumerate(_shares(turns, stage.steps)):
        reached = checkpoint.partial(folder) / f"turn_{turn:02d}"
        if checkpoint.complete(reached):
            model = HyenaNeoXForCausalLM.from_pretrained(reached, dtype=torch.float32)
            history = checkpoint.read_json(reached / "history.json")
            continue
        torch.manual_seed(recipe.seed)  # the penalty draws filters; a run that goes on draws the same
        matching = MixerMatching(model, matched, own_inputs=stage.schedule == "progressive")
        with teacher.captured(frozen) as (inputs, outputs):

            def loss(module, ids, model=model, inputs=inputs, outputs=outputs, matched=matched):
                with torch.no_grad():
                    frozen.gpt_neox(input_ids=ids, use_cache=False)
                errors = module(ids, inputs, outputs)
                logged = {f"layer_{layer}": error for layer, error in zip(matched, errors, strict=True)}
                return pressed(errors.sum(), logged, model, recipe)

            name = "activations" if len(turns) == 1 else f"activations of layer {matched[0]}"
            found = training.train(
                name,
                matching,
                loss,
                lambda step, first=first: data.batch(
                    blocks, (first + step) * stage.batch_size, stage.batch_size, recipe.seed
                ),
                _shortened(stage, steps),
                checkpoint.partial(reached) / "steps",
                accelerator,
                recipe.training,
                begins=first,
                watch=lambda model=model: floors(model, recipe),
            )
        history += [entry | {"step": entry["step"] + first} for entry in found]
        checkpoint.finish_model(model, tokenizer, history, reached, accelerator)
    model.requires_grad_(True)
    checkpoint.finish_model(model, tokenizer, history, folder, accelerator)
    return model.to(accelerator.device)


def match_logits(recipe, run_dir, frozen, model, steps_dir, accelerator) -> list[dict]:
    """Step two: the whole student learns the teacher's distribution; returns the history."""
    torch.manual_seed(recipe.seed)  # as before: where the run went on from makes no difference
    stage = recipe.transfer.logits
    blocks = data.blocks(run_dir / "data", "train")
    first = sequences_of_activations(recipe)

    def loss(module, ids):
        with torch.no_grad():
            target = frozen(input_ids=ids, use_cache=False).logits
        logits = module(input_ids=ids, use_cache=False).logits
        divergence = losses.logit_divergence(logits, target)
        if not stage.cross_entropy:
            return pressed(divergence, {"divergence": divergence}, model, recipe)
        ce = losses.cross_entropy(logits, ids)
        logged = {"divergence": divergence, "cross_entropy": ce}
        return pressed((1 - stage.cross_entropy) * divergence + stage.cross_entropy * ce, logged, model, recipe)

    return training.train(
        "logits",
        model,
        loss,
        lambda step: data.batch(blocks, first + step * stage.batch_size, stage.batch_size, recipe.seed),
        stage,
        steps_dir,
        accelerator,
        recipe.training,
        begins=recipe.transfer.activations.steps,
        watch=lambda: floors(model, recipe),
    )


def pressed(loss: Tensor, logged: dict, model: HyenaNeoXForCausalLM, recipe: Recipe) -> tuple[Tensor, dict]:
    """The loss with the Hankel penalty, if the recipe has one, on SEEN filters of each layer drawn at each step."""
    settings = recipe.student.filter
    if not settings.hankel_penalty:
        return loss, logged
    tails = []
    for _, taps in _taps(model, recipe):
        drawn = torch.randperm(len(taps))[:SEEN]
        tails.append(losses.hankel_tail(taps[drawn.to(taps.device)], settings.hankel_states).mean())
    tail = torch.stack(tails).mean()
    return loss + settings.hankel_penalty * tail, logged | {"hankel_tail": tail}


@torch.no_grad()
def floors(model: HyenaNeoXForCausalLM, recipe: Recipe) -> dict[str, float]:
    """For each layer, the least relative error that `hankel_states` real states allow: a mean over SEEN filters."""
    found = {}
    for layer, taps in _taps(model, recipe):
        least = hankel.tap_floors(taps[:: -(-len(taps) // SEEN)].double())
        found[f"floor_{layer}"] = least[:, min(recipe.student.filter.hankel_states, least.shape[1] - 1)].mean().item()
    return found


def _taps(model, recipe):
    """The taps of each layer that has filters, over the context length."""
    for index, layer in enumerate(model.gpt_neox.layers):
        if index not in model.config.attention_layers:
            yield index, layer.mixer.filter(recipe.data.context_length)


def sequences_of_activations(recipe: Recipe) -> int:
    """How many sequences the first step reads, hence where the second begins."""
    return recipe.transfer.activations.steps * recipe.transfer.activations.batch_size


def sequences(recipe: Recipe) -> int:
    """How many sequences both steps read."""
    return sequences_of_activations(recipe) + recipe.transfer.logits.steps * recipe.transfer.logits.batch_size


class MixerMatching(nn.Module):
    """The relative error of each matched mixer's output; the only module whose parameters the first step trains."""

    def __init__(self, model: HyenaNeoXForCausalLM, layers: list[int], own_inputs: bool):
        super().__init__()
        self.model = model
        self.layers = layers
        self.own_inputs = own_inputs
        model.requires_grad_(False)
        for layer in layers:
            model.gpt_neox.layers[layer].mixer.requires_grad_(True)

    def forward(self, ids: Tensor, inputs: list[Tensor], outputs: list[Tensor]) -> Tensor:  # (layer,)
        body = self.model.gpt_neox
        mask, cos, sin = body.mask_and_angles(inputs[0])
        errors = []
        for layer in self.layers:
            taken = self._own_input(ids, layer, cos, sin) if self.own_inputs else inputs[layer]
            errors.append(losses.activation_error(body.layers[layer].mixer(taken, cos, sin), outputs[layer]))
        return torch.stack(errors)

    @torch.no_grad()
    def _own_input(self, ids, layer, cos, sin):
        body = self.model.gpt_neox
        hidden = body.embed_in(ids)
        for below in body.layers[:layer]:
            hidden = below(hidden, cos, sin, None, None)
        return body.layers[layer].input_layernorm(hidden)


def _shares(turns, steps):
    """Each turn with its first step and number of steps."""
    edges = [round(turn * steps / len(turns)) for turn in range(len(turns) + 1)]
    return [(turn, edges[index], edges[index + 1] - edges[index]) for index, turn in enumerate(turns)]


def _shortened(stage, steps):
    """The stage for one turn: its share of the steps, and warm-up in proportion."""
    return Stage(steps, stage.batch_size, stage.learning_rate, stage.warmup_steps * steps // stage.steps)
