"""The benchmarks run, force the forms they name, and those compute the same."""

import argparse
import ctypes
import dataclasses
import gc
import importlib
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
from conftest import importing_from
from reference import assert_close
from transformers import GPTNeoXForCausalLM

from scavenger import losses, measure
from scavenger.model import hyena
from scavenger.report import contenders
from scavenger.report.contenders import Case, Dynamic, Exact, ModelCalls, PackedDynamic, PackedStatic, ReadAgain, Static


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = (64, 2, 4, 128, 101)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Garbage is collected before each measurement, in 0.2 s or more unless what was imported is left out."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def benchmark():
    """Load a benchmark anew, as a module that its own processes find, too."""
    with importing_from(BENCHMARKS):
        yield importlib.import_module


@pytest.fixture
def decoding(benchmark):
    return benchmark("decoding")


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("mixers", ["--hidden-size", "30"], "found width [30]"),
        ("mixers", ["--hidden-size", "64", "128"], "found width [64, 128] with [8] heads"),
        ("reduction", ["--filters", "0"], "found a length, number of filters"),
        ("transfer", ["--rounds", "0"], "--rounds: found 0; expected 1 or more\n"),
        ("logits", ["--length", "31"], "found 152000 words and length 31; expected more than 64 words"),
        ("logits", ["--hidden-size", "40"], "found 2 layers of width 40"),
        ("decoding", ["--cases", "2x1+3"], "--cases: found 2x1+3"),
        ("decoding", ["--shapes", "60,2,4,128,101"], "--shapes: found 60,2"),
        ("decoding", ["--contexts", "0"], "found 0 or less"),
        ("gpu", ["--only", "speed"], "--only: found speed; expected some of correctness, decoding"),
        ("gpu", ["--minutes", "0"], "--minutes: found 0; expected more than 0"),
        ("gpu", ["--contexts", "512", "1"], "--contexts: found 1; expected more than 1"),
        ("gpu", ["--shapes", "60,2,4,128,101"], "--shapes: found 60,2"),
        ("gpu", ["--shapes", "64,1,4,128,101"], "--shapes: found 64,1,4,128,101; expected two layers or more"),
        ("gpu", ["--train-length", "64"], "--train-length: found 64; expected more than the window of 64 tokens"),
        ("gpu", ["--to", "no/such/page.md"], "found no/such/page.md, but no folder no/such; expected one that is"),
        ("gpu", ["--json", "pyproject.toml"], "--json: pyproject.toml is not a file of this command"),
        ("recall", ["--train", "64"], "found 64; expected LENGTHxPAIRS"),
        ("recall", ["--test", "64x17"], "found 64x17"),
        ("recall", ["--vocabulary", "8"], "found --vocabulary 8"),
        ("recall", ["--widths", "48"], "found --widths [48]; expected multiples of 32"),
        ("recall", ["--steps", "0"], "found --steps 0; expected 1 or more"),
    ],
)
def test_mistakes_are_one_line(name, words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    monkeypatch.chdir(BENCHMARKS.parent)
    with importing_from(BENCHMARKS), pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().err
    assert shown.startswith(f"{name}: error: {said}") and shown.count("\n") == 1


def test_mixers_command(benchmark, monkeypatch, tmp_path, capsys):
    mixers = benchmark("mixers")
    monkeypatch.setitem(measure.MATRIX, "cpu", 64)
    monkeypatch.setattr(mixers, "BYTES", 1 << 20)
    monkeypatch.setattr(mixers, "TOO_LONG", math.inf)
    # This process goes on with other tests: its allocator stays as it is.
    libc = SimpleNamespace(malloc_trim=ctypes.CDLL(None).malloc_trim, mallopt=lambda *setting: 1)
    monkeypatch.setattr(mixers, "ctypes", SimpleNamespace(CDLL=lambda name: libc))
    words = ["--hidden-size", "64", "32", "--num-heads", "4", "2", "--lengths", "20", "70", "--rounds", "1"]
    assert mixers.main([*words, "--output", str(tmp_path / "mixers.md")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["results"]) == 2 * 2 * 10
    assert {(row["hidden_size"], row["batch_size"], row["length"]) for row in found["results"]} == {
        (width, 1, length) for width in (64, 32) for length in (20, 70)
    }
    for row in found["results"]:
        assert 0 < row["floor"] and 0 < row["forward"] < math.inf and 0 < row["both"] < math.inf
        assert row["memory"] >= 0
    shown = (tmp_path / "mixers.md").read_text()
    assert "hyena, FFT" in shown and "peak MiB" in shown and "--lengths 20 70" in shown


def test_forms_that_are_timed_are_the_mixers_own(benchmark, monkeypatch):
    mixers = benchmark("mixers")
    rows = {contender.name: contender for contender in mixers.made(64, 4, torch.device("cpu"))}
    hidden, cos, sin = mixers.inputs(mixers.Shape(64, 4, 2, 70), torch.device("cpu"))
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
    # The scan has a product in each of two chunks, the filters beyond a window one.
    assert taken == [*forms, *forms, "modal_scan", *["ToeplitzProduct"] * 2, "ToeplitzProduct"]
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
    words += ["--gradient-filters", "2", "--workers", "1", "2", "--output", str(tmp_path / "reduction.md")]
    assert benchmark("reduction").main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(row["method"], row["states"]) for row in found["results"]} == {
        (method, states) for method in ("balanced", "irka", "projection", "gradient") for states in (2, 4)
    }
    for row in found["results"]:
        assert 0 < row["error"] and 1 - 1e-9 <= row["ratio"] and 1 - 1e-9 <= row["gain_ratio"]
        assert 0 <= row["tail"] and 0 < row["milliseconds"] < math.inf
    one, two = ({key: row[key] for key in row.keys() - {"seconds"}} for row in found["many"])
    assert one | {"workers": 2} == two and one["filters"] == 6
    shown = (tmp_path / "reduction.md").read_text()
    assert "projection" in shown and "--steps 2" in shown


def made(decoding, row, mixer="hyena"):
    """A contender at a tiny shape."""
    case, args = Case(3, 21, 20), argparse.Namespace(dtype="float32", modes=None)
    return row(decoding.model_of(row, mixer, TINY, case.prompt + case.new, torch.device("cpu"), args), case)


def test_decoding_command(decoding, monkeypatch, tmp_path):
    """All rows in this process, but what they are given and what they return can travel to another; not compiled."""
    monkeypatch.setattr(decoding, "apart", lambda *words: travelled(call(*travelled(words))))
    monkeypatch.setitem(measure.MATRIX, "cpu", 64)
    monkeypatch.setattr(decoding, "NUMBERS", 1 << 20)
    monkeypatch.setattr(decoding, "PROMPT", 150)
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    monkeypatch.setattr(contenders, "compiles", lambda: True)
    monkeypatch.setattr("scavenger.model.decoding.PACKING_PAYS", 0)
    words = ["--shapes", ",".join(map(str, TINY)), "--cases", "2x21+7", "--mixers", "hyena", "multihyena"]
    words += ["--contexts", "9", "70", "--threads", str(torch.get_num_threads())]
    assert decoding.main([*words, "--json", str(tmp_path / "found.json"), "--to", str(tmp_path / "found.md")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["mixer"], row["row"]): row for row in found["cases"][0]["rows"]}
    assert len(rows) == 4 + 2 * 4
    dynamic, static = rows[None, "teacher, dynamic cache"], rows[None, "teacher, static cache"]
    assert dynamic["kept_last"] - dynamic["kept_first"] == 7 * 2 * 4 * 2 * 64
    assert static["kept_last"] == static["kept_first"] == dynamic["kept_last"]
    assert static["tokens"] == dynamic["tokens"] and len(dynamic["tokens"]) == 8
    packed = next(row for (_, name), row in rows.items() if name.endswith("packed"))
    assert packed["floor_bytes"] == static["floor_bytes"]
    assert rows[None, "teacher, static cache, compiled"]["tokens"] == dynamic["tokens"]
    for mixer in ("hyena", "multihyena"):
        again, exact = rows[mixer, "read again"], rows[mixer, "exact"]
        assert again["tokens"] == exact["tokens"] and exact["kept_first"] < exact["kept_last"]
        recurrent = [rows[mixer, f"recurrent, {kind}"] for kind in ("model(...)", "Decoder")]
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
        names = ("step", "loss", "update", "log", "of_plain", "tokens_per_second", "of_the_rate")
        numbers = [row[key] for key in names]
        assert all(0 < number < math.inf for number in numbers), name
        assert row["tokens_per_second"] == pytest.approx(2 * 24 / row["step"])
        bare = name in ("activations, joint", "activations, progressive")
        assert (row["floor"] is None) == (row["of_the_floor"] is None) == bare
    assert 0 < found["peaks"]["in chunks"] <= found["peaks"]["all at once"]
    shown = page.read_text()
    assert "logits, forward_kl, cached 64" in shown and "--shapes tiny" in shown and "peak of a logit step" in shown


def test_rows_of_transfer_are_the_trainings_of_a_run(transfer, tmp_path):
    """What is timed is what the stages give to the loop; the loop's own steps are counted from batch to batch."""
    shape = transfer.shape_of("tiny", tmp_path, Accelerator(cpu=True))
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


ON_ONE_CARD = "--shapes 64,2,2,128,512 --batches 1 3 --contexts 9 40 --prompts 20 70 --prompt-tokens 140".split()
ON_ONE_CARD += "--train-shapes 64,2,2,128,512 32,2,2,64,101 --train-length 80 --train-batch-size 2".split()


@pytest.fixture
def gpu(benchmark, monkeypatch):
    """The benchmark of a card, in this process and with few steps."""
    decoding = benchmark("decoding")
    benchmark("transfer")
    benchmark("mixers")
    module = benchmark("gpu")
    monkeypatch.setitem(measure.MATRIX, "cpu", 64)
    monkeypatch.setattr(decoding, "NUMBERS", 1 << 20)
    for name, value in {
        "ROUND_SECONDS": 0,
        "STEPS": (2, 4),
        "TRAINING_SECONDS": 0,
        "FILTERS": 3,
        "MIXER_LENGTHS": [30],
    }.items():
        monkeypatch.setattr(module, name, value)

    def here(cases, args, figures, until, end):
        module.carried_out(cases, args, figures.found["rates"], until, end, figures.take)

    monkeypatch.setattr(module, "apart", here)
    monkeypatch.setattr(module.processes, "available", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return module


def bench_of(gpu, folder, *words):
    """What sections work on, for a tiny shape in float32."""
    args = gpu.parser().parse_args([*ON_ONE_CARD, "--dtype", "float32", *words])
    gpu.check(args)
    return gpu.Bench(args, {"operations_per_second": 1e30, "bytes_per_second": 1e3}, folder, lambda *found: None)


def test_gpu_command(gpu, monkeypatch, tmp_path, capsys):
    """Every section; a rerun measures nothing, and --again one section anew."""
    page, figures = tmp_path / "card.md", tmp_path / "card.json"
    words = [*ON_ONE_CARD, "--to", str(page)]
    assert gpu.main(words) == 0
    shown = page.read_text()
    assert capsys.readouterr().out == shown and " ".join(words) in shown and torch.__version__ in shown
    found = json.loads(figures.read_text())
    assert found["sections"]["correctness"]["pytest -m gpu"] == {"outcome": "needs CUDA"}
    sections = {name: list(records.values()) for name, records in found["sections"].items()}
    measured = {
        name: [record for record in records if record["outcome"] == "measured"] for name, records in sections.items()
    }
    assert {record["outcome"] for records in sections.values() for record in records} == {"measured", "needs CUDA"}
    # Of each form the teacher at every context, and three students; of the largest batch these with rounded states too.
    assert len(sections["decoding"]) == 2 * (3 * 2 + 3) + 3 and len(measured["decoding"]) == 2 * (2 + 3) + 3
    assert {record["form"] for record in measured["decoding"]} == {"plain", "rounded"}
    exact, rounded = (
        [record["state"] for record in measured["decoding"] if (record["form"], record["batch"]) == (form, 3)]
        for form in ("plain", "rounded")
    )
    assert all(less < more for less, more in zip(rounded, exact[-3:], strict=True))
    assert len(measured["prefill"]) == 4 * (2 + 2) and len(measured["reduction"]) == 2 == len(sections["reduction"])
    first, second = "64,2,2,128,512", "32,2,2,64,101"
    assert [*found["sections"]["training"]] == [
        *(f"{first}, {stage}" for stage in ("activations, parallel", "activations, joint", "logits", "baseline")),
        *(f"{second}, {stage}" for stage in ("activations, parallel", "logits")),
        *(f"{shape}, mixers, 30" for shape in (first, second)),
    ]
    of_mixers = [record["mixers"] for record in measured["training"] if "mixers" in record]
    measured["training"] = [record for record in measured["training"] if record["stage"] != "mixers"]
    for rows in of_mixers:
        assert len(rows) == 10 and all(0 < row["floor"] and 0 < row["forward"] < math.inf for row in rows)
    for name in ("decoding", "prefill", "training", "reduction"):
        for record in measured[name]:
            numbers = [value for value in record.values() if isinstance(value, float)]
            assert len(numbers) > 1 and all(0 < number < math.inf for number in numbers), record
    for title in ("# Everything on one card", "## Correctness", "## Decoding", "## Prompts", "## Training"):
        assert title in shown
    assert (
        "teacher, static cache, captured" in shown
        and "windows, Decoder" in shown
        and "× teacher 40" in shown
        and "needs CUDA" in shown
    )
    assert "length 30, width 64, 2 heads, batch 1" in shown and "multihyena 8, Toeplitz" in shown
    assert "## Failed" not in shown and "## Not run" not in shown

    monkeypatch.setattr(gpu, "attempted", lambda *words: pytest.fail("it is measured"))
    before = figures.read_text()
    assert gpu.main(words) == 0 and figures.read_text() == before and page.read_text() == shown
    monkeypatch.setattr(gpu, "attempted", lambda *words: {"outcome": "measured", "prompt_seconds": 7.0})
    assert gpu.main([*words, "--again", "--only", "prefill"]) == 0
    again = json.loads(figures.read_text())
    assert {record["prompt_seconds"] for record in again["sections"].pop("prefill").values()} == {7.0}
    assert again["sections"].items() <= found["sections"].items() and len(again["runs"]) == 2
    capsys.readouterr()
    assert gpu.main([*words, "--dtype", "float32"]) == 2
    assert f"--json: {figures} has figures with dtype bfloat16; expected float32" in capsys.readouterr().err


def test_a_section_that_raises_fails_alone(gpu, monkeypatch, tmp_path):
    """Its cases are a table, and the exit code is 1; the next run tries them again."""
    words = [*ON_ONE_CARD, "--only", "prefill", "reduction", "--to", str(tmp_path / "card.md")]

    def broken(*words):
        raise ImportError("no module named this\nand more")

    measure = gpu.recurrence.reduce_filters
    monkeypatch.setattr(gpu.recurrence, "reduce_filters", broken)
    assert gpu.main(words) == 1
    shown = (tmp_path / "card.md").read_text()
    assert "| reduction | hyena, 1 worker | ImportError: no module named this |\n" in shown and "and more" not in shown
    assert shown.count("| ImportError") == 2
    found = json.loads((tmp_path / "card.json").read_text())["sections"]
    assert {record["outcome"] for record in found["prefill"].values()} == {"measured"}
    monkeypatch.setattr(gpu.recurrence, "reduce_filters", measure)
    assert gpu.main(words) == 0
    after = json.loads((tmp_path / "card.json").read_text())["sections"]
    assert after["prefill"] == found["prefill"] and after["reduction"]["hyena, 1 worker"]["filters"] == 3
    assert "## Failed" not in (tmp_path / "card.md").read_text()


def test_what_does_not_fit_the_card(gpu, monkeypatch, tmp_path):
    """A cache that is larger than the free memory, or what runs out of it, is an outcome of its own."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**31, 2**32))
    gpu.require(0.8 * 2**31, torch.device("cuda"))

    class Section:
        def measured(self, size, limit):
            gpu.require(size * 2**30, torch.device("cuda"))
            raise torch.OutOfMemoryError("after all")

    large, small = (gpu.Decoding.case("70m", "teacher", "plain", 3, context) for context in (40, 9))
    records = [
        case.facts | gpu.attempted(Section(), dataclasses.replace(case, facts={"size": size}), 0)
        for case, size in ((large, 96), (small, 1))
    ]
    assert records[0]["note"] == "does not fit: 96 GiB of keys and values" and "note" not in records[1]
    (table,) = gpu.Decoding.tables(records)
    assert table.count("does not fit") == 2 and "3 sequences" in table


def test_what_the_time_is_too_short_for(gpu, monkeypatch):
    """A section has its share, and what it has no time for comes again at the end; what then does not fit is said."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(time=lambda: clock.now))

    class Section:
        def __init__(self, bench):
            pass

    def attempted(section, case, limit):
        clock.now += case.facts["takes"]
        return {"outcome": "measured"}

    monkeypatch.setattr(gpu, "SECTIONS", dict.fromkeys(gpu.SHARES, Section))
    monkeypatch.setattr(gpu, "attempted", attempted)
    case = gpu.Case
    cases = [
        case("decoding", "first", {"takes": 50}, 10, "alike"),
        case("decoding", "second", {"takes": 5}, 10, "alike"),  # as the first took 50, so long is expected
        case("decoding", "third", {"takes": 20}, 20),
        case("prefill", "fourth", {"takes": 5}, 30),
        case("prefill", "fifth", {"takes": 5}, 200),
    ]
    until = gpu.deadlines(["decoding", "prefill"], 0, 100)
    assert until == {"decoding": pytest.approx(76), "prefill": 100}

    def run(until, end):
        clock.now, told = 0.0, []
        gpu.carried_out(cases, SimpleNamespace(), {}, until, end, lambda *found: told.append(found))
        outcomes = {found[1].name: found[2]["outcome"] for found in told if found[0] == "record"}
        left = {name for name, outcome in outcomes.items() if outcome == "not run: time"}
        assert outcomes.keys() == {case.name for case in cases} and len(told) == 2 * len(cases) - len(left)
        return [found[1:] for found in told if found[0] == "began"], left

    began, left = run(until, 100)
    assert left == {"second", "fifth"}
    assert [(case.name, stop) for case, stop in began] == [
        ("first", gpu.PATIENCE * 10 + gpu.GRACE),
        ("third", 100),
        ("fourth", 100),
    ]
    began, left = run(until | {"decoding": 60}, 130)
    assert [case.name for case, _ in began] == ["first", "fourth", "second", "third"] and left == {"fifth"}


IN_ITS_OWN_PROCESS = """
import os, time

def tell(cases, args, rates, until, end, sender):
    for case in cases:
        sender.send(("began", case, time.time() + case.seconds))
        if case.name == "crash":
            os._exit(3)
        time.sleep(case.facts["takes"])
        sender.send(("record", case, {"outcome": "measured"}))
"""


def test_a_case_that_crashes_its_process_or_does_not_end(benchmark, monkeypatch, tmp_path, capsys):
    gpu = benchmark("gpu")
    (tmp_path / "in_its_own_process.py").write_text(IN_ITS_OWN_PROCESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gpu, "_tell", importlib.import_module("in_its_own_process").tell)
    args = gpu.parser().parse_args([*ON_ONE_CARD, "--json", str(tmp_path / "card.json")])
    figures = gpu.Figures(args, [])
    takes = {"crash": 0, "quick": 0, "endless": 600, "last": 0}
    cases = [
        gpu.Case("decoding", name, {"takes": seconds}, 20 if name != "endless" else 0.5)
        for name, seconds in takes.items()
    ]
    began = gpu.time.time()
    gpu.apart(cases, args, figures, {}, began + 120)
    found = figures.records("decoding")
    assert found["crash"]["outcome"] == "failed" and found["crash"]["note"] == "the process ended with code 3"
    assert found["quick"]["outcome"] == found["last"]["outcome"] == "measured"
    assert found["endless"]["outcome"] == "not run: time" and "stopped" in found["endless"]["note"]
    assert figures.wrong() and [case.name for case in cases if not figures.has(case)] == ["crash", "endless"]


def test_pytest_is_counted(gpu, monkeypatch, tmp_path):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    (tmp_path / "test_some.py").write_text(
        "import pytest, time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\n"
        "def test_left(): pass\n"
    )
    words = ["-p", "no:randomly", "--rootdir", str(tmp_path)]
    found = gpu.suite([*words, str(tmp_path)], 60)
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "stopped": False, "failures": ["test_some::test_bad"]}
    (shown,) = gpu.Correctness.tables([found | {"outcome": "measured", "seconds": 1.0}])
    assert shown == "1 passed, 1 failed, 1 skipped; 1 s\ntest_some::test_bad"
    (tmp_path / "test_some.py").write_text("import time\ndef test_good(): pass\ndef test_long(): time.sleep(600)\n")
    found = gpu.suite([*words, str(tmp_path)], 2)
    assert found["stopped"] and found["passed"] == 1
    with pytest.raises(RuntimeError, match="pytest ran no test: .*no-such-folder"):
        gpu.suite([str(tmp_path / "no-such-folder")], 60)


@pytest.mark.parametrize("model, form", [("teacher", "plain"), ("teacher", "compiled"), ("windows", "plain")])
def test_steps_leave_the_cache_where_it_was(gpu, monkeypatch, tmp_path, model, form):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    made = []
    measure = gpu.step_seconds
    monkeypatch.setattr(gpu, "step_seconds", lambda *words: made.append(words[0]) or measure(*words))
    section = gpu.Decoding(bench_of(gpu, tmp_path))
    context = 40 if model == "teacher" else None
    found = section.measured("64,2,2,128,512", model, form, 3, context, limit=math.inf)
    assert 0 < found["step"] < math.inf and found["floor"] == (found["weights"] + found["state"]) / 1e3
    config = made[0].model.config
    width, layers, itemsize = 64, 2, 4
    if model == "teacher":
        assert made[0].cache.get_seq_length() == 40
        assert found["state"] == 3 * layers * 2 * itemsize * width * (40 + gpu.STEPS[1] / 2 + 2)
    else:  # one layer has modes, read and written, and a window that is read; the other is kept in a larger window
        assert (config.attention_layers, config.attention_window, config.window) == ([1], 512, 64)
        modes = 2 * 2 * 2 * itemsize * 32 * 32  # filters, modes, components
        ring = 2 * itemsize * width + 1
        assert found["state"] == 3 * (2 * modes + (64 + 512) * ring)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_captured_step_is_the_step(benchmark, tmp_path):
    """A teacher's: the same logits from a graph that was captured by hand and from calls, in float32."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    gpu = benchmark("gpu")
    own = bench_of(gpu, tmp_path).model_of("teacher", "64,2,2,128,512")
    ids = torch.randint(512, (7, 3), device=own.device)
    found = []
    for capture in (False, True):
        contender = gpu.FORMS["plain"][0](own, Case(3, 9, 30))
        contender.read(torch.arange(18, device=own.device).view(3, 6))
        tokens, logits = torch.zeros_like(ids[0]), torch.zeros(3, 512, device=own.device)

        def step(contender=contender, tokens=tokens, logits=logits):
            logits.copy_(contender.step(tokens))

        if capture:
            step = gpu.captured(step)
        else:
            for _ in range(gpu.WARM):
                step()
        kept = []
        for new in ids:
            tokens.copy_(new)
            step()
            kept.append(logits.clone())
        found.append(torch.stack(kept))
    assert_close(*found, 1e-5)
