"""How models write beside a reference: each measure against a plain loop or by hand, and the command."""

import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, command, tiny_student, tiny_teacher
from torch.nn import functional as F

from scavenger import measure
from scavenger.report import continuation
from scavenger.report.evaluated import Evaluated
from scavenger.report.metrics import Metric


SETTINGS = continuation.Settings(prompts=5, prompt_tokens=7, new_tokens=11, top_k=9, seed=2)


def values(found, name):
    """A metric's value for each prompt."""
    (metric,) = [Metric(**metric) for metric in found if metric["name"] == name]
    return np.array(metric.numerators) / np.array(metric.denominators)


def tokens(*shape):
    return np.random.default_rng(4).integers(0, 97, shape)


def read_again(model, prompt, count):
    """Greedy decoding without any memory."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def trio(workshop, evaluated):
    """The teacher and its two students, and a text's tokens."""
    text = json.loads((workshop / "text.jsonl").read_text().splitlines()[50])["text"]
    stream = np.array(evaluated[0].tokenizer(text)["input_ids"])[:400]
    return evaluated, stream


@torch.no_grad()
def test_divergence_along_a_text_is_that_of_a_double_loop(monkeypatch):
    teacher, student = tiny_teacher(), tiny_student()
    prompts, text = tokens(3, 7), tokens(3, 5)
    monkeypatch.setattr(measure, "BATCH_TOKENS", 4 * 25)  # two sequences of twelve tokens at once
    divergence, same = continuation.along(student, teacher, prompts, text)
    assert divergence.shape == same.shape == (3, 5)
    nats = continuation.losses_of(student, prompts, text)
    agreed = set()
    for row in range(3):
        for place in range(5):
            read = torch.tensor([[*prompts[row], *text[row, :place]]])
            p, q = (model(input_ids=read, use_cache=False).logits[0, -1].softmax(-1) for model in (teacher, student))
            expected = sum(p[v].item() * (p[v].log() - q[v].log()).item() for v in range(97))
            assert divergence[row, place] == pytest.approx(expected, rel=1e-9)  # in float64, as the models are
            assert same[row, place] == (p.argmax() == q.argmax()).item()
            assert nats[row, place] == pytest.approx(-q[text[row, place]].log().item(), rel=1e-9)
            agreed.add(same[row, place])
    assert divergence.min() > 1e-3 and 0.0 in agreed


@torch.no_grad()
@pytest.mark.parametrize("modal", [False, True])
def test_greedy_continuations_are_those_of_a_loop_that_reads_everything_again(monkeypatch, modal):
    model, prompts = tiny_student(modal=modal), tokens(5, 7)
    monkeypatch.setattr(measure, "BATCH_TOKENS", 40)  # two prompts at once
    expected = [read_again(model, prompt, 11) for prompt in prompts]
    assert continuation.continuations(model, prompts, SETTINGS).tolist() == expected
    # No token ends it, and what the model's folder asks of generation is not asked here.
    model.generation_config.update(eos_token_id=expected[0][2], repetition_penalty=1.5, no_repeat_ngram_size=1)
    model.generation_config.update(suppress_tokens=[expected[0][0]], bad_words_ids=[[expected[1][0]]], min_p=0.5)
    own = model.generation_config
    assert continuation.continuations(model, prompts, SETTINGS).tolist() == expected
    assert model.generation_config is own


def test_samples_follow_from_the_seed_and_from_the_most_likely_tokens():
    model, prompts = tiny_teacher(), tokens(5, 7)
    state = torch.get_rng_state()
    first = continuation.continuations(model, prompts, SETTINGS, sampled=True)
    assert (first == continuation.continuations(model, prompts, SETTINGS, sampled=True)).all()
    other = continuation.Settings(prompts=5, prompt_tokens=7, new_tokens=11, top_k=9, seed=3)
    assert (first != continuation.continuations(model, prompts, other, sampled=True)).any()
    assert (first != continuation.continuations(model, prompts, SETTINGS)).any()
    assert torch.equal(state, torch.get_rng_state()), "the caller's own random numbers go on"
    for prompt, text in zip(prompts, first, strict=True):
        ids = torch.tensor([[*prompt, *text]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, 6:-1]
        assert ((logits > logits.gather(1, ids[0, 7:, None])).sum(-1) < 9).all()


def test_what_two_texts_begin_with():
    one = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    other = np.array([[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3, 9]])
    assert continuation.common_prefix(one, other).tolist() == [4, 0, 2, 3]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 twice, 2341, 3412, 4123
        ([5] * 7, 3 / 4),
        ([1, 2, 3, 1, 2, 3, 9], 0),  # pieces of three come again, of four none
        ([1, 2, 3, 4], 0),
    ],
)
def test_repeated_four_grams_by_hand(text, share):
    assert continuation.repeated_ngrams(np.array(text)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ([5] * 16, True),
        ([5] * 15, False),
        ([4] + [5] * 15, False),
        ([*range(40, 50), *[1, 2] * 8], True),
        ([*range(40, 50), 2, *[1, 2] * 8], True),  # begun in the middle of a piece
        ([*range(40, 50), *[1, 2] * 7, 1], False),  # 15 tokens
        ([*range(40, 50), *[1, 2, 3, 4, 5, 6] * 3], True),
        ([*range(40, 50), *[1, 2, 3, 4, 5, 6] * 2, 1, 2, 3, 4, 5], False),  # not three times
        ([*[1, 2] * 12, 3], False),  # not at the end
        (list(range(30)), False),
    ],
)
def test_endings_in_a_loop_by_hand(text, loops):
    assert continuation.ends_in_loop(np.array(text)) is loops


