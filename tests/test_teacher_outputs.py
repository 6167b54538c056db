"""The teacher's outputs on disk: what is read is what the teacher says, and what lies there is whole and shared."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import scavenger, tiny_teacher
from program import forked, ranks

from scavenger import data, losses, student, teacher
from scavenger.recipe import RecipeError, load_recipe, resolved
from scavenger.run.run import Run
from scavenger.transfer import teacher_outputs, transfer


CPU = torch.device("cpu")
KEEPS_BOTH = ("cache.activations=true", "cache.logits=7")


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def given(workshop, tmp_path, monkeypatch):
    """A recipe over 23 blocks of which each phase reads all, several times, and its run folder with these blocks.

    Shards hold five blocks of both kinds, so that the last is short.
    """
    text = np.random.default_rng(1).integers(0, 320, (23, 48)).astype(np.uint16)
    text[5, 41:] = data.padding(text.dtype)
    text[17] = text[3]  # a sequence that recurs
    count = [0]

    def made(*overrides, blocks=text):
        count[0] += 1
        run_dir = tmp_path / f"run_{count[0]}"
        (run_dir / "data").mkdir(parents=True)
        np.save(run_dir / "data" / "train.npy", blocks)
        overrides = [f"run_dir={run_dir}", f"cache.folder={tmp_path}/cache", *overrides]
        return load_recipe(str(workshop / "recipe.yaml"), overrides), run_dir

    monkeypatch.setattr(teacher_outputs, "SHARD_BYTES", 5 * (2 * 2 * 3 * 48 * 30 + 48 * (7 * 4 + 4)))
    return made


def filled(recipe, run_dir, accelerator, frozen=None):
    """The cache and the teacher that it is of."""
    frozen = frozen or teacher.load(recipe.teacher, run_dir)
    return teacher_outputs.run(Run(recipe, run_dir, accelerator, None), frozen), frozen


def shards(recipe):
    """The bytes of each shard of the recipe's folder, by name."""
    return {path.name: path.read_bytes() for path in Path(recipe.cache.folder).rglob("*.safetensors")}


def forbid(monkeypatch):
    """No forward of the teacher from now on."""

    def refused(*args):
        raise AssertionError("the teacher is run")

    for name in ("attention", "hidden_states"):
        monkeypatch.setattr(teacher, name, refused)


def test_a_recipe_without_the_section_has_none(workshop, accelerator):
    recipe = load_recipe(str(workshop / "recipe.yaml"))
    assert teacher_outputs.run(Run(recipe, workshop, accelerator, None), tiny_teacher()) is None


def test_activations_are_the_teachers(given, accelerator):
    recipe, run_dir = given(*KEEPS_BOTH)
    kept, frozen = filled(recipe, run_dir, accelerator)
    assert kept.activations and len(shards(recipe)) == 5, "22 different sequences"
    batch = data.batch(data.blocks(run_dir / "data", "train"), 11, 9, recipe.seed)  # of several shards, in any order
    mixers = transfer.MixerMatching(
        student.from_teacher(recipe.student, 48, frozen, 0), (0, 2), "teacher", recipe.student.filter
    )
    found, errors = [], []
    for aim in (teacher.attention(frozen, batch.ids, (0, 2)), kept.attention(batch.rows, (0, 2), CPU)):
        found.append(aim)
        errors.append(mixers(batch.ids, batch.mask, *aim)[0])
    for exact, read in zip(*found, strict=True):
        assert read.keys() == exact.keys() == {0, 2}
        for layer in (0, 2):
            assert read[layer].dtype == torch.float16 and read[layer].shape == (9, 48, 30)
            assert losses.activation_error(read[layer], exact[layer]).max() < 5e-7  # measured 5e-8
    torch.testing.assert_close(*errors, rtol=4e-5, atol=0)  # measured 3.5e-6


