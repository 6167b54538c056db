"""The recipes for Pythia: what their headers say, and the whole way of each, scaled down, without the network."""

import json
import re
from pathlib import Path

import pytest
from conftest import scavenger

from scavenger import plan
from scavenger.model import HyenaConfig
from scavenger.recipe import load_recipe
from scavenger.run.checkpoint import read_json


RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = ["70m", "160m", "410m", "1b"]


def recipe_of(size):
    return load_recipe(str(RECIPES / f"neox{size}.yaml"))


def said(size, pattern):
    """What a recipe's comments say: the number in the pattern's group."""
    text = (RECIPES / f"neox{size}.yaml").read_text()
    comments = " ".join(line.partition("#")[2].strip() for line in text.splitlines())
    found = re.findall(pattern, comments)
    assert len(found) == 1, f"{pattern!r} stands {len(found)} times in the comments"
    return float(found[0].replace(",", ""))


@pytest.mark.parametrize("size", SIZES)
def test_teacher_and_text_are_pinned(size):
    recipe = recipe_of(size)
    assert recipe.teacher.name == f"EleutherAI/pythia-{size}" and recipe.run_dir == f"runs/neox{size}"
    assert re.fullmatch("[0-9a-f]{40}", recipe.teacher.revision) and re.fullmatch("[0-9a-f]{40}", recipe.data.revision)
    assert recipe.baseline and recipe.recurrence and recipe.report
    assert (RECIPES / f"neox{size}.yaml").stat().st_mode & 0o100, "the recipe is a program"


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_tokens_of_the_header(size):
    recipe = recipe_of(size)
    parameters = said(size, r"Teacher: ([\d,]+) parameters")
    assert f"{recipe.teacher.name}: GPT-NeoX, {parameters:,.0f} parameters" in plan.text(recipe, [])
    tokens = [phase.steps * phase.batch_size * recipe.data.context_length for phase in recipe.transfer.phases]
    assert sum(tokens) == said(size, r"Transfer: ([\d,]+) tokens")
    text = (RECIPES / f"neox{size}.yaml").read_text()
    assert [f"{count:,}" for count in tokens] == re.findall(r"# ([\d,]+) tokens", text)


@pytest.mark.parametrize("size", SIZES)
def test_eight_gpus_divide_every_batch(size):
    recipe = recipe_of(size)
    assert all(phase.batch_size % (8 * recipe.training.accumulate) == 0 for phase in recipe.transfer.phases)


@pytest.fixture(scope="module")
def texts(workshop, tmp_path_factory):
    """The workshop's text in each form that `data.path` takes."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("texts")
    documents = [json.loads(line)["text"] for line in (workshop / "text.jsonl").read_text().splitlines()]
    (folder / "text").mkdir()
    for index in range(10):
        (folder / "text" / f"{index}.txt").write_text("\n".join(documents[index::10]))
    parquet.write_table(pyarrow.table({"text": documents}), folder / "text.parquet")
    return {"jsonl": workshop / "text.jsonl", "txt": folder / "text", "parquet": folder / "text.parquet"}


# The first goes the whole way; the others, which run the same code, stop before baseline and report.
SHORTENED = ["baseline=null", "report=null"]
WHOLE = [
    "baseline.warmup_steps=1",
    "report.context_lengths=[10]",
    "report.sample_tokens=4",
    "report.cases=[2x10+4]",
    "report.tasks=[]",
    "report.examples=3",
    "report.prompts=2",
    "report.rounds=1",
]


@pytest.mark.parametrize(
    "size, kind, kept, ends",
    [
        ("70m", "jsonl", [], WHOLE),
        ("160m", "txt", [1], SHORTENED),
        ("410m", "parquet", [0, 2], SHORTENED),
        ("1b", "txt", [], SHORTENED),
    ],
)
def test_the_whole_way_scaled_down(workshop, texts, tmp_path, size, kind, kept, ends):
    run = tmp_path / "run"
    scavenger(
        RECIPES / f"neox{size}.yaml",
        f"run_dir={run}",
        f"teacher.path={workshop}/teacher",
        f"data.path={texts[kind]}",
        "data.context_length=24",
        "data.evaluation_tokens=240",
        f"student.attention_layers={kept}",
        "student.attention_window=10",
        "training.log_every=2",
        "training.checkpoint_every=2",
        "transfer.activations.0.steps=2",
        "transfer.activations.0.batch_size=4",
        "transfer.activations.0.warmup_steps=1",
        "transfer.activations.1.steps=1",
        "transfer.activations.1.batch_size=4",
        "transfer.activations.1.warmup_steps=0",
        "transfer.logits.steps=2",
        "transfer.logits.batch_size=6",
        "transfer.logits.warmup_steps=1",
        "recurrence.state_bytes=30_000",
        *ends,
    )
    turns = read_json(run / "transfer/turns.json")
    assert [turn["name"] for turn in turns] == ["activations", "activations, jointly", "logits"]
    assert [turn["steps"] * turn["batch_size"] for turn in turns] == [2 * 4, 4, 2 * 6]
    assert read_json(run / "recurrence/config.json")["attention_layers"] == kept
    student = HyenaConfig.from_pretrained(run / "recurrence")
    assert 0 < student.state_bytes <= 30_000
    if ends is WHOLE:
        figures = read_json(run / "report/report.json")
        assert set(figures["models"]) == {"teacher", "pre-trained", "distilled", "recurrent"}
        assert figures["models"]["distilled"]["tokens_seen"] == (3 * 4 + 2 * 6) * 24
        assert figures["models"]["recurrent"]["generation"][0]["state_bytes"] == student.state_bytes