def test_prompts_are_places_of_the_text_that_do_not_overlap():
    stream = np.arange(1000)
    found = continuation.prepare(
        None, stream, continuation.Settings(prompts=50, prompt_tokens=7, new_tokens=11, seed=2)
    )
    pieces = np.concatenate([found.prompts, found.text], axis=1)
    assert pieces.shape == (50, 18) and (np.diff(pieces, axis=1) == 1).all() and len(set(pieces.ravel())) == 50 * 18
    other = continuation.prepare(
        None, stream, continuation.Settings(prompts=50, prompt_tokens=7, new_tokens=11, seed=3)
    )
    assert (found.prompts != other.prompts).any()
    with pytest.raises(ValueError, match="the text has 899 tokens; expected 900 or more, for 50 prompts"):
        continuation.prepare(None, stream[:899], found.settings)


def test_a_reference_agrees_with_itself(trio):
    (teacher, *_), stream = trio
    result = continuation.run(teacher, teacher, stream, SETTINGS)
    found = result["metrics"]
    for name in ("greedy agreement", "same whole continuation", "top-1 along the reference's text"):
        assert values(found, name).tolist() == [1] * 5, name
    assert values(found, "tokens until first divergence").tolist() == [11] * 5
    assert np.abs(values(found, "KL along the reference's text")).max() < 1e-6
    for sample in result["samples"]:
        assert sample["first_divergence"] is None and sample["greedy"] == sample["reference"]
        assert sample["agreed_characters"] == len(sample["greedy"])


@torch.no_grad()
def test_a_students_figures_are_those_of_plain_loops(trio):
    (teacher, distilled, _), stream = trio
    prepared = continuation.prepare(teacher, stream, SETTINGS)
    result = continuation.run(distilled, teacher, stream, SETTINGS, prepared)
    found, prefixes, firsts = result["metrics"], [], []
    for prompt, text in zip(prepared.prompts, prepared.greedy, strict=True):
        ids = list(prompt)
        own = read_again(distilled.model, prompt, 11)
        theirs = read_again(teacher.model, prompt, 11)
        assert theirs == text.tolist()
        prefixes.append(next((place for place in range(11) if own[place] != theirs[place]), 11))
        p, q = (
            model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)
            for model in (teacher, distilled)
        )
        firsts.append(F.kl_div(q, p, log_target=True, reduction="sum").item())
    assert values(found, "tokens until first divergence").tolist() == prefixes
    assert values(found, "greedy agreement") == pytest.approx(np.array(prefixes) / 11)
    assert values(found, "same whole continuation").tolist() == [float(prefix == 11) for prefix in prefixes]
    assert min(prefixes) < 11, "there is something to see"
    assert values(found, "KL at new token 1") == pytest.approx(firsts, rel=1e-4)
    bins = [metric for metric in found if metric.get("group") == "divergence"]
    assert [metric["x"] for metric in bins] == [1, 2, 4, 8, 11] and bins[2]["name"] == "KL at new tokens 3–4"
    sums = np.sum([metric["numerators"] for metric in bins], axis=0)
    assert values(found, "KL along the reference's text") == pytest.approx(sums / 11, rel=1e-6)
    # What follows in the text is measured as a sample is.
    ids = torch.from_numpy(np.concatenate([prepared.prompts, prepared.text], axis=1))
    logits = teacher.model(input_ids=ids[:, :-1], use_cache=False).logits[:, 6:]
    expected = F.cross_entropy(logits.transpose(1, 2), ids[:, 7:], reduction="none").mean(1)
    name = "loss of sampled text under the reference"
    assert values(result["held_out"], name) == pytest.approx(expected.numpy(), rel=1e-5)
    assert {metric["name"] for metric in result["held_out"]} < {metric["name"] for metric in found}
    assert len(result["samples"]) == 3
    for row, sample in enumerate(result["samples"]):
        agreed = distilled.tokenizer.decode(prepared.greedy[row, : prefixes[row]])
        assert sample["greedy"][: sample["agreed_characters"]] == agreed
        assert sample["prompt"] == teacher.tokenizer.decode(prepared.prompts[row])


