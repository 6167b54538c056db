"""Recall and the comparison of mixers: models whose recall is known, and the commands on small runs."""

import json
import math
import re
import runpy
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command, scavenger, shared
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from scavenger import data, measure
from scavenger.model import HyenaForCausalLM
from scavenger.recipe import load_recipe
from scavenger.report import retrieval
from scavenger.report.evaluated import Evaluated


VOCABULARY = 311
DISTANCES = [17, 23, 40, 76]
# Each token but 0 once, so that a token has one place; 0 is what a model that knows nothing names first.
TEXT = np.random.default_rng(5).permutation(np.arange(1, VOCABULARY))


class Logits(nn.Module):
    """A language model without a head of its own."""

    @property
    def base_model(self):
        return self

    def get_output_embeddings(self):
        return None


class Oracle(Logits):
    """What followed the last `match` tokens where they last occurred in the last `window`; else every token alike."""

    def __init__(self, window=10_000, match=1):
        super().__init__()
        self.window, self.match, self.read = window, match, []
        self.place = nn.Parameter(torch.zeros(()))

    def logits(self, ids):
        logits, last = torch.zeros(len(ids), VOCABULARY), {}
        for t in range(self.match - 1, len(ids)):
            piece = tuple(ids[t - self.match + 1 : t + 1])
            if piece in last and t - last[piece] < self.window:
                logits[t, ids[last[piece] + 1]] = 40.0
            last[piece] = t
        return logits

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        if input_ids.shape[1] > measure.COMPARED:
            self.read += input_ids.tolist()
        return CausalLMOutputWithPast(logits=torch.stack([self.logits(ids) for ids in input_ids.tolist()]))


class Forgetful(Oracle):
    """An oracle that only follows tokens whose number three does not divide."""

    def logits(self, ids):
        logits = super().logits(ids)
        logits[[token % 3 == 0 for token in ids]] = 0.0
        return logits


class Bag(Oracle):
    """Every token read so far alike, and all others much less: it knows what occurred, and nothing of the order."""

    def logits(self, ids):
        read = torch.zeros(len(ids), VOCABULARY)
        for t, token in enumerate(ids):
            read[t:, token] = 9.0
        return read


