"""Several models on everything: differences that can be checked, one page, nothing measured twice."""

import html
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ARC, command, shared
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from scavenger.report import comparison, likelihood, metrics, retrieval, sections, timing
from scavenger.report.evaluated import Evaluated
from scavenger.report.metrics import Metric
from scavenger.report.results import Results
from scavenger.run.checkpoint import read_json


SMALL = ["--context-length", "64", "--examples", "3", "--prompts", "5"]
SMALL += ["--cases", "2x20+6", "--contexts", "20", "40", "--rounds", "1"]


@pytest.fixture(scope="module")
def compared(finished, workshop, tmp_path_factory):
    """The command on four models, one of them the reference again under another name."""
    models = {
        "teacher": workshop / "teacher",
        "again": workshop / "teacher",
        "distilled": finished / "transfer",
        "recurrent": finished / "recurrence",
    }
    words = [*(f"{label}={path}" for label, path in models.items()), "--text", workshop / "text.jsonl"]
    words += ["--split", "all", "--limit", "12"]

    def make(folder):
        done = command("eval/compare.py", *words, "--to", folder / "out", *SMALL)
        assert done.returncode == 0, done.stderr
        (folder / "printed").write_text(done.stdout)

    folder = shared(tmp_path_factory, "compared", make)
    return folder / "out", [*words, "--to", folder / "out", *SMALL], (folder / "printed").read_text()


def test_one_table_one_page_one_json(compared):
    folder, _, printed = compared
    found = read_json(folder / "compare.json")
    assert found["labels"] == ["teacher", "again", "distilled", "recurrent"] and found["reference"] == "teacher"
    assert {row["measurement"] for row in found["rows"]} == {"perplexity", "recall", "generation", "speed"}
    page = html.unescape((folder / "index.html").read_text())
    for row in found["rows"]:
        assert row["metric"] in page, row["metric"]
    last = json.loads(printed.splitlines()[-1])
    assert last["verdict"] in page and last["verdict"].count("Compared with teacher, ") == 3
    for word in ("recall of pairs", "documents 12", "examples 3", "seed 0", "greedy agreement"):
        assert word in printed, word
    assert found["versions"]["torch"] and found["seed"] == 0


def test_a_model_beside_itself_differs_in_nothing(compared):
    """Nothing is better or worse, and all that is near to the reference is as near as can be."""
    rows = read_json(compared[0] / "compare.json")["rows"]
    for row in rows:
        if row["measurement"] != "speed" and not row["metric"].startswith(("KL", "same", "top-1", "greedy", "tokens")):
            own, other = row["models"]["again"], row["models"]["teacher"]
            assert own == other, row["metric"]
            difference = row["differences"]["again"]
            assert difference["value"] == (1 if row["ratio"] else 0) and difference["verdict"] is None
    by_name = {row["metric"]: row["models"] for row in rows}
    assert by_name[likelihood.AGREEMENT]["again"]["value"] == by_name["greedy agreement"]["again"]["value"] == 1
    assert abs(by_name[likelihood.DIVERGENCE]["again"]["value"]) < 1e-6
    assert "teacher" not in by_name[likelihood.AGREEMENT], "of itself that says nothing"


def test_differences_are_those_of_the_results(compared):
    """From the kept sums, by hand."""
    folder, _, _ = compared
    row = next(row for row in read_json(folder / "compare.json")["rows"] if row["metric"] == "perplexity")
    sums = {}
    for label in ("teacher", "distilled"):
        kept = read_json(folder / "results" / f"perplexity-{label}.json")
        sums[label] = next(m for m in kept["metrics"] if m["name"] == "perplexity")
        loss = sum(sums[label]["numerators"]) / sum(sums[label]["denominators"])
        assert row["models"][label]["value"] == pytest.approx(math.exp(loss))
        assert row["models"][label]["items"] == 12
    found = metrics.difference(Metric(**sums["distilled"]), Metric(**sums["teacher"]))
    assert row["differences"]["distilled"]["value"] == pytest.approx(found.value)
    assert [row["differences"]["distilled"][end] for end in ("low", "high")] == pytest.approx([found.low, found.high])


