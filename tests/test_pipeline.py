"""The whole way, on a small teacher and real text: every folder, every launch."""

import errno
import fcntl
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ARC, BIN, ROOT, command_line, done, launch, scavenger
from transformers import AutoModelForCausalLM, AutoTokenizer

import scavenger.model as _registered  # noqa: F401  (AutoModel knows the student)
from scavenger import data, families, measure, teacher, training
from scavenger.__main__ import main
from scavenger.recipe import RecipeError, load_recipe
from scavenger.report import drawing, report
from scavenger.run import checkpoint
from scavenger.run import launch as hook
from scavenger.run.checkpoint import read_json


def curve(run, stage):
    return [entry["loss"] for entry in read_json(run / stage / "history.json")]


def test_every_folder_opens(finished):
    assert not list(finished.rglob("turn_*"))
    for name in ("transfer", "transfer/activations", "baseline", "recurrence"):
        model = AutoModelForCausalLM.from_pretrained(finished / name)
        assert model.config.filter == ("modal" if name == "recurrence" else "implicit")
        assert AutoTokenizer.from_pretrained(finished / name).eos_token == "<|endoftext|>"
    assert not list(finished.rglob("*.partial")) and not list(finished.rglob("steps"))
    assert not list(finished.rglob("*.bin")) and not list(finished.rglob("*.pt")), "safetensors only"
    assert list((finished / "logs").rglob("events*")), "the tracker's log"


def test_transfer_learns(finished):
    errors = read_json(finished / "transfer/activations/history.json")
    for layer in range(3):
        assert errors[-1][f"layer_{layer}"] < 0.9 * errors[0][f"layer_{layer}"]
    losses = curve(finished, "transfer")
    assert losses[-1] < 0.8 * losses[0]
    assert curve(finished, "baseline")[-1] < curve(finished, "baseline")[0]


def test_activations_touch_mixers_only(finished, workshop):
    student = AutoModelForCausalLM.from_pretrained(finished / "transfer/activations").state_dict()
    frozen = AutoModelForCausalLM.from_pretrained(workshop / "teacher")
    rest = {
        key: value for key, value in families.of("gpt_neox").student_weights(frozen, ()).items() if ".mixer." not in key
    }
    assert len(rest) == 3 * 8 + 5, "norms and MLP of three layers; embedding, last norm, head and frequencies"
    for key, value in rest.items():
        assert torch.equal(student[key], value), key


def test_recurrent_student_is_the_distilled_one(finished):
    found = read_json(finished / "recurrence/certificate.json")
    assert found["filters"] == 15 and found["largest_radius"] < 1
    distilled, recurrent = (
        AutoModelForCausalLM.from_pretrained(finished / name) for name in ("transfer", "recurrence")
    )
    for layer, (exact, modal) in enumerate(zip(distilled.model.layers, recurrent.model.layers, strict=True)):
        taps, made = exact.mixer.filter(48), modal.mixer.filter(48)
        for row, facts in enumerate(found["layers"][layer]["filters"]):
            error = ((taps[row] - made[row]).norm() / taps[row].norm()).item()
            assert error == pytest.approx(facts["relative_error"], rel=0.05, abs=1e-5)
            assert facts["relative_error"] >= facts["floor"] * (1 - 1e-9)
            assert facts["relative_error"] <= 1e-3 or facts["state_size"] >= 20
    blocks = data.blocks(finished / "data", "test")
    assert measure.held_out(recurrent, blocks, distilled).divergence < 1e-4


def test_recurrent_student_generates_as_it_reads(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "recurrence").double()
    ids = torch.from_numpy(data.blocks(finished / "data", "test")[:2, :30].astype(np.int64))
    arguments = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments))


