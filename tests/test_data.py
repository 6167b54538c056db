"""The same text on every machine, from whatever moment a run goes on, and held-out text that stays out."""

import gzip
import io
import itertools
import json
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from program import forked

from scavenger import data, loading
from scavenger.recipe import Activations, Data, Logits, Recipe, RecipeError, Teacher, TeacherTraining, Transfer
from scavenger.run import checkpoint


class Letters:
    """A tokenizer of single characters."""

    eos_token_id = bos_token_id = 0

    def __init__(self, size=300):
        self.size = size

    def get_vocab(self):
        return {str(index): index for index in range(self.size)}

    def convert_ids_to_tokens(self, number):
        return str(number)

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[min(ord(letter), self.size - 1) for letter in text] for text in texts]}


def recipe(steps=10, seed=3, **settings):
    """A recipe that asks for `steps` blocks of training text."""
    stage = {"batch_size": 1, "learning_rate": 1e-3}
    transfer = Transfer((Activations(steps=1, **stage),), (Logits(steps=steps - 1, **stage),))
    settings = {"context_length": 11, "evaluation_tokens": 200} | settings
    return Recipe(run_dir="run", seed=seed, data=Data(**settings), transfer=transfer)


def texts_of(count, start=0):
    return [f"text {index} of several\n" + "more " * (index % 7) for index in range(start, start + count)]


def write(path, texts, kind=None):
    kind = kind or path.suffix[1:]
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "n": index}) for index, text in enumerate(texts)))
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"n": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=13)
    else:
        path.write_text("".join(texts))


def names(settings, seed=0):
    return [name for name, _ in data.documents(settings, seed)]


def test_splits_are_whole_documents_by_their_name():
    found = Counter(data.split_of(f"package/module_{index}.py") for index in range(2000))
    assert 1720 < found["train"] < 1880 and 60 < found["validation"] < 140 and 60 < found["test"] < 140
    assert data.split_of("asyncio/events.py") == data.split_of("asyncio/events.py") == "train"


@pytest.mark.slow
def test_standard_library():
    files = data.stdlib_files()
    assert len(files) > 400 and "asyncio/events.py" in files
    assert not any("/test/" in f"/{name}" or "site-packages" in name for name in files)
    first = names(Data(), 1)
    assert sorted(first) == sorted(files)
    for seed in (1, 2):
        some = [name for name, _ in itertools.islice(data.documents(Data(), seed), 20)]
        assert (some == first[:20]) == (seed == 1)
    found = data.source(Data())
    assert found["modules"] == len(files) and len(found["content_sha256"]) == 64