def test_nothing_is_measured_twice(compared, tmp_path):
    """Neither after the end nor after a stop: what is missing is measured, and the figures are the same."""
    folder, words, _ = compared
    shutil.copytree(folder, tmp_path / "out")
    words = [tmp_path / "out" if word == folder else word for word in words]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/results").iterdir()}
    gone = tmp_path / "out/results/recall-distilled.json"
    gone.unlink()
    done = command("eval/compare.py", *words)
    assert done.returncode == 0, done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/results").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {gone.name}
    one, other = (read_json(path / "compare.json") for path in (folder, tmp_path / "out"))
    assert one["rows"] == other["rows"]


def test_models_of_other_tokens_are_compared_by_byte(finished, workshop, tmp_path):
    """Where tokens are not the same, perplexities per token and sequences of tokens do not compare: a dash."""
    shutil.copytree(workshop / "teacher", tmp_path / "other")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(workshop / "teacher")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][:-20]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(state))
    order = list(state["model"]["vocab"])
    state["model"]["vocab"] = {token: number for number, token in enumerate([*order[:-2], order[-1], order[-2]])}
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(state))
    words = [workshop / "teacher", tmp_path / "other"]
    words += ["--text", workshop / "text.jsonl", "--split", "all", "--limit", "9"]
    done = command("eval/compare.py", *words, "--to", tmp_path / "out", "--measure", "perplexity", "recall", *SMALL)
    assert done.returncode == 0, done.stderr
    rows = {row["metric"]: row for row in read_json(tmp_path / "out/compare.json")["rows"]}
    assert rows["bits per byte"]["differences"] and not rows["perplexity"]["differences"]
    assert not rows["recall of pairs"]["differences"] and len(rows["recall of pairs"]["models"]) == 2
    assert "generation" not in {row["measurement"] for row in rows.values()}


def test_a_vocabulary_that_is_padded_further(workshop, tmp_path):
    """As those of larger models of Pythia: the same tokens, so losses are paired, but not as many probabilities."""
    model = AutoModelForCausalLM.from_pretrained(workshop / "teacher")
    model.resize_token_embeddings(352)
    model.save_pretrained(tmp_path / "padded")
    for path in (workshop / "teacher").glob("token*"):
        shutil.copy(path, tmp_path / "padded")
    words = [workshop / "teacher", tmp_path / "padded"]
    words += ["--text", workshop / "text.jsonl", "--split", "all", "--limit", "9", *SMALL]
    measure = ["--measure", "perplexity", "generation"]
    done = command("eval/compare.py", *words, "--to", tmp_path / "out", *measure)
    assert done.returncode == 0, done.stderr
    rows = {row["metric"]: row for row in read_json(tmp_path / "out/compare.json")["rows"]}
    assert rows["perplexity"]["differences"] and likelihood.AGREEMENT not in rows and "greedy agreement" not in rows