def test_a_normalised_student_is_certified_for_every_input(workshop, tmp_path):
    """Windows, a kept head, features and positive filters, from the teacher to the recurrence."""
    words = ["student.window=9", "student.attention_heads=[L1H2]", "student.attention_window=21"]
    words += [
        "student.features=hedgehog",
        "student.filter={form: positive, state_size: 3}",
        "recurrence.method=positive",
    ]
    words += ["recurrence.tolerance=0.05", "training.tracker=none", "baseline=null", "report=null"]
    scavenger(workshop / "recipe.yaml", f"run_dir={tmp_path}/run", *words)
    found = read_json(tmp_path / "run/recurrence/certificate.json")
    assert found["normalised"] and "for every input" in found["verdict"]
    filters = [entry for layer in found["layers"] for entry in layer["filters"]]
    assert len(filters) == 14 and all(0 <= entry["pointwise_error"] <= 0.05 for entry in filters)
    assert all(entry["pointwise_error"] <= entry["pointwise_error_at_all_lags"] for entry in filters)
    exact, recurrent = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name).double() for name in ("transfer", "recurrence")
    )
    assert recurrent.config.positive and recurrent.config.state_bytes == found["state_bytes"]
    taps, made = (model.model.layers[1].mixer.filter(48 - 9) for model in (exact, recurrent))
    assert ((made / taps - 1).abs() <= 0.05 * (1 + 1e-6)).all()
    ids = torch.from_numpy(data.blocks(tmp_path / "run/data", "test")[:2, :30].astype(np.int64))
    arguments = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(recurrent.generate(ids, **arguments), recurrent.generate(ids, use_cache=False, **arguments))


