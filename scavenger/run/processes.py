"""The processes of a launch, their devices, and the tracker."""

import importlib.util
import logging
import netrc
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from scavenger.recipe import Recipe, RecipeError
from scavenger.run import energy


PATIENCE = timedelta(days=7)  # the other processes wait while the main process tokenises the text


def start(recipe: Recipe) -> Accelerator:
    """The Accelerator of the launch: devices, processes and the recipe's tracker.

    Raises RecipeError where the launcher started several processes that do not see each other (each would run the whole
    recipe), where it started one process instead of several, and where the launch cannot train the recipe.
    """
    transformers_logging.disable_progress_bar()  # we show our own; one per saved shard is noise
    # It warns at each checkpoint that the head, a parameter of the loss module too, is written once.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    _require_one_job()
    if recipe.training.energy:
        energy.require_codecarbon()
    on_cpu = not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns wherever it is installed
    # The launcher sets this variable, and accelerate prefers it to the argument.
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(recipe.training.accumulate)
    group = {"timeout": PATIENCE}
    if on_cpu and deepspeed:
        group["backend"] = "gloo"  # accelerate chooses none by itself, and drops DeepSpeed with cpu=True
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,
        gradient_accumulation_steps=recipe.training.accumulate,
        log_with=_tracker(recipe),
        kwargs_handlers=[InitProcessGroupKwargs(**group)],
        project_config=ProjectConfiguration(recipe.run_dir, logging_dir=str(Path(recipe.run_dir) / "logs")),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RecipeError(
            f"launch: {launched} processes were started but do not see each other; expected a launch "
            "configuration such as accelerate_configs/cpu_two_processes.yaml"
        )
    _require_whole_parts(recipe, accelerator.num_processes)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise RecipeError(
            f"launch: found mixed_precision {accelerator.mixed_precision}; expected bf16 or no: in float16 the "
            "gradients of a mean over a batch's tokens underflow"
        )
    if accelerator.device.type == "cpu":
        # accelerate leaves each process one thread; use all cores of the machine.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if recipe.training.compile and accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise RecipeError(
                "training.compile: found true; expected false under ZeRO-3, which gathers each parameter by itself"
            )
        _fit_deepspeed(recipe, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        _fit_fsdp(accelerator)
    return accelerator


def _require_one_job():
    """Refuse `accelerate launch --cpu --num_processes 2`, which sets MASTER_PORT but starts one process."""
    meeting = "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ
    if meeting and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & os.environ.keys():
        raise RecipeError(
            "launch: several processes were asked for (MASTER_PORT is set), but one was started; expected "
            "--num_processes 1, or a launch configuration such as accelerate_configs/cpu_two_processes.yaml"
        )


def _tracker(recipe):
    """The recipe's tracker, or None. Without an account wandb writes to this machine only; trackio always does."""
    tracker = None if recipe.training.tracker == "none" else recipe.training.tracker
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise RecipeError(
            f"training.tracker: {tracker} is not installed; expected `pip install {tracker}`, or tracker: none"
        )
    if tracker == "wandb" and "WANDB_MODE" not in os.environ and not _has_wandb_account():
        os.environ["WANDB_MODE"] = "offline"  # logs locally, to be uploaded by `wandb sync`
    return tracker


def _has_wandb_account():
    """Whether there is a key in the environment or where `wandb login` stores it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _require_whole_parts(recipe, processes):
    """RecipeError unless every batch splits into equal micro-batches, `accumulate` for each process."""
    stages = {"teacher.train": (recipe.teacher.train,)}
    if recipe.transfer:
        stages |= {"transfer.activations": recipe.transfer.activations, "transfer.logits": recipe.transfer.logits}
    parts = processes * recipe.training.accumulate
    for name, phases in stages.items():
        for index, phase in enumerate(phases):
            if phase is not None and phase.batch_size % parts:
                place = f".{index}" if len(phases) > 1 else ""
                raise RecipeError(
                    f"{name}{place}.batch_size: found {phase.batch_size}; expected a multiple of {parts}: processes "
                    f"({processes}) × training.accumulate ({recipe.training.accumulate})"
                )


def _fit_deepspeed(recipe, accelerator):
    """Adapt DeepSpeed's configuration; RecipeError for what it cannot train."""
    if recipe.student.filter.form == "modal":
        raise RecipeError(
            "student.filter.form: found modal; expected implicit under DeepSpeed: poles are moved back inside the unit "
            "circle after each step, which DeepSpeed's own copies of the parameters would miss"
        )
    # accelerate announces ZeRO-3 to transformers, which would then shard every loaded model, the frozen teacher too.
    unset_hf_deepspeed_config()
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    # DeepSpeed requires the micro-batch size in advance, and uses it for a consistency check only.
    config["train_micro_batch_size_per_gpu"] = 1
    if accelerator.mixed_precision == "bf16":
        # Its own half precision would cast all parameters, those of filters included; the other launches use autocast.
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def _fit_fsdp(accelerator):
    """Adapt FSDP's configuration; RecipeError for version 1."""
    if not accelerator.is_fsdp2:
        raise RecipeError(
            "launch: found FSDP of version 1; expected fsdp_version: 2, as in accelerate_configs/fsdp.yaml"
        )
    # Its own half precision would cast the filters' parameters too; the other launches use autocast.
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
