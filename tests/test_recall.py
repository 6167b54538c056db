"""Recall and the comparison of mixers: models whose recall is known, and the commands on small runs."""

import json
import math
import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import scavenger
from test_eval import command
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from scavenger import data, measure
from scavenger.model import HyenaNeoXForCausalLM
from scavenger.recipe import load_recipe


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "eval"))  # as for a command of that folder, which finds its neighbours
import recall  # noqa: E402


VOCABULARY = 311
DISTANCES = [17, 23, 40, 76]
# Each token but 0 once, so that a token has one place; 0 is what a model that knows nothing names first.
TEXT = np.random.default_rng(5).permutation(np.arange(1, VOCABULARY))


class Oracle(nn.Module):
    """What followed the current token where it last occurred in the last `window` tokens; else every token alike."""

    def __init__(self, window=10_000):
        super().__init__()
        self.window = window
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, ids in enumerate(input_ids.tolist()):
            last = {}
            for t, token in enumerate(ids):
                if token in last and t - last[token] < self.window:
                    logits[row, t, ids[last[token] + 1]] = 40.0
                last[token] = t
        return CausalLMOutputWithPast(logits=logits)


def pairs_of(model, distances=DISTANCES, examples=11, seed=3):
    return recall.associative_recall(model, TEXT.reshape(10, 31), [], distances, examples, seed)


def passages_of(model, distances=DISTANCES, examples=11, seed=3):
    return recall.repeated_passages(model, TEXT.reshape(10, 31), distances, examples, seed)