def test_tasks_stand_beside_what_was_published(finished, workshop, tmp_path):
    """A folder called pythia-70m is taken for that model; a task without documents is a row of dashes."""
    shutil.copytree(workshop / "teacher", tmp_path / "pythia-70m")
    (tmp_path / "arc_easy.jsonl").write_text(ARC)
    words = [tmp_path / "pythia-70m", f"student={finished / 'recurrence'}", "--measure", "tasks", "--local", tmp_path]
    words += ["--text", workshop / "text.jsonl", "--task-limit", 5, "--to", tmp_path / "o"]
    done = command("eval/compare.py", *words)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "o/compare.json")
    header, rows, _ = comparison.headline(found)
    assert header[-1] == f"{tmp_path / 'pythia-70m'}, published"
    cells = {row[0]: row[1:] for row in rows}
    assert cells["arc_easy acc (first 5)"][2] == "37.4 %", "as EleutherAI published"
    assert cells["piqa acc (first 5)"][:2] == ["–", "–"] and cells["piqa acc (first 5)"][2] == "59.5 %"
    assert cells["hellaswag acc_norm (first 5)"] == ["–", "–", "–"]
    (own,) = [row for row in found["rows"] if row["metric"] == "arc_easy acc"]
    assert own["models"]["student"]["items"] == 5 and own["differences"]["student"]["low"] is not None
    page = (tmp_path / "o/index.html").read_text()
    assert "Zero-shot tasks." in page and (tmp_path / "o/plots/tasks.svg").is_file()


def test_worse_and_better():
    metric = Metric("m", [1.0], [1.0], better="lower", exponential=True)
    judged = [comparison._judged(metrics.Estimate(*each, 9), metric) for each in ((1.2, 1.1, 1.3), (0.9, 0.8, 0.95))]
    assert judged == ["worse", "better"]
    share = Metric("m", [1.0], [1.0], better="higher")
    judged = [comparison._judged(metrics.Estimate(*each, 9), share) for each in ((0.2, 0.1, 0.3), (0.2, -0.1, 0.3))]
    assert judged == ["better", None]
    assert comparison._judged(metrics.Estimate(2.0, 1.5, 2.5, 9), Metric("m", [1.0], [1.0])) is None, (
        "neither is better"
    )


def test_a_name_may_have_a_revision(tmp_path, monkeypatch):
    found = Evaluated.parsed("base=EleutherAI/pythia-70m@step1000")
    assert (found.label, found.path, found.revision) == ("base", "EleutherAI/pythia-70m", "step1000")
    (tmp_path / "a@b").mkdir()
    (tmp_path / "rate=0.1").mkdir()
    for name in ("a@b", "rate=0.1"):
        found = Evaluated.parsed(str(tmp_path / name))
        assert found.path == found.label == str(tmp_path / name) and found.revision is None


def test_mistakes_are_one_line(finished, tmp_path):
    for words, part in (
        (["--cases", "1x1+1"], "--cases: found 1x1+1"),
        (["--measure", "recall", "--context-length", "20"], "found a context of 20 tokens; expected 64 or more"),
        (["--text", tmp_path / "none"], "is not there"),
    ):
        done = command("eval/compare.py", finished / "transfer", "--to", tmp_path / "out", *words)
        assert done.returncode == 2 and part in done.stderr.splitlines()[-1], done.stderr
        assert done.stderr.splitlines()[-1].startswith("compare: error: ") and "Traceback" not in done.stderr


def test_results_of_other_versions_and_spoilt_ones_are_measured_again(tmp_path):
    model, kept = SimpleNamespace(label="m", path="p", weights="w"), Results(tmp_path)

    def times_measured():
        counted = []
        kept.of("perplexity", model, {"limit": 3}, lambda: counted.append(1) or {"metrics": []})
        return len(counted)

    assert [times_measured(), times_measured()] == [1, 0]
    path = kept.path("perplexity", model)
    whole = path.read_text()
    for spoilt in (whole.replace(torch.__version__, "1.0.0"), whole[:-9], "[]"):
        path.write_text(spoilt)
        assert [times_measured(), times_measured()] == [1, 0]


def test_what_has_no_interval_is_not_called_alike():
    row = {"metric": "perplexity", "headline": True, "unit": "", "exponential": True}
    few = {"value": 7.39, "low": None, "high": None, "items": 4, "verdict": None}
    found = {"reference": "a", "labels": ["a", "b"], "rows": [row | {"differences": {"b": few}}]}
    assert comparison.verdict(found) == "Compared with a, b is not judged (too few items) at perplexity (× 7.390)."


