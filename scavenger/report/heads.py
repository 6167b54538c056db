"""Which single heads should keep their attention: what the teacher no longer retrieves without each of them.

The output of one head of k and v, that is of all heads of q which read it, is set to zero in the teacher. The score of
the head is how much less the teacher then gains by what it has read, on average over two synthetic tasks of
`retrieval`: repeated passages, and key-value pairs (after arXiv:2602.11374). Nothing is trained. Interactions between
heads are not measured: a head that another one needs ranks as high as that one. In the embedded teacher the first is
L1H1, 62 % of whose attention is on the token before, and the second L2H3, which reads far back; pairs need both.
"""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from scavenger import families, teacher
from scavenger.recipe import Recipe, RecipeError
from scavenger.report import page, retrieval
from scavenger.run import checkpoint
from scavenger.run.run import Run
from scavenger.transfer import ranking


# Sequences of each task. For the embedded teacher the first three heads are the same as with 64 sequences at four
# distances, for either of two seeds; the scores differ by up to 0.1 nats, and no further head has as much.
EXAMPLES = 16
SHOWN = 16  # heads in a table, at least


def run(run: Run) -> dict:
    """Make `heads/`: ranking.json, ranking.png; returns what `measured` does. The main process measures."""
    folder = run.folder / "heads"
    if run.accelerator.is_main_process and not checkpoint.complete(folder):
        beside = checkpoint.partial(folder)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        frozen = teacher.load(run.recipe.teacher, run.folder, run.device)
        text, special = run.blocks("validation"), run.tokenizer.all_special_ids
        found = measured(frozen, text, special, run.recipe.data.context_length, run.recipe.seed)
        checkpoint.write_json(beside / "ranking.json", found)
        _draw(found, beside / "ranking.png")
        checkpoint.finish(folder)
    run.accelerator.wait_for_everyone()
    return checkpoint.read_json(folder / "ranking.json")


def check(recipe: Recipe, keep: int, path: Path | None):
    """Raise RecipeError for mistakes that are visible before any work."""
    train = recipe.teacher.train
    if train is not None:
        config = teacher.shape(train, recipe.data.context_length, train.vocab_size)
    else:
        config = teacher.load_configuration(recipe.teacher, Path(recipe.run_dir))
    count = config.num_hidden_layers * _heads(config)
    if not 1 <= keep < count:
        raise RecipeError(
            f"--heads: found {keep}; expected 1 to {count - 1}, some and not all of the teacher's heads of k and v"
        )
    try:
        retrieval.fitting(retrieval.DISTANCES, recipe.data.context_length)
    except ValueError as error:
        raise RecipeError(f"data.context_length: {error}") from None
    ranking.check_path(path)


def measured(frozen: PreTrainedModel, text: np.ndarray, special: list[int], context_length: int, seed: int) -> dict:
    """The teacher's two gains, and for each head how much they fall without it, nats per token; largest score first.

    `text` has ids of any shape. The score of a head, `fall`, is the mean of its two falls. The distance is the largest
    of retrieval.DISTANCES that fits the context. Raises RecipeError for too short a text and for a teacher whose logits
    are NaN.
    """
    distance = retrieval.fitting(retrieval.DISTANCES, context_length)[-1]

    def gains():
        passages = retrieval.repeated_passages(frozen, text, (distance,), EXAMPLES, seed)
        pairs = retrieval.associative_recall(frozen, text, special, (distance,), EXAMPLES, seed)
        return _value(passages, "gain on repeated passages"), _value(pairs, "gain of pairs")

    places, entries = list(np.ndindex(frozen.config.num_hidden_layers, _heads(frozen.config))), []
    try:
        whole = gains()
        for layer, head in tqdm(places, desc="ranking", unit="head", dynamic_ncols=True):
            with silenced(frozen, layer, head):
                passages, pairs = (before - after for before, after in zip(whole, gains(), strict=True))
            fall = (passages + pairs) / 2
            entries.append({"layer": layer, "head": head, "fall": fall, "passages": passages, "pairs": pairs})
    except ValueError as error:
        raise RecipeError(f"heads cannot be ranked on the validation split: {error}") from None
    return {
        "distance": distance,
        "examples": EXAMPLES,
        "teacher": dict(zip(("passages", "pairs"), whole, strict=True)),
        "heads": sorted(entries, key=lambda entry: -entry["fall"]),
    }