def slow_tokens(settings, seed, tokenizer, wanted):
    """One document after the other, all in memory; of text without splits of its own, in a stream."""
    kept = {split: [] for split in data.SPLITS}
    for name, text in data.documents(settings, seed):
        split = data.split_of(name)
        if len(kept[split]) < wanted[split]:
            kept[split] += tokenizer([text])["input_ids"][0] + [tokenizer.eos_token_id]
    length = settings.context_length
    cut = {split: ids[: min(len(ids), wanted[split]) // length * length] for split, ids in kept.items()}
    return {split: np.array(ids).reshape(-1, length) for split, ids in cut.items()}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["library", "jsonl"])
def test_blocks_are_documents_end_to_end(tmp_path, source):
    if source == "jsonl":
        write(tmp_path / "a.jsonl", texts_of(400))
    asked = recipe(steps=70, path=str(tmp_path / "a.jsonl") if source == "jsonl" else None)
    folder = data.run(asked, tmp_path, Letters())
    slow = slow_tokens(asked.data, 3, Letters(), {"train": 770, "validation": 200, "test": 200})
    for split in data.SPLITS:
        found = data.blocks(folder, split)
        assert np.array_equal(found, slow[split]) and found.dtype == np.uint16
        beside = io.BytesIO()
        np.save(beside, slow[split].astype(np.uint16))
        assert (folder / f"{split}.npy").read_bytes() == beside.getvalue()
    assert sorted(path.name for path in folder.iterdir()) == ["source.json", *sorted(f"{s}.npy" for s in data.SPLITS)]
    written = checkpoint.read_json(folder / "source.json")
    assert written["tokens"] == {"train": 770, "validation": 198, "test": 198}
    assert written["packing"] == {"kind": "stream", "padding": 0}
    assert data.run(asked, tmp_path, None) == folder  # complete: neither text nor tokenizer is asked for


def test_the_type_leaves_room_for_padding(tmp_path):
    write(tmp_path / "a.jsonl", texts_of(400))
    for size, kind in [(2**16 - 1, np.uint16), (2**16, np.uint32)]:
        data.tokenise(recipe(path=str(tmp_path / "a.jsonl")), Letters(size), tmp_path / str(size))
        assert data.blocks(tmp_path / str(size), "train").dtype == kind


def test_batches_depend_on_the_position_alone():
    array = np.arange(7 * 5, dtype=np.uint16).reshape(7, 5)
    whole = data.batch(array, 0, 21, seed=3)
    parts = [data.batch(array, first, 3, seed=3) for first in range(0, 21, 3)]
    assert torch.equal(whole.ids, torch.cat([part.ids for part in parts]))
    assert np.array_equal(whole.rows, np.concatenate([part.rows for part in parts]))
    assert np.array_equal(whole.rows, data.rows(7, 0, 21, seed=3))
    assert np.array_equal(array[whole.rows], whole.ids.numpy()) and whole.mask.all()
    passes = whole.ids.reshape(3, 7, 5)
    for one in passes:
        assert sorted(one[:, 0].tolist()) == list(range(0, 35, 5))  # each pass reads every block once
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(whole.ids, data.batch(array, 0, 21, seed=4).ids)


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_padding_is_masked(kind):
    largest = np.iinfo(kind).max
    array = np.array([[5, 6, 7], [8, largest - 1, largest], [0, largest, largest]], kind)
    found = data.batch(array, 0, 3, seed=1)
    by_row = np.argsort(found.rows)
    assert found.ids[by_row].tolist() == [[5, 6, 7], [8, int(largest) - 1, 0], [0, 0, 0]]
    assert found.mask[by_row].tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert found.ids.dtype == torch.int64 and found.mask.dtype == torch.bool


def test_tokens_needed_are_those_of_all_phases():
    stage = {"learning_rate": 1e-3}
    phases = Transfer(
        (Activations(steps=2, batch_size=3, **stage), Activations(steps=5, batch_size=7, **stage)),
        (Logits(steps=11, batch_size=2, **stage),),
    )
    teacher = Teacher(
        train=TeacherTraining(
            steps=4, batch_size=16, learning_rate=1e-3, hidden_size=8, num_layers=1, num_heads=1, vocab_size=300
        )
    )
    settings = Data(context_length=13, evaluation_tokens=13)
    assert data.tokens_needed(Recipe(run_dir="x", data=settings, transfer=phases)) == 13 * (6 + 35 + 22)
    assert data.tokens_needed(Recipe(run_dir="x", data=settings, transfer=phases, teacher=teacher)) == 13 * 64
    assert data.tokens_needed(Recipe(run_dir="x", data=settings, teacher=teacher)) == 13 * 64


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "txt", "file"])
def test_local_text(tmp_path, kind, size, monkeypatch):
    if size == "large":
        monkeypatch.setattr(data, "SHUFFLED_BYTES", 0)
    texts = [f"text number {index}\nof several" for index in range(23)]
    path = tmp_path / "corpus [1]"
    path.mkdir()
    if kind == "txt":
        for index, text in enumerate(texts):
            write(path / f"{index}.txt", [text])
        (path / "empty.txt").touch()  # as an empty module is
    elif kind == "file":
        path = path / "one.txt"
        texts = ["\n".join(texts)]
        write(path, texts)
    else:
        for number in range(3):
            write(path / f"{number}.{kind}", texts[8 * number : 8 * number + 8])
    assert sorted(names(Data(path=str(path)))) == sorted(texts)
    assert names(Data(path=str(path)), 1) == names(Data(path=str(path)), 1)
    if len(texts) > 1:
        assert names(Data(path=str(path)), 1) != names(Data(path=str(path)), 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "library"])
def test_the_stream_goes_on_from_any_document(tmp_path, kind, size, monkeypatch):
    if size == "large":
        monkeypatch.setattr(data, "SHUFFLED_BYTES", 0)
    monkeypatch.setattr(data, "PIECE", 50)
    if kind == "library":
        some = dict(list(data.stdlib_files().items())[:9])
        monkeypatch.setattr(data, "stdlib_files", lambda: some)
    else:
        for number in range(3):
            write(tmp_path / f"{number}.{kind}", texts_of(17, 17 * number) + ["", "the last\n"])
    (part,) = data.text_parts(Data() if kind == "library" else Data(path=str(tmp_path)), 5)
    whole = list(part.read(None))
    assert len(whole) > (8 if kind == "library" else 20)
    for index, document in enumerate(whole):
        place = json.loads(json.dumps(document.place))
        assert [rest.text for rest in part.read(place)] == [rest.text for rest in whole[index + 1 :]]


def test_a_long_text_file_is_cut_at_line_ends(tmp_path):
    lines = [f"line {index}\n" for index in range(20_000)]
    write(tmp_path / "a.txt", lines)
    pieces = names(Data(path=str(tmp_path)))
    assert len(pieces) > 5 and all(piece.endswith("\n") for piece in pieces)
    assert all(data.PIECE < len(piece) <= data.PIECE + 12 for piece in pieces if lines[-1] not in piece)
    assert sorted("".join(pieces).splitlines(True)) == sorted(lines)


