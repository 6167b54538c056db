"""What a cluster does to a run, really done to it: kills, warnings, full disks, damaged files, losses that are NaN."""

import math
import os
import re
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from program import Program, ranks, small_disk
from transformers import AutoModelForCausalLM

import scavenger.model as _registered  # noqa: F401  (AutoModel knows the student)
from scavenger import training
from scavenger.data import Batch
from scavenger.recipe import RecipeError, Stage, load_recipe
from scavenger.run import checkpoint, interruption
from scavenger.run.checkpoint import read_json
from scavenger.run.run import Run


# A checkpoint every 4 steps; the last one is not the end.
TRAINING = ("transfer.activations.steps=22", "transfer.logits.steps=22", "recurrence=null", "report=null")
TRANSFER = (*TRAINING, "baseline=null")
STEPS = {"activations": 22, "logits": 22, "baseline": 44}
EVERY = 4

FOLDERS = {"activations": "transfer/activations", "logits": "transfer", "baseline": "baseline"}


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory):
    """A run that nothing disturbed."""
    program = Program(tmp_path_factory.mktemp("whole"), workshop / "recipe.yaml", *TRAINING)
    assert program.end() == 0, program.err
    return program


def same(run, whole, *stages):
    """To the last bit: weights, and histories but for what is measured with a clock."""
    for stage in stages:
        mine, right = (AutoModelForCausalLM.from_pretrained(r / stage).state_dict() for r in (run, whole.run))
        assert mine.keys() == right.keys() and all(torch.equal(mine[key], right[key]) for key in right)
        assert history(run, stage) == history(whole.run, stage)


def history(run, stage):
    """Without clocks, and without what comes with checkpoints: it is of the weights, which are compared."""
    clocks = re.compile("second|time_in|mfu|floor_|held_out_loss")
    entries = read_json(run / stage / "history.json")
    return [{key: value for key, value in entry.items() if not clocks.search(key)} for entry in entries]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


LOGITS = "transfer.partial/steps"


def state_without_manifest(run):
    beside = run / LOGITS / "000000004.partial"
    return (beside / "model.safetensors").is_file() and not (beside / checkpoint.MANIFEST).exists()


def manifest_before_the_rename(run):
    return (run / LOGITS / "000000008.partial" / checkpoint.MANIFEST).is_file() and names(run / LOGITS) == [
        "000000004",
        "000000008.partial",
    ]


def renamed_and_not_yet_on_the_disk(run):
    return names(run / LOGITS) == ["000000004", "000000008"]


# Where a run is killed, and what is then on the disk.
WINDOWS = [
    (" activations 6", lambda run: names(run / "transfer.partial/activations.partial/steps") == ["000000004"]),
    (f"open {LOGITS}/000000004.partial/history.json.partial", state_without_manifest),
    (f"os.rename {LOGITS}/000000008", manifest_before_the_rename),
    (f"open {LOGITS}", renamed_and_not_yet_on_the_disk),  # the first time of the folder itself: to sync the rename
    (" baseline 13", lambda run: names(run / "baseline.partial/steps") == ["000000008", "000000012"]),
]


def test_killed_in_every_window(workshop, whole, tmp_path):
    """SIGKILL between two steps, and in each window of a checkpoint's writing, one after the other in one run."""
    for hold, reached in WINDOWS:
        program = Program(tmp_path, workshop / "recipe.yaml", *TRAINING, hold=hold)
        found = reached(program.run)
        assert program.end(signal.SIGKILL) == -signal.SIGKILL and found, hold
    program = Program(tmp_path, workshop / "recipe.yaml", *TRAINING)
    assert program.end() == 0, program.err
    same(program.run, whole, *FOLDERS.values())
    each_sequence_once(program, whole)


def each_sequence_once(program, whole):
    """A process that was killed may have begun steps that the next one, from the last checkpoint, begins again: what
    counts is the last beginning of each. So counted every step is there once, and every sequence is read once.
    """
    for stage, steps in STEPS.items():
        begun = [(step, rows) for name, step, rows in program.batches if name == stage]
        before, newest = -1, 0
        for step, _ in begun:
            if step != before + 1:
                assert newest <= step <= before and step % EVERY == 0, "another process: from a checkpoint on"
                newest = step
            before = step
        counted = dict(begun)
        assert sorted(counted) == list(range(steps)) == [step for name, step, _ in whole.batches if name == stage]
        assert counted == {step: rows for name, step, rows in whole.batches if name == stage}
        assert [entry["step"] for entry in history(program.run, FOLDERS[stage])] == list(range(2, steps + 1, 2))
    for stages in (("activations", "logits"), ("baseline",)):
        read = [row for name, _, rows in whole.batches if name in stages for row in rows]
        assert sorted(read) == list(range(44 * 4)), "one pass, each sequence of it once"


