"""The benchmarks run, force the forms they name, and those compute the same."""

import argparse
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from reference import assert_close
from transformers import GPTNeoXForCausalLM

from scavenger.model import hyena


DECODING = Path(__file__).parents[1] / "benchmarks/decoding.py"
TINY = (64, 2, 4, 128, 101)
COMMAND = Path(__file__).parents[1] / "benchmarks/mixers.py"
SMALL = argparse.Namespace(hidden_size=64, num_heads=4, batch_size=2)


def test_benchmark_command(tmp_path):
    words = ["--hidden-size", "64", "--num-heads", "4", "--lengths", "20", "70", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, COMMAND, *words, "--output", tmp_path / "mixers.md"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["results"]) == 2 * 9
    for row in found["results"]:
        assert 0 < row["floor"] and 0 < row["forward"] < math.inf and 0 < row["both"] < math.inf
        assert row["memory"] >= 0
    shown = (tmp_path / "mixers.md").read_text()
    assert "hyena, FFT" in shown and "peak MiB" in shown and "--lengths 20 70" in shown
    wrong = subprocess.run([sys.executable, COMMAND, "--hidden-size", "30"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("mixers: error: found width 30")


def test_forms_that_are_timed_are_the_mixers_own(monkeypatch):
    benchmark = runpy.run_path(str(COMMAND))
    contenders = {row[0]: benchmark["Contender"](*row, SMALL) for row in benchmark["rows"](16)}
    hidden, cos, sin = benchmark["inputs"](SMALL, 70, torch.device("cpu"), torch.float32)
    outputs, taken = {}, []
    for form in ("outer_product_convolution", "modal_scan"):
        whole = getattr(hyena, form)
        monkeypatch.setattr(hyena, form, lambda *x, f=form, w=whole: taken.append(f) or w(*x))
    whole = hyena.ToeplitzProduct.apply
    monkeypatch.setattr(hyena.ToeplitzProduct, "apply", lambda *x: taken.append("ToeplitzProduct") or whole(*x))
    for name, contender in contenders.items():
        with contender.forced():
            outputs[name] = contender.module(hidden, cos, sin).detach()
    forms = ["ToeplitzProduct", "outer_product_convolution"]
    assert taken == [*forms, *forms, "modal_scan"]
    assert_close(outputs["multihyena 8, Toeplitz"], outputs["multihyena 8, FFT"], 1e-5)
    assert_close(outputs["multihyena 16, Toeplitz"], outputs["multihyena 16, FFT"], 1e-5)
    scanned = contenders["multihyena 16, modal scan"]
    assert_close(outputs["multihyena 16, modal scan"], scanned.module(hidden, cos, sin), 1e-5)
    for width in ("8", "16"):
        for length in (20, 70, 5000):
            taken = [contenders[f"multihyena {width}, {form}"].chosen(length) for form in ("Toeplitz", "FFT")]
            assert sum(taken) == 1


@pytest.fixture(scope="module")
def decoding():
    return runpy.run_path(str(DECODING))


def made(decoding, row, mixer="hyena"):
    """A row's contender at a tiny shape."""
    case = decoding["Case"](3, 21, 20)
    args = argparse.Namespace(dtype="float32", threads=torch.get_num_threads(), modes=None)
    length = case.prompt + case.new
    return decoding[row](decoding["model_of"](decoding[row], mixer, TINY, length, torch.device("cpu"), args), case)


def test_decoding_command(tmp_path):
    words = ["--shapes", ",".join(map(str, TINY)), "--cases", "2x21+7", "--mixers", "hyena", "multihyena"]
    words += ["--contexts", "9", "70", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, DECODING, *words, "--json", tmp_path / "found.json", "--to", tmp_path / "found.md"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["mixer"], row["row"]): row for row in found["cases"][0]["rows"]}
    dynamic, static = rows[None, "teacher, dynamic cache"], rows[None, "teacher, static cache"]
    assert dynamic["kept_last"] - dynamic["kept_first"] == 7 * 2 * 4 * 2 * 64
    assert static["kept_last"] == static["kept_first"] == dynamic["kept_last"]
    assert static["tokens"] == dynamic["tokens"] and len(dynamic["tokens"]) == 8
    for mixer in ("hyena", "multihyena"):
        again, exact = rows.pop((mixer, "read again")), rows.pop((mixer, "exact"))
        assert again["tokens"] == exact["tokens"] and exact["kept_first"] < exact["kept_last"]
        steps, decoder = rows.pop((mixer, "recurrent, model(...)")), rows.pop((mixer, "recurrent, Decoder"))
        assert steps["tokens"] == decoder["tokens"]
        for row in (steps, decoder):
            assert row["kept_first"] == row["kept_last"]
    for row in found["cases"][0]["rows"]:
        numbers = [value for value in row.values() if isinstance(value, (int, float))]
        assert len(numbers) > 15 and all(0 < number < math.inf for number in numbers), row
        assert row["timed"] == 7
    assert dynamic["new_to_dynamic"] == 1 and min(dynamic["new_to_best"], static["new_to_best"]) <= 1
    for by_context, share in zip(found["contexts"], found["prompts"], strict=True):
        short, long = by_context["rows"]
        assert short["kept"] == long["kept"] and short["teacher_kept"] / long["teacher_kept"] == 9 / 70
        assert 0 < share["state"] < share["prefill"] and 0 < share["share"] < math.inf
    shown = (tmp_path / "found.md").read_text()
    assert "teacher, dynamic cache" in shown and "The floor of a step is" in shown and "--cases 2x21+7" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cases", "2x1+3"], "--cases: found 2x1+3"),
        (["--shapes", "60,2,4,128,101"], "--shapes: found 60,2"),
        (["--contexts", "0"], "found 0 or less"),
    ],
)
def test_decoding_errors(decoding, words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decoding.py", *words])
    assert decoding["main"]() == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"decoding: error: {said}") and shown.count("\n") == 1


