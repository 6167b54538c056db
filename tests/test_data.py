"""The same text on every machine, and held-out text that stays out."""

import json

import numpy as np
import pytest
import torch

from scavenger import data
from scavenger.recipe import Data, RecipeError


class Letters:
    """A tokenizer of single characters."""

    eos_token_id = 0

    def __len__(self):
        return 300

    def __call__(self, text, **kwargs):
        return {"input_ids": [min(ord(letter), 299) for letter in text]}


def test_splits_are_whole_documents_by_their_name():
    names = [f"package/module_{index}.py" for index in range(2000)]
    counts = {split: sum(data.split_of(name) == split for name in names) for split in data.SPLITS}
    assert 1720 < counts["train"] < 1880 and 60 < counts["validation"] < 140 and 60 < counts["test"] < 140
    assert data.split_of("asyncio/events.py") == data.split_of("asyncio/events.py") == "train"


def test_standard_library():
    files = data.stdlib_files()
    assert len(files) > 400 and "asyncio/events.py" in files
    assert not any("/test/" in f"/{name}" or "site-packages" in name for name in files)
    names = [name for name, _ in data.documents(Data(), seed=1)]
    assert sorted(names) == sorted(files)
    assert names != [name for name, _ in data.documents(Data(), seed=2)]
    assert names == [name for name, _ in data.documents(Data(), seed=1)]
    found = data.source(Data())
    assert found["modules"] == len(files) and len(found["content_sha256"]) == 64


def test_tokens_stop_at_what_is_wanted_and_part_documents():
    stream = ((f"document {index}", "x" * 9) for index in range(400))
    tokens = data.tokenise(stream, Letters(), {"train": 95, "validation": 20, "test": 20})
    assert {split: len(ids) for split, ids in tokens.items()} == {"train": 95, "validation": 20, "test": 20}
    assert np.array_equal(np.flatnonzero(tokens["train"] == 0), np.arange(9, 95, 10))


def test_batches_depend_on_the_position_alone():
    array = np.arange(7 * 5, dtype=np.uint16).reshape(7, 5)
    whole = data.batch(array, 0, 21, seed=3)
    assert torch.equal(whole, torch.cat([data.batch(array, first, 3, seed=3) for first in range(0, 21, 3)]))
    passes = whole.reshape(3, 7, 5)
    for one in passes:
        assert sorted(one[:, 0].tolist()) == list(range(0, 35, 5))  # each pass reads every block once
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(whole, data.batch(array, 0, 21, seed=4))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "file"])
def test_local_text(tmp_path, kind):
    texts = [f"text number {index}\nof several" for index in range(23)]
    path = tmp_path / "corpus"
    path.mkdir()
    if kind == "jsonl":
        (path / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"body": texts}), path / "a.parquet")
    elif kind == "txt":
        for index, text in enumerate(texts):
            (path / f"{index}.txt").write_text(text)
    else:
        path = path / "one.txt"
        path.write_text("\n".join(texts))
        texts = ["\n".join(texts)]
    column = "text" if kind in ("txt", "file") else "body"
    found = [text for _, text in data.documents(Data(path=str(path), text_column=column), seed=0)]
    assert sorted(found) == sorted(texts)


def test_a_long_text_file_is_cut_at_line_ends(tmp_path):
    lines = [f"line {index}\n" for index in range(20_000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    pieces = [text for _, text in data.documents(Data(path=str(tmp_path)), seed=0)]
    assert len(pieces) > 5 and all(piece.endswith("\n") for piece in pieces)
    assert sorted("".join(pieces).splitlines(True)) == sorted(lines)


def test_rows_without_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": 1}\n{"text": null, "n": 2}\n{"text": "", "n": 3}')
    assert [text for _, text in data.documents(Data(path=str(tmp_path)), 0)] == ["x"]
    with pytest.raises(RecipeError, match="found a int.*name text"):
        list(data.documents(Data(path=str(tmp_path), text_column="n"), 0))


def test_data_that_cannot_be_read(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(RecipeError, match="files of one kind"):
        list(data.documents(Data(path=str(tmp_path)), 0))
    (tmp_path / "a.csv").unlink()
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    with pytest.raises(RecipeError, match="found columns body.*text_column"):
        list(data.documents(Data(path=str(tmp_path)), 0))
    (tmp_path / "a.jsonl").write_text('{"body": ')
    with pytest.raises(RecipeError, match="cannot be read as json"):
        list(data.documents(Data(path=str(tmp_path)), 0))