def corpus(folder, kind, named):
    """1,600 documents in several files: some files, or the three splits of a data set."""
    folder.mkdir()
    if named:
        write(folder / f"dev.{kind}", texts_of(80, 5000))
        write(folder / f"test.{kind}", texts_of(80, 6000))
    for number in range(4):
        write(
            folder / f"train-{number}-of-4.{kind}" if named else folder / f"{number}.{kind}",
            texts_of(400, 400 * number),
        )
    return folder


class Stop(BaseException):
    """What nothing but the test catches."""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "named", "packing", "shuffled"),
    [
        ("jsonl", False, "stream", 0),
        ("jsonl", True, "documents", 2**30),
        ("parquet", True, "stream", 0),
        ("txt", False, "documents", 0),
    ],
)
def test_broken_off_anywhere_it_ends_with_the_same_files(tmp_path, monkeypatch, kind, named, packing, shuffled):
    monkeypatch.setattr(data, "SHUFFLED_BYTES", shuffled)
    monkeypatch.setattr(data, "PIECE", 40)
    asked = recipe(9000, path=str(corpus(tmp_path / "corpus", kind, named)), packing=packing, evaluation_tokens=700)
    whole = files_of(data.run(asked, tmp_path / "whole", Letters()))
    documents = sum(json.loads(whole["source.json"])["documents"].values())
    assert documents > 500
    append, write_json = data._Files.append, checkpoint.write_json
    left = 0

    def breaking_append(files, split, ids):
        nonlocal left
        append(files, split, ids)
        left -= 1
        if left == 0:
            raise Stop  # what was appended is flushed, and more than the state says

    def breaking_write(path, values):
        write_json(path, values)
        if path.name == "source.json" and len(moments) == 0 and not finished:
            finished.append(path)
            raise Stop  # all is made but the folder's name

    monkeypatch.setattr(data, "CHUNK_DOCUMENTS", 37)
    monkeypatch.setattr(data._Files, "append", breaking_append)
    monkeypatch.setattr(data.checkpoint, "write_json", breaking_write)
    moments, finished, stops = [1, 36, 38, 111, 200], [], 0
    while not (tmp_path / "broken" / "data").is_dir():
        left = moments.pop(0) if moments else 0
        try:
            data.run(asked, tmp_path / "broken", Letters())
        except Stop:
            stops += 1
    assert stops == 6
    assert files_of(tmp_path / "broken" / "data") == whole


def _killed(text, folder, left):
    """Tokenise, and kill this process after so many documents."""
    data.SHUFFLED_BYTES, data.CHUNK_DOCUMENTS = 0, 37
    append, numbers = data._Files.append, itertools.count(1)

    def appended(files, split, ids):
        append(files, split, ids)
        if next(numbers) == left:
            os.kill(os.getpid(), signal.SIGKILL)

    data._Files.append = appended
    data.run(recipe(9000, path=text, evaluation_tokens=700), folder, Letters())


@pytest.mark.slow
def test_killed_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHUFFLED_BYTES", 0)
    text = str(corpus(tmp_path / "corpus", "jsonl", True))
    asked = recipe(9000, path=text, evaluation_tokens=700)
    whole = files_of(data.run(asked, tmp_path / "whole", Letters()))
    process = forked(_killed, text, tmp_path / "killed", 250)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.read_json(tmp_path / "killed" / "data.partial" / "state.json")["documents"]["train"] > 0
    assert files_of(data.run(asked, tmp_path / "killed", Letters())) == whole


def test_a_state_that_says_more_than_the_disk_holds_is_none(tmp_path):
    write(tmp_path / "a.jsonl", texts_of(400))
    asked = recipe(path=str(tmp_path / "a.jsonl"))
    data.tokenise(asked, Letters(), tmp_path / "data.partial")
    whole = files_of(tmp_path / "data.partial")
    for name, length in [("train.npy", 140), ("state.json", 0)]:  # a machine that went down
        os.truncate(tmp_path / "data.partial" / name, length)
        data.tokenise(asked, Letters(), tmp_path / "data.partial")
        assert files_of(tmp_path / "data.partial") == whole


def test_splits_by_the_names_of_files(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for split, start in [("train", 0), ("valid", 500), ("test", 600)]:
        write(text / f"{split}.jsonl", texts_of(60, start) + ["held out twice"])
    write(text / "train-00001-of-00002.jsonl", texts_of(60, 60) + texts_of(10, 500))
    write(text / "README.md", ["what this is"])
    folder = data.run(recipe(9000, path=str(text), context_length=8, evaluation_tokens=8000), tmp_path, Letters())
    numbers = {}
    for split in data.SPLITS:
        words = "".join(map(chr, data.blocks(folder, split).reshape(-1)))
        numbers[split] = {
            int(line.split()[1]) for line in words.split("\0") if line.startswith("text ") and " of " in line
        }
        assert ("held out twice" in words) == (split != "train")
    assert numbers["train"] <= set(range(120)) and len(numbers["train"]) > 115  # the last block is cut
    assert numbers["validation"] >= set(range(500, 559)) and numbers["test"] >= set(range(600, 659))
    found = checkpoint.read_json(folder / "source.json")
    assert found["documents"] == {"train": 120, "validation": 61, "test": 61, "left_out": 11}
    assert sorted(names(Data(path=str(text)))) == sorted(texts_of(120) + texts_of(10, 500) + ["held out twice"])
    (text / "valid.jsonl").unlink()
    (text / "README.md").unlink()
    with pytest.raises(RecipeError, match="test: test.jsonl; expected files of all three splits"):
        names(Data(path=str(text)))


def shard_names(folder):
    """The files of each split, as the tokeniser takes them."""
    parts = data.text_parts(Data(path=str(folder)), 0)
    return {part.split: [os.path.relpath(name, folder) for name in part.shards] for part in parts}


def layout(folder, files):
    for name in files.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, [f"the text of {name}"], "txt")


