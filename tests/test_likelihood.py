"""Sliding windows against a plain loop and against lm-eval's rolling log-likelihood; blocks, positions, text."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, command, tiny_student, tiny_teacher

from scavenger import data, losses, measure
from scavenger.recipe import RecipeError
from scavenger.report import likelihood, text
from scavenger.report.evaluated import Evaluated
from scavenger.report.results import Results
from scavenger.report.text import Blocks, Text


LENGTHS = [1, 4, 13, 14, 29, 61]  # of documents, tokens behind the end of text
VOCABULARY = 320  # of the workshop's tokenizer


@pytest.fixture(scope="module")
def models(workshop):
    """A teacher and a student in float64, with the workshop's tokenizer."""
    made = {"teacher": tiny_teacher(vocab_size=VOCABULARY), "student": tiny_student(vocab_size=VOCABULARY)}
    return {label: Evaluated(label, str(workshop / "teacher"), loader=lambda m=m: m) for label, m in made.items()}


def documents():
    rng = np.random.default_rng(3)
    return [[0, *rng.integers(1, VOCABULARY, length).tolist()] for length in LENGTHS]


def plain_loop(model, ids, length, stride):
    """-log p of each token behind the first: in the first window that ends behind it and is no longer than `length`."""
    losses = []
    for place in range(1, len(ids)):
        end = min(length, len(ids) - 1)
        while end < place:
            end = min(end + stride, len(ids) - 1)
        window = torch.tensor([ids[max(0, end - length) : place]])
        with torch.no_grad():
            losses.append(-model(input_ids=window).logits[0, -1].log_softmax(-1)[ids[place]].item())
    return sum(losses)


@pytest.mark.parametrize("length, stride", [(13, 5), (13, 13), (13, 1), (64, 32), (2, 1)])
@pytest.mark.parametrize("label", ["teacher", "student"])
def test_sliding_windows_are_the_plain_loop(models, label, length, stride):
    model = models[label]
    found = likelihood.sliding(model, documents(), length, stride)[0]
    expected = [plain_loop(model.model, ids, length, stride) for ids in documents()]
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # losses are float32: measured 8e-8 at most


def test_windows_predict_every_token_once():
    for tokens in (1, 6, 7, 8, 40):
        for length, stride in ((7, 3), (7, 7), (7, 1)):
            windows = list(likelihood._windows(tokens, length, stride))
            predicted = [place for begin, first, end in windows for place in range(first + 1, end + 1)]
            assert predicted == list(range(1, tokens + 1))
            assert all(end - begin == min(length, tokens) for begin, _, end in windows), "all windows are full"


