"""Stage two: every long filter becomes poles and residues, and the student generates from a state of constant size."""

import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from scavenger import checkpoint, data, measure
from scavenger.model import HyenaNeoXConfig, HyenaNeoXForCausalLM
from scavenger.recipe import Recipe, RecipeError
from scavenger.reduction.balanced import ReducedFilter, reduce


def run(recipe: Recipe, run_dir: Path, accelerator, tokenizer) -> Path:
    """Make `recurrence/`, the recurrent student, and `recurrence/filters.json`, what each filter lost."""
    folder = run_dir / "recurrence"
    if checkpoint.complete(folder) or not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return folder
    student = HyenaNeoXForCausalLM.from_pretrained(run_dir / "transfer", dtype=torch.float32).eval()
    horizon = recipe.recurrence.horizon or recipe.data.context_length
    reduced = reduce_filters(student, horizon, recipe.recurrence.tolerance, recipe.recurrence.max_state_size)
    recurrent = recurrent_student(student, reduced)
    blocks = data.blocks(run_dir / "data", "validation")
    against = measure.held_out(recurrent.to(accelerator.device), blocks, student.to(accelerator.device))
    filters = summary(reduced, recipe) | {
        "logits": {"divergence": against.divergence, "agreement": against.agreement, "tokens": against.tokens}
    }
    checkpoint.finish_model(
        recurrent,
        tokenizer,
        [],
        folder,
        accelerator,
        more=lambda beside: checkpoint.write_json(beside / "filters.json", filters),
    )
    return folder


@torch.no_grad()
def reduce_filters(
    student: HyenaNeoXForCausalLM, horizon: int, tolerance: float, max_state_size: int
) -> list[list[ReducedFilter]]:
    """The reduction of each filter of each layer, from its first `horizon` taps."""
    layers = [getattr(layer.mixer, "filter", None) for layer in student.gpt_neox.layers]
    with tqdm(
        total=sum(f.num_filters for f in layers if f is not None), desc="recurrence", unit="filter", dynamic_ncols=True
    ) as bar:
        found = []
        for index, filter in enumerate(layers):
            if filter is None:  # kept attention
                found.append([])
                continue
            taps = filter.double()(horizon).cpu().numpy()
            filter.float()
            if not np.isfinite(taps).all():
                raise RecipeError(f"recurrence: the filters of layer {index} are not finite; the transfer diverged")
            found.append([])
            for row in taps:
                found[-1].append(reduce(row, tolerance, max_state_size))
                bar.update()
    return found


@torch.no_grad()
def recurrent_student(student: HyenaNeoXForCausalLM, reduced: list[list[ReducedFilter]]) -> HyenaNeoXForCausalLM:
    """The same student with modal filters; every other parameter is the student's own."""
    values = student.config.to_dict() | {
        "filter": "modal",
        "state_sizes": [[f.state_size for f in layer] for layer in reduced],
    }
    recurrent = HyenaNeoXForCausalLM(HyenaNeoXConfig.from_dict(values))
    recurrent.load_state_dict(
        {key: value for key, value in student.state_dict().items() if ".mixer.filter." not in key}, strict=False
    )
    for layer, filters in zip(recurrent.gpt_neox.layers, reduced, strict=True):
        if not filters:
            continue
        target = layer.mixer.filter
        for parameter, parts in (
            (target.pole, [f.poles for f in filters]),
            (target.residue, [f.residues for f in filters]),
        ):
            parameter.copy_(torch.view_as_real(torch.from_numpy(np.concatenate(parts))))
        target.direct.copy_(torch.tensor([f.direct for f in filters]))
    return recurrent.eval()


def summary(reduced: list[list[ReducedFilter]], recipe: Recipe) -> dict:
    """What each filter lost, beside what no method could save, in plain numbers."""
    tolerance = recipe.recurrence.tolerance
    filters = [f for layer in reduced for f in layer]
    return {
        "tolerance": tolerance,
        "horizon": recipe.recurrence.horizon or recipe.data.context_length,
        "max_state_size": recipe.recurrence.max_state_size,
        "within_tolerance": sum(f.relative_error <= tolerance for f in filters),
        "filters": len(filters),
        "largest_radius": max((float(abs(f.poles).max()) for f in filters if f.state_size), default=0.0),
        "layers": [
            [
                {
                    "state_size": f.state_size,
                    "real_states": f.real_states,
                    "relative_error": f.relative_error,
                    "floor": f.floor,
                    "gain_floor": f.gain_floor,
                    "tail": f.tail,
                    "largest_radius": float(abs(f.poles).max()) if f.state_size else 0.0,
                    "hankel_values": [float(v) for v in f.hankel_values[:64] if math.isfinite(v)],
                }
                for f in layer
            ]
            for layer in reduced
        ],
    }