@pytest.mark.parametrize(
    "files",
    [
        "train/a.txt train/b.txt validation/a.txt test/a.txt",
        "Train/a.txt VAL/a.txt Test/a.txt",
        "data/train/a.txt data/dev/a.txt data/test/a.txt README.md",
        "en/train/a.txt de/train/a.txt en/valid/a.txt en/test/unit-train.txt",
        "train/deep/a.txt train/deeper/b.txt valid.txt test.txt",
        "wiki.train.txt wiki.valid.txt wiki.test.txt",
        "corpus-train.jsonl corpus-dev.jsonl corpus-test.jsonl",
        "wiki_train.TXT news_val.txt books_test.txt",
        "data/train-00000-of-00002-a09b74b3ef9c3b56.parquet data/train-00001-of-00002-a09b74b3ef9c3b56.parquet "
        "data/validation-00000-of-00001.parquet data/test-00000-of-00001.parquet README.md dataset_infos.json",
        "train1.txt train2.txt valid1.txt test1.txt",
        "train.en.txt valid.en.txt test.en.txt",
        "train_clean.jsonl validation_clean.jsonl test_clean.jsonl",
        "wiki.train.raw.txt wiki.valid.raw.txt wiki.test.raw.txt LICENSE.md",
        "train.txt evaluation.txt dev.txt",
    ],
)
def test_splits_are_known_by_names(tmp_path, files):
    layout(tmp_path, files)
    found = shard_names(tmp_path)
    assert list(found) == ["validation", "test", "train"]
    assert all("train" in name.lower() for name in found["train"])
    assert not any("train" in name.lower().removesuffix("unit-train.txt") for name in found["test"])
    assert all(any(word in name.lower() for word in ("val", "dev")) for name in found["validation"])
    text = {name for name in files.split() if not name.startswith(("README", "LICENSE", "dataset_infos"))}
    assert {name for group in found.values() for name in group} == text


@pytest.mark.parametrize(
    "files",
    [
        "latest.txt training_manual.txt contest.txt",
        "the-last-train.txt notes.txt",
        "test_results.txt dev_notes.txt train_times.txt",
        "train.py test.py model.py val/a.py",
        "training.md testing.md evaluation.md install.md",
        "train-00000-of-00002.parquet train-00001-of-00002.parquet",
        "train/a.txt train/b.txt",
    ],
)
def test_a_word_is_no_split_by_accident(tmp_path, files):
    layout(tmp_path, files)
    assert shard_names(tmp_path) == {None: sorted(files.split())}


@pytest.mark.parametrize(
    ("files", "mapping"),
    [
        ("train.jsonl test.jsonl", "train: train.jsonl; test: test.jsonl; expected files of all three splits"),
        ("train/a.txt val/a.txt", "train: train/a.txt; validation: val/a.txt; expected"),
        ("validation.jsonl", "found these splits by file name: validation: validation.jsonl; expected"),
        ("test/a.txt test/b.txt", "found these splits by file name: test: test/a.txt, test/b.txt; expected"),
        ("train.txt dev.txt test.txt more.txt", "test: test.txt; in no split: more.txt; expected"),
        (
            "wiki.train.txt wiki.test.txt notes.txt",
            "test: wiki.test.txt; in no split: notes.txt; expected",
        ),
        ("train/a.txt test/a.txt b.txt", "train: train/a.txt; test: test/a.txt; in no split: b.txt; expected"),
        ("a.txt b.txt c.txt d.txt train/e.txt valid.txt", "in no split: a.txt, b.txt, c.txt and 1 more; expected"),
    ],
)
def test_what_may_be_splits_is_refused_with_the_mapping(tmp_path, files, mapping):
    layout(tmp_path, files)
    with pytest.raises(RecipeError, match=mapping):
        shard_names(tmp_path)


