"""The benchmarks run, force the forms they name, and those compute the same."""

import argparse
import ctypes
import dataclasses
import gc
import importlib.util
import json
import math
import os
import pickle
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from reference import assert_close
from transformers import GPTNeoXForCausalLM

from scavenger import losses
from scavenger.model import hyena
from scavenger.report import contenders
from scavenger.report.contenders import Case, Dynamic, Exact, ModelCalls, PackedDynamic, PackedStatic, ReadAgain, Static


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = (64, 2, 4, 128, 101)
SMALL = argparse.Namespace(hidden_size=64, num_heads=4, batch_size=2)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Garbage is collected before each measurement, in 0.2 s or more unless what was imported is left out."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def benchmark(monkeypatch):
    """Load a benchmark anew, as a module that its own processes find, too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def loaded(name):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return loaded


@pytest.fixture
def decoding(benchmark):
    return benchmark("decoding")


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("mixers", ["--hidden-size", "30"], "found width 30"),
        ("reduction", ["--filters", "0"], "found a length, number of filters"),
        ("transfer", ["--rounds", "0"], "--rounds: found 0; expected 1 or more\n"),
        ("logits", ["--length", "31"], "found 152000 words and length 31; expected more than 64 words"),
        ("logits", ["--hidden-size", "40"], "found 2 layers of width 40"),
        ("decoding", ["--cases", "2x1+3"], "--cases: found 2x1+3"),
        ("decoding", ["--shapes", "60,2,4,128,101"], "--shapes: found 60,2"),
        ("decoding", ["--contexts", "0"], "found 0 or less"),
        ("recall", ["--train", "64"], "found 64; expected LENGTHxPAIRS"),
        ("recall", ["--test", "64x17"], "found 64x17"),
        ("recall", ["--vocabulary", "8"], "found --vocabulary 8"),
        ("recall", ["--widths", "48"], "found --widths [48]; expected multiples of 32"),
        ("recall", ["--steps", "0"], "found --steps 0; expected 1 or more"),
    ],
)
def test_mistakes_are_one_line(name, words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as Python does for a script
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().err
    assert shown.startswith(f"{name}: error: {said}") and shown.count("\n") == 1


def test_mixers_command(benchmark, monkeypatch, tmp_path, capsys):
    mixers = benchmark("mixers")
    monkeypatch.setattr(mixers, "MATRIX", 256)
    monkeypatch.setattr(mixers, "BYTES", 1 << 20)
    monkeypatch.setattr(mixers, "TOO_LONG", math.inf)
    # This process goes on with other tests: its allocator stays as it is.
    libc = SimpleNamespace(malloc_trim=ctypes.CDLL(None).malloc_trim, mallopt=lambda *setting: 1)
    monkeypatch.setattr(mixers, "ctypes", SimpleNamespace(CDLL=lambda name: libc))
    words = ["--hidden-size", "64", "--num-heads", "4", "--lengths", "20", "70", "--rounds", "1"]
    assert mixers.main([*words, "--output", str(tmp_path / "mixers.md")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["results"]) == 2 * 9
    for row in found["results"]:
        assert 0 < row["floor"] and 0 < row["forward"] < math.inf and 0 < row["both"] < math.inf
        assert row["memory"] >= 0
    shown = (tmp_path / "mixers.md").read_text()
    assert "hyena, FFT" in shown and "peak MiB" in shown and "--lengths 20 70" in shown


def test_forms_that_are_timed_are_the_mixers_own(benchmark, monkeypatch):
    mixers = benchmark("mixers")
    rows = {row[0]: mixers.Contender(*row, SMALL) for row in mixers.rows(16)}
    hidden, cos, sin = mixers.inputs(SMALL, 70, torch.device("cpu"), torch.float32)
    outputs, taken = {}, []
    for form in ("outer_product_convolution", "modal_scan"):
        whole = getattr(hyena, form)
        monkeypatch.setattr(hyena, form, lambda *x, f=form, w=whole: taken.append(f) or w(*x))
    whole = hyena.ToeplitzProduct.apply
    monkeypatch.setattr(hyena.ToeplitzProduct, "apply", lambda *x: taken.append("ToeplitzProduct") or whole(*x))
    for name, contender in rows.items():
        with contender.forced():
            outputs[name] = contender.module(hidden, cos, sin).detach()
    forms = ["ToeplitzProduct", "outer_product_convolution"]
    assert taken == [*forms, *forms, "modal_scan"]
    assert_close(outputs["multihyena 8, Toeplitz"], outputs["multihyena 8, FFT"], 1e-5)
    assert_close(outputs["multihyena 16, Toeplitz"], outputs["multihyena 16, FFT"], 1e-5)
    scanned = rows["multihyena 16, modal scan"]
    assert_close(outputs["multihyena 16, modal scan"], scanned.module(hidden, cos, sin), 1e-5)
    for width in ("8", "16"):
        for length in (20, 70, 5000):
            taken = [rows[f"multihyena {width}, {form}"].chosen(length) for form in ("Toeplitz", "FFT")]
            assert sum(taken) == 1


def test_reduction_command(benchmark, tmp_path, capsys):
    words = ["--length", "48", "--filters", "4", "--states", "2", "4", "--many", "6", "--steps", "2"]
    words += ["--gradient-filters", "2", "--output", str(tmp_path / "reduction.md")]
    assert benchmark("reduction").main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(row["method"], row["states"]) for row in found["results"]} == {
        (method, states) for method in ("balanced", "irka", "projection", "gradient") for states in (2, 4)
    }
    for row in found["results"]:
        assert 0 < row["error"] and 1 - 1e-9 <= row["ratio"] and 1 - 1e-9 <= row["gain_ratio"]
        assert 0 <= row["tail"] and 0 < row["milliseconds"] < math.inf
    shown = (tmp_path / "reduction.md").read_text()
    assert "projection" in shown and "--steps 2" in shown


def made(decoding, row, mixer="hyena"):
    """A contender at a tiny shape."""
    case, args = Case(3, 21, 20), argparse.Namespace(dtype="float32", modes=None)
    return row(decoding.model_of(row, mixer, TINY, case.prompt + case.new, torch.device("cpu"), args), case)


def test_decoding_command(decoding, monkeypatch, tmp_path):
    """All rows in this process, but what they are given and what they return can travel to another; not compiled."""
    monkeypatch.setattr(decoding, "apart", lambda *words: travelled(call(*travelled(words))))
    monkeypatch.setattr(decoding, "MATRIX", {"cpu": 256})
    monkeypatch.setattr(decoding, "NUMBERS", 1 << 20)
    monkeypatch.setattr(decoding, "PROMPT", 150)
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    words = ["--shapes", ",".join(map(str, TINY)), "--cases", "2x21+7", "--mixers", "hyena", "multihyena"]
    words += ["--contexts", "9", "70", "--threads", str(torch.get_num_threads()), "--compile"]
    assert decoding.main([*words, "--json", str(tmp_path / "found.json"), "--to", str(tmp_path / "found.md")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["mixer"], row["row"]): row for row in found["cases"][0]["rows"]}
    assert len(rows) == 4 + 2 * 5
    dynamic, static = rows[None, "teacher, dynamic cache"], rows[None, "teacher, static cache"]
    assert dynamic["kept_last"] - dynamic["kept_first"] == 7 * 2 * 4 * 2 * 64
    assert static["kept_last"] == static["kept_first"] == dynamic["kept_last"]
    assert static["tokens"] == dynamic["tokens"] and len(dynamic["tokens"]) == 8
    assert rows[None, "teacher, static cache, compiled"]["tokens"] == dynamic["tokens"]
    for mixer in ("hyena", "multihyena"):
        again, exact = rows[mixer, "read again"], rows[mixer, "exact"]
        assert again["tokens"] == exact["tokens"] and exact["kept_first"] < exact["kept_last"]
        recurrent = [rows[mixer, f"recurrent, {kind}"] for kind in ("model(...)", "Decoder", "Decoder, compiled")]
        for row in recurrent:
            assert row["tokens"] == recurrent[0]["tokens"] and row["kept_first"] == row["kept_last"]
    for row in rows.values():
        numbers = [value for key, value in row.items() if isinstance(value, (int, float)) and key not in PROCESS]
        assert len(numbers) > 15 and all(0 < number < math.inf for number in numbers), row
        assert row["timed"] == 7
    assert dynamic["new_to_dynamic"] == 1 and min(dynamic["new_to_best"], static["new_to_best"]) <= 1
    for by_context, share in zip(found["contexts"], found["prompts"], strict=True):
        short, long = by_context["rows"]
        assert short["kept"] == long["kept"] and short["teacher_kept"] / long["teacher_kept"] == 9 / 70
        assert 0 < share["state"] < share["prefill"] and 0 < share["share"] < math.inf
    shown = (tmp_path / "found.md").read_text()
    assert "teacher, dynamic cache" in shown and "The floor of a step is" in shown and "--cases 2x21+7" in shown


PROCESS = ("peak", "largest_batch")  # figures that need a process for each row


def travelled(x):
    return pickle.loads(pickle.dumps(x))


def call(function, *words):
    return function(*words)


def test_a_row_has_a_process_of_its_own(decoding):
    args = argparse.Namespace(dtype="float32", modes=None, threads=1, seconds=1.0, memory=16.0)
    summary = {"machine": {"bytes_per_second": 1e9, "operations_per_second": 1e9}}
    assert decoding.apart(os.getpid) != os.getpid()
    for row in (Dynamic, ReadAgain):
        found = decoding.apart(decoding.measured, row, "hyena", TINY, Case(2, 21, 7), summary, args)
        assert found["peak"] > found["weights"] > 0
        each = found["kept_last"] if row is Dynamic else (found["peak"] - found["weights"]) / 2
        assert found["largest_batch"] == (2**34 - found["weights"]) // each
    with pytest.raises(SystemExit, match="decoding: error: out of memory"):
        decoding.apart(os._exit, 1)


@pytest.mark.parametrize("mixer", ["hyena", "multihyena"])
@pytest.mark.parametrize(
    "rows", [(Dynamic, Static, PackedDynamic, PackedStatic), (Exact,), (ModelCalls, contenders.Decoded)]
)
@torch.inference_mode()
def test_every_cache_gives_what_reading_again_gives(decoding, rows, mixer):
    ids = torch.randint(TINY[-1], (3, 21), generator=torch.Generator().manual_seed(0))
    again = None
    for row in rows:
        contender = made(decoding, row, mixer)
        if again is None:  # the models of the others are made from the same seed
            again = ReadAgain(contender.model, contender.case)
            reference = [again.read(ids)]
            for _ in range(20):
                reference.append(again.step(reference[-1].argmax(-1)))
        contender.step(contender.read(ids[:, :2]).argmax(-1))  # must leave no trace
        logits = [contender.read(ids)]
        for _ in range(20):
            logits.append(contender.step(logits[-1].argmax(-1)))
        assert_close(torch.stack(reference), torch.stack(logits), 1e-5)
        assert torch.equal(torch.stack(reference).argmax(-1), torch.stack(logits).argmax(-1))


@pytest.mark.parametrize("row", [Dynamic, Static, ReadAgain, Exact, ModelCalls, contenders.Decoded])
@torch.inference_mode()
def test_a_few_steps_stand_for_all(decoding, row):
    ids = torch.randint(TINY[-1], (3, 21), generator=torch.Generator().manual_seed(0))
    contender = made(decoding, row)
    whole = contenders.generated(contender, ids, math.inf)
    assert len(whole["steps"]) == 20 and whole["generation"] == pytest.approx(sum(whole["steps"]))
    sampled = contenders.generated(contender, ids, 0)
    assert len(sampled["steps"]) == (20 if contender.uneven else 6)
    assert sampled["kept_last"] == whole["kept_last"]  # the cache was filled up to the last token
    assert sampled["tokens"] == whole["tokens"][: len(sampled["tokens"])] and len(sampled["tokens"]) >= 3
    if row is Static:
        assert contender.cache.get_seq_length() == 41


def test_floors(decoding):
    width, layers, _, mlp, vocabulary = TINY
    weights = layers * (4 * width**2 + 2 * width * mlp) + vocabulary * width
    machine = {"bytes_per_second": 1e3, "operations_per_second": 1e30}
    for row in (Dynamic, ModelCalls, Exact):
        contender = made(decoding, row)
        assert decoding.multiplied(contender.model) == weights
        if row is ModelCalls:
            contender.read(torch.zeros(3, 5, dtype=torch.long))
        floor = decoding.floor_of(contender, 30, machine)
        assert floor["seconds"] == floor["bytes"] / 1e3 and floor["bytes"] > 4 * weights
        assert floor["operations"] > 2 * 3 * weights
        if isinstance(contender.model, GPTNeoXForCausalLM):
            small = sum(p.nbytes for p in contender.model.parameters() if p.ndim == 1)
            assert floor["bytes"] == 4 * weights + small + 3 * layers * 2 * 4 * width * 32


def test_logits_command(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 2**22)
    mixers = benchmark("mixers")
    libc = SimpleNamespace(malloc_trim=ctypes.CDLL(None).malloc_trim, mallopt=lambda *setting: 1)
    monkeypatch.setattr(mixers, "ctypes", SimpleNamespace(CDLL=lambda name: libc))
    words = ["--vocabulary", "5003", "--hidden-size", "32", "--num-layers", "1", "--batch-size", "2", "--length", "70"]
    assert benchmark("logits").main([*words, "--output", str(tmp_path / "logits.md")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["results"]) == 13 and found["chunk_bytes"] == 4 * 5003 * 209 and found["whole"] == 4 * 5003 * 140
    assert all(0 <= row["peak"] < math.inf for row in found["results"])
    shown = (tmp_path / "logits.md").read_text()
    assert "held-out look with teacher" in shown and "--vocabulary 5003" in shown and "planned" in shown


@pytest.fixture
def transfer(benchmark, monkeypatch):
    """The benchmark of transfer with sequences of 24 tokens."""
    module = benchmark("transfer")
    whole = module.load_recipe
    monkeypatch.setattr(
        module,
        "load_recipe",
        lambda path, changes: whole(
            path,
            [
                *changes,
                "data.context_length=24",
                "student.window=8",
                "student.attention_heads=[]",
                "student.num_filter_heads=4",
            ],
        ),
    )
    return module


def test_transfer_command(transfer, tmp_path, capsys):
    page = tmp_path / "transfer.md"
    assert transfer.main(["--shapes", "tiny", "--rounds", "1", "--output", str(page)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["shapes"]["tiny"]
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 9 and rows["next tokens"]["of_plain"] == 1
    for name, row in rows.items():
        numbers = [row[key] for key in ("step", "loss", "update", "log", "of_plain", "tokens_per_second")]
        assert all(0 < number < math.inf for number in numbers), name
        assert row["tokens_per_second"] == pytest.approx(2 * 24 / row["step"])
        bare = name in ("activations, joint", "activations, progressive")
        assert (row["floor"] is None) == (row["of_the_floor"] is None) == bare
    assert 0 < found["peaks"]["in chunks"] <= found["peaks"]["all at once"]
    shown = page.read_text()
    assert "logits, forward_kl, cached 64" in shown and "--shapes tiny" in shown and "peak of a logit step" in shown


def test_rows_of_transfer_are_the_trainings_of_a_run(transfer, tmp_path):
    """What is timed is what the stages give to the loop; the loop's own steps are counted from batch to batch."""
    shape = transfer.Shape("tiny", tmp_path, Accelerator(cpu=True))
    rows = shape.trainings()
    kinds = {name: type(row.module).__name__ for name, row in rows.items()}
    assert set(kinds.values()) == {"NextTokens", "MixerMatching", "LogitMatching"}
    assert (
        rows["activations, parallel"].module.layers == (0, 1)
        and rows["activations, parallel"].module.reading == "teacher"
    )
    assert rows["activations, progressive"].module.layers == (1,), "the layer in the middle"
    assert rows["activations, joint"].module.reading == "student"
    row = rows["logits, reverse_kl"]
    assert row.module.phase.objective == "reverse_kl"
    before = [p.detach().clone() for p in row.parameters]
    read = []
    whole = row.optimisation.batch
    row.optimisation = dataclasses.replace(row.optimisation, batch=lambda step: read.append(step) or whole(step))
    assert row.loop(3, torch.device("cpu")) > 0 and read == list(range(5))
    assert any(not torch.equal(p, was) for p, was in zip(row.parameters, before, strict=True))
    assert row.peak() > 4 * sum(p.numel() for p in row.parameters), "the gradients and more"


