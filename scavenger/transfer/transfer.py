"""Stage one: the student learns its teacher's activations, then its logits.

Sources: arXiv:2401.17574 (the two steps, layer by layer from the bottom), arXiv:2505.03005 (all layers in parallel,
then all parameters).
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scavenger import data, losses, measure, student, teacher, training
from scavenger.flops import Flops
from scavenger.model import HyenaForCausalLM
from scavenger.recipe import Activations, Filter, Logits, Recipe
from scavenger.recurrence.reduction import hankel
from scavenger.run import checkpoint
from scavenger.run.run import Run
from scavenger.training import Optimisation
from scavenger.transfer import teacher_outputs


SEEN = 16  # filters of a layer in the Hankel penalty: O(length³) each, and a layer can have thousands
WATCHED = 4  # filters of a layer whose floor is logged with every checkpoint: 0.16 s each at 1,024 taps on one core
HELD_OUT = 16  # sequences of the held-out loss logged with every checkpoint: always the same, for a smooth curve
READING = {"parallel": "teacher", "progressive": "below", "joint": "student"}  # input of the mixers, by schedule
LOOKED_AT = 32  # held-out sequences of `look`: the mean error of a layer is then known to about 1 % of itself
LOOK_BATCH = 8  # of them at once: no more memory than a small batch


def run(run: Run) -> Path:
    """Make `transfer/`, the distilled student; `transfer/activations` is the student between the two steps."""
    folder = run.folder / "transfer"
    if checkpoint.complete(folder):
        return folder
    frozen = teacher.load(run.recipe.teacher, run.folder, run.device)
    kept = teacher_outputs.run(run, frozen)
    between = checkpoint.partial(folder) / "activations"
    match_activations(run, frozen, between, kept)
    match_logits(run, frozen, between, folder, kept)
    return folder


@dataclass(frozen=True)
class Turn:
    """One training of the transfer: a phase, or a layer's share of a progressive one."""

    name: str
    phase: Activations | Logits
    layers: tuple[int, ...]  # whose mixers are matched; empty where logits are matched
    first: int = 0  # position in the shuffled text of the first sequence it reads
    first_step: int = 0  # steps of the run before it


def match_activations(run: Run, frozen, folder: Path, kept=None) -> HyenaForCausalLM:
    """Step one: each mixer learns to reproduce its teacher's attention output; nothing else is trained.

    `parallel`: every layer reads the teacher's activations, so one forward pass of the teacher serves all layers and no
    gradient crosses a layer. `progressive`: layer by layer from the bottom, each reading the student's own activations;
    the layers share the steps, and the teacher runs no deeper than the layer in turn. `joint`: all layers at once on
    the student's own activations, with gradients through all of them.
    """
    if checkpoint.complete(folder):
        return student.load(folder).to(run.device)
    recipe = run.recipe
    attention_layers = recipe.student.attention_layers
    layers = tuple(layer for layer in range(frozen.config.num_hidden_layers) if layer not in attention_layers)
    turns = [turn for phase in recipe.transfer.activations for turn in turns_of(phase, layers)]

    def begin():
        return student.from_teacher(recipe.student, recipe.data.context_length, frozen, recipe.seed)

    return _follow(run, turns, begin, [], partial(activation_matching, run, frozen, kept), folder)


def match_logits(run: Run, frozen, between: Path, folder: Path, kept=None) -> HyenaForCausalLM:
    """Step two: the student learns the teacher's distribution, from its logits or from the outputs `kept` on disk."""
    turns = [
        Turn("logits" if index == 0 else f"logits {index + 1}", phase, ())
        for index, phase in enumerate(run.recipe.transfer.logits)
    ]
    taken = checkpoint.read_json(between / "turns.json")
    return _follow(
        run, turns, partial(student.load, between), taken, partial(logit_matching, run, frozen, kept), folder
    )


def activation_matching(run: Run, frozen, kept, turn: Turn, model: HyenaForCausalLM, steps_dir: Path) -> Optimisation:
    """The training of a turn of step one."""
    filter = run.recipe.student.filter

    def target(part):
        if kept is not None and kept.activations:
            return kept.attention(part.rows, turn.layers, run.device)
        return teacher.attention(frozen, part.ids, turn.layers)

    def loss(module, part, target, whole):
        errors, tail = module(part.ids, part.mask, *target)
        errors = errors.sum(1) / len(whole.rows)
        logged = {f"layer_{layer}": error for layer, error in zip(turn.layers, errors, strict=True)}
        return _with_penalty(errors.sum(), logged, tail, len(part.rows) / len(whole.rows), filter)

    return Optimisation(
        name=turn.name,
        module=MixerMatching(model, turn.layers, READING[turn.phase.schedule], filter),
        settings=turn.phase,
        steps_dir=steps_dir,
        batch=partial(_batch, run, turn),
        loss=loss,
        target=target,
        watch=watching(run, partial(watched, run, model)),
        look=partial(held_out_error, run, frozen, turn.layers) if turn.phase.flat is not None else None,
        flops=_flops(run, frozen, turn),
        first_step=turn.first_step,
    )