def test_a_recurrence_writes_what_its_filters_do(trio):
    (_, distilled, recurrent), stream = trio
    found = continuation.run(recurrent, distilled, stream, SETTINGS)["metrics"]
    assert values(found, "KL along the reference's text").max() < 1e-4
    assert values(found, "top-1 along the reference's text").mean() > 0.9


def test_samples_stand_side_by_side():
    def result(label, greedy, agreed, divergence):
        sample = {"prompt": "def f", "text": "(x):", "reference": "(a):\n  return b", "greedy": greedy}
        sample |= {"agreed_characters": agreed, "first_divergence": divergence, "sampled": f"by {label}"}
        return {"model": label, "reference": "teacher", "samples": [sample]}

    shown = continuation.side_by_side(
        [result("teacher", "(a):\n  return b", 15, None), result("student", "(a):\n  raise", 8, 4)]
    )
    lines = [[cell.strip() for cell in line.split(" | ")] for line in shown.splitlines()]
    assert ["teacher, greedy", "student, greedy"] in lines and ["return b", "r‖aise"] in lines
    assert ["held-out text", "teacher, sampled", "student, sampled"] in lines
    assert ["(x):", "by teacher", "by student"] in lines and ["def f"] in lines


@pytest.fixture(scope="module")
def foreign(workshop, tmp_path_factory):
    """The teacher with two tokens of its vocabulary exchanged."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    shutil.copytree(workshop / "teacher", folder)
    found = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = found["model"]["vocab"]
    one, other = [token for token in vocabulary if len(token) == 1][5:7]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(found))
    return folder


def test_models_of_other_tokens_are_refused(trio, foreign):
    (teacher, *_), stream = trio
    with pytest.raises(ValueError, match="^foreign and teacher have different tokens; expected .*$"):
        continuation.run(Evaluated("foreign", str(foreign)), teacher, stream, SETTINGS)


def test_generation_command(finished, workshop, foreign, tmp_path, monkeypatch, capsys):
    lines = (workshop / "text.jsonl").read_text().splitlines()[:3]
    (tmp_path / "text.txt").write_text("\n".join(json.loads(line)["text"] for line in lines))
    words = ["eval/generation.py", f"teacher={workshop / 'teacher'}", f"recurrent={finished / 'recurrence'}"]
    options = ["--text", tmp_path / "text.txt", "--split", "all"]
    options += ["--prompts", 5, "--prompt-tokens", 9, "--new-tokens", 13]
    done = command(*words, *options)
    assert done.returncode == 0, done.stderr
    teacher, recurrent, text = json.loads(done.stdout.splitlines()[-1])
    assert teacher["metrics"]["greedy agreement"]["value"] == 1
    assert 0 <= recurrent["metrics"]["greedy agreement"]["value"] < 1
    assert recurrent["metrics"]["KL along the reference's text"]["value"] > 1e-3
    assert text["model"] == "held-out text" and text["metrics"].keys() < teacher["metrics"].keys()
    assert teacher["settings"] == recurrent["settings"] and teacher["settings"]["new_tokens"] == 13
    rows = done.stdout.splitlines()
    assert any(row.startswith("prompt 3") for row in rows) and "recurrent, greedy" in done.stdout
    (row,) = [row for row in rows if row.startswith("greedy agreement")]
    assert row.endswith("–"), "the text has no greedy continuation"
    for change, message in {
        (*words, *options, "--prompts", 0): "--prompts: found 0; expected 1 or more",
        (*words, *options, "--prompts", 5000): "expected 110000 or more, for 5000 prompts",
        (*words, *options, "--new-tokens", 3): "found 3 new tokens; expected 4 or more",
        (*words, *options, "--temperature", 0): "temperature 0.0",
        (*words, foreign, *options): f"{foreign} and teacher have different tokens",
        (*words, tmp_path, *options): "cannot be loaded",
    }.items():
        monkeypatch.setattr(sys, "argv", [str(word) for word in change])
        assert runpy.run_path(str(ROOT / change[0]))["main"]() == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("generation: error:") and message in lines[-1], lines