@contextlib.contextmanager
def silenced(model: PreTrainedModel, layer: int, head: int):
    """In forward passes inside the context the output of a head of k and v, of all heads of q that read it, is zero.

    Heads of q that share a head of k and v are neighbours, so theirs is one block of the output projection's input.
    """
    output = families.of(model.config.model_type).outputs(model)[layer]
    width = output.in_features // _heads(model.config)
    channels = torch.arange(head * width, (head + 1) * width, device=output.weight.device)

    def silence(module: nn.Module, args):
        return (args[0].index_fill(-1, channels, 0.0),)

    hook = output.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        hook.remove()


def recommended(recipe: Recipe, found: dict, keep: int) -> Recipe:
    """The recipe that keeps the `keep` heads with the largest score, and no whole layer, with its own run folder."""
    places = sorted((entry["layer"], entry["head"]) for entry in found["heads"][:keep])
    names = tuple(f"L{layer}H{head}" for layer, head in places)
    return dataclasses.replace(
        recipe,
        run_dir=f"{Path(recipe.run_dir)}-keeps-heads-{keep}",
        student=dataclasses.replace(recipe.student, attention_layers=(), attention_heads=names),
    )


def write_recipe(recipe: Recipe, found: dict, path: Path):
    """Write the recommended recipe, with the first heads of the ranking as a comment."""
    shown = table(found, max(SHOWN, len(recipe.student.attention_heads)))
    comment = ["Attention is kept in single heads. What the teacher loses without any one head:"]
    ranking.write_commented(recipe, comment + [f"  {line}" for line in shown.splitlines()], path)


def kept_in(recipe: Recipe) -> str:
    """What keeps its attention, in words."""
    names = recipe.student.attention_heads
    return f"head{'s' if len(names) > 1 else ''} {', '.join(names)}"


def table(found: dict, shown: int = SHOWN) -> str:
    """The first heads of the ranking as aligned text."""
    gains, entries = found["teacher"], found["heads"]
    lines = [
        f"gains by what was read up to {found['distance']} tokens before, and their fall without a head (nats):",
        f"{'':>7}  {'passages':>8}  {'pairs':>8}  {'mean':>8}",
        f"{'teacher':>7}  {gains['passages']:>8.3f}  {gains['pairs']:>8.3f}  {sum(gains.values()) / 2:>8.3f}",
    ]
    for entry in entries[:shown]:
        name = f"L{entry['layer']}H{entry['head']}"
        lines.append(f"{name:>7}  {entry['passages']:>8.3f}  {entry['pairs']:>8.3f}  {entry['fall']:>8.3f}")
    if len(entries) > shown:
        lines.append(f"and {len(entries) - shown} more in heads/ranking.json")
    return "\n".join(lines)


def _heads(config: PreTrainedConfig) -> int:
    """Heads of k and v in a layer of the teacher."""
    try:
        return families.of(config.model_type).block(config)["num_key_value_heads"]
    except ValueError as error:
        raise RecipeError(f"teacher: {error}; expected a teacher without it") from None


def _value(found, name):
    (metric,) = (metric for metric in found if metric.name == name)
    return sum(metric.numerators) / sum(metric.denominators)


def _draw(found, path):
    falls = np.zeros([1 + max(entry[axis] for entry in found["heads"]) for axis in ("layer", "head")])
    for entry in found["heads"]:
        falls[entry["layer"], entry["head"]] = entry["fall"]
    figure, axes = page.plot(*(1.8 + 0.3 * np.maximum(falls.shape[::-1], 6)))
    falls = falls.clip(min=0)  # a gain that rises is no reason to keep a head
    image = axes.imshow(falls, cmap="Blues", vmin=0, origin="lower")
    figure.colorbar(image, label="fall of the gain (nats)")
    axes.set(xlabel="head of k and v, silenced", ylabel="layer")
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=130)
    page.plt.close(figure)