@pytest.mark.parametrize("mixer", ["hyena", "multihyena"])
@pytest.mark.parametrize(
    "rows", [("DynamicTeacher", "StaticTeacher", "PackedTeacher"), ("Exact",), ("Steps", "Decoded")]
)
@torch.inference_mode()
def test_every_cache_gives_what_reading_again_gives(decoding, rows, mixer):
    ids = torch.randint(TINY[-1], (3, 21), generator=torch.Generator().manual_seed(0))
    again = None
    for row in rows:
        contender = made(decoding, row, mixer)
        if again is None:  # the models of the others are made from the same seed
            again = decoding["ReadAgain"](contender.model, contender.case)
            reference = [again.read(ids)]
            for _ in range(20):
                reference.append(again.step(reference[-1].argmax(-1)))
        contender.step(contender.read(ids[:, :2]).argmax(-1))  # must leave no trace
        logits = [contender.read(ids)]
        for _ in range(20):
            logits.append(contender.step(logits[-1].argmax(-1)))
        assert_close(torch.stack(reference), torch.stack(logits), 1e-5)
        assert torch.equal(torch.stack(reference).argmax(-1), torch.stack(logits).argmax(-1))


@pytest.mark.parametrize("row", ["DynamicTeacher", "StaticTeacher", "ReadAgain", "Exact", "Steps", "Decoded"])
@torch.inference_mode()
def test_a_few_steps_stand_for_all(decoding, row):
    ids = torch.randint(TINY[-1], (3, 21), generator=torch.Generator().manual_seed(0))
    contender = made(decoding, row)
    whole = decoding["generated"](contender, ids, 20, math.inf)
    assert len(whole["steps"]) == 20 and whole["generation"] == pytest.approx(sum(whole["steps"]))
    sampled = decoding["generated"](contender, ids, 20, 0)
    assert len(sampled["steps"]) == (20 if contender.uneven else 6)
    assert sampled["kept_last"] == whole["kept_last"]  # the cache was filled up to the last token
    assert sampled["tokens"] == whole["tokens"][: len(sampled["tokens"])] and len(sampled["tokens"]) >= 3
    if row == "StaticTeacher":
        assert contender.cache.get_seq_length() == 41


