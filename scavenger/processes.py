"""How many processes there are, on what devices, and who logs."""

import importlib.util
import netrc
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from transformers.utils import logging as transformers_logging

from scavenger.recipe import Recipe, RecipeError


PATIENCE = timedelta(days=7)  # the other processes wait while the first one reads and tokenises the text


def start(recipe: Recipe) -> Accelerator:
    """accelerate's view of the launch: devices, processes and the recipe's tracker.

    Raises RecipeError where the launcher started several processes that do not see each other: each would run the
    whole recipe, on top of the others.
    """
    transformers_logging.disable_progress_bar()  # one bar is ours; one per saved shard is noise
    tracker = None if recipe.training.tracker == "none" else recipe.training.tracker
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise RecipeError(
            f"training.tracker: {tracker} is not installed; expected `pip install {tracker}`, or tracker: none"
        )
    if tracker == "wandb" and "WANDB_MODE" not in os.environ and not _has_wandb_account():
        os.environ["WANDB_MODE"] = "offline"  # the log stays here, for `wandb sync`
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=tracker,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        project_config=ProjectConfiguration(recipe.run_dir, logging_dir=str(Path(recipe.run_dir) / "logs")),
    )
    if accelerator.device.type == "cpu":
        # accelerate leaves one thread to a process; the machine's cores are what there is.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RecipeError(
            f"launch: {launched} processes were started but do not see each other; expected a launch "
            "configuration such as accelerate_configs/cpu_two_processes.yaml"
        )
    stages = {"teacher.train": recipe.teacher.train}
    if recipe.transfer:
        stages |= {"transfer.activations": recipe.transfer.activations, "transfer.logits": recipe.transfer.logits}
    for name, stage in stages.items():
        if stage is not None and stage.batch_size % accelerator.num_processes:
            raise RecipeError(
                f"{name}.batch_size: found {stage.batch_size}; expected a multiple of the number of processes "
                f"({accelerator.num_processes})"
            )
    return accelerator


def _has_wandb_account():
    """Whether a key is in the environment or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
