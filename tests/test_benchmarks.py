"""The benchmark of the mixers runs, forces the forms it names, and those compute the same."""

import argparse
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import torch
from reference import assert_close

from scavenger.model import hyena


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