def test_disjoint_windows_are_rolling_log_likelihoods_of_lm_eval(models, workshop):
    """An independent implementation, by its own tokenisation of whole documents."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = models["teacher"]
    texts = [json.loads(line)["text"][:300] for line in (workshop / "text.jsonl").read_text().splitlines()[:4]]
    harness = HFLM(pretrained=model.model, tokenizer=model.tokenizer, max_length=29, batch_size=2)
    asked = [Instance("loglikelihood_rolling", {}, (document,), 0) for document in texts]
    expected = [-value for value in harness.loglikelihood_rolling(asked, disable_tqdm=True)]
    ids = Text("", "", texts).ids(model.tokenizer)
    np.testing.assert_allclose(likelihood.sliding(model, ids, 29, 29)[0], expected, rtol=1e-6)


def test_a_reference_is_compared_with(models):
    found = likelihood.sliding(models["student"], documents(), 13, 5, models["teacher"])
    itself = likelihood.sliding(models["teacher"], documents(), 13, 5, models["teacher"])
    np.testing.assert_allclose(itself[1], LENGTHS)
    np.testing.assert_allclose(itself[2], 0, atol=1e-12)
    assert (found[2] > 0).all() and (found[1] < itself[1]).any()
    kl, same = 0.0, 0
    ids = torch.tensor([documents()[2]])  # one window: 13 tokens
    log_p, log_q = (models[name].model(input_ids=ids[:, :-1]).logits[0].log_softmax(-1) for name in models)
    for p, q in zip(log_p, log_q, strict=True):
        kl += sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        same += int(p.argmax() == q.argmax())
    assert found[2, 2] == pytest.approx(kl, rel=1e-6) and found[1, 2] == same


def test_bits_per_byte_by_hand(models):
    """Two bytes in two letters, four in a smiling face."""
    written = Text("", "", ["ab", "ab☺\N{GRINNING FACE}"])
    settings = likelihood.Settings(13, 13, 13)
    rows = {m.name: m for m in likelihood.of_documents(models["teacher"], written, settings)}
    assert rows["bits per byte"].denominators == [2, 2 + 3 + 4]
    loss = [plain_loop(models["teacher"].model, ids, 13, 13) for ids in written.ids(models["teacher"].tokenizer)]
    assert rows["bits per byte"].numerators == pytest.approx([each / math.log(2) for each in loss])
    assert rows["perplexity"].numerators == pytest.approx(loss)


def test_chunks_change_nothing(models, monkeypatch):
    """Whole batches are read, and their logits computed a chunk at a time: the figures are the same."""
    model, read, heads = models["student"].model, [], []
    hooks = [
        model.get_input_embeddings().register_forward_hook(lambda m, given, out: read.append(len(given[0]))),
        model.get_output_embeddings().register_forward_hook(lambda m, given, out: heads.append(len(given[0]))),
    ]
    blocks = np.random.default_rng(0).integers(0, VOCABULARY, (7, 13))
    whole = likelihood.predictions(model, blocks, models["teacher"].model)
    assert read == [1, 1, 7] and heads[2:] == [7 * 12]
    monkeypatch.setattr(losses, "CHUNK_BYTES", 5 * 4 * VOCABULARY)
    parts = likelihood.predictions(model, blocks, models["teacher"].model)
    assert read[3:] == [1, 1, 7] and heads[5:] == [5] * 16 + [4]
    np.testing.assert_allclose(parts, whole, rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(measure, "BATCH_TOKENS", 40)
    np.testing.assert_allclose(likelihood.predictions(model, blocks), whole[:1], rtol=1e-6)
    assert read[8:] == [3, 3, 1] and heads[-1] == 2
    for hook in hooks:
        hook.remove()


def test_blocks_are_what_the_pipeline_measures(models, finished):
    blocks = data.blocks(finished / "data", "test")
    model, reference = models["student"], models["teacher"]
    rows = {m.name: m for m in likelihood.of_blocks(model, Blocks("", blocks), None, reference)}
    expected = measure.held_out(model.model.float(), blocks, reference.model.float())
    model.model.double(), reference.model.double()
    loss = rows["perplexity"]
    assert sum(loss.denominators) == expected.tokens
    assert sum(loss.numerators) / sum(loss.denominators) == pytest.approx(expected.loss, rel=1e-5)
    agreed, divergence = rows[likelihood.AGREEMENT], rows[likelihood.DIVERGENCE]
    assert sum(agreed.numerators) / expected.tokens == pytest.approx(expected.agreement, abs=2e-3)
    assert sum(divergence.numerators) / expected.tokens == pytest.approx(expected.divergence, rel=1e-4)
    ends = (blocks.reshape(-1) == model.tokenizer.eos_token_id).sum()
    assert len(loss.numerators) in (ends, ends + 1), "a document for each end of text, and the one that was begun"
    ids = blocks[:, 1:].reshape(-1)
    whole = model.tokenizer.decode(ids[ids != model.tokenizer.eos_token_id])
    assert sum(rows["bits per byte"].denominators) == pytest.approx(len(whole.encode()), rel=0.02)


def test_positions(models):
    """Bins of the positions of contexts that are read on their own, and what lies past the window."""
    model = models["student"]
    stream = np.random.default_rng(8).integers(1, VOCABULARY, 3 * 23 + 5)
    stream[[0, 20, 40]] = model.tokenizer.eos_token_id  # three documents, in three contexts
    found = {m.name: m for m in likelihood.by_position(model, stream, likelihood.Settings(7, 7, 23))}
    loss = likelihood.predictions(model.model, stream[: 3 * 23].reshape(3, 23))[0]
    assert list(found) == [
        *("perplexity at 1", "perplexity at 2–3", "perplexity at 4–7", "perplexity at 8–15", "perplexity at 16–22"),
        "perplexity past 7, up to 23",
    ]
    for name, first, last in (("at 4–7", 4, 7), ("at 16–22", 16, 22), ("past 7, up to 23", 7, 22)):
        sums, counts = np.zeros(4), np.zeros(4)
        for context in range(3):
            for place in range(first, last + 1):
                document = int(np.searchsorted([0, 20, 40], context * 23 + place, side="right"))
                sums[document] += loss[context, place - 1]
                counts[document] += 1
        np.testing.assert_allclose(found[f"perplexity {name}"].numerators, sums)
        assert found[f"perplexity {name}"].denominators == counts.tolist() and counts[0] == 0
    assert sum(sum(found[name].denominators) for name in list(found)[:-1]) == loss.size


def test_characters_that_a_block_cuts_are_counted_once(models, workshop):
    """Each is three bytes, and three tokens of this tokenizer: the ends of eight blocks cut some."""
    model = models["teacher"]
    ids = np.array([model.tokenizer.eos_token_id, *model.tokenizer("\N{HIRAGANA LETTER A}" * 60)["input_ids"]])
    blocks = np.lib.stride_tricks.sliding_window_view(ids, 21)[::20]
    found = likelihood.of_blocks(model, Blocks("", blocks), None)[1]
    assert found.name == "bits per byte" and sum(found.denominators) == pytest.approx(3 * 60, abs=len(blocks))


def test_nothing_to_predict_is_said(models):
    with pytest.raises(ValueError, match="nothing: found no token to predict; expected some text"):
        likelihood.of_documents(models["teacher"], Text("nothing", "", ["", ""]), likelihood.Settings(13, 13, 13))
    with pytest.raises(ValueError, match="contexts of 1 tokens for positions; expected 2 or more"):
        likelihood.Settings(13, 13, 1)


def test_text_has_splits_of_its_own_or_none(workshop, tmp_path):
    (tmp_path / "own").mkdir()
    for split, count in (("train", 5), ("validation", 2), ("test", 3)):
        lines = [json.dumps({"text": f"{split} {number}"}) for number in range(count)]
        (tmp_path / "own" / f"{split}.jsonl").write_text("\n".join(lines))
    assert sorted(text.read(str(tmp_path / "own")).documents) == ["test 0", "test 1", "test 2"]
    assert len(text.read(str(tmp_path / "own"), split="validation").documents) == 2
    assert len(text.read(str(tmp_path / "own"), split="all").documents) == 10
    whole = text.read(str(tmp_path / "own" / "train.jsonl"), split="all")
    some = text.read(str(tmp_path / "own" / "train.jsonl"), split="all", limit=2)
    assert len(whole.documents) == 5 and whole.documents[:2] == some.documents and whole.digest != some.digest
    library = text.read(limit=3)
    assert len(library.documents) == 3 and "standard library, test split" in library.name
    splits = {data.split_of(name) for name, code in data.documents(data.Data(), 0) if code in library.documents}
    assert splits == {"test"}
    lines = [json.dumps({"text": f"document {number}"}) for number in range(200)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    read = {split: text.read(str(tmp_path / "some.jsonl"), split=split) for split in ("validation", "test", "all")}
    assert {data.split_of(document) for document in read["test"].documents} == {"test"}
    assert {data.split_of(document) for document in read["validation"].documents} == {"validation"}
    assert len(read["all"].documents) == 200 and read["all"].name == str(tmp_path / "some.jsonl")
    assert read["test"].name.endswith("some.jsonl, test split") and len(read["test"].documents) < 25
    (tmp_path / "some.jsonl").write_text(
        "\n".join(line for line in lines if data.split_of(json.loads(line)["text"]) == "train")
    )
    with pytest.raises(ValueError, match="no document in the test split; expected more documents, or --split all$"):
        text.read(str(tmp_path / "some.jsonl"))
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="blank.txt: found no text; expected one document at least"):
        text.read(str(tmp_path / "blank.txt"), split="all")


def test_command_and_metric(finished, workshop, tmp_path):
    lines = [json.loads(line)["text"] for line in (workshop / "text.jsonl").read_text().splitlines()[:3]]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    words = ["--text", tmp_path / "text.jsonl", "--split", "all", "--context-length", 48]
    words += ["--results", tmp_path / "kept"]
    done = command("eval/perplexity.py", f"long={finished / 'transfer'}", finished / "recurrence", *words)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first["metrics"]["perplexity"]["value"] == pytest.approx(second["metrics"]["perplexity"]["value"], rel=1e-3)
    assert 0 < first["metrics"]["bits per byte"]["value"] < 8 and first["model"] == "long"
    assert first["metrics"]["perplexity"]["items"] == 3 and first["settings"]["stride"] == 24
    assert "documents 3" in done.stdout and "[" in done.stdout
    import evaluate

    metric = evaluate.load(str(ROOT / "eval/perplexity.py"))
    found = metric.compute(predictions=lines, model_id=str(finished / "transfer"), context_length=48)
    assert found["perplexity"] == pytest.approx(first["metrics"]["perplexity"]["value"], rel=1e-6)
    assert found["interval"] == [first["metrics"]["perplexity"][end] for end in ("low", "high")]


@pytest.mark.parametrize(
    "words, part",
    [
        (["--text", "nothing.txt"], "--text: nothing.txt is not there"),
        (["--stride", "49", "--context-length", "48"], "found a stride of 49; expected 1 to 48"),
        (["--limit", "0"], "--limit: found 0; expected 1 or more"),
        (["--text", "README.md", "--dataset", "x"], "expected one of them"),
    ],
)
def test_mistakes_are_one_line(finished, words, part):
    done = command("eval/perplexity.py", finished / "transfer", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("perplexity: error: ") and part in done.stderr


def test_models_that_are_not_there_are_one_line(finished):
    for words, part in (
        ([finished / "nothing"], "nothing: cannot be loaded"),
        ([finished / "transfer", finished / "transfer"], "expected models that differ"),
        (["=x"], "expected FOLDER or LABEL=FOLDER"),
    ):
        done = command("eval/perplexity.py", *words, "--text", "README.md", "--split", "all")
        assert done.returncode == 2 and part in done.stderr.splitlines()[-1], done.stderr


def test_results_are_kept_until_something_changes(tmp_path, workshop):
    """Settings and weights, not the name alone, say whether a figure is still one's own."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((workshop / "teacher" / name).read_bytes())
    results, made = Results(tmp_path / "results"), []

    def found(label="a", **settings):
        return results.of("p", Evaluated(label, str(tmp_path)), settings, lambda: made.append(1) or {"metrics": []})

    assert found(length=3)["settings"] == {"length": 3} and found(length=3)["model"] == "a" and len(made) == 1
    found(length=4)
    assert len(made) == 2
    found("b", length=4)
    assert len(made) == 3
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    found("b", length=4)
    assert len(made) == 4 and not list((tmp_path / "results").glob("*.partial"))