def test_report(finished):
    figures = read_json(finished / "report/report.json")
    assert list(figures["models"]) == ["teacher", "pre-trained", "distilled", "recurrent"]
    assert (
        figures["models"]["distilled"]["tokens_seen"] == figures["models"]["pre-trained"]["tokens_seen"] == 20 * 4 * 48
    )
    assert figures["models"]["teacher"]["ratio_to_teacher"] == 1
    first, second = figures["models"]["recurrent"]["generation"]
    assert first["state_bytes"] == second["state_bytes"] > 0
    first, second = figures["models"]["teacher"]["generation"]
    assert second["state_bytes"] - first["state_bytes"] == (60 - 20) * 2 * 3 * 30 * 4
    page = (finished / "report/index.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 13 == len(list((finished / "report/plots").glob("*.svg")))
    for name in figures["models"]:
        assert name in page
    rows = {row["name"]: row for row in figures["trainings"]}
    assert {name: row["tokens"] for name, row in rows.items()} == {
        "activations": 10 * 4 * 48,
        "logits": 10 * 4 * 48,
        "baseline": 20 * 4 * 48,
    }
    for name, row in rows.items():
        shares = [row[f"time_in_{what}"] for what in ("teacher", "student", "data", "checkpoints")]
        assert sum(shares) == pytest.approx(1) and row["skipped"] == 0 and name in page
        assert (row["time_in_teacher"] < 0.05) == (name == "baseline"), "the baseline has no teacher"


@pytest.fixture
def before_report(finished, tmp_path):
    """A run that lacks nothing but its report, of two models."""
    run = tmp_path / "run"
    for name in ("data", "transfer"):
        shutil.copytree(finished / name, run / name)
    return run


def test_a_report_with_tasks(before_report, workshop, tmp_path):
    """Missing documents end in one line before anything is measured; once they are there, the command resumes."""
    asked = ["report.tasks=[arc_easy]", f"report.task_files=[{ROOT / 'eval/tasks'}]", "report.task_limit=3"]
    asked += [f"run_dir={before_report}", f"report.tasks_path={tmp_path}", "baseline=null", "recurrence=null"]
    with pytest.raises(RecipeError, match="report: .*arc_easy.*; what is measured is kept: run the same command again"):
        scavenger(workshop / "recipe.yaml", *asked)
    assert not (before_report / "report").exists()
    assert not list((before_report / "report.partial/results").iterdir())
    (tmp_path / "arc_easy.jsonl").write_text(ARC)
    scavenger(workshop / "recipe.yaml", *asked)
    rows = {row["metric"]: row for row in read_json(before_report / "report/report.json")["comparison"]["rows"]}
    assert [row["items"] for row in rows["arc_easy acc"]["models"].values()] == [3, 3]
    assert "Zero-shot tasks." in (before_report / "report/index.html").read_text()


def test_tasks_without_the_harness_are_refused_at_once(workshop, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    recipe = load_recipe(str(workshop / "recipe.yaml"), ["report.tasks=[arc_easy]"])
    with pytest.raises(RecipeError, match="report.tasks: lm_eval is not installed; expected pip install"):
        report.require_harness(recipe)
    report.require_harness(load_recipe(str(workshop / "recipe.yaml")))


def test_held_out_figures_are_the_models_own(finished, workshop):
    model = AutoModelForCausalLM.from_pretrained(workshop / "teacher")
    blocks = data.blocks(finished / "data", "test")
    found = measure.held_out(model, blocks, model)
    ids = torch.from_numpy(blocks.astype(np.int64))
    assert found.loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert found.agreement == 1 and abs(found.divergence) < 1e-6 and found.tokens == ids[:, 1:].numel()


def test_a_finished_run_is_not_run_again(own_run, workshop, capsys):
    before = {path: path.stat().st_mtime_ns for path in own_run.rglob("*.safetensors")}
    scavenger(workshop / "recipe.yaml", f"run_dir={own_run}")
    out = capsys.readouterr().out
    assert "(complete)" in out and "× teacher" in out and "report/index.html" in out
    assert before == {path: path.stat().st_mtime_ns for path in own_run.rglob("*.safetensors")}


def test_another_recipe_is_refused(own_run, workshop):
    with pytest.raises(RecipeError, match=r"transfer.logits.steps \(the run has 10, the recipe says 11\)"):
        scavenger(workshop / "recipe.yaml", f"run_dir={own_run}", "transfer.logits.steps=11")


def test_a_run_older_than_a_key_resumes(own_run, workshop):
    """A key that was added since has its default there."""
    saved = (own_run / "recipe.yaml").read_text()
    older = re.sub(r"  (hyena_order|rotary): .*\n", "", saved)
    assert len(older) < len(saved)
    (own_run / "recipe.yaml").write_text(older)
    scavenger(workshop / "recipe.yaml", f"run_dir={own_run}")
    with pytest.raises(RecipeError, match="student.rotary"):
        scavenger(workshop / "recipe.yaml", f"run_dir={own_run}", "student.rotary=false")


def test_a_run_in_use_is_refused(own_run, workshop):
    with open(own_run / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RecipeError, match="in use by another process"):
            scavenger(workshop / "recipe.yaml", f"run_dir={own_run}")
    scavenger(workshop / "recipe.yaml", f"run_dir={own_run}")


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(own_run, workshop, monkeypatch, capsys):
    """As on some network file systems."""

    def refused(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "flock", refused)
    scavenger(workshop / "recipe.yaml", f"run_dir={own_run}")
    assert "cannot be locked (No locks available); make sure that only one run uses it" in capsys.readouterr().out


@pytest.mark.parametrize("theirs", [None, "another"])
def test_machines_with_folders_of_their_own_are_refused(workshop, tmp_path, monkeypatch, theirs):
    """Rank 1 sees no folder, or its own of the same name, and not what the main process has written."""
    recipe = load_recipe(str(workshop / "recipe.yaml"), [f"run_dir={tmp_path}/run"])
    if theirs is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/lock").write_text(theirs)
    monkeypatch.setattr(checkpoint, "SHARED_SECONDS", 0.2)
    monkeypatch.setattr(checkpoint, "broadcast_object_list", lambda sent: ["written by the main process"])
    monkeypatch.setattr(checkpoint, "gather_object", lambda own: [True, *own])
    second = SimpleNamespace(is_main_process=False)
    with pytest.raises(RecipeError, match="processes 1 do not see what the main process writes to .*run; expected a"):
        with checkpoint.open_run(recipe, second):
            pytest.fail("it went on")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/lock").write_text("written by the main process")
    with checkpoint.open_run(recipe, second) as found:
        assert found == tmp_path / "run"


def test_progressive_schedule(workshop, tmp_path):
    scavenger(
        workshop / "recipe.yaml",
        f"run_dir={tmp_path}/run",
        "transfer.activations.schedule=progressive",
        "transfer.activations.steps=30",
        "baseline=null",
        "recurrence=null",
        "report=null",
    )
    history = read_json(tmp_path / "run/transfer/activations/history.json")
    assert [entry["step"] for entry in history] == list(range(2, 31, 2))
    for layer in range(3):
        mine = [entry[f"layer_{layer}"] for entry in history if f"layer_{layer}" in entry]
        assert len(mine) == 5 and mine[-1] < mine[0]


def test_hyena_with_cross_entropy(workshop, tmp_path):
    scavenger(
        workshop / "recipe.yaml",
        f"run_dir={tmp_path}/run",
        "student.mixer=hyena",
        "transfer.logits.cross_entropy=0.25",
        "baseline=null",
        "report=null",
    )
    entry = read_json(tmp_path / "run/transfer/history.json")[-1]
    assert entry["loss"] == pytest.approx(0.75 * entry["divergence"] + 0.25 * entry["cross_entropy"], rel=1e-4)
    assert read_json(tmp_path / "run/recurrence/certificate.json")["filters"] == 90


def test_every_student_ends_and_speaks_as_its_teacher(workshop, tmp_path):
    """Ends, sampling and chat template of the teacher are in the folder of each stage; what only it can do is not."""
    shutil.copytree(workshop / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher/chat_template.jinja").write_text("{{ messages[0].content }}!")
    kept = {"eos_token_id": [0, 5, 7], "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    lacking = {"cache_implementation": "static", "prompt_lookup_num_tokens": 3, "output_attentions": True}
    (tmp_path / "teacher/generation_config.json").write_text(json.dumps(kept | lacking))
    scavenger(
        workshop / "recipe.yaml",
        f"run_dir={tmp_path}/run",
        f"teacher.path={tmp_path}/teacher",
        "transfer.activations.steps=1",
        "transfer.logits.steps=1",
        "recurrence={tolerance: 0.1, max_state_size: 4}",
        "report=null",
    )
    run = tmp_path / "run"
    words = ["--tolerance", "0.1", "--max-state-size", "4", "--text", workshop / "text.jsonl", "--to", run / "recurred"]
    assert command_line("recur", run / "transfer", *words).returncode == 0
    for name in ("transfer", "baseline", "recurrence", "recurred"):
        found = read_json(run / name / "generation_config.json")
        assert found.items() >= kept.items() and not found.keys() & lacking.keys(), name
        tokenizer = AutoTokenizer.from_pretrained(run / name)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    model, prompt = AutoModelForCausalLM.from_pretrained(run / "recurrence"), torch.tensor([3, 4, 5, 6])
    alone = model.generate(prompt[None], max_new_tokens=40, do_sample=False, repetition_penalty=1.0)[0, 4:]
    (found,) = model.batch_decoder(rows=1).generate([prompt], 40)
    assert torch.equal(found, alone)


def test_full_recurrence_with_a_layer_of_whole_attention(workshop, tmp_path):
    scavenger(
        workshop / "recipe.yaml",
        f"run_dir={tmp_path}/run",
        "student.mixer=hyena",
        "student.hyena_order=2",
        "student.attention_layers=[1]",
        "student.attention_window=0",
        "recurrence.tolerance=1e-2",
        "baseline=null",
        "report=null",
    )
    run = tmp_path / "run"
    found = read_json(run / "recurrence/certificate.json")
    assert found["filters"] == 2 * 2 * 30 and found["model"]["divergence"] < 1e-3
    model = AutoModelForCausalLM.from_pretrained(run / "recurrence").double()
    ids = torch.from_numpy(data.blocks(run / "data", "test")[:2, :30].astype(np.int64))
    arguments = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments))
    sizes = [measure.state_bytes(model.float()(input_ids=ids[:1, :tokens]).cache) for tokens in (10, 30)]
    assert sizes[1] - sizes[0] == (30 - 10) * (2 * 30 * 4 + 1) and model.config.break_even_length is None


def test_the_verdict_on_a_state_that_grows(finished):
    figures = read_json(finished / "report/report.json")
    row = figures["models"]["recurrent"]
    float32, half = row["break_even_length"], row["break_even_length_16_bit"]
    said = f"no more than the teacher's KV cache in float32 from {float32} tokens on"
    assert f"between tokens at any context length, {said}, in 16 bits from {half}." in report.verdict(figures)
    row.pop("break_even_length_16_bit")  # a report made by an earlier version
    assert f"{said}." in report.verdict(figures)
    figures["models"]["recurrent"]["break_even_length"] = None
    assert "between tokens, and more with every token in its kept attention layers" in report.verdict(figures)


def test_what_sharded_launches_do_not_watch_is_said(finished):
    figures = read_json(finished / "report/report.json")
    assert "not measured: under sharded launches" not in (finished / "report/index.html").read_text()
    for name in ("logits", "baseline"):
        for entry in figures["history"][name]:
            for key in [key for key in entry if key == "held_out_loss" or key.startswith("floor_")]:
                del entry[key]
    found = {section.title: section for section in report.sections(finished, figures)}
    result, transfer = found["Result"], found["Transfer"]
    (quality,) = result.figures
    assert "logits, baseline: not measured: under sharded launches (FSDP, ZeRO-3)" in quality.caption
    assert ["baseline", "–", "not measured"] in quality.rows and "during training: not measured: under" in transfer.body
    for entry in figures["history"]["activations"]:
        entry.pop("held_out_loss", None)
    assert "activations, logits, baseline: not measured" in drawing.quality(figures).caption, "nothing was watched"


def test_what_the_report_leaves_out_is_said(finished, workshop):
    figures = read_json(finished / "report/report.json")
    assert figures["left_out"] == ["Recall is not measured: it needs contexts of 64 tokens or more."]
    assert figures["left_out"][0] in (finished / "report/index.html").read_text()
    recipe = load_recipe(str(workshop / "recipe.yaml"), ["report.prompts=9", "data.context_length=64"])
    for tokens, said in {
        9 * 53: [],
        9 * 53 - 1: ["Generation is measured with 8 of 9 prompts: the test split has 476 tokens"],
        52: ["Generation is not measured: the test split has 52 tokens"],
    }.items():
        asked = report.settings(recipe, [], tokens)
        found = report.left_out(recipe, asked, tokens)
        assert [len(said)] == [len(found)] and all(map(str.startswith, found, said))
        assert all(text.endswith("takes 53.") for text in found)


@pytest.mark.parametrize(
    "written, tokens",
    [
        ('{"tokens": 12}', 12),
        ("{}", None),
        ('{"tokens": "many"}', None),
        ("[1]", None),
        ("no JSON", None),
        (None, None),
    ],
)
def test_a_teacher_that_does_not_record_its_tokens(tmp_path, written, tokens):
    if written is not None:
        (tmp_path / "training.json").write_text(written)
    recipe = SimpleNamespace(teacher=SimpleNamespace(folder=tmp_path))
    assert report._teacher_tokens(recipe, tmp_path) == tokens


PLAN = ("transfer.logits.steps=123", "--plan")


def is_planned(done, run):
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("logits") and " 123 " in line]
    assert not run.exists(), "a plan writes nothing"


def test_launched_by_a_module(workshop, tmp_path):
    """`accelerate launch -m scavenger`, as really typed; the quickstart of test_readme is launched by the hook."""
    words = [BIN / "accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "-m", "scavenger"]
    is_planned(launch(*words, workshop / "recipe.yaml", *PLAN, f"run_dir={tmp_path}/run"), tmp_path / "run")


def test_a_recipe_is_a_program(workshop, tmp_path):
    """`./recipe.yaml`: the first line finds `scavenger`, the entry point."""
    is_planned(launch(workshop / "recipe.yaml", *PLAN, f"run_dir={tmp_path}/run"), tmp_path / "run")


@pytest.mark.parametrize("first", [[], ["scavenger"]])
def test_the_words_of_a_launch(workshop, tmp_path, monkeypatch, first):
    """`python recipe.yaml` and `accelerate launch recipe.yaml` (the recipe is argv[0]), and `scavenger recipe.yaml`."""
    words = [str(workshop / "recipe.yaml"), *PLAN, f"run_dir={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", [*first, *words])
    is_planned(done(main, None), tmp_path / "run")


def test_python_finds_main_in_a_recipe(workshop, tmp_path, monkeypatch):
    """What the hook gives to `python recipe.yaml`: a module `__main__` that calls ours."""
    recipe = str(workshop / "recipe.yaml")
    spec = hook._finder(recipe).find_spec("__main__")
    called = []
    monkeypatch.setattr("scavenger.__main__.main", lambda: called.append(True) or 7)
    with pytest.raises(SystemExit, match="7"):
        exec(spec.loader.get_code("__main__"), {"__name__": "__main__"})
    assert called == [True] and spec.origin == recipe
    assert hook._finder(recipe).find_spec("other") is None


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        ("#!/usr/bin/env scavenger\n", True),
        ("\ufeff#!/usr/bin/env scavenger\r\nrun_dir: a\r\n", True),
        ("# my recipe\n\nseed: 1\nteacher:\n  path: a\n", True),
        ("run_dir: runs/a", True),
        ("run_dir : runs/a", True),
        ("a: 1\n", False),
        ("model:\n  teacher: a\n", False),
        ("teachers: 3\n", False),
        ("", False),
    ],
)
def test_what_the_hook_takes_for_a_recipe(tmp_path, content, ours):
    """The marker, or a key that only recipes have; other YAML is left to whoever reads it."""
    path = tmp_path / "file.yaml"
    path.write_text(content, encoding="utf-8", newline="")
    assert hook.is_recipe(str(path)) == ours
    if not ours:
        with pytest.raises(ImportError):
            hook._finder(str(path))