def test_the_whole_distribution_gives_the_loss_and_gradient_of_the_teacher(given, accelerator):
    recipe, run_dir = given("cache.logits=320")
    kept, frozen = filled(recipe, run_dir, accelerator)
    batch = data.batch(data.blocks(run_dir / "data", "train"), 0, 23, recipe.seed)
    assert not batch.mask.all()
    top = kept.top(batch.rows, CPU)
    assert (top.log_p.dtype, top.tokens.dtype, top.log_rest.dtype) == (torch.float32, torch.int64, torch.float32)
    assert top.log_p.shape == top.tokens.shape == (23, 48, 320) and top.log_rest.shape == (23, 48)
    assert torch.equal(top.tokens.sort(-1).values, torch.arange(320).expand(23, 48, 320)), "each token once"
    last, _ = teacher.hidden_states(frozen, batch.ids, False)
    logits = torch.randn(23, 48, 320, requires_grad=True)
    for objective in ("forward_kl", "reverse_kl", "jensen_shannon"):
        full = losses.logit_divergence(logits, last @ frozen.lm_head.weight.T, objective).mean()
        read = losses.kept_divergence(logits, top, objective).mean()
        torch.testing.assert_close(read, full, rtol=5e-6, atol=0)  # measured 5e-7
        slopes = [torch.autograd.grad(value, logits)[0] for value in (full, read)]
        assert losses.activation_error(slopes[1], slopes[0]).max() < 3e-8  # measured 3e-9


def test_the_rest_has_the_mass_of_all_that_is_not_kept(given, accelerator):
    recipe, run_dir = given("cache.logits=7")
    kept, frozen = filled(recipe, run_dir, accelerator)
    batch = data.batch(data.blocks(run_dir / "data", "train"), 20, 5, recipe.seed)
    top = kept.top(batch.rows, CPU)
    last, _ = teacher.hidden_states(frozen, batch.ids, False)
    p = (last @ frozen.lm_head.weight.T).softmax(-1)
    named = torch.zeros_like(p).scatter(-1, top.tokens, 1.0)
    assert torch.all(p[named == 0].reshape(5, 48, 313).amax(-1) <= p.gather(-1, top.tokens).amin(-1)), "the most likely"
    torch.testing.assert_close(top.log_rest.exp(), (p * (1 - named)).sum(-1), rtol=7e-6, atol=0)  # 7e-7
    torch.testing.assert_close(top.log_p.exp().sum(-1) + top.log_rest.exp(), torch.ones(5, 48), rtol=2e-6, atol=0)


def test_what_is_kept_is_never_further_than_the_whole():
    """KL between distributions with outcomes merged, against KL between the whole ones; in float64, unrounded."""
    last, weight = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(41, 6, dtype=torch.float64)
    student = torch.randn(2, 9, 41, dtype=torch.float64)
    for objective in ("forward_kl", "reverse_kl", "jensen_shannon"):
        full = losses.logit_divergence(student, last @ weight.T, objective)
        before = torch.zeros_like(full)
        for kept in (1, 3, 17, 40, 41):
            found = losses.kept_divergence(
                student, teacher_outputs.most_likely(last, losses.Head(weight, None), kept), objective
            )
            assert torch.all(found <= full + 1e-12) and torch.all(found >= before - 1e-12), "more is nearer"
            before = found
        torch.testing.assert_close(before, full, rtol=1e-12, atol=1e-12)


