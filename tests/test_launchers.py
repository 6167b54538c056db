"""The same run by every launcher: one loss curve, one student; what a launch cannot do is refused in one line."""

import os
import signal
import socket
import sqlite3
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from conftest import ROOT, launch, scavenger
from program import Program, ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import scavenger.model as _registered  # noqa: F401  (AutoModel knows the student)
from scavenger.recipe import RecipeError, load_recipe
from scavenger.run import processes
from scavenger.run.checkpoint import read_json


SHORT = (
    "transfer.activations.steps=4",
    "transfer.logits.steps=6",
    "training.checkpoint_every=2",
    "recurrence=null",
    "report=null",
)
# Of curves, and of weights: ten times the largest difference seen between launches, over all of them.
TOLERANCES = {"transfer/activations": (1e-5, 2e-5), "transfer": (4e-4, 6e-3), "baseline": (2e-6, 1e-5)}


@pytest.fixture(scope="module")
def one(workshop, tmp_path_factory):
    """One process, each batch whole."""
    run = tmp_path_factory.mktemp("one") / "run"
    scavenger(workshop / "recipe.yaml", f"run_dir={run}", *SHORT)
    return run


def launched(config, workshop, run, *overrides, script=()):
    """`accelerate launch` with two CPU processes, really launched."""
    options = ["--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", "2"]
    options += ["--mixed_precision", "no", *script]
    made = launch("accelerate", "launch", *options, workshop / "recipe.yaml", f"run_dir={run}", *SHORT, *overrides)
    assert made.returncode == 0, made.stderr
    return made


def forked(config, workshop, folder, *overrides, script=None, precision="no", hold=None):
    """The two processes of such a launch, in the environment that it gives them, but forked. The second is held."""
    words = ["--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", "2"]
    words += ["--mixed_precision", precision, str(workshop / "recipe.yaml")]
    started = []
    with (
        mock.patch.object(accelerate_launch, "deepspeed_launcher", started.append),
        mock.patch.object(accelerate_launch, "multi_gpu_launcher", started.append),
    ):
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(words))
    (args,) = started
    prepared = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return [
        Program(
            folder / f"rank-{rank}",
            workshop / "recipe.yaml",
            *SHORT,
            *overrides,
            run=folder / "run",
            hold=hold if rank == 1 else None,
            environment=prepared | environment,
            script=script,
        )
        for rank, environment in enumerate(ranks(2))
    ]


def assert_same(run, one):
    """The loss curves to rounding; the students in every shape, and in their weights as far as Adam lets them.

    Where a gradient is only rounding, as that of a rare token, Adam still makes a whole step of it.
    """
    for stage, (tolerance, _) in TOLERANCES.items():
        mine, whole = read_json(run / stage / "history.json"), read_json(one / stage / "history.json")
        assert [entry["step"] for entry in mine] == [entry["step"] for entry in whole]
        for key in ("loss", "gradient_norm"):
            np.testing.assert_allclose(
                [entry[key] for entry in mine],
                [entry[key] for entry in whole],
                rtol=tolerance,
                err_msg=f"{stage} {key}",
            )
        floors = {key: 1e-2 for key in whole[-1] if key.startswith("floor_")}  # small rests of the filters' energy
        for key, allowed in ({"held_out_loss": 10 * tolerance} | floors).items():
            assert [key in entry for entry in mine] == [key in entry for entry in whole]
            np.testing.assert_allclose(
                [entry[key] for entry in mine if key in entry],
                [entry[key] for entry in whole if key in entry],
                rtol=allowed,
                err_msg=f"{stage} {key}",
            )
        assert "held_out_loss" in whole[-1]
    for stage, (_, tolerance) in TOLERANCES.items():
        mine, whole = (load_file(folder / stage / "model.safetensors") for folder in (run, one))
        assert mine.keys() == whole.keys()
        for key, weight in whole.items():
            assert mine[key].shape == weight.shape and mine[key].dtype == weight.dtype and weight.numel()
            assert (mine[key] - weight).norm() <= tolerance * weight.norm(), f"{stage} {key}"


