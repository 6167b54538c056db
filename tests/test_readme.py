"""The README's commands run, those of evaluation and of stage two too; its results are those of the figures."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from conftest import QUICKSTART, ROOT, command, command_line, importing_from, launch
from pages import blocks, commands

from scavenger.run.checkpoint import read_json


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quickstart(quickstart):
    folder, printed = quickstart
    assert QUICKSTART in README
    assert (folder / "report/index.html").is_file() and "recurrent" in printed
    models = read_json(folder / "report/report.json")["models"]
    assert models["teacher"]["tokens_seen"] >= 20e6
    assert models["teacher"]["perplexity"] < models["distilled"]["perplexity"] < models["pre-trained"]["perplexity"]


def test_make_runs_those_commands():
    assert {"make quickstart", "make test"} <= set(commands())
    for target, words in (
        ("quickstart", "accelerate launch recipes/quickstart.yaml"),
        ("test", "pytest"),
        ("check", "ruff"),
    ):
        assert words in launch("make", "--dry-run", target).stdout
    assert "make test" in (ROOT / ".ci/run").read_text()


# Appended to the commands of docs/evaluation.md and docs/recurrences.md: the same measurements of less.
LESS = {
    "perplexity": "--longest 300",
    "recall": "--examples 3",
    "generation": "--new-tokens 9",
    "harness": "",
    "speed": "--rounds 1 --seconds 0.02",
    "compare": "--examples 3 --text README.md --split all",
    "recur": "--method balanced --max-state-size 5 --text README.md --split all",
}


@pytest.fixture(scope="module")
def evaluated(quickstart, tmp_path_factory):
    """What the commands of evaluation print, on the beginning of the README: the JSON of the last line."""
    run, found = quickstart[0], {}
    place = tmp_path_factory.mktemp("evaluated")
    (place / "README.md").write_text(README[:6000])  # of text, to evaluate on
    for line in commands():
        first, *words = line.split()
        name = Path(words[0]).stem
        if not ("runs/quickstart" in line and name in LESS):
            continue
        words = [word.replace("runs/quickstart", str(run)).replace("runs/", f"{place}/") for word in words]
        words += LESS[name].split()
        words = [str(place / word) if word == "README.md" else word for word in words]
        made = command(*words) if first == "python" else command_line(*words)
        assert made.returncode == 0, made.stderr
        found.setdefault(name, []).append(made.stdout.splitlines()[-1])
    assert found.keys() == LESS.keys() and len(found["recur"]) == 2
    return place, {name: json.loads(lines[0]) for name, lines in found.items() if name != "recur"}


def values(result):
    return {name: row["value"] for name, row in result["metrics"].items()}


def test_evaluation_commands(quickstart, evaluated):
    """One number of each command, from another part of the project or by what it must be."""
    _, found = evaluated
    config = read_json(quickstart[0] / "recurrence/config.json")
    for sliding, disjoint in zip(found["perplexity"], found["harness"], strict=True):
        # Windows that overlap give a token more context than the harness does.
        ratio = values(disjoint)["text_perplexity bits_per_byte"] / values(sliding)["bits per byte"]
        assert 1 < ratio < 1.1
    for result in found["recall"]:
        assert 0 <= values(result)["recall of pairs"] < 0.5 and result["settings"]["examples"] == 3
        assert result["metrics"]["recall of pairs"]["items"] == 3
    teacher, recurrent, _ = found["generation"]
    assert values(teacher)["greedy agreement"] == 1 > values(recurrent)["greedy agreement"]
    teacher, recurrent = found["speed"]
    (first, *_), (own, *_) = teacher["rows"], recurrent["rows"]
    # Keys and values: 4 layers of width 128 in float32, 64 tokens.
    assert first["state_bytes"] == 2 * 4 * 4 * 128 * 64 and first["new"] == own["new"] == 32
    assert 0 < own["state_bytes"] <= 300_000 and config["filter"] == "modal"
    figures = read_json(Path(found["compare"]["figures"]))
    (perplexity,) = [row for row in figures["rows"] if row["metric"] == "bits per byte"]
    for result, model in zip(found["perplexity"], perplexity["models"].values(), strict=True):
        assert model["value"] == pytest.approx(values(result)["bits per byte"], rel=1e-6)


@pytest.mark.parametrize("script", sorted((ROOT / "eval").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_run_their_main(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with importing_from(script.parent), pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")


def test_recur_commands(evaluated):
    place, _ = evaluated
    by_tolerance, by_budget = (read_json(place / f"by-{name}/certificate.json") for name in ("tolerance", "budget"))
    assert by_tolerance["settings"]["tolerance"] == 1e-2 and by_tolerance["state_bytes"] > 300_000
    assert 290_000 < by_budget["state_bytes"] <= 300_000
    assert by_budget["model"]["divergence"] > by_tolerance["model"]["divergence"] > 0


def test_python_example(quickstart, tmp_path):
    code = "\n".join(block.text for block in blocks("python") if block.page == ROOT / "README.md")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(quickstart[0])
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue().startswith("def main(")


def test_it_is_read_in_three_minutes():
    assert len(README.splitlines()) <= 150


def test_the_results_are_those_of_the_figures():
    """Of eval/quickstart.json: `python eval/readme.py` writes them anew, and page and figure of the quickstart too."""
    checked = command("eval/readme.py", "--check")
    assert checked.returncode == 0, checked.stderr
    made = runpy.run_path(str(ROOT / "eval/readme.py"))
    figures = read_json(ROOT / "eval/quickstart.json")
    assert made["with_results"](README, figures) == README
    results = (ROOT / "docs/results/quickstart.md").read_text(encoding="utf-8")
    assert made["results_page"](figures) == results
    shown = f"{figures['models']['recurrent']['perplexity']:.3f}"
    assert shown in README and shown in results
    digest = made["digest"](figures)
    assert digest in made["drawn"](figures)
    (row,) = [row for row in figures["comparison"]["rows"] if row["metric"] == "perplexity"]
    row["models"]["recurrent"]["value"] += 0.1
    assert made["with_results"](README, figures) != README and made["results_page"](figures) != results
    assert made["digest"](figures) != digest
    with pytest.raises(ValueError, match="no place for results"):
        made["with_results"]("# scavenger", figures)


def test_a_run_gives_its_figures(quickstart):
    """From a report, what README, page and figure show of it: every model, and no sums over items."""
    folder, _ = quickstart
    made = runpy.run_path(str(ROOT / "eval/readme.py"))
    figures = made["taken"](folder)
    text = made["results_page"](figures) + made["summary"](figures)
    assert "<svg" in made["drawn"](figures)
    for name in ("teacher", "pre-trained", "distilled", "recurrent", "recall of pairs", "greedy agreement", "torch "):
        assert name in text, name
    assert len(json.dumps(figures)) < 100_000


def test_links_in_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