def test_warned_in_training(workshop, whole, tmp_path):
    """SIGTERM: a checkpoint after the running step, though none was due, an exit code of its own, and on."""
    words = (workshop / "recipe.yaml", *TRANSFER, "training.checkpoint_every=1000")
    program = Program(tmp_path, *words, hold=" logits 6")
    assert program.end(signal.SIGTERM) == interruption.EXIT_CODE == 75
    assert names(program.run / "transfer.partial/steps") == ["000000007"]
    assert program.lines == [
        "scavenger: ended by SIGTERM (logits: stopped after step 7 of 22); run the same command again to resume"
    ]
    again = Program(tmp_path, *words)
    assert again.end() == 0 and again.lines == [], again.err
    assert [step for name, step, _ in again.batches if name == "logits"] == list(range(22)), "no step twice"
    same(again.run, whole, "transfer")


def test_warned_elsewhere(workshop, tmp_path):
    """SIGTERM where nothing trains: at once, and the same command goes on to the end."""
    words = [
        *("transfer.activations.steps=2", "transfer.logits.steps=2", "baseline=null"),
        *("report.context_lengths=[20]", "report.sample_tokens=4"),
    ]
    for stage in ("data", "recurrence", "report"):
        program = Program(tmp_path, workshop / "recipe.yaml", *words, hold=f"os.mkdir /{stage}.partial")
        assert program.end(signal.SIGTERM) == 75, program.err
        assert program.lines == ["scavenger: ended by SIGTERM; run the same command again to resume"]
        assert not (program.run / stage).exists()
    program = Program(tmp_path, workshop / "recipe.yaml", *words)
    assert program.end() == 0, program.err
    assert (program.run / "report/index.html").is_file() and not list(program.run.rglob("*.partial"))


def test_two_processes_are_warned(workshop, tmp_path):
    """One of two gets the SIGTERM: both stop after the same step, and both go on from it."""
    lengths = ("transfer.activations.steps=2", "transfer.logits.steps=14")

    def pair(name, hold=None):
        return [
            Program(
                tmp_path / f"{name}-{rank}",
                workshop / "recipe.yaml",
                *TRANSFER,
                *lengths,
                run=tmp_path / name,
                hold=hold if rank else None,
                environment=environment,
            )
            for rank, environment in enumerate(ranks(2))
        ]

    undisturbed = pair("undisturbed")
    assert [program.end() for program in undisturbed] == [0, 0], undisturbed[0].err
    first, second = pair("warned", hold=" logits 5")
    assert second.end(signal.SIGTERM) == first.end() == 75, first.err + second.err
    assert first.batches == second.batches and first.batches[-1][:2] == ("logits", 5)
    assert names(first.run / "transfer.partial/steps") == ["000000004", "000000006"]
    again = pair("warned")
    assert [program.end() for program in again] == [0, 0], again[0].err
    assert [step for name, step, _ in again[1].batches if name == "logits"] == list(range(14))
    same(first.run, undisturbed[0], "transfer")


def test_only_a_program_is_warned():
    """Importing and training in somebody's own program, or in a thread of it, leave their signals alone."""
    before = signal.getsignal(signal.SIGTERM)
    with interruption.handled():
        assert signal.getsignal(signal.SIGTERM) is not before
        with pytest.raises(interruption.Stopped), interruption.postponed() as warning:
            signal.raise_signal(signal.SIGTERM)
            assert warning.asked
        with pytest.raises(interruption.Stopped):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a second one, while the first is obeyed
    assert signal.getsignal(signal.SIGTERM) is before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_signal_within).result() is before
    with interruption.postponed() as warning:
        assert not warning.asked


def _signal_within():
    with interruption.handled():
        return signal.getsignal(signal.SIGTERM)