def test_what_is_read_as_which_split_is_said_and_written(tmp_path, capsys):
    for split, start in [("train", 0), ("valid", 500), ("test", 600)]:
        (tmp_path / "own" / split).mkdir(parents=True)
        for number in range(2):
            write(tmp_path / "own" / split / f"{number}.jsonl", texts_of(40, start + 40 * number))
    data.run(recipe(path=str(tmp_path / "own")), tmp_path / "a", Letters())
    line, _ = capsys.readouterr().out.splitlines()
    found = "train train/0.jsonl and 1 more; validation valid/0.jsonl and 1 more; test test/0.jsonl and 1 more"
    assert line == f"data: {tmp_path}/own, its own splits: {found}"
    written = checkpoint.read_json(tmp_path / "a/data/source.json")
    assert written["splits"] == "its own" and written["files"]["test"] == ["test/0.jsonl", "test/1.jsonl"]
    (tmp_path / "plain").mkdir()
    for number in range(2):
        write(tmp_path / "plain" / f"{number}.jsonl", texts_of(200, 200 * number))
    data.run(recipe(path=str(tmp_path / "plain")), tmp_path / "b", Letters())
    line = f"data: {tmp_path}/plain (2 files), split 90/5/5 by a hash of each document\n"
    assert capsys.readouterr().out.startswith(line)
    written = checkpoint.read_json(tmp_path / "b/data/source.json")
    assert written["splits"].startswith("90/5/5") and written["files"] == {"all": ["0.jsonl", "1.jsonl"]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set that `load_dataset` finds by a name of the Hub; returns its folder."""
    import datasets

    load = datasets.load_dataset

    def found(name, *args, **kwargs):
        return load(str(tmp_path / "hub"), **kwargs) if name == "some/texts" else load(name, *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", found)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@pytest.mark.slow
def test_a_data_set_of_the_hub(hub, tmp_path):
    for number in range(3):
        write(hub / f"train-0000{number}-of-00003.parquet", texts_of(30, 30 * number))
    settings = Data(name="some/texts")
    (part,) = data.text_parts(settings, 5)
    whole = list(part.read(None))
    assert sorted(document.text for document in whole) == sorted(texts_of(90))
    assert [document.text for document in whole] != texts_of(90)
    for index, document in enumerate(whole):
        assert [rest.text for rest in part.read(document.place)] == [rest.text for rest in whole[index + 1 :]]
    write(hub / "validation.parquet", texts_of(30, 500))
    write(hub / "test.parquet", texts_of(30, 600))
    assert [part.split for part in data.text_parts(settings, 5)] == ["validation", "test", "train"]
    asked = recipe(80, name="some/texts")
    folder = data.run(asked, tmp_path, Letters())
    assert checkpoint.read_json(folder / "source.json")["splits"] == "its own"
    assert "text 50" in "".join(map(chr, data.blocks(folder, "validation").reshape(-1)))


def test_a_hub_that_goes_away(hub, tmp_path, monkeypatch):
    import datasets

    for number in range(3):
        write(hub / f"train-0000{number}-of-00003.jsonl", texts_of(200, 200 * number))
    asked = recipe(9000, name="some/texts")
    whole = files_of(data.run(asked, tmp_path / "whole", Letters()))
    shard, opened = datasets.IterableDataset.shard, []

    def unreachable(rows, *args, **kwargs):
        opened.append(args)
        if len(opened) == 3:
            raise ConnectionError("the network is unreachable\nat great length")
        return shard(rows, *args, **kwargs)

    monkeypatch.setattr(datasets.IterableDataset, "shard", unreachable)
    message = (
        r"some/texts could not be read to the end \(the network is unreachable\).*run the same command again to resume$"
    )
    with pytest.raises(RecipeError, match=message):
        data.run(asked, tmp_path / "cut", Letters())
    state = checkpoint.read_json(tmp_path / "cut" / "data.partial" / "state.json")
    assert sum(state["documents"].values()) > 350  # both shards that could be read
    assert files_of(data.run(asked, tmp_path / "cut", Letters())) == whole
    with pytest.raises(RecipeError, match="no/texts cannot be read from the Hub.*data.path="):
        data.text_parts(Data(name="no/texts"), 0)


def test_documents_begin_blocks(tmp_path):
    lengths = [3, 11, 12, 21, 40]  # with the end of text: part of a block, a block and one more than that among them
    texts = [chr(65 + index % 26) * (lengths[index % 5] - 1) for index in range(60)]
    for split, some in [("train", texts), ("validation", texts_of(20)), ("test", texts_of(20, 20))]:
        (tmp_path / "text").mkdir(exist_ok=True)
        write(tmp_path / "text" / f"{split}.jsonl", some)
    asked = recipe(60 * 8, path=str(tmp_path / "text"), packing="documents")
    folder = data.run(asked, tmp_path, Letters())
    found = data.blocks(folder, "train")
    order = [document.text for document in data.text_parts(asked.data, asked.seed)[-1].read(None)]
    slow = []
    for text in order:
        ids = [*map(ord, text), 0]
        for first in range(0, len(ids), 11):
            block = ids[first : first + 11]
            if len(block) > 1:  # one token on its own predicts nothing
                slow.append(block + [65535] * (11 - len(block)))
    assert found.tolist() == slow
    padded = sum(row.count(65535) for row in slow) / (11 * len(slow))
    written = checkpoint.read_json(folder / "source.json")["packing"]
    assert written == {"kind": "documents", "padding": pytest.approx(padded)} and padded > 0.1
    assert not any((data.blocks(folder, split) == 65535).any() for split in ("validation", "test"))
    taken = data.batch(found, 0, len(found), 0)
    assert (~taken.mask).sum() == sum(row.count(65535) for row in slow) and taken.ids.max() < 300


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_overlap_is_the_share_of_windows_that_train_has_too(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(data, "OVERLAP_CHUNK", 100)  # windows straddle chunks
    some = np.random.default_rng(5)
    train = some.integers(0, 3, 7 * 131).astype(kind)  # of three tokens, so that windows recur
    held_out = {"validation": some.integers(0, 3, 7 * 60), "test": some.integers(3, 9, 7 * 61)}
    for start in (90, 190, 300, 7 * 131 - 20):
        held_out["validation"][start % 397 : start % 397 + 20] = train[start : start + 20]
    held_out["test"][50:62] = train[50:62]  # 12 tokens are no window
    for split, ids in [("train", train), *held_out.items()]:
        np.save(tmp_path / f"{split}.npy", ids.astype(kind).reshape(-1, 7))
    seen = {tuple(train[place : place + 13].tolist()) for place in range(len(train) - 12)}
    found = data.overlaps(tmp_path)
    for split, ids in held_out.items():
        windows = [tuple(ids[place : place + 13].tolist()) for place in range(len(ids) - 12)]
        assert found[split] == sum(window in seen for window in windows) / len(windows)
    assert found["validation"] > 0.04 and found["test"] == 0
    np.save(tmp_path / "test.npy", train[:8].reshape(1, 8))
    assert data.overlaps(tmp_path)["test"] == 0  # no window of 13


def test_the_hash_of_a_window_is_a_polynomial():
    ids = np.random.default_rng(2).integers(0, 2**32 - 1, 40).astype(np.uint32)
    slow = [sum(int(ids[n + j]) * data.FACTOR ** (13 - j) for j in range(13)) % 2**64 for n in range(28)]
    assert data._window_hashes(ids).tolist() == slow


def test_one_line_says_what_was_made(tmp_path, capsys):
    for split, start in [("train", 0), ("validation", 0), ("test", 900)]:
        write(tmp_path / f"{split}.jsonl", texts_of(60, start))
    with pytest.raises(RecipeError, match="the train split has 0 tokens.*expected more text in it"):
        data.run(recipe(path=str(tmp_path), evaluation_tokens=9000), tmp_path, Letters())  # all of it is held out
    assert not (tmp_path / "data.partial").exists() and "tokens" not in capsys.readouterr().out
    write(tmp_path / "train.jsonl", [text + "again" for text in texts_of(60)])
    data.run(recipe(path=str(tmp_path)), tmp_path, Letters())
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("data: tokens train 110, validation 198, test 198; 13-token windows that are in train too: ")


def test_too_little_text(tmp_path):
    write(tmp_path / "a.jsonl", texts_of(2))
    with pytest.raises(
        RecipeError, match="split has 0 tokens, less than one context of 11; documents are split 90/5/5 by hash"
    ):
        data.run(recipe(path=str(tmp_path)), tmp_path, Letters())
    write(tmp_path / "a.jsonl", texts_of(400))
    data.run(recipe(path=str(tmp_path)), tmp_path, Letters())  # nothing is left of the first attempt


def test_vocabulary():
    loading.require_ids(Letters(97), 97)
    loading.require_ids(Letters(97), 128)  # padded, as Pythia's
    with pytest.raises(RecipeError, match="ids up to 1,096, the model has 97 embedding.*below 97.*another model's"):
        loading.require_ids(Letters(1097), 97)
    endless = Letters(97)
    endless.eos_token_id = None
    with pytest.raises(RecipeError, match="no end-of-text token"):
        loading.require_ids(endless, 97)


def test_rows_without_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": 1}\n{"text": null, "n": 2}\n{"text": "", "n": 3}')
    assert names(Data(path=str(tmp_path))) == ["x"]
    with pytest.raises(RecipeError, match="found int.*name a column of text"):
        names(Data(path=str(tmp_path), text_column="n"))


def test_data_that_cannot_be_read(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(RecipeError, match="files of one kind"):
        names(Data(path=str(tmp_path)))
    (tmp_path / "a.csv").unlink()
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    with pytest.raises(RecipeError, match="found columns body.*text_column"):
        names(Data(path=str(tmp_path)))
    (tmp_path / "a.jsonl").write_text('{"body": ')
    with pytest.raises(RecipeError, match="cannot be read as json"):
        names(Data(path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "txt"])
def test_an_empty_shard_is_passed_over(tmp_path, kind):
    write(tmp_path / f"a.{kind}", texts_of(30))
    before = sorted(names(Data(path=str(tmp_path))))
    (tmp_path / f"b.{kind}").touch()
    assert sorted(names(Data(path=str(tmp_path)))) == before
    (tmp_path / f"a.{kind}").write_bytes(b"")
    with pytest.raises(RecipeError, match=f"data.path: {tmp_path}: all files are empty; expected text"):
        names(Data(path=str(tmp_path)))


def test_text_without_line_ends_is_cut_by_characters(tmp_path):
    text = "".join(chr(0x4E00 + index % 999) for index in range(40_000))
    (tmp_path / "a.txt").write_text(text)
    (part,) = data.text_parts(Data(path=str(tmp_path)), 0)
    pieces = [
        document.text for document in data._streamed([data._file_shard(tmp_path / "a.txt", "text", Data())], 0, None)
    ]
    assert sorted(pieces) == sorted(document.text for document in part.read(None))
    assert "".join(pieces) == text and [len(piece) for piece in pieces] == [16_385, 16_385, 7_230]


def test_what_datasets_saves_is_read(tmp_path):
    rows = Dataset.from_dict({"text": texts_of(30), "n": list(range(30))})
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert sorted(names(Data(path=str(tmp_path / "one")))) == sorted(texts_of(30))
    DatasetDict({"train": rows, "validation": rows, "test": rows}).save_to_disk(str(tmp_path / "three"))
    assert list(shard_names(tmp_path / "three")) == ["validation", "test", "train"]
    assert sorted(names(Data(path=str(tmp_path / "three")))) == sorted(texts_of(30))
    (tmp_path / "one" / "cache-1f.arrow").write_bytes(b"of map()")
    assert shard_names(tmp_path / "one") == {None: [f"data-0000{number}-of-00002.arrow" for number in range(2)]}


def test_a_snapshot_of_the_hub_is_read(tmp_path):
    """Links to blobs, with a card and other files beside the text."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot/data").mkdir(parents=True)
    (tmp_path / "snapshot/.cache").mkdir()
    for number in range(2):
        write(tmp_path / "blobs" / f"{number}", texts_of(20, 20 * number), "parquet")
        (tmp_path / f"snapshot/data/train-0000{number}-of-00002.parquet").symlink_to(tmp_path / f"blobs/{number}")
    for name in ("README.md", "LICENSE.txt", ".gitattributes", ".cache/a.json", "dataset_infos.json", "logo.png"):
        (tmp_path / "snapshot" / name).write_text("{}")
    assert sorted(names(Data(path=str(tmp_path / "snapshot")))) == sorted(texts_of(40))
    # Such names are text where they are not beside a table, or have another suffix.
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "guide.md", "license.md"):
        write(tmp_path / "docs" / name, [name])
    assert sorted(names(Data(path=str(tmp_path / "docs")))) == ["README.md", "guide.md", "license.md"]
    (tmp_path / "tables").mkdir()
    for name in ("state.jsonl", "a.jsonl"):
        write(tmp_path / "tables" / name, [name])
    assert sorted(names(Data(path=str(tmp_path / "tables")))) == ["a.jsonl", "state.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("null", "line 2: found null; expected an object with the column text"),
        ("3", "line 2: found 3; expected an object"),
        ('["a"]', r'line 2: found \["a"\]; expected an object'),
        ("{}", r"line 2: found columns \(none\); expected data.text_column"),
        ('{"text": 5}', "line 2: found int values in text"),
        ('{"text": {"a": 1}}', "line 2: found dict values in text"),
        ('{"text": "\\ud800"}', "line 2: found half a surrogate pair in text"),
        ('{"text": "a', r"cannot be read as json \(line 2: Invalid control character"),
        ("[" * 99_999, r"cannot be read as json \(line 2: maximum recursion depth"),
        ('{"text": ' + "9" * 9999 + "}", r"cannot be read as json \(line 2: Exceeds the limit"),
    ],
    ids=range(10),
)
def test_a_bad_row_is_named(tmp_path, row, message):
    (tmp_path / "b.jsonl").write_text(f'{{"text": "a"}}\n{row}\n')
    with pytest.raises(RecipeError, match=f"{tmp_path}/b.jsonl(, |: ){message}"):
        names(Data(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_compressed_text_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "a"}'))
    with pytest.raises(RecipeError, match=f"{name}: cannot be read as .* .it is a gzip file, expected an unpacked one"):
        names(Data(path=str(tmp_path)))
    (tmp_path / name).rename(tmp_path / f"{name}.gz")
    for path in (tmp_path, tmp_path / f"{name}.gz"):
        with pytest.raises(RecipeError, match=f"{name}.gz is compressed; expected an unpacked file"):
            names(Data(path=str(path)))


def test_links_to_nothing_and_closed_files(tmp_path):
    write(tmp_path / "a.txt", texts_of(9))
    (tmp_path / "b.txt").symlink_to("nothing.txt")
    with pytest.raises(RecipeError, match=f"{tmp_path}/b.txt is a link to a file that is not there; expected text"):
        names(Data(path=str(tmp_path)))
    with pytest.raises(RecipeError, match=f"{tmp_path}/b.txt: found neither a file nor a folder"):
        names(Data(path=str(tmp_path / "b.txt")))
    (tmp_path / "b.txt").unlink()
    (tmp_path / "around").symlink_to(tmp_path)  # a folder within itself is read once
    assert names(Data(path=str(tmp_path))) == ["".join(texts_of(9))]
    if os.geteuid():  # root may read all
        (tmp_path / "a.txt").chmod(0)
        with pytest.raises(RecipeError, match="a.txt: cannot be read as text .*Permission denied"):
            names(Data(path=str(tmp_path)))
        (tmp_path / "closed").mkdir(mode=0)
        with pytest.raises(RecipeError, match="closed cannot be read .Permission denied"):
            names(Data(path=str(tmp_path)))


BROKEN = {
    "jsonl": lambda whole: whole.replace(b'"text": "text 3', b'"text": "text \n3', 1),
    "json": lambda whole: whole[:-40],
    "parquet": lambda whole: whole[:-40],
    "txt": lambda whole: whole + b"\xff\xfe" + whole,
}


@pytest.mark.parametrize("shuffled", [0, 2**30])
@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_damaged_file_is_named_and_mended(tmp_path, monkeypatch, capfd, kind, shuffled):
    monkeypatch.setattr(data, "SHUFFLED_BYTES", shuffled)
    monkeypatch.setattr(data, "PIECE", 40)
    text = corpus(tmp_path / "corpus", kind, False)
    asked = recipe(9000, path=str(text), evaluation_tokens=700)
    whole = files_of(data.run(asked, tmp_path / "whole", Letters()))
    last = text / f"{np.random.default_rng(3).permutation(4)[-1]}.{kind}"
    sound = last.read_bytes()
    last.write_bytes(BROKEN[kind](sound))
    capfd.readouterr()
    with pytest.raises(
        RecipeError, match=f"{last}.*cannot be read as .*repair it and run the same command again$"
    ) as caught:
        data.run(asked, tmp_path / "run", Letters())
    assert "\n" not in str(caught.value) and capfd.readouterr().out.startswith(f"data: {text} (4 files)")
    if kind == "jsonl":
        number = 1 + sound[: sound.index(b'"text": "text 3')].count(b"\n")
        assert f"{last}: cannot be read as json (line {number}: " in str(caught.value)
    if not shuffled:
        state = checkpoint.read_json(tmp_path / "run" / "data.partial" / "state.json")
        documents = sum(json.loads(whole["source.json"])["documents"].values())
        assert sum(state["documents"].values()) > 0.7 * documents  # the other three files
    if not shuffled:
        for change in (last.unlink, last.touch):
            change()
            with pytest.raises(RecipeError, match=f"{last} is gone.*expected the same text"):
                data.run(asked, tmp_path / "run", Letters())
    last.write_bytes(sound)
    assert files_of(data.run(asked, tmp_path / "run", Letters())) == whole


def test_a_file_that_vanishes_while_it_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHUFFLED_BYTES", 0)
    text = corpus(tmp_path / "corpus", "jsonl", False)
    (part,) = data.text_parts(Data(path=str(text)), 3)
    last = text / f"{np.random.default_rng(3).permutation(4)[-1]}.jsonl"
    stream = part.read(None)
    next(stream)
    last.unlink()
    with pytest.raises(RecipeError, match=f"{last}: cannot be read"):
        list(stream)


def test_text_that_changed_while_the_run_was_away(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", texts_of(400))
    asked = recipe(9000, path=str(tmp_path / "a.jsonl"))
    monkeypatch.setattr(data, "CHUNK_DOCUMENTS", 37)
    append = data._Files.append

    def breaking(files, split, ids):
        append(files, split, ids)
        if sum(files.state["documents"].values()) == 90:
            raise Stop

    with monkeypatch.context() as broken, pytest.raises(Stop):
        broken.setattr(data._Files, "append", breaking)
        data.run(asked, tmp_path, Letters())
    write(tmp_path / "a.jsonl", texts_of(401))
    with pytest.raises(RecipeError, match="had 400 documents when tokenising began and have 401 now"):
        data.run(asked, tmp_path, Letters())


def test_blocks_that_are_gone_or_cut(tmp_path):
    np.save(tmp_path / "train.npy", np.zeros((20, 30), np.uint16))
    assert data.blocks(tmp_path, "train").shape == (20, 30)
    with pytest.raises(RecipeError, match="test.npy is missing; expected the tokens of this run: delete"):
        data.blocks(tmp_path, "test")
    for size in (500, 60, 0):
        os.truncate(tmp_path / "train.npy", size)
        with pytest.raises(RecipeError, match="train.npy is damaged.*run the same command again to make them anew"):
            data.blocks(tmp_path, "train")