def recalled(window, distances=(16, 64, 128, 256), **settings):
    """A comparison of recall by a teacher and two students whose attention has this window."""
    value = {"value": 0.5, "low": 0.4, "high": 0.6, "items": 9}
    apart = {"value": 0.25, "low": 0.2, "high": 0.3, "items": 9, "verdict": "worse"}
    labels = ["teacher", "student", "recurrent"]
    students = {label: apart for label in labels[1:]}

    def row(metric, group, x, unit="share"):
        return {
            "measurement": "recall",
            "metric": metric,
            "group": group,
            "x": x,
            "unit": unit,
            "exponential": False,
            "headline": not group,
            "models": dict.fromkeys(labels, value),
            "differences": students,
        }

    rows = [row(f"{group} at {x}", group, float(x)) for group in ("pairs", "copying", "needle") for x in (16, 64, 128)]
    rows += [row(f"passages at {x}", "passages", float(x), "nats") for x in distances]
    rows += [row(f"repeats at {x}", "repeats", float(x), "nats") for x in (16, 64, 128)]
    return {
        "reference": "teacher",
        "labels": labels,
        "level": 0.95,
        "models": {
            label: {"training_context": 256, "attention_window": None if label == "teacher" else window}
            for label in labels
        },
        "settings": {"recall": {"distances": list(distances), "context_length": 256} | settings},
        "rows": [*rows, row(retrieval.OTHERS, "", None, "nats")],
        "details": {"recall": {}},
        "published": {},
    }


def recall_of(found):
    """The section of recall, and its plots by name."""
    (section,) = [section for section in sections.sections(found) if section.title == "Recall"]
    return html.unescape(section.body), {figure.name: figure for figure in section.figures}


@pytest.mark.parametrize(
    ("window", "distances", "settings", "all_inside"),
    [
        (128, (16, 128, 256), {}, True),
        (0, (16, 128, 256), {}, True),
        (64, (16, 128, 256), {}, False),
        (128, (16, 128, 208, 256), {}, False),
        (128, (16, 128), {"beyond_window": 208}, False),  # a comparison made by an earlier version
        (128, (16, 128), {"beyond_window": None}, True),
    ],
)
def test_means_of_recall_within_the_window_are_said(window, distances, settings, all_inside):
    found = recalled(window, distances, **settings)
    for text in (comparison.verdict(found), recall_of(found)[0]):
        said = "All distances in the means of recall, up to 128 tokens, are within what the attention of student"
        assert (said in text) == all_inside


def test_what_is_beyond_a_window_is_marked():
    found = recalled(100)
    found["models"]["recurrent"]["attention_window"] = 40
    body, plots = recall_of(found)
    assert "sees at most, of student: the last 100 tokens; recurrent: the last 40 tokens" in body
    shown = "50.0 % [40.0, 60.0]"
    for name, expected in {
        "pairs": {"16": ("", ""), "64": ("", " (†)"), "128": (" (†)", " †")},
        "needle": {"16": ("", ""), "64": ("", " †"), "128": (" †", " †")},
    }.items():
        rows = [[x, shown, *(shown + mark for mark in marks)] for x, marks in expected.items()]
        assert plots[name].rows == rows and "its window of attention" in plots[name].caption
    assert f"copying at 128</td><td>{shown}</td><td>{shown} †</td>" in body
    assert plots["passages"].svg.count("stroke-dasharray: 3.6,1.8") == 2, "each window in its model's colour"


@pytest.mark.parametrize("window", [0, None])
def test_nothing_is_marked_without_a_window(window):
    found = recalled(window)
    body, plots = recall_of(found)
    assert ("student: all tokens" in body) == (window == 0)
    for figure in plots.values():
        assert "window of attention" not in figure.caption and not any(
            "†" in cell for row in figure.rows for cell in row
        )
    for facts in found["models"].values():
        del facts["attention_window"]  # a comparison made by an earlier version
    assert "window" not in recall_of(found)[0]


