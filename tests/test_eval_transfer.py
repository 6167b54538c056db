"""eval/transfer.py on runs of the tests' own recipe."""

import json

import pytest
from conftest import command, scavenger

from scavenger.run import checkpoint


def test_rows_are_schedules_and_seeds_are_spread(finished, workshop, tmp_path):
    runs = []
    for name, overrides in {
        "first": [],
        "seed": ["seed=1"],
        "joint": ["transfer.activations.schedule=joint", "baseline=null"],
    }.items():
        runs.append(tmp_path / name)
        scavenger(
            workshop / "recipe.yaml",
            f"run_dir={runs[-1]}",
            "report=null",
            "recurrence=null",
            *overrides,
        )
    done = command("eval/transfer.py", *runs, "--output", tmp_path / "transfer.md")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["student"], len(row["runs"])) for row in rows] == [
        ("distilled", 2),
        ("pre-trained", 2),
        ("distilled", 1),
    ]
    own = checkpoint.read_json(finished / "report/report.json")["models"]
    first = rows[0]["runs"][0]
    assert first["test"] == pytest.approx(own["distilled"]["perplexity"], rel=1e-6)
    assert first["test_ratio"] == pytest.approx(own["distilled"]["ratio_to_teacher"], rel=1e-6)
    assert rows[1]["runs"][0]["test"] == pytest.approx(own["pre-trained"]["perplexity"], rel=1e-6)
    assert first["tokens"] == own["distilled"]["tokens_seen"] and rows[2]["schedule"].startswith("joint, 10 × 4")
    layers = checkpoint.read_json(finished / "transfer/activations/history.json")[-1]
    errors = [layers[f"layer_{layer}"] for layer in range(3)]
    assert first["activation_error"] == pytest.approx(sum(errors) / 3)
    shown = (tmp_path / "transfer.md").read_text()
    assert "±" in shown and shown.count("| distilled |") == 2


def test_a_run_without_its_transfer_is_one_line(tmp_path):
    done = command("eval/transfer.py", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("transfer: error: ") and done.stderr.count("\n") == 1
