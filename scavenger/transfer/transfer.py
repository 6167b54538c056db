"""Stage one: what the teacher knows goes to the student, first by activations, then by logits.

Sources: arXiv:2401.17574 (the two steps, layer by layer from the bottom), arXiv:2505.03005 (all layers in parallel,
then everything free).
"""

import contextlib
import dataclasses
import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from scavenger import data, losses, measure, student, teacher, training
from scavenger.model import HyenaNeoXForCausalLM
from scavenger.recipe import Activations, Filter, Logits, Recipe
from scavenger.recurrence.reduction import hankel
from scavenger.run import checkpoint
from scavenger.transfer import teacher_outputs


SEEN = 16  # filters of a layer whose Hankel values the penalty takes: O(length³) each, and a layer can have thousands
WATCHED = 4  # whose floor is watched: 0.16 s each at 1,024 taps on one core, of each layer, with every checkpoint
HELD_OUT = 16  # sequences whose loss comes with every checkpoint: always the same ones, so that its course is smooth
READING = {"parallel": "teacher", "progressive": "below", "joint": "student"}  # what the mixers of a schedule read
LOOKED_AT = 32  # held-out sequences of a look: the mean error of a layer is then good to about a hundredth of itself


def run(recipe: Recipe, run_dir: Path, accelerator, tokenizer) -> Path:
    """Make `transfer/`, the distilled student; `transfer/activations` is the student between the two steps."""
    folder = run_dir / "transfer"
    if checkpoint.complete(folder):
        return folder
    frozen = teacher.load(recipe, run_dir, accelerator.device)
    kept = teacher_outputs.run(recipe, run_dir, frozen, accelerator)
    between = checkpoint.partial(folder) / "activations"
    match_activations(recipe, run_dir, frozen, between, accelerator, tokenizer, kept)
    match_logits(recipe, run_dir, frozen, between, folder, accelerator, tokenizer, kept)
    return folder


@dataclass(frozen=True)
class Turn:
    """One training of the transfer: a phase, or a layer's share of a progressive one."""

    name: str
    phase: Activations | Logits
    layers: tuple[int, ...]  # whose mixers it matches; none where the logits are matched
    first: int = 0  # the sequence of the shuffled text that it reads first
    steps: int = 0  # that it took