def test_losses_of_repeats_are_drawn_as_differences():
    found = recalled(64)
    figure = recall_of(found)[1]["repeats"]
    assert "minus teacher's; dotted: of all other tokens" in figure.caption
    assert figure.rows[0] == ["16", *["0.500 [0.400, 0.600]"] * 3]
    for row in found["rows"]:
        row["differences"] = {}  # models of different tokenizers
    assert "minus" not in recall_of(found)[1]["repeats"].caption


def test_a_measurement_that_fails_does_not_lose_the_others(workshop, finished, tmp_path, monkeypatch):
    recall, models = retrieval.run, [f"teacher={workshop / 'teacher'}", f"student={finished / 'transfer'}"]

    def fails(model, stream, settings):
        if model.label == "student":
            raise torch.OutOfMemoryError("out of memory\nin many lines")
        return recall(model, stream, settings)

    monkeypatch.setattr(retrieval, "run", fails)
    words = [*models, "--text", workshop / "text.jsonl", "--limit", "3", *SMALL, "--to", tmp_path / "out"]
    done = command("eval/compare.py", *words, "--measure", "perplexity", "recall")
    assert done.returncode == 0 and "recall failed and is left out: student: out of memory\n" in done.stderr
    found = read_json(tmp_path / "out/compare.json")
    rows = {row["metric"]: row for row in found["rows"]}
    assert len(rows["perplexity"]["models"]) == 2 and "recall of pairs" not in rows and "recall" not in found["details"]
    said = "recall: not measured (student: out of memory)"
    assert not rows[said]["models"] and said in done.stdout and said in (tmp_path / "out/index.html").read_text()
    done = command("eval/compare.py", *words, "--measure", "recall")
    assert done.returncode == 2 and done.stderr.endswith("compare: error: recall: student: out of memory\n")


@pytest.mark.parametrize("required", [(), ("speed",), ("perplexity",)])
def test_a_required_measurement_that_fails_is_an_error(evaluated, monkeypatch, required):
    """The table of a run's report is of perplexity and speed."""

    def fails(*args):
        raise ValueError("no text")

    monkeypatch.setattr(comparison.likelihood, "of", fails)
    monkeypatch.setattr(comparison.timing, "kept", fails)
    monkeypatch.setattr(comparison, "same_outputs", lambda models: False)
    settings = comparison.Settings(perplexity=likelihood.Settings(32, 32, 32), speed=timing.Settings())
    text = SimpleNamespace(settings={}, stream=lambda tokenizer: None)
    with pytest.raises(
        ValueError, match="^no text$" if required else "^perplexity: teacher: no text; speed: all models"
    ):
        comparison.run(evaluated[:1], text, settings, Results(None), required)


def test_speed_in_each_dtype_has_a_section(evaluated, monkeypatch):
    monkeypatch.setattr(timing, "dtypes", lambda device, own: [own, "bfloat16"])
    monkeypatch.setattr(comparison, "same_outputs", lambda models: False)
    settings = comparison.Settings(speed=timing.Settings(cases=(timing.Case(2, 9, 3),), contexts=(9, 20), rounds=1))
    text = SimpleNamespace(settings={}, stream=lambda tokenizer: None)
    found = json.loads(json.dumps(comparison.run(evaluated[:2], text, settings, Results(None))))
    assert list(found["details"]) == ["speed", "speed in bfloat16"]
    machines = [next(iter(own.values()))["machine"]["dtype"] for own in found["details"].values()]
    assert machines == ["float32", "bfloat16"]
    made = {section.title: section for section in sections.sections(found) if section.title.startswith("Speed")}
    assert list(made) == ["Speed and memory", "Speed and memory in bfloat16"]
    names = [figure.name for section in made.values() for figure in section.figures]
    assert names == ["step", "state", "step-in-bfloat16", "state-in-bfloat16"]