class Noise(Logits):
    """Different logits after each token, whatever was before."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2)))

    def forward(self, input_ids, use_cache):
        return CausalLMOutputWithPast(logits=self.table[input_ids])


def pairs_of(model, distances=DISTANCES, examples=11, seed=3):
    return retrieval.associative_recall(model, TEXT.reshape(10, 31), [], distances, examples, seed)


def copies_of(model, distances=DISTANCES, examples=11, seed=3):
    return retrieval.copying(model, TEXT.reshape(10, 31), [], distances, examples, seed)


def keys_of(model, distances=DISTANCES, examples=11, seed=3):
    return retrieval.passkeys(model, TEXT.reshape(10, 31), [], distances, examples, seed)


def passages_of(model, distances=DISTANCES, examples=11, seed=3):
    return retrieval.repeated_passages(model, TEXT.reshape(10, 31), distances, examples, seed)


def needles_of(model, distances=DISTANCES, examples=11, seed=3):
    return retrieval.needles(model, TEXT.reshape(10, 31), distances, examples, seed)


PARTS = {
    "pairs": pairs_of,
    "copying": copies_of,
    "passkey": keys_of,
    "needle": needles_of,
    "passages": passages_of,
}


def value(found, name):
    """A metric by its name."""
    (metric,) = [metric for metric in found if metric.name == name]
    return sum(metric.numerators) / sum(metric.denominators)


def curve(found, group):
    """Values of a group by distance."""
    return {int(metric.x): value([metric], metric.name) for metric in found if metric.group == group}


def test_a_model_that_copies_recalls_everything():
    pairs, copies, passages, needles = (of(Oracle()) for of in (pairs_of, copies_of, passages_of, needles_of))
    keys = keys_of(Oracle(match=2))
    for group, found in {"pairs": pairs, "copying": copies, "passkey": keys, "needle": needles}.items():
        assert curve(found, group) == dict.fromkeys(DISTANCES, 1.0), group
    for name, found in {
        "recall of pairs": pairs,
        "recall of pairs among all tokens": pairs,
        "copying": copies,
        "passkey": keys,
        "passkey tokens": keys,
        "needle": needles,
        "right tokens after a needle": needles,
        "right tokens of passages read again": passages,
    }.items():
        assert value(found, name) == 1, name
    # The oracle's logit for what followed; 0 for all else.
    assert curve(pairs, "pairs gain") == pytest.approx(dict.fromkeys(DISTANCES, 40), rel=1e-6)
    every = math.log(VOCABULARY)
    assert value(passages, "loss of passages read first") == pytest.approx(every, rel=1e-6)
    assert value(passages, "loss of passages read again") == pytest.approx(0, abs=1e-6)
    for group, found in {"passages": passages, "copying gain": copies}.items():
        assert curve(found, group) == pytest.approx(dict.fromkeys(DISTANCES, every), rel=1e-6), group
    # Where another needle was shown, three tokens of the continuation follow tokens that were not read before either.
    assert value(needles, "right tokens after another needle") == 0
    assert curve(needles, "needle gain") == pytest.approx(dict.fromkeys(DISTANCES, every), rel=1e-6)
    # Of another key's two tokens it is sure that the first comes, and after that knows nothing.
    assert curve(keys, "passkey gain") == pytest.approx(dict.fromkeys(DISTANCES, (40 + every) / 2), rel=1e-6)


def test_a_model_that_knows_nothing_is_at_chance():
    pairs, copies, keys, needles, passages = (measured(Oracle(window=0)) for measured in PARTS.values())
    for name, found in {
        "recall of pairs among all tokens": pairs,
        "gain of pairs": pairs,
        "copying": copies,
        "gain of copying": copies,
        "passkey": keys,
        "passkey tokens": keys,
        "gain of passkey": keys,
        "needle": needles,
        "gain of needle": needles,
        "gain on repeated passages": passages,
        "right tokens of passages read again": passages,
    }.items():
        assert value(found, name) == pytest.approx(0, abs=1e-6), name
    assert value(passages, "loss of passages read again") == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    # Where all are alike the first is named: right once in each sequence.
    assert value(pairs, "recall of pairs") == pytest.approx(1 / 19)
    assert [sum(m.denominators) for m in pairs if m.name == "recall of pairs"] == [11 * 19]


@pytest.mark.parametrize("furthest", DISTANCES[:3])
def test_a_window_forgets_what_lies_further_back(furthest):
    """A token `furthest` back is seen in a window of one more."""
    seen = {distance: float(distance <= furthest) for distance in DISTANCES}
    model = Oracle(window=furthest + 1)
    assert curve(copies_of(model), "copying") == seen
    assert curve(keys_of(Oracle(window=furthest + 1, match=2)), "passkey") == seen
    assert curve(needles_of(model), "needle") == seen
    pairs, passages = curve(pairs_of(model), "pairs gain"), curve(passages_of(model), "passages")
    for distance in DISTANCES:
        assert pairs[distance] == pytest.approx(40 * seen[distance], abs=1e-4)
        assert passages[distance] == pytest.approx(math.log(VOCABULARY) * seen[distance], abs=1e-4)
    # One token less, and what lies that far back is out of sight.
    for group, measured in PARTS.items():
        if group != "pairs":
            model = Oracle(window=furthest, match=2 if group == "passkey" else 1)
            assert curve(measured(model, [furthest]), group)[furthest] == pytest.approx(0, abs=1e-6), group


def test_a_whole_key_is_what_greedy_decoding_writes():
    model = Forgetful(match=2)
    found = keys_of(model, [40], examples=29)
    (whole,) = [metric.numerators for metric in found if metric.name == "passkey at 40"]
    shown = model.read[:29]  # before the controls
    for ids, right in zip(shown, whole, strict=True):
        written = ids[: -retrieval.KEY]
        for _ in range(retrieval.KEY):
            written = [*written, int(model.logits(written)[-1].argmax())]
        assert right == (written == ids)
    assert 0 < sum(whole) < 29 and 0 < value(found, "passkey") < value(found, "passkey tokens") < 1


def test_keys_lie_behind_a_marker_at_their_distance():
    model = Oracle(match=2)
    keys_of(model, [40], examples=7)
    shown, controls = np.array(model.read).reshape(2, 7, -1)
    assert shown.shape[1] == 32 + 40 + 4 + 2
    assert (shown[:, 32:38] == shown[:, -6:]).all() and (controls[:, 32:36] == controls[:, -6:-2]).all()
    assert ((shown == controls).all(0) == [not 36 <= place < 38 for place in range(78)]).all()
    assert (shown[:, 36:38] != controls[:, 36:38]).all()
    follows = dict(zip(TEXT, np.roll(TEXT, -1), strict=True))
    for ids in shown:
        text = [*ids[:32], *ids[38:-6]]
        assert all(follows[a] == b for a, b in zip(text, text[1:], strict=False))
    assert len({tuple(ids) for ids in shown[:, 32:36]}) == 7, "each sequence has a marker of its own"


def test_losses_of_a_copy_are_those_of_a_plain_loop():
    model = Forgetful()
    found = copies_of(model, [17, 40], examples=5)
    gains, right = [], []
    for ids in model.read:
        count = len(ids) // 2
        assert ids[:count] == ids[count:] and len(set(ids)) == count
        loss = F.cross_entropy(model.logits(ids)[:-1], torch.tensor(ids[1:]), reduction="none")
        gains.append((loss[: count - 1] - loss[count:]).mean().item())
        right.append(np.mean([ids[t + 1] == int(model.logits(ids)[t].argmax()) for t in range(count, len(ids) - 1)]))
    for name, expected in {"gain of copying": gains, "copying": right}.items():
        assert value(found, f"{name} at 17") == pytest.approx(np.mean(expected[:5]), rel=1e-6)
        assert value(found, f"{name} at 40") == pytest.approx(np.mean(expected[5:]), rel=1e-6)
        assert value(found, name) == pytest.approx(np.mean(expected), rel=1e-6)
    assert 0.3 < value(found, "copying") < 0.9
    assert model.read[0][:17] == model.read[5][:17], "a shorter sequence begins as a longer one"


def test_sequences_follow_from_the_seed(monkeypatch):
    for group, measured in PARTS.items():
        model = Forgetful(match=2 if group == "passkey" else 1)
        first = [metric.numerators for metric in measured(model)]
        assert first == [metric.numerators for metric in measured(model)]
        assert first != [metric.numerators for metric in measured(model, seed=4)]
        with monkeypatch.context() as patch:
            patch.setattr(measure, "BATCH_TOKENS", 150)  # one or two sequences at once
            for numerators, metric in zip(first, measured(model), strict=True):
                assert metric.numerators == pytest.approx(numerators, rel=1e-6, abs=1e-6)


def test_a_model_of_two_tokens_gains_nothing():
    """After the same token it says the same, whatever was before: at both readings, and of any key."""
    model = Noise()
    log_p = model.table.detach().log_softmax(-1).numpy()
    _, passages = retrieval._passages(TEXT, 32 + max(DISTANCES) - 16, 11, 3)
    expected = -np.mean([log_p[before, token] for row in passages for before, token in zip(row, row[1:], strict=False)])
    found = passages_of(model)
    for reading in ("first", "again"):
        assert value(found, f"loss of passages read {reading}") == pytest.approx(expected, rel=1e-6)
    assert value(copies_of(model), "gain of copying") == pytest.approx(0, abs=1e-6)
    assert value(keys_of(model), "gain of passkey") == pytest.approx(0, abs=1e-6)
    assert value(needles_of(model), "gain of needle") == pytest.approx(0, abs=1e-6)


def test_what_occurred_in_no_order_is_no_recall_of_pairs():
    assert curve(pairs_of(Bag()), "pairs gain") == pytest.approx(dict.fromkeys(DISTANCES, 0), abs=1e-6)
    copies, keys, passages = copies_of(Bag()), keys_of(Bag()), passages_of(Bag())
    assert value(copies, "copying") < 0.1 and value(keys, "passkey") == 0
    for found, group in ((copies, "copying gain"), (keys, "passkey gain"), (passages, "passages")):
        assert min(curve(found, group).values()) > 1, "here it cannot be told apart, and the text says so"


def test_pairs_are_of_frequent_ordinary_tokens():
    text = np.concatenate([np.repeat(np.arange(80), 3), np.arange(80, 310)])
    special = [4, 7]
    drawn, order = retrieval._pair_sequences(retrieval._frequent_tokens(text, special, [33]), 8, 29, 0)
    assert set(drawn.ravel()) == set(range(66)) - set(special)  # 8 for each pair, all of which occur in 29 sequences
    for ids, places in zip(drawn, order, strict=True):
        shown, asked = ids.reshape(2, 8, 2)
        assert len(set(shown.ravel())) == 16 and (asked == shown[places]).all()
    assert any((places != np.arange(8)).any() for places in order)


def test_passages_and_what_is_between_are_different_places():
    other, passages = retrieval._passages(TEXT, 92, 400, 0)
    assert other.shape == (400, 92) and passages.shape == (400, 16)
    assert all(not set(before) & set(passage) for before, passage in zip(other, passages, strict=True))
    assert len({passage[0] for passage in passages}) > 200
    follows = dict(zip(TEXT, np.roll(TEXT, -1), strict=True))
    assert all(follows[a] == b for row in (*other, *passages) for a, b in zip(row, row[1:], strict=False))


def test_needles_are_given_again_at_their_distance():
    model = Oracle()
    needles_of(model, [40], examples=7)
    shown, controls = np.array(model.read).reshape(2, 7, -1)
    assert shown.shape[1] == 32 + 40 + 12
    assert (shown[:, 32:44] == shown[:, -12:]).all()
    assert ((shown == controls).all(0) == [not 32 <= place < 44 for place in range(84)]).all()
    follows = dict(zip(TEXT, np.roll(TEXT, -1), strict=True))
    for ids in (*shown, *controls):
        assert len(set(ids[:72])) == 72, "nothing but the needle is read twice"
        for part in ([*ids[:32], *ids[44:72]], ids[32:44], ids[72:]):
            assert all(follows[a] == b for a, b in zip(part, part[1:], strict=False))


def test_the_first_tokens_of_a_needle_occur_once_where_the_text_allows():
    """A third of the text is one passage over and over."""
    text = np.concatenate([np.tile(np.arange(1, 14), 8), TEXT[:210]])
    other, needles, another = retrieval._needles(text, 92, 200, 0)
    windows = np.lib.stride_tricks.sliding_window_view(other, retrieval.PREFIX, axis=1)
    again = (windows == needles[:, None, : retrieval.PREFIX]).all(-1).any(1)
    assert again.mean() < 0.01 < (windows == another[:, None, : retrieval.PREFIX]).all(-1).any(1).mean()
    with pytest.raises(ValueError, match="the text has 127 tokens; expected 128 or more"):
        retrieval._needles(TEXT[:127], 92, 3, 0)
    assert len(retrieval._needles(TEXT[:128], 92, 3, 0)[1]) == 3


class Window(Logits):
    """One layer of softmax attention over the last `window` tokens, and no other memory."""

    def __init__(self, window):
        super().__init__()
        torch.manual_seed(1)
        self.window, self.embedding = window, nn.Embedding(VOCABULARY, 24)

    def forward(self, input_ids, use_cache):
        x = self.embedding(input_ids) / 3
        place = torch.arange(input_ids.shape[1])
        back = place[:, None] - place
        scores = (x @ x.mT).masked_fill((back < 0) | (back >= self.window), -math.inf)
        return CausalLMOutputWithPast(logits=scores.softmax(-1) @ x @ self.embedding.weight.T)


def test_a_window_without_other_memory_gains_nothing_beyond_it():
    """The last prediction after a needle is PREFIX + 3 tokens into it, and sees its end 36 tokens before at 40."""
    seen, unseen = (curve(needles_of(Window(window)), "needle gain") for window in (37, 36))
    assert min(abs(seen[distance]) for distance in (17, 23, 40)) > 1e-4
    assert seen[76] == pytest.approx(0, abs=1e-6) == unseen[76] == unseen[40]


def split_slowly(ids):
    """For each token of one context, the distance to the trigram that it completes again, or 0."""
    found, last = [0, 0], {}
    for t in range(2, len(ids)):
        bigram = tuple(ids[t - 2 : t])
        s = last.get(bigram)
        found.append(t - s if s is not None and ids[s] == ids[t] else 0)
        last[bigram] = t
    return found


@pytest.mark.parametrize(("contexts", "length", "vocabulary"), [(7, 53, 3), (3, 40, 9), (1, 3, 1), (2, 1, 4)])
def test_repeats_are_those_of_a_plain_loop(contexts, length, vocabulary):
    ids = np.random.default_rng(length).integers(vocabulary, size=(contexts, length))
    assert retrieval.repeats(ids).tolist() == [split_slowly(row)[:length] for row in ids.tolist()]


def test_the_split_has_every_predicted_token_once():
    """Of text with documents of different lengths, and a remainder shorter than a context, which is not read."""
    stream = np.random.default_rng(8).integers(1, 6, size=5 * 70 + 19)
    beginnings = [0, 33, 180, 207]
    stream[beginnings] = 0
    model = Noise()
    found = retrieval.loss_of_repeats(model, stream, 0, 70)
    ids = stream[:350].reshape(5, 70)
    loss = F.cross_entropy(model.table[torch.tensor(ids[:, :-1])].mT, torch.tensor(ids[:, 1:]), reduction="none")
    sums = {metric.name: [0.0] * 5 for metric in found}  # item 0: what is before the first beginning
    counts = {metric.name: [0] * 5 for metric in found}
    ends = {(0, 16): "1–16", (16, 32): "17–32", (32, 64): "33–64", (64, 70): "65–70"}
    for row, own in enumerate(ids.tolist()):
        for t, distance in list(enumerate(split_slowly(own)))[1:]:
            document = sum(start <= 70 * row + t for start in beginnings)
            names = ["loss of repeated trigrams" if distance else retrieval.OTHERS]
            for (low, high), name in ends.items():
                names += [f"loss of trigrams repeated within {name}"] if low < distance <= high else []
            for name in names:
                sums[name][document] += loss[row, t - 1].item()
                counts[name][document] += 1
    for metric in found:
        assert metric.numerators == pytest.approx(sums[metric.name], rel=1e-6), metric.name
        assert metric.denominators == counts[metric.name], metric.name
    tokens = {metric.name: sum(metric.denominators) for metric in found}
    assert tokens["loss of repeated trigrams"] + tokens[retrieval.OTHERS] == 5 * 69
    assert sum(sum(m.denominators) for m in found if m.group) == tokens["loss of repeated trigrams"]
    assert [metric.x for metric in found if metric.group] == [16, 32, 64, 70][: len(found) - 2]


def test_what_is_split_is_limited(monkeypatch):
    monkeypatch.setattr(retrieval, "SPLIT_TOKENS", 200)
    found = retrieval.loss_of_repeats(Noise(), TEXT, 0, 60)
    assert sum(sum(metric.denominators) for metric in found if not metric.group) == 3 * 59
    found = retrieval.loss_of_repeats(Noise(), TEXT[:41], 0, 60)  # shorter than a context
    assert [sum(metric.denominators) for metric in found] == [40] and found[0].name == retrieval.OTHERS


def test_a_bin_without_queries_has_no_metric():
    """Distances between a key and its return are even."""
    assert list(curve(pairs_of(Oracle(), distances=[16, 17, 40]), "pairs")) == [16, 40]


@pytest.mark.parametrize(
    ("context", "inside", "beyond"),
    [
        (64, [16], [32, 64, 128, 256]),
        (79, [16, 31], [32, 64, 128, 256]),
        (80, [16, 32], [64, 128, 256]),
        (255, [16, 32, 64, 128, 207], [256, 512]),
        (256, [16, 32, 64, 128, 208], [256, 512, 1024]),
    ],
)
def test_distances_double_to_four_contexts(context, inside, beyond):
    settings = retrieval.settings_for([], context_length=context)
    assert settings.of_text == inside and settings.beyond_context == beyond
    assert list(settings.distances) == inside + beyond and settings.beyond_window == []
    assert settings.of_tokens == [distance for distance in inside if 2 * distance <= context]
    asked = retrieval.settings_for([], [4 * context + 1, 31, 16], context)
    assert asked.distances == (16, 31) and asked.of_tokens == ([16] if context == 64 else [16, 31])


def test_distances_are_what_all_models_can_read(capsys):
    def model(label, longest):
        return SimpleNamespace(attention_window=None, training_context=256, longest=longest, label=label)

    settings = retrieval.settings_for([model("other", None), model("table", 600)])
    assert settings.beyond_context == [256, 512] and settings.context_length == 256
    assert "table has positions for 600 tokens, all models read no more" in capsys.readouterr().err
    settings = retrieval.settings_for([model("table", 100)])
    assert settings.distances == (16, 32, 52) and settings.context_length == 100 and settings.beyond_context == []


@pytest.mark.parametrize(
    ("windows", "beyond"),
    [
        ((None, 128), [208]),
        ((20, 100), [128, 208]),
        ((None, 255), []),
        ((None, 208), []),
        ((0, None), []),
        ((0, 31), [32, 64, 128, 208]),
    ],
)
def test_distances_beyond_every_window(windows, beyond):
    """0, the whole context, is no window."""
    models = [
        SimpleNamespace(attention_window=window, training_context=256, longest=None, label="any") for window in windows
    ]
    settings = retrieval.settings_for(models)
    assert settings.beyond_window == beyond and settings.window == (max(filter(None, windows), default=None))


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        ((32, 16), "expected [16, 32]"),
        ((16, 16), "expected [16]"),
        ((16, 400), "expected [16]"),
        ((80,), "160 or"),
    ],
)
def test_settings_are_in_order_and_within_four_contexts(distances, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        retrieval.Settings(distances, 96)


class Stood(SimpleNamespace):
    """A model as `run` takes it."""

    def __init__(self, model, window=None):
        tokenizer = SimpleNamespace(all_special_ids=[], bos_token_id=None, eos_token_id=0)
        super().__init__(model=model, tokenizer=tokenizer, attention_window=window)


def measured(model, settings, stream=TEXT):
    """What `run` finds, and its metrics by name as means."""
    found = retrieval.run(model, stream, settings)
    means = {
        metric["name"]: (sum(metric["numerators"]) / sum(metric["denominators"]), len(metric["numerators"]))
        for metric in found["metrics"]
    }
    return found, means


def test_what_lies_beyond_the_context_is_in_no_mean():
    near, both = (
        measured(Stood(Oracle()), retrieval.Settings(distances, 80, examples=19))[1]
        for distances in ((16, 32), (16, 32, 40, 70))
    )
    assert {name: both[name] for name in near} == near
    kinds = ("needle", "gain of needle", "passages", "loss of passages read again")
    assert both.keys() - near.keys() == {f"{kind} at {distance}" for kind in kinds for distance in (40, 70)}
    assert {both[f"{kind} at 70"][1] for kind in kinds} == {16} and both["passages at 32"][1] == 19


def test_the_gain_beyond_the_window_is_a_mean_of_its_own():
    name, every = "gain on repeated passages beyond the window", math.log(VOCABULARY)
    settings = retrieval.Settings((16, 32, 64, 128), 120, examples=5, window=31)
    found, means = measured(Stood(Oracle(window=64), 31), settings)
    assert found["beyond_window"] == [32, 64, 128] and found["attention_window"] == 31
    assert means[name] == pytest.approx((every / 2, 5), rel=1e-6), "64 tokens back are out of sight, 128 not averaged"
    assert means["gain on repeated passages"] == pytest.approx((2 / 3 * every, 5), rel=1e-6)
    for window in (None, 64):
        assert name not in measured(Stood(Oracle()), replace(settings, window=window))[1]


def test_tokens_read_are_those_that_a_model_reads():
    settings = retrieval.Settings((16, 32, 45, 64, 128), 96, examples=19)
    assert settings.of_tokens == [16, 32, 45] and settings.beyond_context == [64, 128]
    for text in (TEXT, TEXT[:101], TEXT[:119], TEXT[:120], TEXT[:184]):
        model = Oracle()
        retrieval.run(Stood(model), text, settings)
        assert sum(map(len, model.read)) == retrieval.tokens_read(settings, len(text)), len(text)


def test_result_has_every_part_and_its_chance(workshop):
    model = Evaluated.parsed(f"teacher={workshop / 'teacher'}")
    stream = np.tile(np.arange(320), 9)
    settings = retrieval.settings_for([model], [16, 40], context_length=100, examples=3)  # past its 63 positions
    found = retrieval.run(model, stream, settings)
    described = {"distances": (16, 40), "context_length": 100, "examples": 3, "seed": 0, "window": None}
    assert retrieval.described(settings) == described
    headlines = [metric["name"] for metric in found["metrics"] if metric.get("headline")]
    losses = ["loss of repeated trigrams", "loss of other tokens"]
    assert headlines == ["recall of pairs", "copying", "passkey", "needle", "gain on repeated passages", *losses[1:]]
    assert found["pairs_shown"] == 10 and found["tokens_drawn_from"] == 80
    chance = {"pairs": 1 / 10, "copying": 1 / 80, "passkey": 1 / 6400, "passkey tokens": 1 / 80}
    gains = dict.fromkeys(("pairs gain", "copying gain", "passkey gain", "needle", "needle gain", "passages"), 0)
    assert found["chance"] == pytest.approx(chance | gains)
    groups = {metric["group"]: metric["x"] for metric in found["metrics"] if "group" in metric}
    assert groups == dict.fromkeys([*found["chance"], "passages loss"], 40.0)
    assert {len(metric["numerators"]) for metric in found["metrics"] if metric["name"] not in losses} == {3}


def test_recall_command(finished, workshop, tmp_path, monkeypatch, capsys):
    lines = (workshop / "text.jsonl").read_text().splitlines()[:3]
    (tmp_path / "text.txt").write_text("\n".join(json.loads(line)["text"] for line in lines))
    words = ["eval/recall.py", workshop / "teacher", finished / "recurrence", "--split", "all"]
    words += ["--text", tmp_path / "text.txt"]
    longer = ["--context-length", 70, "--distances", 64, 19, 281]
    done = command(*words, *longer, "--examples", 5)
    assert done.returncode == 0, done.stderr
    assert "too short for distances 64, which are read for passages and needles only" in done.stderr
    assert "too short for distances 281, which are left out" in done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first["settings"] == second["settings"] and first["settings"]["distances"] == [19, 64]
    for name in ("pairs at ≤ 19", "copying at 19", "passkey at 19", "needle at 19", "passages at 19", "passages at 64"):
        assert first["metrics"][name]["items"] == 5 and any(line.startswith(name) for line in done.stdout.splitlines())
    assert first["pairs_shown"] == 4 and first["metrics"] != second["metrics"]
    for change, message in {
        (*longer, "--text", tmp_path / "nothing.txt"): "nothing.txt is not there",
        ("--distances", 7): "found a distance of 7; expected 16 or more",
        (*longer, "--examples", 0): "--examples: found 0",
        # The shorter of 63 (the teacher's positions) and 48 (the student's training examples).
        (): "found a context of 48 tokens; expected 64 or more",
    }.items():
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*words, *change)])
        assert runpy.run_path(str(ROOT / words[0]))["main"]() == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("recall: error:") and message in lines[-1], lines


@pytest.fixture(scope="module")
def compared(workshop, tmp_path_factory):
    """Small runs: two seeds of one configuration, one that keeps a layer, a window and filters, and a window alone."""
    words = ["data.context_length=80", "training.tracker=none", "baseline=null", "report=null"]
    words += ["recurrence.max_state_size=12"]
    runs = {
        "first": [],
        "second": ["seed=1"],
        "kept": ["student.mixer=hyena", "student.attention_layers=[1]", "student.attention_window=21"],
        "both": ["student.window=9", "student.attention_heads=[L1H2]", "student.attention_window=21"],
        "window": ["student.window=9", "student.mixer=window", "recurrence=null"],
    }

    def make(folder):
        for name, changes in runs.items():
            scavenger(workshop / "recipe.yaml", f"run_dir={folder}/{name}", *words, *changes)

    return shared(tmp_path_factory, "mixers", make)


def test_mixers_command(compared, tmp_path):
    folders = [compared / name for name in ("first", "kept", "second", "both", "window")]
    tolerance = load_recipe(str(folders[0] / "recipe.yaml")).recurrence.tolerance
    words = ["--tolerances", tolerance, 0.6, "--state-bytes", 14_000, "--output", tmp_path / "mixers.md"]
    words += ["--figure", tmp_path / "mixers.png"]
    done = command("eval/mixers.py", *folders, *words)
    assert done.returncode == 0, done.stderr
    *tables, last = done.stdout.splitlines()
    page = (tmp_path / "mixers.md").read_text()
    quality, distances, controls, reduced = "\n".join(tables).split("\n\n")
    assert all(part in page for part in (quality, distances, controls, reduced))
    assert [len(part.splitlines()) for part in (quality, distances, controls, reduced)] == [7, 7, 3, 2 + 3 * 3]
    assert "![State against perplexity and recall](mixers.png)" in page and (tmp_path / "mixers.png").is_file()
    found = json.loads(last)
    seeds, kept, both, window = found["students"]
    assert found["recall"]["distances"] == [16, 32]
    for line, marked in zip(distances.splitlines()[2:], [0, 0, 1, 1, 2], strict=True):
        assert line.count("†") == marked, line  # without a window nothing is beyond it
    (facts,) = both["runs"]
    assert facts["widest_window"] == 21 and set(facts["controls"]) == {"filters", "window"}
    exact = HyenaForCausalLM.from_pretrained(compared / "both" / "transfer", dtype=torch.float32)
    with torch.no_grad():
        for layer in exact.model.layers:
            layer.mixer.join.bias.chunk(2)[1].fill_(-1e9)
    expected = measure.held_out(exact, data.blocks(compared / "both" / "data", "validation")).perplexity
    ratio = expected / found["teacher"]["texts"][0]["validation"]
    assert facts["controls"]["window"] == pytest.approx(ratio, rel=1e-5)
    assert window["reduced"] == [] and window["runs"][0]["distilled"]["test"] == window["runs"][0]["recurrent"]["test"]
    assert window["mixer"].startswith("window 9") and ", window 9, L1H2 kept, window 21" in both["mixer"]
    for row in (seeds, kept):
        own, loose, within = row["reduced"]
        assert within["state_bytes"] <= within["state_bytes_asked"] == 14_000
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
        model = HyenaForCausalLM.from_pretrained(folder / "recurrence", dtype=torch.float32)
        for split in ("test", "validation"):
            expected = measure.held_out(model, data.blocks(folder / "data", split)).perplexity
            assert run["recurrent"][split] == pytest.approx(expected, rel=1e-5)
            assert run["recurrent"][f"{split}_ratio"] == pytest.approx(expected / text[split], rel=1e-5)
        assert (run["break_even"] - 1) * 2 * 3 * 30 * 4 < run["state_bytes"] <= run["break_even"] * 2 * 3 * 30 * 4
        assert 0 <= run["pairs"] <= 1 and 0 <= run["agreement"] <= 1
    mean = (seeds["runs"][0]["distilled"]["test"] + seeds["runs"][1]["distilled"]["test"]) / 2
    half = abs(seeds["runs"][0]["distilled"]["test"] - mean)
    assert f"{mean:.3f} ± {math.sqrt(2) * half:.3f} (" in tables[3]  # the standard deviation of two
    assert not any("±" in line for line in tables[4:7])


def test_mixers_command_refuses_what_cannot_be_compared(compared, finished, tmp_path):
    for folders, message in {
        (compared / "first", finished): "found another data than in",
        (compared / "first", compared / "first"): "found the configuration and the seed (0) of",
        (tmp_path,): "found no recipe.yaml; expected the folder of a finished run",
    }.items():
        done = command("eval/mixers.py", *folders, "--output", tmp_path / "mixers.md")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("mixers: error:") and message in done.stderr
    done = command("eval/mixers.py", compared / "first", "--output", tmp_path / "nowhere" / "mixers.md")
    assert done.returncode == 2 and "nowhere is not a folder" in done.stderr and not list(tmp_path.iterdir())
