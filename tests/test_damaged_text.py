"""Folders of text that are damaged at random: all of the text is read, or one line says what is wrong."""

import gzip
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_data import Letters, recipe

from scavenger import data
from scavenger.recipe import Data, RecipeError


KINDS = ("jsonl", "json", "parquet", "txt")


def texts_of(first, count=60):
    return [f"text {number} is one of several\n" for number in range(first, first + count)]


def write(file, values, column="text"):
    kind = file.suffix[1:]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(values)), column: values}), file, row_group_size=13)
    elif kind == "txt":
        file.write_text("".join(map(str, values)))
    else:
        rows = [json.dumps({"n": number, column: value}) for number, value in enumerate(values)]
        file.write_text("\n".join(rows) if kind == "jsonl" else f"[{', '.join(rows)}]")


def replaced_bytes(file, rng):
    whole = bytearray(file.read_bytes())
    for place in rng.integers(len(whole), size=rng.integers(1, 9)):
        whole[place] = rng.integers(256)
    file.write_bytes(whole)


def other_value(file, rng):
    """One row, or where a column has one type every row, is no text."""
    value = [7, 1.5, True, ["a"], {"a": 1}, "\ud800"][rng.integers(5 if file.suffix == ".parquet" else 6)]
    values = [value] * 30 if file.suffix == ".parquet" else texts_of(900, 30)
    values[rng.integers(30)] = value
    write(file, values)


def nested(file, rng):
    (file.parent / "deeper/still").mkdir(parents=True, exist_ok=True)
    file.rename(file.parent / "deeper/still" / file.name)


def linked(file, rng):
    file.symlink_to(file.rename(file.parent.with_name(file.name)))


def contents(change):
    return lambda file, rng: file.write_bytes(change(file.read_bytes()))


def renamed(change):
    return lambda file, rng: file.rename(file.with_name(change(file.name)))


LOSING = {
    "cut": lambda file, rng: os.truncate(file, rng.integers(file.stat().st_size)),
    "bytes replaced": replaced_bytes,
    "empty": contents(lambda whole: b""),
    "another suffix": lambda file, rng: file.rename(file.with_suffix(f".{KINDS[rng.integers(4)]}")),
    "no suffix": renamed(lambda name: name.split(".")[0]),
    "column": lambda file, rng: write(file, texts_of(900), "body"),
    "value": other_value,
    "null bytes": contents(lambda whole: bytes(99)),
    "random bytes": lambda file, rng: file.write_bytes(rng.bytes(999)),
    "UTF-16": contents(lambda whole: "text\n".encode("utf-16") * 9),
    "compressed": contents(gzip.compress),
    "compressed by name": renamed("{}.gz".format),
    "gone": lambda file, rng: file.unlink(),
    "link to nothing": lambda file, rng: (file.unlink(), file.symlink_to("nothing")),
    "link to itself": lambda file, rng: (file.unlink(), file.symlink_to(file.name)),
    "folder": lambda file, rng: (file.unlink(), file.mkdir()),
    "no object": lambda file, rng: file.write_text(["3", "[]", "[[1]]", "{}", "null", '"a"', "\n\n"][rng.integers(7)]),
}
KEEPING = {  # the text: all of it is read, or it is refused
    "BOM": contents(lambda whole: b"\xef\xbb\xbf" + whole),
    "CRLF": contents(lambda whole: whole.replace(b"\n", b"\r\n")),
    "blank lines": contents(lambda whole: whole.replace(b"\n", b"\n\n")),
    "called a split": lambda file, rng: file.rename(file.with_stem(["train", "a.test", "valid-1"][rng.integers(3)])),
    "capitals": renamed(str.upper),
    "nested": nested,
    "linked": linked,
    "empty shard": lambda file, rng: file.with_stem(file.stem + "9").touch(),
    "hidden file": lambda file, rng: file.with_name("." + file.name).write_bytes(b"\xff"),
    "picture": lambda file, rng: file.with_name("picture.png").write_bytes(b"\xff"),
    "card": lambda file, rng: file.with_name("README.md").write_text("about"),
}


# What is seen whatever else is done; but any JSON is plain text as well.
SEEN = {"null bytes", "random bytes", "UTF-16", "compressed", "compressed by name", "link to nothing", "link to itself"}


@pytest.mark.parametrize("seed", range(int(os.environ.get("FUZZED_FOLDERS", 24))))
def test_it_is_read_or_refused_in_a_line(tmp_path, monkeypatch, seed, record_property):
    """FUZZED_FOLDERS=300 tries more; `--junitxml` then has how each ended."""
    _, refusal = read_or_refused(tmp_path, monkeypatch, np.random.default_rng(seed))
    record_property("ended", "read" if refusal is None else "refused")


def read_or_refused(tmp_path, monkeypatch, rng):
    """One case; returns what was done and the refusal, or None."""
    monkeypatch.setattr(data, "SHUFFLED_BYTES", [0, 2**30][rng.integers(2)])
    monkeypatch.setattr(data, "PIECE", 40)
    kind, stems = KINDS[rng.integers(4)], [("train-0", "train-1", "valid", "test"), "abcd"][rng.integers(2)]
    folder = tmp_path / "text"
    folder.mkdir()
    texts = {folder / f"{stem}.{kind}": texts_of(60 * number) for number, stem in enumerate(stems)}
    for file, values in texts.items():
        write(file, values)
    done = {}
    for file in rng.choice(list(texts), rng.integers(1, 3), replace=False):
        name = [*LOSING, *KEEPING][rng.integers(len(LOSING | KEEPING))]
        (LOSING | KEEPING)[name](file, rng)
        done[file] = name
    kept = {text.strip() for file in texts if done.get(file) not in LOSING for text in texts[file]}
    settings = recipe(20, context_length=8, evaluation_tokens=64, path=str(folder))
    try:
        data.run(settings, tmp_path, Letters())
        read = "\n".join(data.in_split(Data(path=str(folder)), 0, "all"))
    except RecipeError as error:
        assert "\n" not in str(error) and (str(folder) in str(error) or "more text" in str(error)), (done, error)
        return done, str(error)
    assert kept <= {line.strip() for line in read.splitlines()}, done
    seen = SEEN if kind == "txt" else SEEN | {"column", "value"}
    assert not seen & set(done.values()), done
    return done, None