def test_full_disk(workshop, whole, tmp_path):
    """The disk fills up in the middle of a run; with room again, the same command goes on."""
    words = (workshop / "recipe.yaml", *TRANSFER, "training.tracker=none")
    with small_disk(tmp_path / "disk") as disk:
        seen = Path("/proc", str(disk), "root", *tmp_path.parts[1:], "disk")
        program = Program(tmp_path, *words, run=tmp_path / "disk/run", disk=disk, hold=" logits 9")
        with pytest.raises(OSError, match="No space"), open(seen / "ballast", "wb", buffering=0) as ballast:
            while ballast.write(bytes(2**12)):
                pass
        assert program.end() == 2
        [line] = program.lines
        assert re.fullmatch(
            r"scavenger: error: .*/transfer.partial/steps/000000012.partial: cannot be written "
            r"\(No space left on device.*\); the checkpoint of step 8 is intact; run the same command again to resume",
            line,
        )
        assert "Traceback" not in program.err
        assert names(seen / "run/transfer.partial/steps") == ["000000004", "000000008"]
        (seen / "ballast").unlink()
        again = Program(tmp_path, *words, run=tmp_path / "disk/run", disk=disk)
        assert again.end() == 0, again.err
        same(seen / "run", whole, "transfer")


@pytest.mark.parametrize(
    ("step", "size", "what", "why", "left"),
    [
        (9, 200_000, "transfer.partial/steps/000000012.partial", r"a write failed; [\d,.]+ MiB are free there", [4, 8]),
        (20, 100_000, "transfer.partial", r"File too large \(os error 27\)", [16, 20]),
    ],
    ids=["optimizer", "model"],
)
def test_no_room_for_a_file(workshop, whole, tmp_path, step, size, what, why, left):
    """Files may grow no more, so that a write fails half way: of a checkpoint, or of the model at the end."""
    program = Program(tmp_path, workshop / "recipe.yaml", *TRANSFER, hold=f" logits {step}")
    resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (size, size))
    assert program.end() == 2
    [line] = program.lines
    intact = f"the checkpoint of step {left[-1]} is intact; run the same command again to resume"
    assert re.fullmatch(rf"scavenger: error: .*/{what}: cannot be written \({why}\); {intact}", line), line
    assert "Traceback" not in program.err
    beside = program.run / "transfer.partial"
    assert names(beside / "steps") == [f"{step:09d}" for step in left]
    assert names(beside) == ["activations", "steps"]
    again = Program(tmp_path, workshop / "recipe.yaml", *TRANSFER)
    assert again.end() == 0, again.err
    same(again.run, whole, "transfer")


def truncated(steps):
    os.truncate(steps / "000000012/model.safetensors", 1000)


def altered(steps):
    file = steps / "000000012/optimizer.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def incomplete(steps):
    (steps / "000000012/random_states_0.pkl").unlink()


def unlisted(steps):
    (steps / "000000012/custom_checkpoint_0.pkl").write_bytes(b"whatever")


def unsealed(steps):
    file = steps / "000000012/manifest.json"
    file.write_text(file.read_text().replace('"step": 12', '"step": 16'))


def unnamed(steps):
    (steps / "000000012/manifest.json").unlink()


def empty(steps):
    truncated(steps)
    os.truncate(steps / "000000008/manifest.json", 0)


REFUSED = [
    (truncated, [r"/steps/000000012: model.safetensors is truncated \(1,000 bytes of [\d,]+\); resuming from step 8"]),
    (altered, [r"/steps/000000012: optimizer.bin is altered \(its checksum is wrong\); resuming from step 8"]),
    (incomplete, [r"/steps/000000012: random_states_0.pkl is missing; resuming from step 8"]),
    (unlisted, [r"/steps/000000012: custom_checkpoint_0.pkl is not in its manifest; resuming from step 8"]),
    (unsealed, [r"/steps/000000012: manifest.json is altered; resuming from step 8"]),
    (unnamed, [r"/steps/000000012: manifest.json is missing; resuming from step 8"]),
    (
        empty,
        [
            r"/steps/000000012: model.safetensors is truncated \(.*\); the stage starts anew",
            r"/steps/000000008: manifest.json cannot be read; the stage starts anew",
        ],
    ),
]


