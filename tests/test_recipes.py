"""The recipes for Pythia: what their headers say, and the whole way of each, scaled down, without the network."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import scavenger
from transformers import GPTNeoXConfig

from scavenger import plan, student
from scavenger.model import HyenaNeoXConfig, HyenaNeoXForCausalLM
from scavenger.recipe import load_recipe, teacher_shape
from scavenger.recurrence import allocation
from scavenger.run.checkpoint import read_json
from scavenger.transfer import transfer


RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = ["70m", "160m", "410m", "1b"]
KEPT_BYTES = 45  # by a layer for each token and channel, until the backward pass


def recipe_of(size):
    return load_recipe(str(RECIPES / f"neox{size}.yaml"))


def said(size, pattern):
    """What a recipe's comments say: the number in the pattern's group."""
    text = (RECIPES / f"neox{size}.yaml").read_text()
    comments = " ".join(line.partition("#")[2].strip() for line in text.splitlines())
    found = re.findall(pattern, comments)
    assert len(found) == 1, f"{pattern!r} stands {len(found)} times in the comments"
    return float(found[0].replace(",", ""))


def configurations(size):
    config = GPTNeoXConfig(**teacher_shape(recipe_of(size)))
    return config, student.configuration(recipe_of(size), config)


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
def test_memory_of_the_header(size):
    """Of the largest phase, on one GPU."""
    recipe, (config, _) = recipe_of(size), configurations(size)
    assert said(size, r"activations at (\d+) bytes") == KEPT_BYTES
    assert recipe.training.accumulate == (2 if "in two parts" in (RECIPES / f"neox{size}.yaml").read_text() else 1)
    rows = max(phase.batch_size for phase in recipe.transfer.phases) / recipe.training.accumulate
    activations = KEPT_BYTES * rows * recipe.data.context_length * config.num_hidden_layers * config.hidden_size
    assert abs(activations / 1e9 - said(size, r"Memory: (\d+) GB")) < 1
    # Weight, gradient and two moments in float32, and the teacher in its float16.
    weights = 18 * said(size, r"Teacher: ([\d,]+) parameters") / 1e9
    assert abs(weights - said(size, r"(\d+) GB of weights")) < 1
    assert activations / 1e9 + weights < 80 - 15, "room for logits, work space and fragments"


def test_bytes_of_the_headers():
    """Kept by a layer for each token and channel, in bfloat16: of three sequences less those of two."""
    length, width = 128, 192

    def kept(batch):
        config = HyenaNeoXConfig(
            vocab_size=16,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=4 * width,
            num_filters=3,
            context_length=length,
            rotary_fraction=0.25,
            short_filter_length=7,
        )
        found = {}

        def keep(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other takes its place
            return tensor

        ids = torch.zeros(batch, length, dtype=torch.int64)
        body = HyenaNeoXForCausalLM(config).gpt_neox
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            list(transfer._depths(body, ids))
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

    assert KEPT_BYTES - 3 < (kept(3) - kept(2)) / (length * width) <= KEPT_BYTES  # 42 to 43 at widths of 128 to 512


@pytest.mark.parametrize("size", SIZES)
def test_state_of_the_comments(size):
    """The budget is the teacher's cache of as many tokens as the recipe says, and buys the modes that it says."""
    recipe, (config, made) = recipe_of(size), configurations(size)
    a_token = 2 * 4 * config.num_hidden_layers * config.hidden_size
    assert recipe.recurrence.state_bytes == a_token * said(size, r"cache of (\d+) tokens")
    filters = made.num_filters * (config.num_hidden_layers - len(made.attention_layers))
    a_mode = 8 * (config.hidden_size // made.num_filters) ** 2
    modes = (recipe.recurrence.state_bytes - allocation.state_bytes(made)) / (a_mode * filters)
    words = {"two": 2, "three": 3, "four": 4}
    text = (RECIPES / f"neox{size}.yaml").read_text()
    assert round(modes) == words[re.search(r"some (\w+) modes", text)[1]]


@pytest.mark.parametrize("size", SIZES)
def test_eight_gpus_divide_every_batch(size):
    recipe = recipe_of(size)
    assert all(phase.batch_size % (8 * recipe.training.accumulate) == 0 for phase in recipe.transfer.phases)


@pytest.fixture(scope="module")
def texts(workshop):
    """The workshop's text in each form that `data.path` takes."""
    import pyarrow
    from pyarrow import parquet

    documents = [json.loads(line)["text"] for line in (workshop / "text.jsonl").read_text().splitlines()]
    (workshop / "text").mkdir()
    for index in range(10):
        (workshop / "text" / f"{index}.txt").write_text("\n".join(documents[index::10]))
    parquet.write_table(pyarrow.table({"text": documents}), workshop / "text.parquet")
    return {"jsonl": workshop / "text.jsonl", "txt": workshop / "text", "parquet": workshop / "text.parquet"}


@pytest.mark.parametrize(
    "size, kind, kept", [("70m", "jsonl", []), ("160m", "txt", [1]), ("410m", "parquet", [0, 2]), ("1b", "txt", [])]
)
def test_the_whole_way_scaled_down(workshop, texts, tmp_path, size, kind, kept):
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
        "baseline.warmup_steps=1",
        "recurrence.state_bytes=30_000",
        "report.context_lengths=[10]",
        "report.sample_tokens=4",
        "report.cases=[2x10+4]",
        "report.tasks=[]",
        "report.examples=3",
        "report.prompts=2",
        "report.rounds=1",
    )
    turns = read_json(run / "transfer/turns.json")
    assert [turn["name"] for turn in turns] == ["activations", "activations, jointly", "logits"]
    figures = read_json(run / "report/report.json")
    assert set(figures["models"]) == {"teacher", "pre-trained", "distilled", "recurrent"}
    assert figures["models"]["distilled"]["tokens_seen"] == (3 * 4 + 2 * 6) * 24
    assert 0 < figures["models"]["recurrent"]["generation"][0]["state_bytes"] <= 30_000
    assert read_json(run / "recurrence/config.json")["attention_layers"] == kept
