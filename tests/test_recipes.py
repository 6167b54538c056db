"""The recipes by Hub name: what their headers say, and the whole way of each, scaled down, without the network."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import scavenger, tiny_of

from scavenger import families, plan
from scavenger.model import HyenaConfig
from scavenger.recipe import load_recipe
from scavenger.run.checkpoint import read_json


RECIPES = Path(__file__).parents[1] / "recipes"


def pythia(width, layers, heads):
    return "gpt_neox", {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": 50304,
    }


# Each recipe's teacher on the Hub, its family, and of its config.json there what its size follows from.
PUBLISHED = {
    "neox70m": ("EleutherAI/pythia-70m", *pythia(512, 6, 8)),
    "neox160m": ("EleutherAI/pythia-160m", *pythia(768, 12, 12)),
    "neox410m": ("EleutherAI/pythia-410m", *pythia(1024, 24, 16)),
    "neox1b": ("EleutherAI/pythia-1b", *pythia(2048, 16, 8)),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M",
        "llama",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
    "llama3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        "llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-0.6b": (
        "Qwen/Qwen3-0.6B",
        "qwen3",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
}
NAMES = list(PUBLISHED)


def recipe_of(name):
    return load_recipe(str(RECIPES / f"{name}.yaml"))


def published(name):
    """The teacher's configuration, of which only the name is in the recipe."""
    _, family, shape = PUBLISHED[name]
    return families.of(family).config(**shape)


def said(name, pattern):
    """What a recipe's comments say: the number in the pattern's group."""
    text = (RECIPES / f"{name}.yaml").read_text()
    comments = " ".join(line.partition("#")[2].strip() for line in text.splitlines())
    found = re.findall(pattern, comments)
    assert len(found) == 1, f"{pattern!r} stands {len(found)} times in the comments"
    return float(found[0].replace(",", ""))


@pytest.mark.parametrize("name", NAMES)
def test_teacher_and_text_are_pinned(name):
    recipe = recipe_of(name)
    assert recipe.teacher.name == PUBLISHED[name][0] and recipe.run_dir == f"runs/{name}"
    assert re.fullmatch("[0-9a-f]{40}", recipe.teacher.revision) and re.fullmatch("[0-9a-f]{40}", recipe.data.revision)
    assert recipe.baseline and recipe.recurrence and recipe.report
    assert (RECIPES / f"{name}.yaml").stat().st_mode & 0o100, "the recipe is a program"


@pytest.mark.parametrize("name", NAMES)
def test_figures_of_the_header(name, monkeypatch):
    """Parameters, tokens and operations; and the state is as large as the teacher's cache of so many tokens."""
    recipe, config = recipe_of(name), published(name)
    monkeypatch.setattr(plan, "_configuration", lambda recipe: config)
    parameters = said(name, r"Teacher: ([\d,]+) parameters")
    assert f"{recipe.teacher.name}: {config.model_type}, {parameters:,.0f} parameters" in plan.text(recipe, [])
    tokens = [phase.steps * phase.batch_size * recipe.data.context_length for phase in recipe.transfer.phases]
    assert sum(tokens) == said(name, r"Transfer: ([\d,]+) tokens")
    text = (RECIPES / f"{name}.yaml").read_text()
    assert [f"{count:,}" for count in tokens] == re.findall(r"# ([\d,]+) tokens", text)
    operations = sum(stage.flops for stage, _, _ in plan._trainings(recipe, config))
    assert operations == pytest.approx(1e18 * said(name, r"Cost: ([\d.]+)e18"), rel=0.15)
    token = 2 * families.of(config.model_type).cache_numbers(config)
    cached = said(name, r"KV cache of (\d+) tokens in 16 bits")
    assert recipe.recurrence.state_bytes == cached * token and recipe.recurrence.dtype == "bfloat16"
    moved = said(name, r"reads and writes as many bytes as attention reads of ([\d,]+) tokens")
    assert f"with a KV cache in 16 bits, from {moved:,.0f} tokens on" in plan.text(recipe, [])


@pytest.mark.parametrize("name", NAMES)
def test_eight_gpus_divide_every_batch(name):
    recipe = recipe_of(name)
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


def teacher_of(family, workshop, folder):
    """A tiny teacher of a family with the tokenizer of the workshop's."""
    if family == "gpt_neox":
        return workshop / "teacher"
    made = folder / "teacher"
    shutil.copytree(workshop / "teacher", made)
    tiny_of(family, vocab_size=320).save_pretrained(made)
    return made


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
    "name, kind, kept, ends",
    [
        ("neox70m", "jsonl", [], WHOLE),
        ("neox160m", "txt", [1], SHORTENED),
        ("neox410m", "parquet", [0, 2], SHORTENED),
        ("neox1b", "txt", [], SHORTENED),
        ("smollm2-135m", "parquet", [1], SHORTENED),
        ("llama3.2-1b", "txt", [1], SHORTENED),
        ("qwen3-0.6b", "jsonl", [1], SHORTENED),
    ],
)
def test_the_whole_way_scaled_down(workshop, texts, tmp_path, name, kind, kept, ends):
    run, family = tmp_path / "run", PUBLISHED[name][1]
    scavenger(
        RECIPES / f"{name}.yaml",
        f"run_dir={run}",
        f"teacher.path={teacher_of(family, workshop, tmp_path)}",
        f"data.path={texts[kind]}",
        "data.context_length=24",
        "student.window=8",
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
        "transfer.logits.batch_size=8",
        "transfer.logits.warmup_steps=1",
        "recurrence.state_bytes=30_000",
        *ends,
        # Of the tiny teacher's heads.
        *(["student.num_filter_heads=15"] if recipe_of(name).student.num_filter_heads else []),
    )
    turns = read_json(run / "transfer/turns.json")
    assert [turn["name"] for turn in turns] == ["activations", "activations, jointly", "logits"]
    assert [turn["steps"] * turn["batch_size"] for turn in turns] == [2 * 4, 4, 2 * 8]
    assert read_json(run / "recurrence/config.json")["attention_layers"] == kept
    student = HyenaConfig.from_pretrained(run / "recurrence")
    assert 0 < student.state_bytes_of(2) <= 30_000, "in the dtype that the recipe decodes in"
    if ends is WHOLE:
        figures = read_json(run / "report/report.json")
        assert set(figures["models"]) == {"teacher", "pre-trained", "distilled", "recurrent"}
        assert figures["models"]["distilled"]["tokens_seen"] == (3 * 4 + 2 * 8) * 24
        assert figures["models"]["recurrent"]["generation"][0]["state_bytes"] == student.state_bytes