def logit_matching(run: Run, frozen, kept, turn: Turn, model: HyenaForCausalLM, steps_dir: Path) -> Optimisation:
    """The training of a turn of step two."""
    phase, filter = turn.phase, run.recipe.student.filter

    def target(part):
        if kept is not None and kept.logits:
            return kept.top(part.rows, run.device), None, []
        return losses.Head.of(frozen), *teacher.hidden_states(frozen, part.ids, phase.hidden_states > 0)

    def loss(module, part, target, whole):
        following = losses.following(whole.ids, whole.predicted)[1].sum()
        matched = whole.mask.sum() if whole.counted is None else following
        counts = torch.stack([matched, following]).clamp_min(1)  # a batch may have none
        counts = counts.to(part.ids.device, non_blocking=True)
        share = len(part.rows) / len(whole.rows)
        value, logged, tail = module(part.ids, part.mask, counts, share, *target, part.counted)
        return _with_penalty(value, logged, tail, share, filter)

    return Optimisation(
        name=turn.name,
        module=LogitMatching(model, phase, filter),
        settings=phase,
        steps_dir=steps_dir,
        batch=partial(_batch, run, turn),
        loss=loss,
        target=target,
        watch=watching(run, partial(watched, run, model)),
        rest_rate=(phase.rest_learning_rate or phase.learning_rate) / phase.learning_rate,
        flops=_flops(run, frozen, turn),
        first_step=turn.first_step,
    )


def _follow(
    run: Run,
    turns: list[Turn],
    begin: Callable[[], HyenaForCausalLM],
    taken: list[dict],
    optimisation: Callable[[Turn, HyenaForCausalLM, Path], Optimisation],
    folder: Path,
) -> HyenaForCausalLM:
    """One turn after the other, each starting from the student of the one before; the last makes `folder`.

    `begin()` makes the student of the first turn. `turns.json` in each student's folder lists the turns so far, this
    step's and those of the step before (`taken`).
    """
    history, place = [], None
    for index, turn in enumerate(turns):
        last = index + 1 == len(turns)
        reached = folder if last else checkpoint.partial(folder) / f"turn_{index:02d}"
        if not checkpoint.complete(reached):
            turn = dataclasses.replace(
                turn,
                first=sum(made["steps"] * made["batch_size"] for made in taken),
                first_step=teacher_steps(run.recipe) + sum(made["steps"] for made in taken),
            )
            model = begin() if place is None else student.load(place)
            found, model = training.train(run, optimisation(turn, model, checkpoint.partial(reached) / "steps"))
            model.requires_grad_(True)
            own = history[-1]["step"] if history else 0
            history = history + [entry | {"step": own + entry["step"]} for entry in found]
            made = {"name": turn.name, "first": turn.first, "steps": found[-1]["step"]}
            read = [*taken, made | {"batch_size": turn.phase.batch_size}]
            checkpoint.finish_model(
                run,
                model,
                history,
                reached,
                lambda beside, read=read: checkpoint.write_json(beside / "turns.json", read),
            )
        history, taken = checkpoint.read_json(reached / "history.json"), checkpoint.read_json(reached / "turns.json")
        place = reached
    return student.load(folder).to(run.device)


def teacher_steps(recipe: Recipe) -> int:
    """The steps of the run before its transfer: those of a teacher that it trains."""
    return recipe.teacher.train.steps if recipe.teacher.train else 0


def sequences(folder: Path) -> int:
    """How many sequences the student in `folder` read in its transfer."""
    return sum(turn["steps"] * turn["batch_size"] for turn in checkpoint.read_json(folder / "turns.json"))