def test_accumulated_parts_are_one_batch(one, workshop, tmp_path):
    scavenger(workshop / "recipe.yaml", f"run_dir={tmp_path}/run", *SHORT, "training.accumulate=4")
    assert_same(tmp_path / "run", one)


SHARDED, COMPILED = "tests/launching/sharded.py", "tests/launching/compiled.py"
AGAIN = "training.checkpoint_activations=true"


def test_activations_computed_again_are_the_same(one, workshop, tmp_path):
    """As under FSDP and ZeRO-3 below."""
    scavenger(workshop / "recipe.yaml", f"run_dir={tmp_path}/run", *SHORT, AGAIN)
    assert_same(tmp_path / "run", one)


def test_fully_sharded(one, workshop, tmp_path):
    """Each process keeps half of every parameter, in torch's own fully_shard; the finished student is whole."""
    launched("fsdp", workshop, tmp_path / "run", AGAIN, "training.compile=true", script=[COMPILED])
    assert_same(tmp_path / "run", one)


def test_modal_filters_are_fully_sharded(workshop, tmp_path):
    """In the scan, which takes poles and residues, not taps."""
    words = [*SHORT, "data.context_length=128", "student.filter={form: modal, state_size: 1}", "baseline=null"]
    words += ["transfer.activations.steps=2", "transfer.logits.steps=2"]
    programs = forked("fsdp", workshop, tmp_path, *words, script=SHARDED)
    assert [program.end() for program in programs] == [0, 0], programs[0].err
    scavenger(workshop / "recipe.yaml", f"run_dir={tmp_path}/one", *words)
    for stage in ("transfer/activations", "transfer"):
        mine, whole = (load_file(tmp_path / run / stage / "model.safetensors") for run in ("run", "one"))
        assert mine.keys() == whole.keys()
        for key, weight in whole.items():
            assert (mine[key] - weight).norm() <= 1e-3 * weight.norm(), f"{stage} {key}"


def test_zero_2(one, workshop, tmp_path):
    """Two processes with two micro-batches each, and compiled parts."""
    words = ["training.accumulate=2", "training.compile=true"]
    programs = forked("zero2", workshop, tmp_path, *words, script=COMPILED)
    assert [program.end() for program in programs] == [0, 0], programs[0].err
    assert_same(tmp_path / "run", one)


@pytest.mark.parametrize("config, script", [("zero2", None), ("fsdp", SHARDED)])
def test_half_precision_rounds_no_filter(one, workshop, tmp_path, config, script):
    """The launcher's own form of bfloat16 would round the filters too: a first tap is then ten times further off."""
    programs = forked(config, workshop, tmp_path, "baseline=null", script=script, precision="bf16")
    assert [program.end() for program in programs] == [0, 0], programs[0].err
    mine, whole = (load_file(run / "transfer/activations/model.safetensors") for run in (tmp_path / "run", one))
    first, exact = (read_json(r / "transfer/activations/history.json")[0] for r in (tmp_path / "run", one))
    assert 1e-5 < abs(first["loss"] / exact["loss"] - 1) < 5e-2, "products are rounded to bfloat16"
    filters = [key for key in whole if ".filter." in key]
    assert len(filters) > 3
    for key in filters:
        assert mine[key].dtype == torch.float32
        assert (mine[key] - whole[key]).norm() < 0.2 * whole[key].norm(), key


