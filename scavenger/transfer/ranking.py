"""Which layers should keep their attention: the teacher's loss when each layer's attention alone is replaced.

All mixers are matched to the teacher's attention at once, as in step one of the transfer. Then each mixer alone
replaces the attention of its layer in the teacher, and the KL divergence from the teacher on held-out text ranks the
layer. Interactions between layers are not measured.
"""

import dataclasses
import shutil
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from scavenger import families, measure, teacher
from scavenger.model import HyenaForCausalLM
from scavenger.recipe import Recipe, RecipeError, resolved, teacher_layers
from scavenger.run import checkpoint
from scavenger.run.run import Run
from scavenger.transfer import teacher_outputs, transfer


matplotlib.use("Agg")  # files, no window
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)


def run(run: Run) -> list[dict]:
    """Make `ranking/`: ranking.json, ranking.png; returns one entry per layer, the largest divergence first."""
    folder = run.folder / "ranking"
    frozen = teacher.load(run.recipe.teacher, run.folder).to(run.device)
    kept = teacher_outputs.run(run, frozen)
    matched = transfer.match_activations(run, frozen, run.folder / "activations", kept)
    if run.accelerator.is_main_process and not checkpoint.complete(folder):
        beside = checkpoint.partial(folder)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        found = measured(frozen, matched, run.blocks("validation"), run.device, run.counted("validation"))
        checkpoint.write_json(beside / "ranking.json", found)
        _draw(found, beside / "ranking.png")
        checkpoint.finish(folder)
    run.accelerator.wait_for_everyone()
    return checkpoint.read_json(folder / "ranking.json")


def check(recipe: Recipe, keep: int, path: Path | None):
    """Raise RecipeError for mistakes that are visible before any work."""
    if recipe.transfer is None:
        raise RecipeError("transfer: found nothing; expected a section: layers are ranked by matching activations")
    layers = teacher_layers(recipe)
    if layers is None:
        layers = teacher.load_configuration(recipe.teacher, Path(recipe.run_dir)).num_hidden_layers
    if not 1 <= keep < layers:
        raise RecipeError(f"--keep: found {keep}; expected 1 to {layers - 1}, some and not all of the teacher's layers")
    check_path(path)


def check_path(path: Path | None):
    """Raise RecipeError where no recipe can be written to `--to`."""
    if path is None:
        return
    if path.is_dir():
        raise RecipeError(f"--to: {path} is a folder; expected the name of a new file")
    if not path.parent.is_dir():
        raise RecipeError(f"--to: {path.parent} is not a folder; expected the name of a new file in an existing folder")


def without_attention(recipe: Recipe) -> Recipe:
    """The recipe of a ranking: no attention kept, activations only, in the folder `<run_dir>-ranking`."""
    return dataclasses.replace(
        recipe,
        run_dir=f"{Path(recipe.run_dir)}-ranking",
        student=dataclasses.replace(recipe.student, attention_layers=(), attention_heads=()),
        transfer=recipe.transfer
        and dataclasses.replace(
            recipe.transfer,
            activations=tuple(
                dataclasses.replace(phase, schedule="parallel", flat=None) for phase in recipe.transfer.activations
            ),
        ),
        cache=dataclasses.replace(recipe.cache, logits=None) if recipe.cache and recipe.cache.activations else None,
        baseline=None,
        recurrence=None,
        report=None,
        hub=None,
    )


def measured(frozen: PreTrainedModel, matched: HyenaForCausalLM, blocks, device, counted=None) -> list[dict]:
    """For each layer KL(teacher || teacher with that layer's mixer), nats per (counted) token, largest first."""
    entries = []
    for layer in tqdm(range(matched.config.num_hidden_layers), desc="ranking", unit="layer", dynamic_ncols=True):
        against = measure.held_out(alone(frozen, matched, layer).to(device), blocks, frozen, counted)
        entries.append(
            {
                "layer": layer,
                "divergence": against.divergence,
                "agreement": against.agreement,
                "perplexity": against.perplexity,
                "tokens": against.tokens,
            }
        )
    return sorted(entries, key=lambda entry: -entry["divergence"])


@torch.no_grad()
def alone(frozen: PreTrainedModel, matched: HyenaForCausalLM, layer: int) -> HyenaForCausalLM:
    """The teacher with the matched mixer in one layer; all other layers keep their full attention."""
    config = type(matched.config).from_dict(
        matched.config.to_dict()
        | {
            "attention_layers": [other for other in range(matched.config.num_hidden_layers) if other != layer],
            "attention_window": 0,
        }
    )
    model = HyenaForCausalLM(config)
    own = f"model.layers.{layer}.mixer."
    weights = families.of(frozen.config.model_type).student_weights(frozen, config.attention_layers)
    model.load_state_dict(weights | {key: value for key, value in matched.state_dict().items() if key.startswith(own)})
    return model.eval()


def recommended(recipe: Recipe, found: list[dict], keep: int) -> Recipe:
    """The recipe that keeps the `keep` layers with the largest divergence, with its own run folder."""
    layers = tuple(sorted(entry["layer"] for entry in found[:keep]))
    return dataclasses.replace(
        recipe,
        run_dir=f"{Path(recipe.run_dir)}-keeps-{'-'.join(map(str, layers))}",
        student=dataclasses.replace(recipe.student, attention_layers=layers, attention_heads=()),
    )


def write_recipe(recipe: Recipe, found: list[dict], path: Path):
    """Write the recommended recipe, with the ranking as a comment."""
    comment = [
        f"Attention is kept in {kept_in(recipe)}. What each layer costs when it alone is replaced, after matching",
        f"activations (KL to the teacher, nats per token, over {found[0]['tokens']:,} held-out tokens):",
        *(f"  layer {entry['layer']:>2}  {entry['divergence']:.4f}" for entry in found),
    ]
    write_commented(recipe, comment, path)


def write_commented(recipe: Recipe, comment: list[str], path: Path):
    """Write a recipe with lines of comment before it; never overwrites a different file."""
    marker, body = resolved(recipe).split("\n", 1)
    text = "\n".join([marker, *(f"# {line}" for line in comment), body])
    if path.exists() and path.read_bytes() != text.encode():
        raise RecipeError(f"--to: {path} exists already; expected the name of a new file")
    checkpoint.write_text(path, text)


def kept_in(recipe: Recipe) -> str:
    """What keeps its attention, in words."""
    return f"layer {', '.join(map(str, recipe.student.attention_layers))}"


def table(found: list[dict]) -> str:
    """The ranking as aligned text."""
    lines = [f"{'layer':>5}  {'KL (nats)':>9}  {'agreement':>9}  {'perplexity':>10}"]
    for entry in found:
        lines.append(
            f"{entry['layer']:>5}  {entry['divergence']:>9.4f}  {100 * entry['agreement']:>7.1f} %  "
            f"{entry['perplexity']:>10.3f}"
        )
    return "\n".join(lines)


def _draw(found, path):
    by_layer = sorted(found, key=lambda entry: entry["layer"])
    plt.figure(figsize=(4.6, 2.8), dpi=130)
    plt.bar([str(entry["layer"]) for entry in by_layer], [entry["divergence"] for entry in by_layer], color="#2d6fc2")
    plt.xlabel("layer replaced, alone")
    plt.ylabel("KL to the teacher (nats per token)")
    plt.tight_layout()
    plt.savefig(path)
    plt.close()