class MixerMatching(training.Trained):
    """The relative error of each matched mixer's output; only those mixers are trained.

    `reading` names the mixers' input: "teacher", the teacher's activations; "below", the student's own, without a
    gradient through the layers below; "student", the student's own, with that gradient.
    """

    def __init__(self, model: HyenaForCausalLM, layers: tuple[int, ...], reading: str, filter: Filter):
        super().__init__()
        self.model, self.layers, self.reading, self.filter = model, layers, reading, filter
        model.requires_grad_(False)
        for layer in layers:
            model.model.layers[layer].mixer.requires_grad_(True)

    def loss(self, ids: Tensor, mask: Tensor, inputs: dict[int, Tensor], outputs: dict[int, Tensor]):
        """Errors (layer, batch), and the mean Hankel tail."""
        read = self._outputs(ids, inputs)
        errors = [losses.activation_error(read[layer], outputs[layer], mask) for layer in self.layers]
        return torch.stack(errors), _tail(self.model, self.filter)

    def _outputs(self, ids, inputs):
        body = self.model.model
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
                inputs = {layer: body.layers[layer].mixer_norm(below)}
        own = body.embed.weight.dtype
        inputs = {layer: inputs[layer].to(own) for layer in self.layers}
        _, cos, sin = body.mask_and_angles(inputs[self.layers[0]])
        return {layer: _called(body, body.layers[layer].mixer, inputs[layer], cos, sin) for layer in self.layers}


class LogitMatching(training.Trained):
    """The divergence of the student's distribution from its teacher's, and the other terms of the phase's loss.

    The logits of both models are computed in chunks of positions and never held all at once.
    """

    def __init__(self, model: HyenaForCausalLM, phase: Logits, filter: Filter):
        super().__init__()
        self.model, self.phase, self.filter = model, phase, filter
        model.requires_grad_(phase.trained == "everything")
        for layer in model.model.layers:
            layer.mixer.requires_grad_(True)
        # Parameters of this module too, so that sharded launches gather them.
        self.head, self.head_bias = losses.Head.of(model)

    def loss(
        self,
        ids: Tensor,  # (batch, length)
        mask: Tensor,  # (batch, length)
        counts: Tensor,  # positions of the global batch that count for the divergence, and for the cross-entropy
        share: float,  # of the global batch that this micro-batch is
        aim: losses.Head | losses.TopK,  # the teacher's head, or its kept distribution
        last: Tensor | None,  # the input of the teacher's head (batch, length, channel); None with a kept distribution
        blocks: list,  # outputs of the teacher's blocks (batch, length, channel); empty where they are not matched
        predicted: Tensor | None = None,  # (batch, length) tokens that alone are predicted for the loss; None: mask
    ):
        """The micro-batch's contribution to the loss, its contributions to the logged values, the mean Hankel tail."""
        phase, body = self.phase, self.model.model
        depths = list(_depths(body, ids))
        hidden = body.norm(depths[-1]).flatten(0, 1)
        following, counted = losses.following(ids, mask if predicted is None else predicted)
        counted = counted.to(hidden.dtype)
        matched = mask.flatten().to(hidden.dtype) if predicted is None else counted
        if isinstance(aim, losses.TopK):
            aim = losses.TopK(*(item.flatten(0, 1) for item in aim))
        else:
            last = last.flatten(0, 1)

        own = counted if phase.cross_entropy else None
        terms = losses.Terms(following, own, matched, aim, last, phase.objective, phase.temperature)
        weights = torch.tensor([1 - phase.cross_entropy, phase.cross_entropy], device=ids.device)
        used = 2 if phase.cross_entropy else 1
        head = losses.Head(self.head, self.head_bias)
        value, sums = losses.projected(hidden, head, terms, (weights / counts)[:used])
        logged = dict(zip(("divergence", "cross_entropy"), sums / counts[:used], strict=False))
        if blocks:
            pairs = zip(depths[1:], blocks, strict=True)
            errors = [losses.activation_error(own, block, mask).mean() for own, block in pairs]
            logged["hidden_states"] = share * torch.stack(errors).mean()
            value = value + phase.hidden_states * logged["hidden_states"]
        return value, logged, _tail(self.model, self.filter)


def _keep(found, layer, module, args, output):
    found[layer] = output


def _depths(body, ids):
    """The hidden state before each layer, and after the last."""
    hidden = body.embed(ids)
    _, cos, sin = body.mask_and_angles(hidden)
    yield hidden
    for layer in body.layers:
        hidden = _called(body, layer, hidden, cos, sin, None, None)
        yield hidden


def _called(body, module, *arguments):
    """The output of a layer or mixer, which is computed again in the backward pass where activations are not kept."""
    if body.gradient_checkpointing and torch.is_grad_enabled():
        return body._gradient_checkpointing_func(module, *arguments)
    return module(*arguments)


