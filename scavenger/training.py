"""The one optimisation loop: step, clip, schedule, log, checkpoint, resume."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from scavenger import checkpoint
from scavenger.model.filters import ModalFilter
from scavenger.recipe import RecipeError, Stage, Training


BETAS = (0.9, 0.95)  # as GPT-NeoX and Pythia
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
FINAL_RATE = 0.1  # the cosine ends at this share of the learning rate, as Pythia's


def train(
    name: str,
    model: nn.Module,
    loss: Callable[[nn.Module, Tensor], tuple[Tensor, dict[str, Tensor]]],
    batch: Callable[[int], Tensor],
    stage: Stage,
    steps_dir: Path,
    accelerator: Accelerator,
    settings: Training,
    begins: int = 0,
    watch: Callable[[], dict[str, float]] = dict,
) -> list[dict]:
    """Train the parameters of `model` that require a gradient; returns the history, one entry per `log_every` steps.

    `batch(step)` gives the global batch of a step, of which each process takes its share; `loss(model, batch)` gives a
    mean over sequences and further values to log. Resumes from the newest checkpoint below `steps_dir`. `begins` is
    the step of the whole run at which this training begins: trackers want an axis that only goes on. What `watch()`
    finds in the parameters is logged beside the means. Poles that a step put outside the unit circle are put back.
    """
    optimizer = torch.optim.AdamW(_groups(model), lr=stage.learning_rate, betas=BETAS, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    start, history = _resume(steps_dir, accelerator)
    modal = [module for module in model.modules() if isinstance(module, ModalFilter)]
    model.train()
    sums, counted, seconds = {}, 0, history[-1]["seconds"] if history else 0.0
    began = time.monotonic()
    bar = tqdm(
        total=stage.steps,
        initial=start,
        desc=name,
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )
    for step in range(start, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        value, logged = loss(model, _share(batch(step), accelerator))
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        for filters in modal:
            filters.stabilise()
        for key, item in {"loss": value, **logged}.items():
            sums[key] = sums.get(key, 0.0) + item.detach()
        counted += 1
        bar.update()
        if (step + 1) % settings.log_every == 0 or step + 1 == stage.steps:
            means = {key: _mean(item / counted, accelerator) for key, item in sums.items()}
            if not all(math.isfinite(item) for item in means.values()):
                raise RecipeError(
                    f"{name}: the loss is {means['loss']} at step {step + 1}; expected a finite one: "
                    f"lower the learning rate ({stage.learning_rate})"
                )
            means |= watch()
            history.append({"step": step + 1, "seconds": seconds + time.monotonic() - began, **means})
            accelerator.log(
                {f"{name}/{key}": item for key, item in means.items()}
                | {f"{name}/learning_rate": learning_rate(stage, step)},
                step=begins + step + 1,
            )
            bar.set_postfix(loss=f"{means['loss']:.4f}")
            sums, counted = {}, 0
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < stage.steps:
            _save(steps_dir, step + 1, history, accelerator)
    bar.close()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return history


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine from `learning_rate` to a tenth of it."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def _groups(model):
    """Matrices decay; biases, norms and all that shapes a filter do not. By name, which a loaded model shares."""
    free = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p for name, p in free if p.ndim >= 2 and "filter" not in name]
    kept = [p for name, p in free if not (p.ndim >= 2 and "filter" not in name)]
    return [{"params": decays, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]


def _share(rows, accelerator):
    count = accelerator.num_processes  # divides every batch: checked at the launch
    return rows[accelerator.process_index :: count].to(accelerator.device)


def _mean(value, accelerator):
    return accelerator.reduce(value, reduction="mean").item()


def _save(steps_dir, step, history, accelerator):
    """Write beside and rename; a kill leaves the previous checkpoint or this one."""
    folder = checkpoint.step_folder(steps_dir, step)
    beside = checkpoint.partial(folder)
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(beside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoint.write_json(beside / "history.json", history)
        checkpoint.finish(folder)
        checkpoint.keep_only(steps_dir, step)
    accelerator.wait_for_everyone()


def _resume(steps_dir, accelerator):
    step = checkpoint.latest_step(steps_dir)
    if step is None:
        return 0, []
    folder = checkpoint.step_folder(steps_dir, step)
    accelerator.load_state(str(folder))
    return step, checkpoint.read_json(folder / "history.json")