def test_a_model_that_copies_recalls_everything():
    pairs, passages = pairs_of(Oracle()), passages_of(Oracle())
    assert [row.distance for row in pairs] == [row.distance for row in passages] == DISTANCES
    assert sum(row.queries for row in pairs) == 11 * (76 // 4)
    for row in pairs:
        assert row.top_1 == row.among == 1
        assert row.log_probability == pytest.approx(0, abs=1e-6)
        assert row.gain == pytest.approx(40, rel=1e-6)  # the oracle's logit for what followed; 0 for all else
    for row in passages:
        assert row.second_top_1 == 1 and row.first_top_1 == 0 and row.tokens == 11 * 15
        assert row.first_loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
        assert row.gain == pytest.approx(row.first_loss, rel=1e-6)


def test_a_model_that_knows_nothing_is_at_chance():
    for row in pairs_of(Oracle(window=0)):
        assert row.top_1 == 0 and row.gain == pytest.approx(0, abs=1e-6)
        assert row.log_probability == pytest.approx(-math.log(VOCABULARY), rel=1e-6)
    overall = pairs_of(Oracle(window=0), distances=[76])
    # Where all are alike the first is named: right once in each sequence.
    assert overall[0].queries == 11 * 19 and overall[0].among == pytest.approx(1 / 19)
    for row in passages_of(Oracle(window=0)):
        assert row.first_loss == row.second_loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
        assert row.second_top_1 == row.gain == 0


@pytest.mark.parametrize("furthest", DISTANCES[:3])
def test_a_window_forgets_what_lies_further_back(furthest):
    """A token `furthest` back is seen in a window of one more."""
    model = Oracle(window=furthest + 1)
    for row in pairs_of(model):
        assert row.top_1 == (1 if row.distance <= furthest else 0), row
        assert (abs(row.gain) < 1e-6) == (row.distance > furthest), row
    for row in passages_of(model):
        assert row.second_top_1 == (1 if row.distance <= furthest else 0), row
    # One token less, and the passage that far back is out of sight.
    assert [row.second_top_1 for row in passages_of(Oracle(window=furthest), distances=[furthest])] == [0]


def test_sequences_follow_from_the_seed(monkeypatch):
    for measured in (pairs_of, passages_of):
        model = Noise()
        first = [astuple(row) for row in measured(model)]
        assert first == [astuple(row) for row in measured(model)]
        assert first != [astuple(row) for row in measured(model, seed=4)]
        with monkeypatch.context() as patch:
            patch.setattr(recall, "BATCH_TOKENS", 150)  # one or two sequences at once
            for row, other in zip(first, measured(model), strict=True):
                assert astuple(other) == pytest.approx(row, rel=1e-6)


def test_a_model_of_two_tokens_gains_nothing():
    """After the same token it says the same, whatever was before: at both readings of a passage."""
    model = Noise()
    log_p = model.table.detach().log_softmax(-1).numpy()
    _, passages = recall._passages(TEXT, max(DISTANCES), 11, 3)
    expected = -np.mean([log_p[before, token] for row in passages for before, token in zip(row, row[1:], strict=False)])
    for row in passages_of(model):
        assert row.first_loss == pytest.approx(expected, rel=1e-6)
        assert row.second_loss == pytest.approx(expected, rel=1e-6)


class Bag(Oracle):
    """Every token read so far alike, and all others much less: it knows what occurred, and nothing of the order."""

    def forward(self, input_ids, use_cache):
        read = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, ids in enumerate(input_ids.tolist()):
            for t, token in enumerate(ids):
                read[row, t:, token] = 9.0
        return CausalLMOutputWithPast(logits=read)


def test_what_occurred_in_no_order_is_no_recall_of_pairs():
    for row in pairs_of(Bag()):
        assert row.gain == pytest.approx(0, abs=1e-6)
    assert all(row.gain > 1 for row in passages_of(Bag())), "of passages it cannot be told apart, and the text says so"


class Noise(nn.Module):
    """Different logits after each token, whatever was before."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2)))

    def forward(self, input_ids, use_cache):
        return CausalLMOutputWithPast(logits=self.table[input_ids])


def test_pairs_are_of_frequent_ordinary_tokens():
    text = np.concatenate([np.repeat(np.arange(80), 3), np.arange(80, 310)])
    special = [4, 7]
    drawn, order = recall._pair_sequences(recall._frequent_tokens(text, special, 8), 8, 29, 0)
    assert set(drawn.ravel()) == set(range(66)) - set(special)  # 8 for each pair, all of which occur in 29 sequences
    for ids, places in zip(drawn, order, strict=True):
        shown, asked = ids.reshape(2, 8, 2)
        assert len(set(shown.ravel())) == 16 and (asked == shown[places]).all()
    assert any((places != np.arange(8)).any() for places in order)


def test_passages_and_what_is_between_are_different_places():
    other, passages = recall._passages(TEXT, 76, 400, 0)
    assert other.shape == (400, 32 + 76 - 16) and passages.shape == (400, 16)
    assert all(not set(before) & set(passage) for before, passage in zip(other, passages, strict=True))
    assert len({passage[0] for passage in passages}) > 200
    follows = dict(zip(TEXT, np.roll(TEXT, -1), strict=True))
    assert all(follows[a] == b for row in (*other, *passages) for a, b in zip(row, row[1:], strict=False))


def test_a_bin_without_queries_has_no_row():
    """Distances between a key and its return are even."""
    assert [row.distance for row in pairs_of(Oracle(), distances=[16, 17, 40])] == [16, 40]


def test_recall_command(finished, workshop, tmp_path):
    lines = (workshop / "text.jsonl").read_text().splitlines()[:3]
    (tmp_path / "text.txt").write_text("\n".join(json.loads(line)["text"] for line in lines))
    words = ["eval/recall.py", workshop / "teacher", finished / "recurrence", "--text", tmp_path / "text.txt"]
    done = command(*words, "--context-length", 70, "--distances", 64, 19, "--examples", 5)
    assert done.returncode == 0, done.stderr
    assert "distances 64: left out" in done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    for found in (first, second):
        assert [row["distance"] for row in found["pairs"]] == [row["distance"] for row in found["passages"]] == [19]
    assert first["pairs_shown"] == 4 and first["passages"] != second["passages"]
    for change, message in {
        ("--text", tmp_path / "nothing.txt"): "nothing.txt cannot be read",
        ("--distances", 7): "found a distance of 7; expected 16 or more",
        ("--examples", 0): "found 0 examples",
        # The shorter of 63 (the teacher's positions) and 48 (the student's training examples).
        (): "found a context of 48 tokens; expected 64 or more",
    }.items():
        done = command(*words, *change)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("recall: error:") and message in done.stderr


@pytest.fixture(scope="module")
def compared(workshop, tmp_path_factory):
    """Three small runs: two seeds of one configuration, and one that keeps a layer."""
    folder = tmp_path_factory.mktemp("compared")
    shared = ["data.context_length=80", "training.tracker=none", "baseline=null", "report=null"]
    for name, changes in {
        "first": [],
        "second": ["seed=1"],
        "kept": ["student.mixer=hyena", "student.attention_layers=[1]", "student.attention_window=21"],
    }.items():
        scavenger(workshop / "recipe.yaml", f"run_dir={folder}/{name}", *shared, *changes)
    return folder


def test_mixers_command(compared, tmp_path):
    folders = [compared / name for name in ("first", "kept", "second")]
    tolerance = load_recipe(str(folders[0] / "recipe.yaml")).recurrence.tolerance
    words = ["--tolerances", tolerance, 0.6, "--state-bytes", 12_000, "--output", tmp_path / "mixers.md"]
    done = command("eval/mixers.py", *folders, *words)
    assert done.returncode == 0, done.stderr
    *tables, last = done.stdout.splitlines()
    page = (tmp_path / "mixers.md").read_text()
    assert tables[5] == "" and len(tables) == 5 + 1 + 2 + 6
    assert "\n".join(tables[:5]) in page and "\n".join(tables[6:]) in page
    found = json.loads(last)
    seeds, kept = found["students"]
    for row in (seeds, kept):
        own, loose, within = row["reduced"]
        assert within["state_bytes"] <= within["state_bytes_asked"] == 12_000
        first = row["runs"][0]
        ratio = first["recurrent"]["validation"] / first["distilled"]["validation"]
        assert own["ratio"] == pytest.approx(ratio, rel=1e-5) and own["state_bytes"] == first["state_bytes"]
        assert loose["state_bytes"] < own["state_bytes"] and loose["divergence"] > own["divergence"]
    filters = "; filter_width 8; position_features 5; sine_frequency 2.0"
    assert seeds["mixer"] == "multihyena, 5 filters of 6 channels" + filters and [
        run["seed"] for run in seeds["runs"]
    ] == [0, 1]
    assert kept["mixer"] == "hyena, layer 1 kept, window 21" + filters and len(kept["runs"]) == 1
    # Ten steps of four sequences of 80 tokens, twice.
    assert seeds["tokens_seen"] == 2 * 10 * 4 * 80
    assert [text["seed"] for text in found["teacher"]["texts"]] == [0, 1]  # another seed, other held-out text
    for run, text, folder in zip(
        [*seeds["runs"], *kept["runs"]],
        [*found["teacher"]["texts"], found["teacher"]["texts"][0]],
        [compared / "first", compared / "second", compared / "kept"],
        strict=True,
    ):
        model = HyenaNeoXForCausalLM.from_pretrained(folder / "recurrence", dtype=torch.float32)
        for split in ("test", "validation"):
            expected = measure.held_out(model, data.blocks(folder / "data", split)).perplexity
            assert run["recurrent"][split] == pytest.approx(expected, rel=1e-5)
            assert run["recurrent"][f"{split}_ratio"] == pytest.approx(expected / text[split], rel=1e-5)
        assert (run["break_even"] - 1) * 2 * 3 * 30 * 4 < run["state_bytes"] <= run["break_even"] * 2 * 3 * 30 * 4
        assert 0 <= run["pairs"] <= 1 and 0 <= run["agreement"] <= 1
    mean = (seeds["runs"][0]["distilled"]["test"] + seeds["runs"][1]["distilled"]["test"]) / 2
    half = abs(seeds["runs"][0]["distilled"]["test"] - mean)
    assert f"{mean:.3f} ± {math.sqrt(2) * half:.3f} (" in tables[3]  # the standard deviation of two
    assert "±" not in tables[4]


def test_mixers_command_refuses_what_cannot_be_compared(compared, finished, tmp_path):
    for folders, message in {
        (compared / "first", finished): "found another data than in",
        (compared / "first", compared / "first"): "found the configuration and the seed (0) of",
        (tmp_path,): "found no recipe.yaml; expected the folder of a run that is finished",
    }.items():
        done = command("eval/mixers.py", *folders, "--output", tmp_path / "mixers.md")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("mixers: error:") and message in done.stderr
    done = command("eval/mixers.py", compared / "first", "--output", tmp_path / "nowhere" / "mixers.md")
    assert done.returncode == 2 and "nowhere is no folder" in done.stderr and not list(tmp_path.iterdir())