@pytest.mark.parametrize(("damage", "said"), REFUSED, ids=[damage.__name__ for damage, _ in REFUSED])
def test_damaged_checkpoint(workshop, tmp_path, capfd, damage, said):
    """The newest whole one is loaded, and a line says why not a newer one."""
    accelerator = Accelerator(cpu=True)
    run = Run(load_recipe(str(workshop / "recipe.yaml")), tmp_path, accelerator, None)
    model = torch.nn.Linear(37, 19)
    trained = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))[1]
    steps, states = tmp_path / "steps", {}
    for step in (4, 8, 12):
        model(torch.randn(3, 37)).sum().backward()
        trained.step()
        states[step] = model.weight.clone()
        checkpoint.save_step(run, steps, step, [{"step": step}])
    assert names(steps) == ["000000008", "000000012"]
    damage(steps)
    capfd.readouterr()
    right = 0 if damage is empty else 8
    model.weight.data.zero_()
    assert checkpoint.resume_step(run, steps) == (right, [{"step": right}] if right else [])
    assert torch.equal(model.weight, states[right] if right else torch.zeros(19, 37))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(said)
    for line, right_line in zip(lines, said, strict=True):
        assert re.fullmatch("scavenger: .*" + right_line, line), line
    checkpoint.save_step(run, steps, 16, [])
    assert names(steps) == (["000000008"] if right else []) + ["000000016"], "what was refused has gone"
    accelerator.free_memory()


@pytest.fixture(scope="module")
def killed(workshop, tmp_path_factory):
    """A run killed in the second half of transfer, and the same of another seed."""

    def run(seed):
        folder, words = tmp_path_factory.mktemp("killed"), (*TRANSFER, f"seed={seed}")
        program = Program(folder, workshop / "recipe.yaml", *words, hold=" logits 13")
        program.end(signal.SIGKILL)
        assert names(program.run / "transfer.partial/steps") == ["000000008", "000000012"]
        return program.run

    return run(0), run(1)


def moved(run, folder):
    """A copy of a run, and where its step checkpoints are."""
    shutil.copytree(run, folder / "run")
    saved = (run / "recipe.yaml").read_text()
    (folder / "run/recipe.yaml").write_text(saved.replace(str(run), str(folder / "run")))
    return folder / "run/transfer.partial/steps"


def exchanged(steps, other):
    shutil.rmtree(steps / "000000012")
    shutil.copytree(other / "transfer.partial/steps/000000012", steps / "000000012")


@pytest.mark.parametrize("damage", [altered, empty, exchanged])
def test_a_run_goes_on_from_the_one_before(workshop, whole, killed, tmp_path, damage):
    steps = moved(killed[0], tmp_path)
    damage(*[steps, killed[1]][: 2 if damage is exchanged else 1])
    program = Program(tmp_path, workshop / "recipe.yaml", *TRANSFER)
    assert program.end() == 0, program.err
    if damage is exchanged:
        why = "it is of another recipe: seed (it has 1, the recipe says 0); resuming from step 8"
        assert program.lines == [f"scavenger: {steps}/000000012: {why}"]
    assert len(program.lines) == (2 if damage is empty else 1)
    assert [step for _, step, _ in program.batches] == list(range(0 if damage is empty else 8, 22))
    same(program.run, whole, "transfer")


@pytest.mark.parametrize("fault", [Path.unlink, lambda file: os.truncate(file, 5000)], ids=["vanished", "truncated"])
def test_the_runs_own_text(workshop, killed, tmp_path, fault):
    steps = moved(killed[0], tmp_path)
    fault(tmp_path / "run/data/train.npy")
    program = Program(tmp_path, workshop / "recipe.yaml", *TRANSFER)
    assert program.end() == 2, program.err
    [line] = program.lines
    assert line.startswith("scavenger: error: ") and "data/train.npy" in line and "Traceback" not in program.err
    assert names(steps) == ["000000008", "000000012"]


