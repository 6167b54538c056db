"""Conversations: the tokens of the teacher's own chat template, and a loss on what the assistant wrote."""

import io
import json
import os
import shutil
import types

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import scavenger, tiny_student, tiny_teacher
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scavenger import chat, data, losses, measure, student, teacher, training
from scavenger.recipe import Activations, Data, Filter, Logits, Recipe, RecipeError, Transfer, load_recipe
from scavenger.report import likelihood
from scavenger.report.text import Blocks
from scavenger.run import checkpoint
from scavenger.run.run import Run, blocks, counted
from scavenger.transfer import transfer


KNOWN = (
    "{% if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no role ' + message.role) }}"
    "{% endif %}"
)
CHATML = (
    "{% for message in messages %}" + KNOWN + "{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = (
    "{{ bos_token }}{% for message in messages %}" + KNOWN + "{{ message.role + '>' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
# Earlier turns lose what stands before their last line.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if loop.last %}{{ message.content }}"
    "{% else %}{{ message.content.split('\n')[-1] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Earlier turns of the assistant stand there twice.
REPEATING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% if message.role == 'assistant' and not loop.last %}{{ ' ' + message.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No token of its own ends a turn, and a merged token begins in the prompt.
PLAIN = (
    "{% for message in messages %}{{ message.role + ':' }}"
    "{% if message.role == 'assistant' %}{{ ' ' + message.content }}{% else %}{{ message.content }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIAL = ("<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")


def made(template, bos="<|begin|>", eos="<|endoftext|>"):
    """A tokenizer of bytes, with a few special tokens and one merge, of a space and an o."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: index for index, letter in enumerate([*letters, "Ġo"])}, [("Ġ", "o")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents, system=None):
    """Messages of the user and the assistant in turn."""
    roles = ["system"] * (system is not None) + ["user", "assistant"] * len(contents)
    said = [system] * (system is not None) + list(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, said, strict=False)]


def marked(tokenizer, messages):
    """The tokens of a conversation as text, those of the assistant in brackets, neighbours together."""
    ((ids, own),) = chat.tokens([chat.Conversation(messages, "here")], tokenizer, True)
    assert own.dtype == bool and len(own) == len(ids)
    text, before = "", False
    for token, of_assistant in zip(ids, own.tolist(), strict=True):
        text += "[" * (of_assistant and not before) + "]" * (before and not of_assistant) + tokenizer.decode([token])
        before = of_assistant
    return text + "]" * before


def recipe(steps=10, **settings):
    """A recipe that asks for `steps` blocks of training text."""
    stage = {"batch_size": 1, "learning_rate": 1e-3}
    transferred = Transfer((Activations(steps=1, **stage),), (Logits(steps=steps - 1, **stage),))
    settings = {"context_length": 11, "evaluation_tokens": 200, "chat_column": "messages"} | settings
    return Recipe(run_dir="run", seed=3, data=Data(**settings), transfer=transferred)


def conversations(count, start=0):
    return [
        turns(*[f"word {index} of turn {turn} é" + index % 5 * " more" for turn in range(1 + index % 4)], system="be")
        for index in range(start, start + count)
    ]


def write(path, rows, column="messages"):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"n": number, column: row}) for number, row in enumerate(rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{column: row} for row in rows]))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(rows)), column: rows}), path, row_group_size=13)
    else:
        Dataset.from_dict({column: rows}).save_to_disk(str(path))


@pytest.mark.parametrize("assistant", [False, True])
@pytest.mark.parametrize("template", [CHATML, BLOCKS])
def test_tokens_are_those_of_the_chat_template(template, assistant):
    tokenizer, some = made(template), conversations(9)
    found = chat.tokens([chat.Conversation(messages, "") for messages in some], tokenizer, assistant)
    assert chat.tokens([], tokenizer, assistant) == []
    for (ids, own), messages in zip(found, some, strict=True):
        assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
        assert (own is not None) == assistant


def test_the_assistants_tokens_by_hand():
    talk = turns("hé", "oh \n", "so", "no", system="be")
    ends, start = "<|im_end|>", "<|im_start|>"
    assert marked(made(CHATML), talk) == (
        f"{start}system\nbe{ends}\n{start}user\nhé{ends}\n{start}assistant\n[oh \n{ends}]\n"
        f"{start}user\nso{ends}\n{start}assistant\n[no{ends}]\n"
    ).replace("é", "\ufffd\ufffd")  # two tokens of a byte each
    assert marked(made(BLOCKS), talk) == (
        "<|begin|>system>be\nuser>hé\nassistant>[oh \n<|endoftext|>]\nuser>so\nassistant>[no<|endoftext|>]\n"
    ).replace("é", "\ufffd\ufffd")
    # The newline is the only end of these turns; the token ' o' is begun by the prompt and counts.
    assert marked(made(PLAIN), turns("a", "oh", "b", "no")) == "user:a\nassistant:[ oh\n]user:b\nassistant: [no\n]"
    assert "[" not in marked(made(CHATML), turns("nobody answers"))
    twice = [*turns("a", "b"), {"role": "assistant", "content": "c"}]
    assert marked(made(CHATML), twice).endswith(f"{start}assistant\n[b{ends}]\n{start}assistant\n[c{ends}]\n")


@pytest.mark.parametrize(
    ("bos", "eos", "template", "framed"),
    [
        ("<|begin|>", "<|endoftext|>", CHATML, ("<|begin|>", "<|endoftext|>")),
        ("<|endoftext|>", "<|endoftext|>", CHATML, ("", "<|endoftext|>")),
        ("<|begin|>", "<|im_end|>", CHATML, ("<|begin|>", "")),  # a newline follows it
        ("<|begin|>", "<|endoftext|>", BLOCKS, ("", "")),
        ("<|endoftext|>", "<|endoftext|>", "{{ bos_token }}" + CHATML, ("", "")),  # where the next one begins
        (None, "<|im_end|>", CHATML, ("", "")),
    ],
)
def test_separators_are_not_written_twice(bos, eos, template, framed):
    tokenizer = made(template, bos, eos)
    ids = tokenizer.apply_chat_template(turns("a", "b"))["input_ids"]
    assert tuple(tokenizer.decode(part) for part in data.frame(ids, tokenizer)) == framed


def slow(rows, tokenizer, split, length, packing, wanted):
    """The blocks of a split and the assistant's tokens in them, one conversation after the other."""
    ids, own = [], []
    for messages in rows:
        ((new, counts),) = chat.tokens([chat.Conversation(messages, "")], tokenizer, True)
        new, counts = [*new, tokenizer.eos_token_id], [*counts.tolist(), False]
        if tokenizer.bos_token_id != tokenizer.eos_token_id:
            new, counts = [tokenizer.bos_token_id, *new], [False, *counts]
        if packing == "documents" and split == "train":
            if len(new) % length == 1:
                new, counts = new[:-1], counts[:-1]
            new, counts = new + -len(new) % length * [65535], counts + -len(counts) % length * [False]
        if len(ids) < wanted:
            ids, own = ids + new, own + counts
    end = min(len(ids), wanted) // length * length
    return np.array(ids[:end]).reshape(-1, length), np.array(own[:end]).reshape(-1, length)


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json", "folder"])
def test_conversations_are_packed_as_documents_are(tmp_path, kind, packing, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_DOCUMENTS", 7)
    tokenizer, text = made(CHATML), tmp_path / ("text" if kind == "folder" else f"text.{kind}")
    write(text, conversations(200))
    asked = recipe(70, path=str(text), packing=packing, chat_loss="assistant")
    folder = data.run(asked, tmp_path, tokenizer)
    order = list(data.documents(asked.data, asked.seed))
    read = [json.loads(words) for _, words in order]
    assert sorted(read, key=str) == sorted(conversations(200), key=str) and read != conversations(200)
    for split in data.SPLITS:
        rows = [json.loads(words) for name, words in order if data.split_of(name) == split]
        ids, own = slow(rows, tokenizer, split, 11, packing, 770 if split == "train" else 200)
        assert np.array_equal(blocks(folder, split), ids)
        assert np.array_equal(counted(folder, split), own) and counted(folder, split).dtype == bool
        assert 0.1 < own.mean() < 0.6
    found = checkpoint.read_json(folder / "source.json")["chat"]
    assert found["column"] == "messages" and found["loss"] == "assistant"
    assert found["counted"]["test"] == counted(folder, "test")[:, 1:].sum()
    beside = io.BytesIO()
    np.save(beside, np.array(counted(folder, "test")))
    assert (folder / "test_counted.npy").read_bytes() == beside.getvalue()
    other = data.run(recipe(70, path=str(text), packing=packing), tmp_path / "all", tokenizer)
    assert not list(other.glob("*counted*")) and np.array_equal(blocks(other, "train"), blocks(folder, "train"))


def test_tables_and_lines_are_the_same_conversations(tmp_path):
    """Absent keys of a message are nulls in a table; the tokens and the splits are the same."""
    rows = [
        [*turns(f"a {index}"), {"role": "assistant", "content": "b", "reasoning": "so"}, *turns(f"c {index}", "d")]
        for index in range(150)
    ]
    for kind in ("jsonl", "parquet"):
        write(tmp_path / f"a.{kind}", rows)
    read = [
        sorted(data.documents(Data(path=str(tmp_path / f"a.{kind}"), chat_column="messages"), 0))
        for kind in ("jsonl", "parquet")
    ]
    assert read[0] == read[1] and len(read[0]) == 150


def test_conversations_of_the_hub(tmp_path, monkeypatch):
    load = datasets.load_dataset

    def found(name, *args, **kwargs):
        return load(str(tmp_path / "hub"), **kwargs) if name == "some/chats" else load(name, *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", found)
    (tmp_path / "hub").mkdir()
    for number in range(2):
        write(tmp_path / f"hub/train-0000{number}-of-00002.parquet", conversations(100, 100 * number))
    asked = recipe(20, name="some/chats", chat_loss="assistant")
    folder = data.run(asked, tmp_path, made(CHATML))
    read = [json.loads(words) for _, words in data.documents(asked.data, asked.seed)]
    assert sorted(read, key=str) == sorted(conversations(200), key=str)
    assert counted(folder, "train").shape == blocks(folder, "train").shape == (20, 11)
    for number in range(2):
        write(tmp_path / f"hub/train-0000{number}-of-00002.parquet", [[{"role": "wizard", "content": "a"}]] * 9)
    with pytest.raises(RecipeError, match="data: some/chats, train . of ., row 1: the chat template.*no role wizard"):
        data.run(asked, tmp_path / "other", made(CHATML))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(BaseException):
    """What nothing but the test catches."""


@pytest.mark.parametrize(("packing", "shuffled"), [("stream", 0), ("documents", 2**30)])
def test_broken_off_it_goes_on(tmp_path, monkeypatch, packing, shuffled):
    monkeypatch.setattr(data, "SHUFFLED_BYTES", shuffled)
    monkeypatch.setattr(data, "CHUNK_DOCUMENTS", 13)
    write(tmp_path / "a.jsonl", conversations(200))
    asked = recipe(9000, path=str(tmp_path / "a.jsonl"), packing=packing, chat_loss="assistant")
    whole = files_of(data.run(asked, tmp_path / "whole", made(CHATML)))
    assert {"train_counted.npy", "validation_counted.npy", "test_counted.npy"} < whole.keys()
    append, count, left = data._Files.append, data._Files.count, 0

    def breaking(method):
        def called(*words):
            nonlocal left
            method(*words)
            left -= 1
            if left == 0:
                raise Stop

        return called

    monkeypatch.setattr(data._Files, "append", breaking(append))
    monkeypatch.setattr(data._Files, "count", breaking(count))
    for moment in (1, 40, 41, 250):  # after tokens, and after what says which of them count
        left = moment
        with pytest.raises(Stop):
            data.run(asked, tmp_path / "broken", made(CHATML))
    left = 0
    os.truncate(tmp_path / "broken/data.partial/train_counted.npy", 90)  # a machine that went down
    assert files_of(data.run(asked, tmp_path / "broken", made(CHATML))) == whole


def test_missing_marks_are_said(tmp_path):
    write(tmp_path / "a.jsonl", conversations(200))
    asked = recipe(path=str(tmp_path / "a.jsonl"), chat_loss="assistant")
    folder = data.run(asked, tmp_path, made(CHATML))
    assert Run(asked, tmp_path, None, None).counted("test").shape == blocks(folder, "test").shape
    assert Run(recipe(path=str(tmp_path)), tmp_path, None, None).counted("test") is None
    (folder / "test_counted.npy").unlink()
    with pytest.raises(RecipeError, match="test_counted.npy is missing; expected the tokens of this run: delete"):
        Run(asked, tmp_path, None, None).counted("test")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "found str values in messages; expected data.chat_column to name a column of conversations"),
        ([], "found an empty list in messages; expected data.chat_column"),
        (["hello"], "found str as message 1 of messages; expected"),
        ([*turns("a"), {"from": "gpt", "value": "b"}], "found the keys from, value in message 2 of messages; expected"),
        ([{"role": "user"}], "found the keys role in message 1 of messages; expected"),
        (turns("\ud800", "b"), "found half a surrogate pair in messages; expected Unicode text"),
        ([{"role": "wizard", "content": "a"}], r"refuses the conversation \(TemplateError: no role wizard\); expected"),
        ([*turns("a"), {"role": "assistant", "content": ["b"]}], r"refuses the conversation \(TypeError: "),
        (turns("a", "b")[1:], "the assistant begins the conversation.*chat_loss: all works"),
    ],
    ids=range(9),
)
def test_a_conversation_that_cannot_be_read_is_named(tmp_path, row, message):
    write(tmp_path / "a.jsonl", [*conversations(2), row])
    asked = recipe(path=str(tmp_path / "a.jsonl"), chat_loss="assistant")
    with pytest.raises(RecipeError, match=f"^data: {tmp_path}/a.jsonl, line 3: .*{message}") as error:
        data.run(asked, tmp_path, made(CHATML))
    assert "\n" not in str(error.value)


def test_rows_of_tables_are_named(tmp_path):
    write(tmp_path / "a.parquet", ["text"] * 3)
    with pytest.raises(RecipeError, match=f"data: {tmp_path}/a.parquet, row 1: found str values in messages"):
        data.run(recipe(path=str(tmp_path / "a.parquet")), tmp_path, made(CHATML))
    write(tmp_path / "b.json", [*conversations(4), [{"role": "wizard", "content": "a"}]])
    with pytest.raises(RecipeError, match=f"data: {tmp_path}/b.json, row 5: the chat template.*no role wizard"):
        data.run(recipe(path=str(tmp_path / "b.json")), tmp_path, made(CHATML))
    write(tmp_path / "c.jsonl", conversations(4), "chats")
    with pytest.raises(RecipeError, match=r"found columns n, chats; expected data.chat_column .*\(it is messages\)"):
        data.run(recipe(path=str(tmp_path / "c.jsonl")), tmp_path, made(CHATML))
    (tmp_path / "d.jsonl").write_text('{"messages": null}\n')  # no conversation, as null is no text
    assert list(data.documents(Data(path=str(tmp_path / "d.jsonl"), chat_column="messages"), 0)) == []


def test_text_and_tokenizers_that_have_no_conversations_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(RecipeError, match="found plain text, which has no column messages; expected .jsonl"):
        data.run(recipe(path=str(tmp_path / "a.txt")), tmp_path, made(CHATML))
    write(tmp_path / "a.jsonl", conversations(200))
    asked = recipe(path=str(tmp_path / "a.jsonl"), chat_loss="assistant")
    for template, found in ((None, "no chat template"), ({"other": CHATML}, "chat templates, none.* called default")):
        with pytest.raises(RecipeError, match=f"^data.chat_column: the teacher's tokenizer has {found}; expected one"):
            data.run(asked, tmp_path, made(template))
    slow_one = made(CHATML)
    slow_one.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": False})
    with pytest.raises(RecipeError, match="^data.chat_loss: .*slow.*chat_loss: all works"):
        data.run(asked, tmp_path, slow_one)
    write(tmp_path / "b.jsonl", [turns(f"nobody answers {number}") for number in range(400)])
    asked = recipe(path=str(tmp_path / "b.jsonl"), chat_loss="assistant")
    with pytest.raises(RecipeError, match="the train split has no token that the assistant wrote; expected messages"):
        data.run(asked, tmp_path, made(CHATML))
    assert not (tmp_path / "data.partial").exists() and not (tmp_path / "data").exists()


def test_a_template_that_changes_earlier_messages(tmp_path):
    write(tmp_path / "a.jsonl", [turns("a", "so\nb")] * 3 + [turns("a", "so\nb", "c", "d")] * 3)
    for loss in ("all", "assistant"):
        asked = recipe(path=str(tmp_path / "a.jsonl"), chat_loss=loss)
        message = (
            "a.jsonl, line .: the chat template .* so the assistant's tokens cannot be found.*chat_loss: all works"
        )
        with pytest.raises(RecipeError, match=message if loss == "assistant" else "less than one context"):
            data.run(asked, tmp_path, made(REPEATING))
    with pytest.raises(RecipeError, match=r"here: the chat template changes its first 2 messages for later ones"):
        marked(made(REPEATING), turns("a", "so\nb", "c"))


def test_earlier_turns_that_lose_their_reasoning():
    """What is still shown of them is the assistant's, with the end of the turn."""
    assert "[so\nb<|im_end|>]" in marked(made(FORGETFUL), turns("a", "so\nb")), "of one turn nothing is dropped"
    shown = marked(made(FORGETFUL), turns("a", "so\nb", "c", "so\nd"))
    assert shown.count("[") == 2 and "assistant\n[b<|im_end|>]\n" in shown and "assistant\n[so\nd<|im_end|>]" in shown
    shown = marked(made(FORGETFUL), turns("y\na", "b"))
    assert "user\na<|im_end|>" in shown and "assistant\n[b<|im_end|>]" in shown


LENGTHS = (17, 9, 2, 13)


def batch(seed=0, none_in=()):
    """Documents, padded, with tokens of an assistant; none in some of the rows."""
    some = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    own = (torch.rand(mask.shape, generator=some) < 0.4) & mask
    own[0, :3] = torch.tensor([True, False, True])  # the first token of a sequence is predicted by none
    own[list(none_in)] = False
    ids = torch.randint(1, 97, mask.shape, generator=some) * mask
    return data.Batch(np.arange(len(LENGTHS)), ids, mask, own)


def part_of(whole, rows):
    return data.Batch(whole.rows[rows], *(item if item is None else item[rows] for item in whole[1:]))


def places(whole):
    return [(i, t) for i, n in enumerate(LENGTHS) for t in range(n - 1) if whole.counted[i, t + 1]]


def slopes(value, model):
    parameters = [p for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if slope is None else slope for p, slope in zip(parameters, found, strict=True)]


def assert_alike(found, expected, tolerance):
    for own, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(own, plain, rtol=tolerance, atol=tolerance * max(1.0, plain.abs().max().item()))


@pytest.mark.parametrize("none_in", [(), (1, 2)])
def test_the_loss_of_next_tokens_is_the_sum_over_the_assistants(none_in):
    whole, model = batch(none_in=none_in), tiny_student()
    module = training.NextTokens(model)
    value, _ = training.next_token_loss(module, whole, None, whole)
    log_p = model(input_ids=whole.ids, use_cache=False).logits.log_softmax(-1)
    expected = sum(-log_p[i, t, whole.ids[i, t + 1]] for i, t in places(whole)) / len(places(whole))
    assert len(places(whole)) > 5
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)  # the count is float32
    assert_alike(slopes(value, model), slopes(expected, model), 1e-6)
    parts = [training.next_token_loss(module, part_of(whole, slice(i, i + 1)), None, whole)[0] for i in range(4)]
    assert sum(parts).item() == pytest.approx(expected.item(), rel=1e-6)
    everything = whole._replace(counted=whole.mask)
    for counts in (None, whole.mask):
        value, _ = training.next_token_loss(module, whole._replace(counted=counts), None, everything)
        mean = [-log_p[i, t, whole.ids[i, t + 1]] for i, n in enumerate(LENGTHS) for t in range(n - 1)]
        assert value.item() == pytest.approx((sum(mean) / len(mean)).item(), rel=1e-6)


@pytest.mark.parametrize("kept", [False, True])
def test_the_loss_of_logits_is_the_sum_over_the_assistants(kept):
    frozen, model, whole = tiny_teacher(), tiny_student(), batch()
    phase = Logits(steps=1, batch_size=1, learning_rate=0.1, cross_entropy=0.3, hidden_states=0.0 if kept else 0.4)
    module = transfer.LogitMatching(model, phase, Filter())
    theirs, own = (each(input_ids=whole.ids, use_cache=False).logits for each in (frozen, model))
    at = places(whole)
    divergence = torch.stack([losses.logit_divergence(own[place], theirs[place].detach()) for place in at]).mean()
    entropy = torch.stack([-own[i, t].log_softmax(-1)[whole.ids[i, t + 1]] for i, t in at]).mean()
    expected = 0.7 * divergence + 0.3 * entropy
    counts = torch.tensor([len(at), len(at)])
    aim = losses.Head.of(frozen), *teacher.hidden_states(frozen, whole.ids, not kept)
    if kept:
        top = theirs.detach().log_softmax(-1).topk(97, -1)
        nothing = torch.full(whole.ids.shape, -torch.inf, dtype=torch.float64)
        aim = losses.TopK(top.values, top.indices, nothing), None, []
    value, logged, _ = module(whole.ids, whole.mask, counts, 1.0, *aim, whole.counted)
    assert logged["divergence"].item() == pytest.approx(divergence.item(), rel=1e-6)
    assert logged["cross_entropy"].item() == pytest.approx(entropy.item(), rel=1e-6)
    if not kept:  # blocks are matched at every token, as without an assistant
        of_all = module(whole.ids, whole.mask, counts, 1.0, *aim)[1]["hidden_states"]
        assert torch.equal(of_all, logged["hidden_states"])
        value = value - 0.4 * logged["hidden_states"]
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    if kept:
        assert_alike(slopes(value, model), slopes(expected, model), 1e-6)


@pytest.mark.parametrize("counts", ["none", "some", "all"])
def test_the_training_of_logits_takes_what_is_counted(workshop, counts):
    """The loss as the training calls it, in two micro-batches; a batch without a counted token has a loss of zero."""
    asked = load_recipe(str(workshop / "recipe.yaml"))
    frozen, whole = tiny_teacher(), batch(none_in=range(4) if counts == "none" else (1,))
    whole = whole._replace(counted=None) if counts == "all" else whole
    model = student.from_teacher(asked.student, 63, frozen, 0).double()
    turn = transfer.Turn("logits", asked.transfer.logits[0], ())
    run = Run(asked, workshop, type("One", (), {"device": torch.device("cpu"), "distributed_type": None})(), None)
    optimisation = transfer.logit_matching(run, frozen, None, turn, model, workshop)
    values = [
        optimisation.loss(optimisation.module, part, optimisation.target(part), whole)[0]
        for part in (part_of(whole, slice(0, 1)), part_of(whole, slice(1, 4)))
    ]
    at = [(i, t) for i, n in enumerate(LENGTHS) for t in range(n)] if counts == "all" else places(whole)
    theirs, own = (each(input_ids=whole.ids, use_cache=False).logits for each in (frozen, model))
    expected = sum(losses.logit_divergence(own[place], theirs[place]).item() for place in at) / max(1, len(at))
    assert sum(values).item() == pytest.approx(expected, rel=1e-6) and bool(at) == (counts != "none")
    for slope in slopes(sum(values), model):
        assert slope.isfinite().all() and (counts != "none" or not slope.any())


def test_held_out_figures_are_those_of_the_assistants_tokens():
    whole, frozen, model = batch(), tiny_teacher(), tiny_student()
    text, own = whole.ids.numpy(), whole.counted.numpy()
    found = measure.held_out(model, text, frozen, own)
    log_q, log_p = (each(input_ids=whole.ids, use_cache=False).logits.log_softmax(-1) for each in (model, frozen))
    at = places(whole)
    assert found.tokens == len(at)
    assert found.loss == pytest.approx(-sum(log_q[i, t, whole.ids[i, t + 1]].item() for i, t in at) / len(at))
    agreed = sum((log_q[place].argmax() == log_p[place].argmax()).item() for place in at)
    assert found.agreement == pytest.approx(agreed / len(at))
    apart = sum((log_p[place].exp() * (log_p[place] - log_q[place])).sum().item() for place in at)
    assert found.divergence == pytest.approx(apart / len(at))
    by_position = measure.by_position(model, text, frozen, own)
    for t in range(16):
        losses_at = [-log_q[i, t, whole.ids[i, t + 1]].item() for i, place in at if place == t]
        assert by_position.counts[t] == len(losses_at)
        assert by_position.loss[t].item() == pytest.approx(sum(losses_at) / max(1, len(losses_at)))
    everything = measure.held_out(model, text, frozen, np.ones_like(own))
    assert everything == measure.held_out(model, text, frozen) and everything.tokens == 4 * 16
    # The first blocks that have something to measure.
    own[:2] = False
    assert transfer.held_out_loss(model, text, own)["held_out_loss"] == measure.held_out(model, text, counted=own).loss


def test_the_reports_perplexity_is_that_of_the_assistants_tokens():
    """By document and by position, token by token; a bin without the assistant's tokens has no metric."""
    whole, model, tokenizer = batch(), tiny_student(), made(CHATML, None, "a")
    tokenizer.bos_token_id = tokenizer.eos_token_id = 5
    text, own = whole.ids.numpy().copy(), whole.counted.numpy().copy()
    text[text == 5], text[0, 0], text[2, 7] = 6, 5, 5  # two documents
    own[:, 2:4] = False
    evaluated = types.SimpleNamespace(model=model, tokenizer=tokenizer)
    perplexity, size = likelihood.of_blocks(evaluated, Blocks("", text, own), None)
    log_p = model(input_ids=torch.from_numpy(text), use_cache=False).logits.log_softmax(-1)
    sums, counts, sizes = np.zeros(3), np.zeros(3), np.zeros(3)
    at = [(i, t) for i in range(4) for t in range(1, 17) if own[i, t]]
    for i, t in at:
        document = 1 + int((i, t) >= (2, 7))
        sums[document] -= log_p[i, t - 1, text[i, t]].item()
        counts[document] += 1
        sizes[document] += len(tokenizer.decode([text[i, t]]).encode().replace("\ufffd".encode(), b"?"))
    np.testing.assert_allclose(perplexity.numerators, sums[1:], rtol=1e-6)
    assert perplexity.denominators == counts[1:].tolist() and min(counts[1:]) > 0
    assert sum(size.denominators) == pytest.approx(sum(sizes), abs=2)
    settings = likelihood.Settings(7, 7, 17)
    found = {m.name: m for m in likelihood.by_position(evaluated, text.reshape(-1), settings, own.reshape(-1))}
    assert "perplexity at 1" in found and "perplexity at 2–3" not in found
    for name, first, last in (("at 1", 1, 1), ("at 4–7", 4, 7), ("past 7, up to 17", 7, 16)):
        inside = [(i, t) for i, t in at if first <= t <= last]
        assert sum(found[f"perplexity {name}"].denominators) == len(inside) > 0
        expected = -sum(log_p[i, t - 1, text[i, t]].item() for i, t in inside)
        assert sum(found[f"perplexity {name}"].numerators) == pytest.approx(expected, rel=1e-6)
    record = Blocks("", text, own).settings
    assert record["counted_tokens"] == len(at) and "counted_tokens" not in Blocks("", text).settings


TALK = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.slow
def test_a_run_on_conversations(workshop, tmp_path):
    """Every stage; the figures of the report are those of the assistant's tokens."""
    shutil.copytree(workshop / "teacher", tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.chat_template = TALK
    tokenizer.save_pretrained(tmp_path / "teacher")
    texts = [json.loads(line)["text"] for line in (workshop / "text.jsonl").read_text().splitlines()]
    write(tmp_path / "talk.jsonl", [turns(*(text[at : at + 60] for at in range(0, 480, 60))) for text in texts])
    overrides = [
        f"run_dir={tmp_path}/run",
        f"teacher.path={tmp_path}/teacher",
        f"data.path={tmp_path}/talk.jsonl",
        "data.chat_column=messages",
        "data.chat_loss=assistant",
        "transfer.logits.cross_entropy=0.2",
        f"cache={{folder: {tmp_path}/cache, logits: 9}}",
        "transfer.activations.steps=4",
        "transfer.logits.steps=4",
        "recurrence.max_state_size=4",
        "recurrence.method=balanced",
        "report.context_lengths=[20]",
        "report.cases=[2x8+3]",
        "report.examples=1",
    ]
    scavenger(workshop / "recipe.yaml", *overrides)
    folder = tmp_path / "run"
    text, own = blocks(folder / "data", "test"), counted(folder / "data", "test")
    assert AutoTokenizer.from_pretrained(folder / "transfer").chat_template == TALK
    figures = checkpoint.read_json(folder / "report/report.json")
    assert figures["test_tokens"] == own[:, 1:].sum() < 0.7 * text[:, 1:].size
    assert "predicted tokens of the test split that the assistant wrote" in (folder / "report/index.html").read_text()
    exact = {"distilled": student.load(folder / "transfer"), "pre-trained": student.load(folder / "baseline")}
    frozen = teacher.load(load_recipe(str(workshop / "recipe.yaml"), overrides).teacher, folder)
    for name, model in exact.items():
        row, found = figures["models"][name], measure.held_out(model, text, frozen, own)
        assert row["perplexity"] == pytest.approx(found.perplexity, rel=1e-4)
        assert row["divergence"] == pytest.approx(found.divergence, rel=1e-3)
        assert abs(found.perplexity - measure.held_out(model, text).perplexity) > 1
    certified = checkpoint.read_json(folder / "recurrence/certificate.json")["model"]
    validation = blocks(folder / "data", "validation"), counted(folder / "data", "validation")
    assert certified["tokens"] == validation[1][:, 1:].sum()
    found = measure.held_out(exact["distilled"], validation[0], counted=validation[1])
    assert certified["exact_perplexity"] == pytest.approx(found.perplexity, rel=1e-4)
    last = checkpoint.read_json(folder / "transfer/history.json")[-1]
    first = transfer.held_out_loss(exact["distilled"], *validation)
    assert last["held_out_loss"] == pytest.approx(first["held_out_loss"], rel=1e-3)