def test_zero_3_killed_resumes(one, workshop, tmp_path):
    """SIGKILL to every process after a checkpoint; the same command ends at the same student as one process does."""
    programs = forked("zero3", workshop, tmp_path, AGAIN, hold=" logits 4")
    run = programs[0].run
    steps = run / "transfer.partial/steps"
    assert [program.end(signal.SIGKILL) for program in programs] == 2 * [-signal.SIGKILL]
    assert not (run / "transfer").exists()
    student = AutoModelForCausalLM.from_pretrained(run / "transfer.partial/activations")
    newest = max(path for path in steps.iterdir() if path.name.isdigit())
    assert_holds_the_student_only(newest / "pytorch_model", student)
    assert "(resumes)" in launched("zero3", workshop, run, AGAIN).stdout
    assert_same(run, one)


def assert_holds_the_student_only(folder, student):
    """A DeepSpeed checkpoint: no weight of a teacher, and optimizer state for each number of the student, once."""
    import deepspeed  # noqa: F401  (its classes are in the files)

    names = {f"model.{name}" for name, _ in student.named_parameters()}
    for path in folder.glob("*model_states.pt"):
        module = torch.load(path, weights_only=False)["module"]
        # The vocabulary projection is there under both names.
        assert module.keys() == names | {"head", "model.model.rotary.inv_freq"}
    held = 0
    for path in folder.glob("*optim_states.pt"):
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        held += sum(
            part.numel() for part in state.get("fp32_flat_groups", state.get("single_partition_of_fp32_groups"))
        )
    count = sum(parameter.numel() for parameter in student.parameters())
    assert count <= held <= count + 8, "the student's own, and what evens out the processes' shares"


def test_the_teacher_is_in_no_optimizer(workshop, tmp_path, monkeypatch):
    """Nor wrapped for a launch: what is prepared are the student's parameters, all of them."""
    seen, prepare = [], Accelerator.prepare

    def spied(self, model, optimizer):
        seen.append(({id(p) for p in model.parameters()}, [p for g in optimizer.param_groups for p in g["params"]]))
        return prepare(self, model, optimizer)

    monkeypatch.setattr(Accelerator, "prepare", spied)
    scavenger(workshop / "recipe.yaml", f"run_dir={tmp_path}/run", *SHORT)
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "run/transfer").parameters())
    assert [len(optimised) > 0 and {id(p) for p in optimised} <= owned for owned, optimised in seen] == 3 * [True]
    assert [sum(p.numel() for p in optimised) for _, optimised in seen][1:] == [size, size]
    assert 0 < sum(p.numel() for p in seen[0][1]) < size, "mixers only"


def test_one_process_for_several_is_refused(workshop, monkeypatch):
    """`--cpu --num_processes 2` starts a single process, in accelerate's own environment for it, and says nothing."""
    words = ["--cpu", "--num_processes", "2", str(workshop / "recipe.yaml")]
    args, *_ = accelerate_launch._validate_launch_command(accelerate_launch.launch_command_parser().parse_args(words))
    environment = prepare_simple_launcher_cmd_env(args)[1]
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    with pytest.raises(RecipeError, match="several processes were asked for"):
        processes.start(load_recipe(str(workshop / "recipe.yaml")))


@pytest.mark.parametrize("overrides, place", [((), "transfer.activations"), (("training.accumulate=3",), "transfer")])
def test_a_batch_that_the_parts_do_not_divide_is_refused(workshop, monkeypatch, overrides, place):
    monkeypatch.setenv("WORLD_SIZE", "3")
    told(monkeypatch, num_processes=3)
    with pytest.raises(
        RecipeError, match=rf"{place}.*batch_size: found 4; expected a multiple of (3|9): processes \(3\)"
    ):
        processes.start(load_recipe(str(workshop / "recipe.yaml"), list(overrides)))


def test_the_phase_that_does_not_divide_is_named(workshop, monkeypatch):
    told(monkeypatch)
    values = yaml.safe_load((workshop / "recipe.yaml").read_text())["transfer"]["logits"]
    phases = f"transfer.logits=[{values}, {values | {'batch_size': 6}}]"
    with pytest.raises(RecipeError, match=r"transfer.logits.1.batch_size: found 6; expected a multiple of 4"):
        processes.start(load_recipe(str(workshop / "recipe.yaml"), [phases, "training.accumulate=4"]))