def _tail(model, filter):
    """The mean Hankel tail of SEEN filters of each layer, drawn anew at each step; 0 without a penalty."""
    if not filter.hankel_penalty:
        return torch.zeros((), device=model.device)
    tails = []
    for _, taps in _taps(model):
        drawn = torch.randperm(len(taps))[:SEEN]
        tails.append(losses.hankel_tail(taps[drawn.to(taps.device)], filter.hankel_states).mean())
    return torch.stack(tails).mean()


def _with_penalty(value, logged, tail, share, filter):
    """The loss and the logged values with the Hankel penalty, if the recipe has one."""
    if not filter.hankel_penalty:
        return value, logged
    return value + filter.hankel_penalty * share * tail, logged | {"hankel_tail": share * tail}


def watching(run: Run, watch: Callable[[], dict[str, float]]) -> Callable[[nn.Module], dict[str, float]]:
    """`watch` as an Optimisation has it: inside the trained module where the launch shards its parameters."""
    if not training.is_sharded(run.accelerator):
        return lambda module: watch()

    def inside(module):
        with torch.no_grad():
            return module(look=watch)

    return inside


def watched(run: Run, model: HyenaForCausalLM) -> dict[str, float]:
    """Logged of the student with every checkpoint: the floors of its filters, and its held-out loss."""
    recipe = run.recipe
    found = floors(model, recipe.student.filter.hankel_states)
    return found | held_out_loss(model, run.blocks("validation"), run.counted("validation"))


def held_out_loss(model: nn.Module, blocks: np.ndarray, counted: np.ndarray | None = None) -> dict[str, float]:
    """Cross-entropy on the first HELD_OUT of the blocks (block, length), nats per token.

    With `counted` (block, length), on the counted tokens of the first blocks that have some.
    """
    if counted is not None:
        rows = np.flatnonzero(counted[:, 1:].any(1))[:HELD_OUT]
        blocks, counted = blocks[rows], counted[rows]
    return {"held_out_loss": measure.held_out(model, blocks[:HELD_OUT], counted=counted).loss}


@torch.no_grad()
def floors(model: HyenaForCausalLM, states: int) -> dict[str, float]:
    """For each layer, the least relative error that `states` real states allow, a mean over WATCHED filters."""
    found = {}
    for layer, taps in _taps(model):
        least = hankel.tap_floors(taps[:: -(-len(taps) // WATCHED)].double())
        found[f"floor_{layer}"] = least[:, min(states, least.shape[1] - 1)].mean().item()
    return found


@torch.no_grad()
def held_out_error(run: Run, frozen, layers: tuple[int, ...], module: nn.Module) -> float:
    """The activation error on LOOKED_AT sequences of the validation split: a mean over layers and sequences."""
    accelerator, text = run.accelerator, run.blocks("validation")[:LOOKED_AT]
    count = accelerator.num_processes
    # Every process takes equally many sequences, as their forward passes may wait for one another; sequences past the
    # end are repeated and do not count.
    places = torch.arange(accelerator.process_index, -(-len(text) // count) * count, count)
    ids = torch.from_numpy(text[(places % len(text)).numpy()].astype("int64")).to(accelerator.device)
    found = []
    for part in ids.split(LOOK_BATCH):
        target = teacher.attention(frozen, part, layers)
        found.append(module(part, torch.ones_like(part, dtype=torch.bool), *target)[0].mean(0))
    own = torch.cat(found)[(places < len(text)).to(accelerator.device)]
    return accelerator.reduce(own.sum(), reduction="sum").item() / len(text)


def _taps(model):
    """The taps of each layer that has filters, at the lags of a context."""
    for index, layer in enumerate(model.model.layers):
        if model.config.filters(index):
            yield index, layer.mixer.filter(model.config.horizon)


def turns_of(phase, layers):
    """The turns of a phase; the layers of a progressive one share its steps and its warm-up."""
    if phase.schedule != "progressive":
        return [Turn("activations" if phase.schedule == "parallel" else "activations, jointly", phase, layers)]
    edges = [round(turn * phase.steps / len(layers)) for turn in range(len(layers) + 1)]
    turns = []
    for layer, first, end in zip(layers, edges, edges[1:], strict=False):
        warmup = phase.warmup_steps * (end - first) // phase.steps
        shortened = dataclasses.replace(phase, steps=end - first, warmup_steps=warmup)
        turns.append(Turn(f"activations of layer {layer}", shortened, (layer,)))
    return turns


def _flops(run, frozen, turn):
    """Of a token."""
    return Flops(frozen.config, run.recipe.data.context_length).of(run.recipe, turn.phase, turn.layers)


def _batch(run, turn, step):
    size = turn.phase.batch_size
    return data.batch(run.blocks("train"), turn.first + step * size, size, run.recipe.seed, run.counted("train"))