def match_activations(recipe, run_dir, frozen, folder, accelerator, tokenizer, kept=None) -> HyenaNeoXForCausalLM:
    """Step one: each mixer learns to give out what the teacher's attention gives out; nothing else is trained.

    `parallel`: every layer reads the teacher's activations, so one teacher forward serves all and no gradient crosses a
    layer. `progressive`: from the bottom, each layer in its turn reads the student's own; the steps are shared out, and
    the teacher is run no deeper than that layer. `joint`: all layers at once on the student's own, gradients and all.
    """
    if checkpoint.complete(folder):
        return _load(folder).to(accelerator.device)
    layers = tuple(
        index for index in range(len(frozen.gpt_neox.layers)) if index not in recipe.student.attention_layers
    )

    def train(model, turn, steps_dir, begins):
        matching = MixerMatching(model, turn.layers, READING[turn.phase.schedule], recipe.student.filter)

        def target(part):
            if kept is not None and kept.activations:
                return kept.attention(part.rows, turn.layers, accelerator.device)
            return teacher.attention(frozen, part.ids, turn.layers)

        def loss(module, part, aim, whole):
            errors, tail = module(part.ids, part.mask, *aim)
            errors = errors.sum(1) / len(whole.rows)
            logged = {f"layer_{layer}": error for layer, error in zip(turn.layers, errors, strict=True)}
            return _pressed(errors.sum(), logged, tail, len(part.rows) / len(whole.rows), recipe)

        @torch.no_grad()
        def look(module):
            text, count = data.blocks(run_dir / "data", "validation")[:LOOKED_AT], accelerator.num_processes
            # As many for each process, whose forwards may wait for one another; what is past the end does not count.
            places = torch.arange(accelerator.process_index, -(-len(text) // count) * count, count)
            ids = torch.from_numpy(text[(places % len(text)).numpy()].astype("int64")).to(accelerator.device)
            found = []
            for part in ids.split(8):  # no more memory than a small batch
                aim = teacher.attention(frozen, part, turn.layers)
                found.append(module(part, torch.ones_like(part, dtype=torch.bool), *aim)[0].mean(0))
            own = torch.cat(found)[(places < len(text)).to(accelerator.device)]
            return accelerator.reduce(own.sum(), reduction="sum").item() / len(text)

        return training.train(
            turn.name,
            matching,
            loss,
            partial(_batch, recipe, run_dir, turn),
            turn.phase,
            steps_dir,
            accelerator,
            recipe,
            begins=begins,
            target=target,
            watch=dict if training.is_spread(accelerator) else partial(watched, model, recipe, run_dir),
            look=look if turn.phase.flat is not None else None,
        )

    turns = [turn for phase in recipe.transfer.activations for turn in _turns_of(phase, layers)]
    made = partial(student.from_teacher, recipe, frozen)
    return _follow(turns, made, [], train, folder, accelerator, tokenizer, taught(recipe))


def match_logits(recipe, run_dir, frozen, between, folder, accelerator, tokenizer, kept=None) -> HyenaNeoXForCausalLM:
    """Step two: the student learns the teacher's distribution."""

    def train(model, turn, steps_dir, begins):
        matching = LogitMatching(model, turn.phase, recipe.student.filter)

        def target(part):
            if kept is not None and kept.logits:
                return kept.top(part.rows, accelerator.device), None, []
            return frozen.lm_head.weight, *teacher.hidden_states(frozen, part.ids, turn.phase.hidden_states > 0)

        def loss(module, part, aim, whole):
            following = losses.following(whole.ids, whole.mask)[1].sum().item()
            share = len(part.rows) / len(whole.rows)
            counts = torch.tensor([whole.mask.sum().item(), following], device=part.ids.device)
            value, logged, tail = module(part.ids, part.mask, counts, share, *aim)
            return _pressed(value, logged, tail, share, recipe)

        rate = turn.phase.rest_learning_rate or turn.phase.learning_rate
        return training.train(
            turn.name,
            matching,
            loss,
            partial(_batch, recipe, run_dir, turn),
            turn.phase,
            steps_dir,
            accelerator,
            recipe,
            begins=begins,
            target=target,
            watch=dict if training.is_spread(accelerator) else partial(watched, model, recipe, run_dir),
            rest_rate=rate / turn.phase.learning_rate,
        )

    taken = checkpoint.read_json(between / "turns.json")
    turns = [
        Turn("logits" if index == 0 else f"logits {index + 1}", phase, ())
        for index, phase in enumerate(recipe.transfer.logits)
    ]
    return _follow(turns, partial(_load, between), taken, train, folder, accelerator, tokenizer, taught(recipe))


def _follow(turns, made, taken, train, folder, accelerator, tokenizer, began):
    """One turn after the other, each from the student that the one before left; the last makes `folder`.

    `turns.json` beside each student says what was read for it, by this step and those before.
    """
    history, place = [], None
    for index, turn in enumerate(turns):
        last = index + 1 == len(turns)
        reached = folder if last else checkpoint.partial(folder) / f"turn_{index:02d}"
        if not checkpoint.complete(reached):
            before = sum(turn["steps"] * turn["batch_size"] for turn in taken)
            begins = began + sum(turn["steps"] for turn in taken)
            model = made() if place is None else _load(place)
            turn = dataclasses.replace(turn, first=before)
            found, model = train(model, turn, checkpoint.partial(reached) / "steps", begins)
            model.requires_grad_(True)
            own = history[-1]["step"] if history else 0
            history = history + [entry | {"step": own + entry["step"]} for entry in found]
            turn = {"name": turn.name, "first": before, "steps": found[-1]["step"], "batch_size": turn.phase.batch_size}
            checkpoint.finish_model(
                model,
                tokenizer,
                history,
                reached,
                accelerator,
                more=lambda beside, read=[*taken, turn]: checkpoint.write_json(beside / "turns.json", read),
            )
        history, taken = checkpoint.read_json(reached / "history.json"), checkpoint.read_json(reached / "turns.json")
        place = reached
    return _load(folder).to(accelerator.device)


def taught(recipe: Recipe) -> int:
    """The steps of the run before its transfer: those of a teacher that it trains."""
    return recipe.teacher.train.steps if recipe.teacher.train else 0


def sequences(folder: Path) -> int:
    """How many sequences the student in `folder` read in its transfer."""
    return sum(turn["steps"] * turn["batch_size"] for turn in checkpoint.read_json(folder / "turns.json"))


class MixerMatching(nn.Module):
    """The relative error of each matched mixer's output; only those mixers are trained.

    `reading` says what the mixers read: the `teacher`'s activations, the student's own without a gradient through the
    layers `below`, or the `student`'s own with one.
    """

    def __init__(self, model: HyenaNeoXForCausalLM, layers: tuple[int, ...], reading: str, filter: Filter):
        super().__init__()
        self.model, self.layers, self.reading, self.filter = model, layers, reading, filter
        model.requires_grad_(False)
        for layer in layers:
            model.gpt_neox.layers[layer].mixer.requires_grad_(True)

    def forward(self, ids: Tensor, mask: Tensor, inputs: dict[int, Tensor], outputs: dict[int, Tensor]):
        """Errors (layer, batch), and the mean Hankel tail."""
        read = self._outputs(ids, inputs)
        errors = [losses.activation_error(read[layer], outputs[layer], mask) for layer in self.layers]
        return torch.stack(errors), _tail(self.model, ids.shape[1], self.filter)

    def _outputs(self, ids, inputs):
        body = self.model.gpt_neox
        if self.reading == "student":
            found = {}
            with contextlib.ExitStack() as stack:
                for layer in self.layers:
                    keep = partial(_keep, found, layer)
                    stack.callback(body.layers[layer].mixer.register_forward_hook(keep).remove)
                for _ in zip(range(max(self.layers) + 2), _depths(body, ids), strict=False):
                    pass
            return found
        if self.reading == "below":
            (layer,) = self.layers
            with torch.no_grad():
                below = next(itertools.islice(_depths(body, ids), layer, None))
                inputs = {layer: body.layers[layer].input_layernorm(below)}
        own = body.embed_in.weight.dtype
        inputs = {layer: inputs[layer].to(own) for layer in self.layers}
        _, cos, sin = body.mask_and_angles(inputs[self.layers[0]])
        return {layer: body.layers[layer].mixer(inputs[layer], cos, sin) for layer in self.layers}


class LogitMatching(nn.Module):
    """The divergence of the student's distribution from its teacher's, with all that the phase adds to it.

    The vocabulary projections of both are taken in chunks of positions: no launch holds all logits at once.
    """

    def __init__(self, model: HyenaNeoXForCausalLM, phase: Logits, filter: Filter):
        super().__init__()
        self.model, self.phase, self.filter = model, phase, filter
        model.requires_grad_(phase.trained == "everything")
        for layer in model.gpt_neox.layers:
            layer.mixer.requires_grad_(True)
        self.head = model.lm_head.weight  # its own, too, so that a launch that shards parameters gathers it for us

    def forward(self, ids: Tensor, mask: Tensor, counts: Tensor, share: float, aim, last: Tensor | None, blocks: list):
        """The part's share of the loss, of what is logged beside it, and the mean Hankel tail.

        `aim` is the teacher's head with what it reads, `last`, or its kept distribution without; `counts` the positions
        of the whole batch that count for the divergence and for the cross-entropy; `share` the part's of the batch.
        """
        phase, body = self.phase, self.model.gpt_neox
        depths = list(_depths(body, ids))
        hidden = body.final_layer_norm(depths[-1]).flatten(0, 1)
        following, counted = losses.following(ids, mask)
        counted, matched = counted.to(hidden.dtype), mask.flatten().to(hidden.dtype)
        if isinstance(aim, losses.TopK):
            aim = losses.TopK(*(item.flatten(0, 1) for item in aim))
        else:
            last = last.flatten(0, 1)

        def terms(logits, rows):
            if isinstance(aim, losses.TopK):
                found = losses.kept_divergence(logits, losses.TopK(*(item[rows] for item in aim)), phase.objective)
            else:
                with torch.autocast(ids.device.type, enabled=False):  # the teacher in its own dtype
                    target = last[rows] @ aim.T
                found = losses.logit_divergence(logits, target, phase.objective, phase.temperature)
            sums = [(found * matched[rows]).sum()]
            if phase.cross_entropy:
                sums.append((losses.cross_entropy(logits, following[rows]) * counted[rows]).sum())
            return torch.stack(sums)

        weights = torch.tensor([1 - phase.cross_entropy, phase.cross_entropy], device=ids.device)
        used = 2 if phase.cross_entropy else 1
        value, sums = losses.projected(hidden, self.head, terms, (weights / counts)[:used])
        logged = dict(zip(("divergence", "cross_entropy"), sums / counts[:used], strict=False))
        if blocks:
            pairs = zip(depths[1:], blocks, strict=True)
            errors = [losses.activation_error(own, block, mask).mean() for own, block in pairs]
            logged["hidden_states"] = share * torch.stack(errors).mean()
            value = value + phase.hidden_states * logged["hidden_states"]
        return value, logged, _tail(self.model, ids.shape[1], self.filter)


def _keep(found, layer, module, args, output):
    found[layer] = output


def _depths(body, ids):
    """The hidden state before each layer, and after the last."""
    hidden = body.embed_in(ids)
    _, cos, sin = body.mask_and_angles(hidden)
    yield hidden
    for layer in body.layers:
        hidden = layer(hidden, cos, sin, None, None)
        yield hidden


def _tail(model, length, filter):
    """The mean Hankel tail of SEEN filters of each layer, drawn anew at each step; nothing without a penalty."""
    if not filter.hankel_penalty:
        return torch.zeros((), device=model.device)
    tails = []
    for _, taps in _taps(model, length):
        drawn = torch.randperm(len(taps))[:SEEN]
        tails.append(losses.hankel_tail(taps[drawn.to(taps.device)], filter.hankel_states).mean())
    return torch.stack(tails).mean()


def _pressed(value, logged, tail, share, recipe):
    """The loss with the Hankel penalty, if the recipe has one."""
    weight = recipe.student.filter.hankel_penalty
    if not weight:
        return value, logged
    return value + weight * share * tail, logged | {"hankel_tail": share * tail}


def watched(model: HyenaNeoXForCausalLM, recipe: Recipe, run_dir: Path) -> dict[str, float]:
    """What is logged of the student with every checkpoint: the floors of its filters, and its held-out loss."""
    return floors(model, recipe) | held_out_loss(model, run_dir)


def held_out_loss(model: nn.Module, run_dir: Path) -> dict[str, float]:
    """Cross-entropy on the first HELD_OUT sequences of the validation split, nats per token."""
    return {"held_out_loss": measure.held_out(model, data.blocks(run_dir / "data", "validation")[:HELD_OUT]).loss}


@torch.no_grad()
def floors(model: HyenaNeoXForCausalLM, recipe: Recipe) -> dict[str, float]:
    """For each layer, the least relative error that `hankel_states` real states allow: a mean over WATCHED filters."""
    found = {}
    for layer, taps in _taps(model, recipe.data.context_length):
        least = hankel.tap_floors(taps[:: -(-len(taps) // WATCHED)].double())
        found[f"floor_{layer}"] = least[:, min(recipe.student.filter.hankel_states, least.shape[1] - 1)].mean().item()
    return found


def _taps(model, length):
    """The taps of each layer that has filters."""
    for index, layer in enumerate(model.gpt_neox.layers):
        if index not in model.config.attention_layers:
            yield index, layer.mixer.filter(length)


def _turns_of(phase, layers):
    """The trainings of a phase; a progressive one shares its steps, and its warm-up, out to the layers."""
    if phase.schedule != "progressive":
        return [Turn("activations" if phase.schedule == "parallel" else "activations, jointly", phase, layers)]
    edges = [round(turn * phase.steps / len(layers)) for turn in range(len(layers) + 1)]
    turns = []
    for layer, first, end in zip(layers, edges, edges[1:], strict=False):
        warmup = phase.warmup_steps * (end - first) // phase.steps
        shortened = dataclasses.replace(phase, steps=end - first, warmup_steps=warmup)
        turns.append(Turn(f"activations of layer {layer}", shortened, (layer,)))
    return turns


def _batch(recipe, run_dir, turn, step):
    size = turn.phase.batch_size
    return data.batch(data.blocks(run_dir / "data", "train"), turn.first + step * size, size, recipe.seed)


def _load(folder):
    return HyenaNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32)
