"""The commands under eval/ on a finished run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def command(*words):
    return subprocess.run(
        [sys.executable, *(str(word) for word in words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_perplexity_command_and_metric(finished, workshop, tmp_path):
    text = "\n".join(json.loads(line)["text"] for line in (workshop / "text.jsonl").read_text().splitlines()[:3])
    (tmp_path / "text.txt").write_text(text)
    done = command(
        "eval/perplexity.py",
        finished / "transfer",
        finished / "recurrence",
        "--text",
        tmp_path / "text.txt",
        "--context-length",
        48,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-3)
    assert 0 < first["bits_per_byte"] < 8
    import evaluate

    metric = evaluate.load(str(ROOT / "eval/perplexity.py"))
    found = metric.compute(predictions=[text], model_id=str(finished / "transfer"), context_length=48)
    assert found["perplexity"] == pytest.approx(first["perplexity"], rel=1e-6)
    done = command("eval/perplexity.py", finished / "transfer", "--text", tmp_path / "nothing.txt")
    assert done.returncode == 2 and done.stderr.startswith("perplexity: error:") and "nothing.txt" in done.stderr


def test_generation_command(finished, workshop):
    done = command(
        "eval/generation.py",
        workshop / "teacher",
        finished / "recurrence",
        finished / "transfer",
        "--context-lengths",
        10,
        30,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    states = [row["state_bytes"] for row in rows]
    assert states[1] - states[0] == 20 * 2 * 3 * 30 * 4 and states[2] == states[3]
    assert states[5] - states[4] == 20 * 3 * (30 * 6 + 5) * 4  # outer products of heads of six channels, and taps
    assert command("eval/generation.py", finished / "nothing").returncode == 2