def test_recall_sequences_ask_for_what_was_shown(benchmark):
    recall = benchmark("recall")
    rng = np.random.default_rng(0)
    for task, words in (("mqar", 97), ("in-context", 32)):
        ids, following = (x.numpy() for x in recall.sequences(task, 64, 7, 50, words, rng))
        assert ids.shape == following.shape == (50, 64) and ids.min() >= 0 and ids.max() < words
        for row, wanted in zip(ids.tolist(), following.tolist(), strict=True):
            asked = [place for place, value in enumerate(wanted) if value >= 0]
            shown = {}
            for place in range(0, 14 if task == "mqar" else 64, 2):
                if task == "in-context":
                    assert (place in asked) == (row[place] in shown)
                    assert wanted[place] in (-1, row[place + 1])
                shown.setdefault(row[place], row[place + 1])
            assert all(wanted[place] == shown[row[place]] for place in asked)
            if task == "mqar":
                assert len(asked) == len(shown) == 7 and sorted(row[place] for place in asked) == sorted(shown)


def test_recall_command(benchmark, tmp_path, capsys):
    recall = benchmark("recall")
    words = "--widths 32 --steps 2 --batch-size 4 --examples 6 --train 16x2 --test 16x2 24x3 --vocabulary 64 --window 5"
    assert recall.main([*words.split(), "--rates", "1e-3", "--output", str(tmp_path / "recall.md")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [run["mixer"] for run in found] == list(recall.MIXERS) * 2
    state = {run["mixer"]: run["state_bytes"] for run in found}
    assert state["attention"] == 2 * 2 * 4 * 32 * 24 and state["window"] < state["window + positive"]
    assert state["window + positive"] < state["window + multihyena"]
    assert "window + features" in (tmp_path / "recall.md").read_text()