def test_chunks_change_nothing(monkeypatch):
    last, weight = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(41, 6, dtype=torch.float64)
    whole = teacher_outputs.most_likely(last, losses.Head(weight, None), 4)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 41 * 4)
    for one, other in zip(whole, teacher_outputs.most_likely(last, losses.Head(weight, None), 4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_a_vocabulary_beyond_16_bits(given, accelerator):
    frozen = tiny_teacher(vocab_size=70_001).float()
    text = np.random.default_rng(2).integers(0, 70_001, (3, 48)).astype(np.uint32)
    recipe, run_dir = given("cache.logits=5", blocks=text)
    kept, _ = filled(recipe, run_dir, accelerator, frozen)
    last, _ = teacher.hidden_states(frozen, torch.from_numpy(text.astype(np.int64)), False)
    expected = (last @ frozen.lm_head.weight.T).topk(5).indices
    found = kept.top(np.arange(3), CPU).tokens
    assert torch.equal(found, expected) and found.max() >= 2**16


def test_activations_beyond_float16(given, accelerator):
    """What one sequence needs another range for is bfloat16 in its shard, and in a batch with others."""
    recipe, run_dir = given("cache.activations=true")
    frozen = teacher.load(recipe.teacher, run_dir)
    with torch.no_grad():
        frozen.gpt_neox.layers[1].input_layernorm.weight.mul_(1e5)
        frozen.gpt_neox.layers[1].attention.dense.weight.mul_(1e-3)
    kept, _ = filled(recipe, run_dir, accelerator, frozen)
    batch = data.batch(data.blocks(run_dir / "data", "train"), 0, 9, recipe.seed)
    inputs, outputs = kept.attention(batch.rows, range(3), CPU)
    exact, _ = teacher.attention(frozen, batch.ids, range(3))
    assert exact[1].abs().max() > 65_504
    assert (inputs[0].dtype, inputs[1].dtype, outputs[0].dtype) == (torch.float16, torch.bfloat16, torch.float16)
    assert losses.activation_error(inputs[1], exact[1]).max() < 3e-5  # measured 2.9e-6
    large, small = torch.full((2, 3), 7e4), torch.full((2, 3), 0.1)
    joined = teacher_outputs._joined([teacher_outputs._halved(small), teacher_outputs._halved(large)])
    assert joined.dtype == torch.bfloat16 and torch.equal(joined, torch.cat([small, large]).bfloat16())
    assert teacher_outputs._halved(small.bfloat16()).dtype == torch.bfloat16, (
        "a teacher's own 16 bits are kept as they are"
    )


def test_a_second_recipe_shares_what_is_there(given, accelerator, monkeypatch, capsys):
    recipe, run_dir = given("cache.activations=true")
    filled(recipe, run_dir, accelerator)
    first = shards(recipe)
    (facts,) = Path(recipe.cache.folder).glob("*/cache.json")
    assert json.loads(facts.read_text())["sequences"] == {"activations": 22}
    assert len(first) == 5 and len(facts.parent.name) == 16
    # another seed, student and learning rate: the same sequences in another order, and nothing is written
    other, other_dir = given(
        "cache.activations=true", "seed=5", "student.mixer=hyena", "transfer.activations.learning_rate=1e-3"
    )
    frozen = teacher.load(other.teacher, other_dir)
    with monkeypatch.context() as patch:
        forbid(patch)
        kept, _ = filled(other, other_dir, accelerator, frozen)
    assert shards(other) == first and ": complete" in capsys.readouterr().out
    batch = data.batch(data.blocks(other_dir / "data", "train"), 0, 4, other.seed)
    exact = teacher.attention(frozen, batch.ids, (1,))[1][1]
    assert losses.activation_error(kept.attention(batch.rows, (1,), CPU)[1][1], exact).max() < 5e-7
    # more text, and more that is kept: only that is added
    text = np.concatenate([data.blocks(run_dir / "data", "train"), np.arange(96, dtype=np.uint16).reshape(2, 48)])
    longer, longer_dir = given(*KEEPS_BOTH, blocks=text)
    filled(longer, longer_dir, accelerator)
    added = shards(longer)
    assert first.items() < added.items()
    assert {name.split("-")[0] for name in added.keys() - first.keys()} == {"activations_top7", "top7"}
    assert len(list(Path(recipe.cache.folder).iterdir())) == 1


def test_another_teacher_or_text_has_another_folder(given, accelerator):
    recipe, run_dir = given("cache.logits=3")
    _, frozen = filled(recipe, run_dir, accelerator)
    names = {folder.name: shards(recipe) for folder in Path(recipe.cache.folder).iterdir()}
    with torch.no_grad():
        frozen.gpt_neox.layers[2].mlp.dense_4h_to_h.weight[3, 1] += 1e-3
    filled(recipe, run_dir, accelerator, frozen)
    folders = {folder.name for folder in Path(recipe.cache.folder).iterdir()}
    assert len(folders) == 2 and names.keys() < folders
    frozen.config.rotary_pct = 0.5  # the same weights, and another model
    filled(recipe, run_dir, accelerator, frozen)
    other, other_dir = given("cache.logits=3", "data.text_column=other")
    filled(other, other_dir, accelerator)
    assert len(list(Path(recipe.cache.folder).iterdir())) == 4


def test_only_what_is_read_is_kept(given, accelerator):
    text = np.random.default_rng(3).integers(0, 320, (61, 48)).astype(np.uint16)
    recipe, run_dir = given(*KEEPS_BOTH, "transfer.activations.steps=3", "transfer.logits.steps=5", blocks=text)
    kept, frozen = filled(recipe, run_dir, accelerator)
    (facts,) = Path(recipe.cache.folder).glob("*/cache.json")
    assert json.loads(facts.read_text())["sequences"] == {"activations": 12, "top7": 20}
    batch = data.batch(text, 0, 32, recipe.seed)
    kept.attention(batch.rows[:12], (0,), CPU)
    kept.top(batch.rows[12:], CPU)
    with pytest.raises(ValueError, match=f"no top7 of blocks .{batch.rows[4]}.$"):
        kept.top(batch.rows[4:5], CPU)
    # a phase that may end early: those after it read from wherever it did
    recipe, run_dir = given(
        *KEEPS_BOTH,
        "transfer.activations.steps=3",
        "transfer.activations.flat=0.1",
        "transfer.logits.steps=5",
        blocks=text,
    )
    kept, _ = filled(recipe, run_dir, accelerator)
    kept.top(batch.rows, CPU)
    kept.attention(batch.rows[:12], (0,), CPU)


def test_a_damaged_shard_is_made_anew(given, accelerator, capsys):
    recipe, run_dir = given(*KEEPS_BOTH)
    filled(recipe, run_dir, accelerator)
    whole = shards(recipe)
    paths = sorted(Path(recipe.cache.folder).rglob("*.safetensors"))
    altered, cut, empty = paths[0], paths[2], paths[3]
    content = bytearray(altered.read_bytes())
    content[-1000] ^= 4
    altered.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-7])
    empty.write_bytes(b"")
    capsys.readouterr()
    kept, frozen = filled(recipe, run_dir, accelerator)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scavenger:")]
    assert len(lines) == 3 and all(line.endswith("it is made anew") for line in lines)
    assert [str(path) in line for path, line in zip((altered, cut, empty), lines, strict=True)] == [True] * 3
    assert "checksum" in lines[0] and "cannot be read" in lines[1]
    assert shards(recipe) == whole
    batch = data.batch(data.blocks(run_dir / "data", "train"), 0, 23, recipe.seed)
    exact = teacher.attention(frozen, batch.ids, (2,))[1][2]
    assert losses.activation_error(kept.attention(batch.rows, (2,), CPU)[1][2], exact).max() < 5e-7


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(given, accelerator, monkeypatch):
    recipe, run_dir = given("cache.activations=true", "cache.logits=100")
    frozen = teacher.load(recipe.teacher, run_dir)
    spare = teacher_outputs.SPARE * frozen.num_parameters()
    logits, activations = 22 * 48 * (4 * 100 + 4), 22 * 48 * 30 * 2 * 2 * 3
    usage = namedtuple("usage", "total used free")

    def free(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, count))

    def refused(count):
        free(count)
        with pytest.raises(RecipeError) as error:
            filled(recipe, run_dir, accelerator, frozen)
        assert not shards(recipe) and "\n" not in str(error.value)
        return str(error.value).split("expected ")[1]

    assert refused(10**5) == "another cache.folder"
    needed = spare + logits + activations
    assert refused(needed - 1).endswith("cache.logits=99 or less, or cache.activations=false")
    assert refused(spare + activations + logits // 2).startswith("another cache.folder, or cache.logits=5")
    assert refused(spare + logits) == "another cache.folder, or cache.logits=10 or less, or cache.activations=false"
    free(needed)
    filled(recipe, run_dir, accelerator, frozen)
    # the size that was said is the size that it has, but for names, keys and checksums
    held = sum(len(content) for content in shards(recipe).values())
    assert logits + activations < held < logits + activations + 5 * 4096
    with pytest.raises(RecipeError, match="cache.logits: found 321; expected 1 to the teacher's vocabulary, 320"):
        filled(*given("cache.logits=321"), accelerator)
    (run_dir / "file").touch()
    with pytest.raises(RecipeError, match="cache.folder: .* cannot be written"):
        filled(*given("cache.logits=3", f"cache.folder={run_dir}/file"), accelerator)


def test_a_full_disk_leaves_whole_shards(given, accelerator, monkeypatch):
    recipe, run_dir = given(*KEEPS_BOTH)
    written = []

    def write(path, tensors):
        if len(written) == 2:
            path.write_bytes(b"a part")
            raise OSError(28, "No space left on device")
        written.append(path)
        whole(path, tensors)

    whole = teacher_outputs._write
    with monkeypatch.context() as patch:
        patch.setattr(teacher_outputs, "_write", write)
        with pytest.raises(
            RecipeError, match="cannot be written .No space left on device.; .* run the same command again to resume"
        ):
            filled(recipe, run_dir, accelerator)
    before = shards(recipe)
    assert len(before) == 2 and not list(Path(recipe.cache.folder).rglob("*.partial"))
    filled(recipe, run_dir, accelerator)
    assert before.items() < shards(recipe).items()


def _share(run_dir, environment, shard_bytes):
    """One of two processes that fill a cache, and then another, where the second kills itself in a write."""
    os.environ.update(environment)
    accelerator, made = Accelerator(cpu=True), []
    teacher_outputs.SHARD_BYTES, whole = shard_bytes, teacher_outputs._write

    def write(path, tensors):
        whole(path, tensors)
        if "killed" in str(path) and accelerator.process_index == 1:
            os.truncate(path, 900)
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(path.name)

    teacher_outputs._write = write
    for name in ("together", "killed"):
        recipe = load_recipe(str(run_dir / "recipe.yaml"), [f"cache.folder={run_dir}/{name}"])
        teacher_outputs.run(Run(recipe, run_dir, accelerator, None), teacher.load(recipe.teacher, run_dir))
        (run_dir / f"made_{accelerator.process_index}").write_text(" ".join(made))
        found = list((run_dir / name).rglob("*.safetensors"))
        assert len(found) == 5, "no process goes on before all have written"


@pytest.mark.slow
def test_two_processes_share_the_work_and_a_kill_loses_one_shard(given, accelerator):
    """Two real processes, once whole, once with one that kills itself in a write; one process then makes the rest."""
    recipe, run_dir = given(*KEEPS_BOTH)
    filled(recipe, run_dir, accelerator)
    whole = shards(recipe)
    (run_dir / "recipe.yaml").write_text(resolved(recipe))
    first, second = (forked(_share, run_dir, environment, teacher_outputs.SHARD_BYTES) for environment in ranks(2))
    second.join()
    assert second.exitcode == -signal.SIGKILL
    first.kill()  # as a launcher does, if the loss of the other has not ended it
    first.join()
    together, killed = (
        dataclasses.replace(recipe, cache=dataclasses.replace(recipe.cache, folder=str(run_dir / name)))
        for name in ("together", "killed")
    )
    assert [len((run_dir / f"made_{process}").read_text().split()) for process in range(2)] == [3, 2]
    assert shards(together).keys() == whole.keys()
    (beside,) = (run_dir / "killed").rglob("*.partial")
    assert beside.stat().st_size == 900 and len(shards(killed)) <= 3
    filled(killed, run_dir, accelerator)
    assert shards(killed) == whole and not beside.exists()


def test_a_second_run_waits_for_the_first(given, accelerator, capsys):
    recipe, run_dir = given(*KEEPS_BOTH)
    filled(recipe, run_dir, accelerator)
    whole = shards(recipe)
    (folder,) = Path(recipe.cache.folder).iterdir()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    mine = folder / "shard.partial"
    found = []
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        mine.touch()
        second = threading.Thread(target=lambda: found.append(filled(recipe, run_dir, accelerator)))
        second.start()
        said = ""
        while "waiting for another run" not in said:
            assert second.is_alive()
            time.sleep(0.01)
            said += capsys.readouterr().err
        assert mine.exists() and not shards(recipe), "what another run is writing is left alone"
    second.join()
    assert found and shards(recipe) == whole and not mine.exists()


def test_a_transfer_reads_the_cache_and_never_runs_the_teacher(workshop, tmp_path, monkeypatch):
    """Both phases through the command; the losses are those of a run without a cache, to rounding."""
    alone = ["baseline=null", "recurrence=null", "report=null", "training.tracker=none"]
    alone += ["transfer.activations.steps=6", "transfer.logits.steps=6"]
    # small, because the first steps of Adam go by the sign of a gradient, were it only rounding
    alone += ["transfer.activations.learning_rate=1e-5", "transfer.logits.learning_rate=1e-5"]
    scavenger(workshop / "recipe.yaml", f"run_dir={tmp_path}/plain", *alone)
    keeps = [f"cache.folder={tmp_path}/cache", "cache.activations=true", "cache.logits=320"]
    filling = teacher_outputs.run

    def then_forbidden(*args):
        kept = filling(*args)
        forbid(monkeypatch)
        return kept

    with monkeypatch.context() as patch:
        patch.setattr(teacher_outputs, "run", then_forbidden)
        scavenger(workshop / "recipe.yaml", f"run_dir={tmp_path}/first", *alone, *keeps)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    # an ablation: other learning rates, and the teacher is not run at all
    rates = [f"transfer.{phase}.learning_rate=2e-2" for phase in ("activations", "logits")]
    scavenger(workshop / "recipe.yaml", f"run_dir={tmp_path}/second", *alone, *keeps, *rates)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == before
    for step in ("transfer/activations", "transfer"):
        plain, first, second = (
            [entry["loss"] for entry in json.loads((tmp_path / run / step / "history.json").read_text())]
            for run in ("plain", "first", "second")
        )
        assert first == pytest.approx(plain, rel=2e-4)  # measured 2e-5
        assert second != pytest.approx(plain, rel=1e-2)