def test_weights_that_are_missing_or_no_numbers_are_said(workshop, tmp_path):
    """Neither random weights nor a NaN, which compares with nothing, may end in a figure."""
    from safetensors.torch import load_file, save_file

    weights = load_file(workshop / "teacher/model.safetensors")
    for name in ("dropped", "broken"):
        shutil.copytree(workshop / "teacher", tmp_path / name)
    key = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    kept = {name: tensor for name, tensor in weights.items() if name != key}
    save_file(kept, tmp_path / "dropped/model.safetensors", {"format": "pt"})
    weights[key][0, 0] = math.nan
    save_file(weights, tmp_path / "broken/model.safetensors", {"format": "pt"})
    settings, written = likelihood.Settings(13, 13, 13), Text("", "", ["some text"] * 6)
    for name, said in (
        ("dropped", f"the checkpoint lacks {key}; expected exactly"),
        ("broken", "values that are NaN or infinite"),
    ):
        with pytest.raises(RecipeError, match=said):
            likelihood.of(Evaluated(name, str(tmp_path / name)), written, settings)
    config = json.loads((tmp_path / "broken/config.json").read_text()) | {"hidden_size": "wide"}
    (tmp_path / "broken/config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="broken: cannot be loaded"):
        _ = Evaluated("broken", str(tmp_path / "broken")).model