class Line(torch.nn.Module):
    """Something to train, in place of a student."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Linear(5, 3)

    def forward(self, ids):
        return self.model(ids.float()).square().mean()


def no_loss(value, module):
    return value * torch.nan


def no_gradient(value, module):
    return value + (0 * module.model.weight).sum().sqrt()  # 0, with the slope of a root at 0


def trained(workshop, steps_dir, faults, steps):
    """The loop on `Line`, where the loss of some steps is spoiled."""

    def batch(step):
        ids = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(step))
        return Batch(np.array([2 * step, 2 * step + 1]), ids, torch.ones_like(ids, dtype=torch.bool))

    def loss(module, part, target, whole):
        value = module(part.ids)
        fault = faults.get(int(whole.rows[0]) // 2)
        return (value if fault is None else fault(value, module)), {}

    recipe = load_recipe(str(workshop / "recipe.yaml"), ["training.checkpoint_every=6"])
    stage = Stage(steps=steps, batch_size=2, learning_rate=1e-2)
    # A run before in this process may have left its own number of micro-batches.
    with mock.patch.dict(os.environ, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1"):
        run = Run(recipe, steps_dir.parent, Accelerator(cpu=True), None)
    optimisation = training.Optimisation(
        name="line", module=Line(), settings=stage, steps_dir=steps_dir, batch=batch, loss=loss
    )
    return training.train(run, optimisation), batch, stage


@pytest.fixture(params=[False, True], ids=["in step", "ahead"])
def ahead(request, monkeypatch):
    """The host looks at a step before the next one, or, as on a GPU, after the next one has begun."""
    monkeypatch.setattr(training, "runs_ahead", lambda accelerator: request.param)


def test_a_step_without_a_number_is_skipped(workshop, tmp_path, ahead):
    (history, model), batch, stage = trained(workshop, tmp_path, {2: no_loss, 3: no_gradient, 7: no_loss}, 11)
    right = Line()
    optimizer = torch.optim.AdamW(right.parameters(), betas=training.BETAS, fused=True)
    for step in (0, 1, 4, 5, 6, 8, 9, 10):
        for group in optimizer.param_groups:
            group |= {"lr": training.learning_rate(stage, step)}
        optimizer.param_groups[0]["weight_decay"] = training.WEIGHT_DECAY
        right(batch(step).ids).backward()
        torch.nn.utils.clip_grad_norm_(right.parameters(), training.MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.weight, right.model.weight, rtol=1e-6, atol=1e-7)
    # Nothing was learned in steps 3 and 4, so there is nothing to log.
    assert [(entry["step"], entry.get("skipped", 0)) for entry in history] == [(2, 0), (6, 2), (8, 3), (10, 3), (11, 3)]
    assert all(math.isfinite(entry["loss"]) for entry in history)


def test_products_of_a_training_are_rounded_on_a_gpu(workshop, tmp_path, monkeypatch):
    seen = set()

    def noted(value, module):
        seen.add(torch.get_float32_matmul_precision())
        return value

    trained(workshop, tmp_path / "cpu", {1: noted}, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trained(workshop, tmp_path / "gpu", {0: noted}, 2)
    assert seen == {"highest", "high"} and torch.get_float32_matmul_precision() == "highest"


def test_skipped_steps_are_counted_to_the_end(workshop, tmp_path, ahead):
    """Over a resumption, and where the last steps are skipped: what reads on begins behind them."""

    def stopped(value, module):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        trained(workshop, tmp_path, {2: no_loss, 8: stopped}, 11)
    (history, _), *_ = trained(workshop, tmp_path, {2: no_loss, 9: no_loss, 10: no_gradient}, 11)
    counts = [(2, 0), (4, 1), (6, 1), (8, 1), (10, 2), (11, 3)]
    assert [(entry["step"], entry.get("skipped", 0)) for entry in history] == counts
    with pytest.raises(RecipeError, match="at step 3, for 3 steps in a row"):
        trained(workshop, tmp_path / "short", dict.fromkeys(range(3), no_loss), 3)


def test_many_steps_without_a_number_end_it(workshop, tmp_path, ahead):
    faults = dict.fromkeys(range(8, 8 + training.MOST_SKIPPED), no_gradient)
    with pytest.raises(RecipeError, match="line: .* at step 13.*nonfinite.json") as found:
        trained(workshop, tmp_path / "steps", faults, 20)
    assert "\n" not in str(found.value)
    facts = read_json(tmp_path / "nonfinite.json")
    assert (facts["stage"], facts["step"], facts["rows"]) == ("line", 13, [24, 25])
    assert names(tmp_path / "steps")[-1] in ("000000006", "000000012")
    trained(workshop, tmp_path / "steps", {}, 20)  # the same command, the fault mended


def test_a_teacher_whose_outputs_overflow(workshop, tmp_path):
    """Its weights are finite. One line, the batch by name, from the program itself."""
    shutil.copytree(workshop / "teacher", tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    model.gpt_neox.layers[1].attention.dense.weight.data[3] = 1e38
    model.save_pretrained(tmp_path / "teacher")
    program = Program(tmp_path, workshop / "recipe.yaml", *TRANSFER, f"teacher.path={tmp_path}/teacher")
    assert program.end() == 2, program.err
    [line] = program.lines
    path = Path(re.search(r"named in (\S*nonfinite.json)", line)[1])
    assert read_json(path)["rows"] == program.batches[-1][2] and "Traceback" not in program.err