def test_floors(decoding):
    width, layers, _, mlp, vocabulary = TINY
    weights = layers * (4 * width**2 + 2 * width * mlp) + vocabulary * width
    machine = {"bytes_per_second": 1e3, "operations_per_second": 1e30}
    for row in ("DynamicTeacher", "Steps", "Exact"):
        contender = made(decoding, row)
        assert decoding["multiplied"](contender.model) == weights
        if row == "Steps":
            contender.read(torch.zeros(3, 5, dtype=torch.long))
        floor = decoding["floor_of"](contender, 30, machine)
        assert floor["seconds"] == floor["bytes"] / 1e3 and floor["bytes"] > 4 * weights
        assert floor["operations"] > 2 * 3 * weights
        if isinstance(contender.model, GPTNeoXForCausalLM):
            small = sum(p.nbytes for p in contender.model.parameters() if p.ndim == 1)
            assert floor["bytes"] == 4 * weights + small + 3 * layers * 2 * 4 * width * 32


@pytest.fixture(scope="module")
def stages():
    return runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/transfer.py"))


def test_transfer_command(stages, tmp_path, monkeypatch, capsys):
    page = tmp_path / "transfer.md"
    monkeypatch.setattr(sys, "argv", ["transfer.py", "--shapes", "tiny", "--rounds", "1", "--output", str(page)])
    assert stages["main"]() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["shapes"]["tiny"]
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 9 and rows["next tokens"]["of_plain"] == 1
    for name, row in rows.items():
        numbers = [row[key] for key in ("step", "loss", "update", "log", "of_plain", "tokens_per_second")]
        assert all(0 < number < math.inf for number in numbers), name
        assert row["tokens_per_second"] == pytest.approx(2 * 256 / row["step"])
        bare = name in ("activations, joint", "activations, progressive")
        assert (row["floor"] is None) == (row["of_the_floor"] is None) == bare
    assert 0 < found["peaks"]["in chunks"] <= found["peaks"]["all at once"]
    shown = page.read_text()
    assert "logits, forward_kl, cached 64" in shown and "--shapes tiny" in shown and "peak of a logit step" in shown
    monkeypatch.setattr(sys, "argv", ["transfer.py", "--rounds", "0"])
    assert stages["main"]() == 2
    assert capsys.readouterr().err == "transfer: error: --rounds: found 0; expected 1 or more\n"


def test_rows_of_transfer_are_the_trainings_of_a_run(stages, tmp_path):
    """What is timed is what the stages give to the loop; the loop's own steps are counted from batch to batch."""
    shape = stages["Shape"]("tiny", tmp_path, Accelerator(cpu=True))
    rows = shape.trainings()
    kinds = {name: type(row.model).__name__ for name, row in rows.items()}
    assert set(kinds.values()) == {"NextTokens", "MixerMatching", "LogitMatching"}
    assert (
        rows["activations, parallel"].model.layers == (0, 1)
        and rows["activations, parallel"].model.reading == "teacher"
    )
    assert rows["activations, progressive"].model.layers == (1,), "the layer in the middle"
    assert rows["activations, joint"].model.reading == "student"
    row = rows["logits, reverse_kl"]
    assert row.model.phase.objective == "reverse_kl"
    before = [p.detach().clone() for p in row.parameters]
    read = []
    row.batch, whole = lambda step: read.append(step) or whole(step), row.batch
    assert row.loop(3, torch.device("cpu")) > 0 and read == list(range(5))
    assert any(not torch.equal(p, was) for p, was in zip(row.parameters, before, strict=True))
    assert row.peak() > 4 * sum(p.numel() for p in row.parameters), "the gradients and more"