def test_a_batch_that_the_processes_do_not_divide_is_refused(workshop, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    from scavenger.run import processes

    three = type("Three", (), {"num_processes": 3, "device": torch.device("cpu")})
    monkeypatch.setattr(processes, "Accelerator", lambda **kwargs: three)
    with pytest.raises(RecipeError, match="transfer.activations.batch_size: found 4; expected a multiple.*3"):
        processes.start(load_recipe(str(workshop / "recipe.yaml")))


def test_processes_that_do_not_see_each_other_are_refused(workshop, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    from scavenger.run import processes

    monkeypatch.setattr(
        processes, "Accelerator", lambda **kwargs: type("One", (), {"num_processes": 1, "device": torch.device("cpu")})
    )
    with pytest.raises(RecipeError, match="2 processes were started but do not see each other"):
        processes.start(load_recipe(str(workshop / "recipe.yaml")))


def test_mistakes_end_in_one_line(workshop, tmp_path):
    made = command_line(workshop / "recipe.yaml", f"run_dir={tmp_path}/run", "transfer.logits.stesp=3")
    assert made.returncode == 2 and made.stdout == ""
    assert made.stderr.startswith("scavenger: error: ") and made.stderr.count("\n") == 1 and "`steps`" in made.stderr
    assert not (tmp_path / "run").exists()


def test_damaged_teacher_is_one_line(workshop, tmp_path):
    shutil.copytree(workshop / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher/model.safetensors").write_bytes(b"not a safetensors file")
    words = (workshop / "recipe.yaml", f"run_dir={tmp_path}/run", f"teacher.path={tmp_path}/teacher")
    made = command_line(*words)
    assert made.returncode == 2, made.stderr
    last = made.stderr.strip().splitlines()[-1]
    assert last.startswith("scavenger: error: ") and "cannot be loaded" in last
    assert "Traceback" not in made.stderr


def test_other_yaml_is_left_alone(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("print: 1\n")
    made = launch(sys.executable, path)
    assert made.returncode == 0 and made.stdout == "", "python reads it as Python: an annotation"
    path.write_text("a: [1\n")
    assert "SyntaxError" in launch(sys.executable, path).stderr


def test_a_teacher_is_trained(tmp_path):
    """recipes/teacher-stdlib.yaml, small: tokenizer, teacher and card, and the teacher serves a student at once."""
    values = yaml.safe_load((ROOT / "recipes/teacher-stdlib.yaml").read_text())
    assert (
        values["teacher"]["train"]["steps"]
        * values["teacher"]["train"]["batch_size"]
        * values["data"]["context_length"]
        >= 20e6
    )
    scavenger(
        ROOT / "recipes/teacher-stdlib.yaml",
        f"run_dir={tmp_path}/run",
        "teacher.train.vocab_size=300",
        "teacher.train.hidden_size=16",
        "teacher.train.num_layers=1",
        "teacher.train.num_heads=2",
        "teacher.train.steps=12",
        "teacher.train.warmup_steps=2",
        "teacher.train.batch_size=2",
        "data.context_length=32",
        "data.evaluation_tokens=640",
        "training.log_every=4",
        "training.checkpoint_every=8",
    )
    folder = tmp_path / "run/teacher"
    facts = read_json(folder / "training.json")
    assert facts["tokens"] == 12 * 2 * 32 and facts["corpus"]["python"] and facts["test_loss"] < 6
    assert "content_sha256" in (folder / "README.md").read_text()
    model = teacher.load(
        load_recipe(
            str(ROOT / "recipes/quickstart.yaml"), [f"teacher.path={folder}", "student.attention_heads=[]"]
        ).teacher,
        tmp_path,
    )
    assert not any(p.requires_grad for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return x + 1\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_learning_rate_schedule():
    stage = load_recipe(str(ROOT / "recipes/quickstart.yaml")).transfer.logits[0]
    rates = [training.learning_rate(stage, step) for step in range(stage.steps)]
    assert max(rates) == pytest.approx(stage.learning_rate) and rates.index(max(rates)) in (
        stage.warmup_steps - 1,
        stage.warmup_steps,
    )
    assert rates[-1] == pytest.approx(0.1 * stage.learning_rate, rel=0.01)
    assert all(a < b for a, b in zip(rates[: stage.warmup_steps - 1], rates[1 : stage.warmup_steps], strict=False))