def test_modal_filters_are_refused_under_deepspeed(workshop, monkeypatch):
    told(monkeypatch, distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(RecipeError, match="student.filter.form: found modal; expected implicit under DeepSpeed"):
        processes.start(load_recipe(str(workshop / "recipe.yaml"), ["student.filter.form=modal"]))


def test_compiled_parts_are_refused_where_every_parameter_is_gathered_by_itself(workshop, monkeypatch):
    plugin = SimpleNamespace(zero_stage=3)
    told(monkeypatch, distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(RecipeError, match="training.compile: found true; expected false under ZeRO-3"):
        processes.start(load_recipe(str(workshop / "recipe.yaml"), ["training.compile=true"]))


def test_the_first_version_of_fsdp_is_refused(workshop, monkeypatch):
    told(monkeypatch, distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(RecipeError, match="FSDP of version 1; expected fsdp_version: 2"):
        processes.start(load_recipe(str(workshop / "recipe.yaml")))


def told(monkeypatch, **facts):
    """An Accelerator that says it is of some launch; returns where the options it is made with will be."""
    options = {}
    usual = {"num_processes": 1, "device": torch.device("cpu"), "distributed_type": DistributedType.NO}
    usual["mixed_precision"] = "no"
    monkeypatch.setattr(
        processes, "Accelerator", lambda **given: options.update(given) or SimpleNamespace(**usual | facts)
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return options


@pytest.mark.parametrize("tracker", ["trackio", "tensorboard"])
def test_trackers_stay_on_this_machine_and_tell_no_token(workshop, tmp_path, monkeypatch, capfd, tracker):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("HF_TOKEN", "WANDB_API_KEY", "TRACKIO_WRITE_TOKEN"):
        monkeypatch.setenv(name, "hf_SecretOfTheTest")

    def refused(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    scavenger(
        workshop / "recipe.yaml", f"run_dir={tmp_path}/run", *SHORT, "baseline=null", f"training.tracker={tracker}"
    )
    if tracker == "trackio":
        with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
            logged = database.execute("select metrics from metrics").fetchall()
        assert sum("logits/loss" in str(row) for row in logged) == 3 and "logits/learning_rate" in str(logged)
    else:
        assert list((tmp_path / "run/logs").rglob("events*"))
    assert "SecretOfTheTest" not in "".join(capfd.readouterr())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"SecretOfTheTest" in path.read_bytes()]


def test_wandb_is_offline_without_an_account(workshop, monkeypatch, tmp_path):
    told(monkeypatch)
    find = processes.importlib.util.find_spec
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "wandb" or find(name))
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    recipe = load_recipe(str(workshop / "recipe.yaml"), ["training.tracker=wandb"])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    processes.start(recipe)
    assert os.environ["WANDB_MODE"] == "disabled", "who says otherwise is heard"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    processes.start(recipe)
    assert "WANDB_MODE" not in os.environ
    monkeypatch.delenv("WANDB_API_KEY")
    processes.start(recipe)
    assert os.environ.pop("WANDB_MODE") == "offline"


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    """Every key of them; those of several processes are launched by the tests above, but for GPUs of one kind."""
    read = load_config_from_file(str(path))
    assert read.distributed_type and read.mixed_precision in ("no", "bf16")
    said = " ".join(path.read_text().replace("\n#", " ").split())
    # What mixers round: test_model.py, test_what_a_mixer_rounds_in_half_precision.
    assert "float32" not in said or "its taps are rounded to bfloat16" in said


def test_float16_is_refused(workshop, monkeypatch):
    told(monkeypatch, mixed_precision="fp16")
    with pytest.raises(RecipeError, match="mixed_precision fp16; expected bf16 or no"):
        processes.start(load_recipe(str(workshop / "recipe.yaml")))
