"""The README's commands run, and its tree is the disk's."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command, command_line

from scavenger.recipe import load_recipe
from scavenger.run.checkpoint import read_json


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
SMALL = [
    "transfer.activations.steps=8",
    "transfer.activations.warmup_steps=2",
    "transfer.activations.batch_size=4",
    "transfer.logits.steps=8",
    "transfer.logits.warmup_steps=2",
    "transfer.logits.batch_size=4",
    "baseline.warmup_steps=2",
    "data.evaluation_tokens=2048",
    "report.context_lengths=[16, 64]",
    "report.cases=[2x16+4]",
    "report.sample_tokens=8",
    "report.examples=4",
    "report.prompts=3",
    "report.rounds=1",
]


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.split("#")[0].strip()]


def run(words, cwd=ROOT):
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A run of the quickstart with smaller numbers: the embedded teacher, the standard library, every stage."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    assert "accelerate launch recipes/quickstart.yaml" in README
    done = run(["accelerate", "launch", "recipes/quickstart.yaml", f"run_dir={folder}", *SMALL])
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_quickstart(quickstart):
    folder, printed = quickstart
    assert (folder / "report/index.html").is_file() and "recurrent" in printed
    models = read_json(folder / "report/report.json")["models"]
    assert models["teacher"]["tokens_seen"] >= 20e6
    assert models["teacher"]["perplexity"] < models["distilled"]["perplexity"] < models["pre-trained"]["perplexity"]


def test_make_runs_those_commands():
    found = commands()
    assert found[:2] == ["make quickstart", "make test"]
    for target, words in (
        ("quickstart", "accelerate launch recipes/quickstart.yaml"),
        ("test", "pytest"),
        ("check", "ruff"),
    ):
        assert words in run(["make", "--dry-run", target]).stdout
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_recipes_in_commands_load():
    named = [words.split() for words in commands() if "recipes/" in words]
    assert len(named) >= 5
    for words in named:
        index = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
        overrides = [
            word for word in words[index + 1 :] if "=" in word and not word.startswith(("teacher.path=", "data.path="))
        ]
        load_recipe(str(ROOT / words[index]), overrides)
    for configuration in re.findall(r"accelerate_configs/\w+\.yaml", README):
        assert (ROOT / configuration).is_file()


EVALUATIONS = [words for words in commands() if words.startswith(("python eval/", "scavenger recur "))]


def one_number(script, printed, folder):
    """A figure of each command that is known beforehand, or whose range is."""
    if script == "compare":
        assert json.loads(printed)["figures"] == f"{folder}-compared/compare.json"
        rows = {row["metric"]: row for row in read_json(Path(f"{folder}-compared/compare.json"))["rows"]}
        return rows["perplexity"]["models"]["teacher-stdlib"]["value"]
    teacher, student, *_ = json.loads(printed)
    if script == "speed":
        assert student["constant_state"] and not teacher["constant_state"]
        return student["rows"][0]["tokens_per_second"]
    name = {"perplexity": "perplexity", "recall": "recall of pairs", "generation": "greedy agreement"}.get(script)
    return teacher["metrics"][name or next(iter(teacher["metrics"]))]["value"]


RANGES = {"perplexity": (2, 200), "compare": (2, 200), "recall": (0, 1), "generation": (1, 1), "speed": (1, 1e6)}


@pytest.mark.parametrize("words", EVALUATIONS)
def test_evaluation_commands(quickstart, words, tmp_path):
    """As they stand, on a shorter text."""
    folder, _ = quickstart
    text = tmp_path / "README.md"
    text.write_text(README[:9000], encoding="utf-8")
    words = words.replace("runs/quickstart", str(folder)).replace("runs/", f"{folder}-")
    _, script, *rest = words.replace("README.md", str(text)).split()
    if script == "recur":
        made = command_line(script, *rest, "--text", text)
        assert made.returncode == 0, made.stderr
        assert read_json(Path(rest[-1]) / "certificate.json")["largest_radius"] < 1
        return
    made = command(script, *rest)
    assert made.returncode == 0, made.stderr
    least, most = RANGES.get(Path(script).stem, (1, 1e9))
    assert least <= one_number(Path(script).stem, made.stdout.splitlines()[-1], folder) <= most


def test_python_example(quickstart, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.S))
    (tmp_path / "runs").mkdir()
    shutil.copytree(quickstart[0], tmp_path / "runs/quickstart")
    done = run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def main(")


def test_file_tree_is_the_disk():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, flags=re.S)[1].splitlines()
    named, folder = set(), None
    for line in tree:
        name, depth = line.split()[0], len(line) - len(line.lstrip())
        if depth == 2:
            named.add(name)
            folder = name
        if depth == 4:
            named.add(folder + name)
    tracked = [path.removeprefix("scavenger/") for path in run(["git", "ls-files", "scavenger"]).stdout.split()]
    shown = {name.partition("/")[0] + "/" for name in named if "/" in name.rstrip("/")}  # folders with their files
    entries = set()
    for path in tracked:
        first, slash, inside = path.partition("/")
        entries.add(first + slash)
        if slash and first + slash in shown:
            entries.add(first + slash + inside.partition("/")[0] + ("/" if "/" in inside else ""))
    assert named == {entry for entry in entries if not entry.endswith("__init__.py")}
    top = {line.split()[0] for line in tree if not line.startswith("  ")}
    assert all((ROOT / name).exists() for name in top)


def test_the_results_are_those_of_the_figures(tmp_path, monkeypatch, capsys):
    """The command says so, and says which line is not."""
    assert run([sys.executable, "eval/readme.py", "--check"]).returncode == 0, "python eval/readme.py makes them anew"
    made = runpy.run_path(str(ROOT / "eval/readme.py"))
    figures = read_json(ROOT / "eval/quickstart.json")
    assert made["with_results"](README, figures) == README
    shown = f"{figures['models']['recurrent']['perplexity']:.3f}"
    assert shown in README
    figures["models"]["recurrent"]["perplexity"] += 0.1
    assert made["with_results"](README, figures) != README
    with pytest.raises(ValueError, match="no place for results"):
        made["with_results"]("# scavenger", figures)


def test_a_run_gives_its_figures(quickstart):
    """From a report, what the README shows of it: every model, and no sums over items."""
    folder, _ = quickstart
    made = runpy.run_path(str(ROOT / "eval/readme.py"))
    figures = made["taken"](read_json(folder / "report/report.json"))
    text = made["results"](figures)
    for name in ("teacher", "pre-trained", "distilled", "recurrent", "recall of pairs", "greedy agreement", "torch "):
        assert name in text, name
    assert len(json.dumps(figures)) < 100_000


def test_links_in_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
