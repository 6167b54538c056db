"""Tokenises text into blocks of tokens, identically on every machine.

Text that has no splits of its own is split by a hash of what names each document (train 90 %, validation 5 %, test
5 %), so a document is in the same split whatever the order, the machine or the amount read. A plain text file has no
documents and is cut into pieces. Tokens are packed end to end, documents separated by the tokenizer's end-of-text
token, and cut into blocks of `context_length`. They go to disk as they are made; an interrupted
run resumes with the next document.
"""

import contextlib
import glob
import hashlib
import io
import json
import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scavenger import loading
from scavenger.recipe import Data, Recipe, RecipeError
from scavenger.run import checkpoint
from scavenger.run.run import blocks


SPLITS = ("train", "validation", "test")
# Not part of the text: test suites (absent from some installations), installed packages, and generated tables of code
# points and of build settings.
STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
PIECE = 16_384  # characters: a plain text file has no documents and is cut at line ends into pieces of about this size
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text", ".py": "text"}
# Names of files that hold a split, optionally followed by a number (train-00000-of-00005).
SPLIT_FILE = re.compile(r"(?:(train)|(validation|valid|val|dev)|(test))(?:[-_.]\d.*)?")
SHUFFLED_BYTES = 2**30  # up to this, local text is held in memory and its documents are shuffled; above, the files are
CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 1024, 2**22  # per tokenizer call: enough for many cores, about 100 MB of memory
WINDOW = 13  # tokens: the GPT-3 paper searches for test text by 13-grams (arXiv:2005.14165, appendix C)
OVERLAP_CHUNK = 2**16  # windows of the train split per pass: half a MB of hashes fits in a core's cache
FACTOR = 0x9E3779B97F4A7C15  # base of the windows' hash: 2**64 / golden ratio, an odd number with irregular bits


class Batch(NamedTuple):
    """Sequences of the train split; `mask` is False where `ids` is padding."""

    rows: np.ndarray  # (batch,) row indices in the train array
    ids: Tensor  # (batch, length) int64
    mask: Tensor  # (batch, length) bool


class Document(NamedTuple):
    """A text, its name, and the place after it, from which reading its part resumes; places are stored as JSON."""

    name: str
    text: str
    place: int | list


class Part(NamedTuple):
    """Text of one split, or (split None) of all three, assigned by the hash of each document's name."""

    split: str | None
    read: Callable[[int | list | None], Iterator[Document]]  # from a document's place, or from the beginning
    shards: list[str]  # names of the shards, in reading order; a resumed run must find the same


class Shard(NamedTuple):
    """A file, or one shard of a data set on the Hub."""

    name: str
    open: Callable  # returns its rows as a streaming data set
    complaint: Callable[[Exception], str]  # the one-line message for an error while it is read


def run(recipe: Recipe, run_dir: Path, tokenizer) -> Path:
    """Write `data/{train,validation,test}.npy` and `data/source.json`; returns the folder."""
    folder = run_dir / "data"
    if checkpoint.complete(folder):
        return folder
    beside = checkpoint.partial(folder)
    made = tokenise(recipe, tokenizer, beside)
    tokens = {split: blocks(beside, split).size for split in SPLITS}
    overlap = overlaps(beside)
    checkpoint.write_json(
        beside / "source.json",
        source(recipe.data)
        | {
            "splits": "its own" if made["named"] else "90/5/5 by a hash of each document",
            "tokens": tokens,
            # left_out: documents of the train split that are also in a held-out split.
            "documents": made["documents"] | {"left_out": made["left_out"]},
            "packing": {"kind": recipe.data.packing, "padding": _padding_share(blocks(beside, "train"))},
            "begins_with": tokenizer.convert_ids_to_tokens(beginning(tokenizer)),  # before each document's first token
            "overlap": {"window": WINDOW} | overlap,
            "sha256": {split: hashlib.sha256(blocks(beside, split)).hexdigest() for split in SPLITS},
        },
    )
    print(
        f"data: tokens {', '.join(f'{split} {tokens[split]:,}' for split in SPLITS)}; {WINDOW}-token windows that are "
        f"in train too: {', '.join(f'{split} {share:.2%}' for split, share in overlap.items())}",
        flush=True,
    )
    checkpoint.finish(folder)
    for name in ("state.json", "held_out.bin"):
        (folder / name).unlink()
    return folder


def batch(array: np.ndarray, first: int, size: int, seed: int) -> Batch:
    """Sequences `first … first + size - 1` of an endless stream that is reshuffled at each pass.

    They depend on position and seed only, so a resumed or distributed run sees the same text.
    """
    places = rows(len(array), first, size, seed)
    ids = torch.from_numpy(array[places].astype(np.int64))
    mask = ids != padding(array.dtype)
    return Batch(places, ids * mask, mask)


def rows(count: int, first: int, size: int, seed: int) -> np.ndarray:
    """Row indices, in an array of `count` blocks, of positions `first … first + size - 1` of the stream."""
    return np.array([_order(count, seed, index // count)[index % count] for index in range(first, first + size)])


def padding(kind: np.dtype) -> int:
    """The value that pads a document's last block in the file: the largest of its dtype, which is never a token id."""
    return int(np.iinfo(kind).max)


def tokens_needed(recipe: Recipe) -> int:
    """Number of training tokens that the longest training of the recipe sees."""
    trainings = [(recipe.teacher.train,)] if recipe.teacher.train else []
    trainings += [recipe.transfer.phases] if recipe.transfer else []
    return recipe.data.context_length * max(
        sum(phase.steps * phase.batch_size for phase in phases) for phases in trainings
    )


def beginning(tokenizer) -> int:
    """The token before the first of each document: beginning-of-text, or end-of-text where the tokenizer has no other.

    This is also lm-eval's rule. Blocks, prompts and passages are cut out of running text and may begin anywhere.
    """
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def framed(ids: list[int], tokenizer) -> list[int]:
    """A document as it stands in running text: end-of-text follows it, beginning-of-text precedes it if it differs."""
    first, end = beginning(tokenizer), tokenizer.eos_token_id
    return [*([] if first == end else [first]), *ids, end]


def split_of(name: str) -> str:
    """train, validation or test, by a hash of the document's name."""
    place = int.from_bytes(_digest(name)[:4], "big") % 100
    return "test" if place < 5 else "validation" if place < 10 else "train"


def tokenise(recipe: Recipe, tokenizer, folder: Path) -> dict:
    """Write `{split}.npy` to the folder, documents in stream order, until each split is full or the text ends.

    Each chunk of documents is appended, then `state.json` says so: an interrupted run resumes with the
    first document that is not in it. Returns the state.
    """
    length = recipe.data.context_length
    wanted = dict.fromkeys(SPLITS, recipe.data.evaluation_tokens) | {"train": tokens_needed(recipe)}
    kind = np.dtype(np.uint16 if _largest_id(tokenizer) < padding(np.uint16) else np.uint32)
    whole_blocks = recipe.data.packing == "documents"
    parts = text_parts(recipe.data, recipe.seed)
    with _Files(folder, kind, length, wanted, parts) as files:
        for number in range(files.state["part"], len(parts)):
            split, read, _ = parts[number]
            awaited = SPLITS if split is None else (split,)
            for chunk in _chunks(read(files.state["place"])) if not files.full(*awaited) else ():
                named = [(split or split_of(document.name), document.text) for document in chunk]
                named = [(split, text) for split, text in named if not files.full(split)]
                for (into, text), ids in zip(named, _ids(tokenizer, [text for _, text in named]), strict=True):
                    if not files.full(into) and not files.held_out(into, text):
                        ids = np.array(framed(ids, tokenizer), kind)
                        files.append(into, _padded(ids, length) if whole_blocks and into == "train" else ids)
                files.save(place=chunk[-1].place)
                if files.full(*awaited):
                    break
            files.save(part=number + 1, place=None)
        files.finish()
    return files.state


def overlaps(folder: Path) -> dict[str, float]:
    """For validation and test, the share of their 13-token windows that also occur in the train split.

    Windows are compared by a 64-bit hash (`_window_hashes`). All hashes of the held-out splits are kept, sorted; those
    of the train split are looked up in chunks, after a table of the first 24 bits has rejected most of them.
    """
    held_out = {split: _window_hashes(blocks(folder, split).reshape(-1)) for split in SPLITS[1:]}
    sought = np.unique(np.concatenate(list(held_out.values())))
    found = np.zeros(len(sought), bool)
    first_bits = np.zeros(2**24, bool)
    first_bits[sought >> np.uint64(40)] = True
    train = blocks(folder, "train").reshape(-1)
    for first in range(0, len(train), OVERLAP_CHUNK):
        hashes = _window_hashes(train[first : first + OVERLAP_CHUNK + WINDOW - 1])
        hashes = np.sort(hashes[first_bits[hashes >> np.uint64(40)]])
        places = np.minimum(np.searchsorted(sought, hashes), len(sought) - 1)
        found[places[sought[places] == hashes]] = True
    return {
        split: float(found[np.searchsorted(sought, hashes)].mean()) if len(hashes) else 0.0
        for split, hashes in held_out.items()
    }


def documents(data: Data, seed: int) -> Iterator[tuple[str, str]]:
    """(name, text) of every document (of the train split only, if the text has its own), in the seed's order."""
    for part in text_parts(data, seed):
        if part.split in (None, "train"):
            for name, text, _ in part.read(None):
                yield name, text


def text_parts(data: Data, seed: int) -> list[Part]:
    """The text of a recipe. If it has its own splits, held-out ones come first: train excludes their documents."""
    if data.path is not None:
        return _local_parts(data, seed)
    if data.name is not None:
        return _hub_parts(data, seed)
    files = stdlib_files()
    names = sorted(files, key=lambda name: _digest(f"{seed} {name}"))

    def read(place):
        for number in range(place or 0, len(names)):
            text = files[names[number]].read_text(encoding="utf-8", errors="replace")
            yield Document(names[number], text, number + 1)

    return [Part(None, read, [f"the {len(files)} modules of Python {platform.python_version()}"])]


def stdlib_files() -> dict[str, Path]:
    """The standard library's modules on this machine, by path relative to its folder."""
    root = Path(sysconfig.get_path("stdlib"))
    return {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*.py"))
        if not STDLIB_EXCLUDED & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    }


def identities(data: Data) -> dict[str, dict]:
    """The identity of each file of local text, of the standard library as a whole; nothing for text on the Hub."""
    if data.path is not None:
        path = Path(data.path)
        files = [file for group in _local_files(path).values() for file in group]
        return {str(file.relative_to(path) if path.is_dir() else file.name): loading.identity(file) for file in files}
    return {} if data.name is not None else {"the standard library": source(data)}


def source(data: Data) -> dict:
    """Description of the text, for the record: its name and revision, or the library's version and content hash."""
    if data.path is not None:
        return {"source": "local", "path": data.path}
    if data.name is not None:
        return {"source": "hub", "name": data.name, "subset": data.subset, "revision": data.revision}
    digest = hashlib.sha256()
    files = stdlib_files()
    for name, path in files.items():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "source": "standard library",
        "python": platform.python_version(),
        "modules": len(files),
        "bytes": sum(path.stat().st_size for path in files.values()),
        "content_sha256": digest.hexdigest(),
    }


class _Files:
    """The token files while they are written, and the state, which records how much of each is valid.

    The header of a `.npy` file has room for any number of blocks: it is overwritten at the end without moving data.
    """

    def __init__(self, folder, kind, length, wanted, parts):
        self.folder, self.kind, self.length, self.wanted = folder, kind, length, wanted
        self.state = _state(folder, kind, length, parts)
        sizes = _sizes(self.state, kind, length)
        self.files = {name: _open(folder / name, size) for name, size in sizes.items()}
        digests = (folder / "held_out.bin").read_bytes()
        self.digests = {digests[place : place + 8] for place in range(0, len(digests), 8)}
        self.bar = tqdm(total=sum(wanted.values()), unit="tok", unit_scale=True, desc="data", leave=False)
        self.bar.update(sum(self.state["tokens"].values()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        for file in self.files.values():
            file.close()

    def full(self, *splits):
        return all(self.state["tokens"][split] >= self.wanted[split] for split in splits)

    def held_out(self, split, text):
        """Whether a text of the train split is also in a held-out split; records the digests of held-out texts."""
        if not self.state["named"]:  # the hash puts equal texts into the same split
            return False
        digest = _digest(text)[:8]
        if split == "train":
            self.state["left_out"] += digest in self.digests
            return digest in self.digests
        self.digests.add(digest)
        self.state["held_out"] += self.files["held_out.bin"].write(digest) // 8
        return False

    def append(self, split, ids):
        self.files[f"{split}.npy"].write(ids.data)
        self.state["documents"][split] += 1
        self.state["tokens"][split] += len(ids)
        self.bar.update(len(ids))

    def save(self, **changes):
        for file in self.files.values():
            file.flush()
        self.state |= changes
        checkpoint.write_json(self.folder / "state.json", self.state)

    def finish(self):
        """Cut off incomplete blocks and surplus tokens, and write the headers."""
        tokens = self.state["tokens"]
        whole = {split: min(tokens[split], self.wanted[split]) // self.length for split in SPLITS}
        for split in SPLITS:
            if whole[split] == 0:
                shutil.rmtree(self.folder)  # so that other text can be tried
                by_hash = "documents are split 90/5/5 by hash, so expected a hundred documents or more"
                raise RecipeError(
                    f"data: the {split} split has {tokens[split]} tokens, less than one context of {self.length}; "
                    + ("expected more text in it" if self.state["named"] else by_hash)
                )
        self.save(tokens={split: count * self.length for split, count in whole.items()})
        for name, size in _sizes(self.state, self.kind, self.length).items():
            self.files[name].truncate(size)
        for split, count in whole.items():
            self.files[f"{split}.npy"].seek(0)
            self.files[f"{split}.npy"].write(_header(self.kind, count, self.length))


def _state(folder, kind, length, parts):
    """The state to resume from: the saved one, or an empty one if there is no valid one."""
    shards = [name for part in parts for name in part.shards]
    with contextlib.suppress(FileNotFoundError, ValueError):
        state = checkpoint.read_json(folder / "state.json")
        differing = {name: "is gone" for name in state["shards"] if name not in shards}
        differing |= {name: "is new" for name in shards if name not in state["shards"]}
        for name, how in differing.items():
            raise RecipeError(
                f"data: {name} {how}, but {folder} holds tokens of the earlier text; expected the same text "
                "(or delete that folder to start again)"
            )
        sizes = _sizes(state, kind, length)
        if all((folder / name).stat().st_size >= size for name, size in sizes.items()):  # else data was lost in a crash
            return state
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    none = dict.fromkeys(SPLITS, 0)
    return {
        "part": 0,
        "place": None,
        "named": parts[0].split is not None,
        "tokens": none,
        "documents": dict(none),
        "held_out": 0,
        "left_out": 0,
        "shards": shards,
    }


def _sizes(state, kind, length):
    """Number of valid bytes of each file."""
    header = len(_header(kind, 0, length))
    return {f"{split}.npy": header + kind.itemsize * state["tokens"][split] for split in SPLITS} | {
        "held_out.bin": 8 * state["held_out"]
    }


def _header(kind, count, length):
    """The header of a `.npy` file of blocks; its length does not depend on their number."""
    written = io.BytesIO()
    shape = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (count, length)}
    np.lib.format.write_array_header_1_0(written, shape)
    return written.getvalue()


def _open(path, size):
    """Open a file for appending, truncated to `size` (or created, with zeros in place of the header)."""
    path.touch()
    os.truncate(path, size)
    file = open(path, "r+b")
    file.seek(size)
    return file


def _ids(tokenizer, texts):
    """Token ids of each text; a fast tokenizer processes a list on all cores."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _largest_id(tokenizer):
    return max(tokenizer.get_vocab().values())


def _padded(ids, length):
    """A document padded to whole blocks; a single token in the last block would predict nothing and is dropped."""
    if len(ids) % length == 1:
        ids = ids[:-1]
    return np.pad(ids, (0, -len(ids) % length), constant_values=padding(ids.dtype))


def _chunks(stream):
    """Lists of documents, of doubling size up to a limit; those read before an error come before it is raised."""
    chunk, characters, most, fault = [], 0, 2**16, None
    while fault is None:
        try:
            chunk.append(next(stream))
            characters += len(chunk[-1].text)
        except (RecipeError, StopIteration) as error:
            fault = error
        if chunk and (fault or len(chunk) == CHUNK_DOCUMENTS or characters >= most):
            yield chunk
            chunk, characters, most = [], 0, min(2 * most, CHUNK_CHARACTERS)
    if isinstance(fault, RecipeError):
        raise fault


def _padding_share(array):
    parts = (array[first : first + 4096] for first in range(0, len(array), 4096))
    return sum(int((part == padding(array.dtype)).sum()) for part in parts) / array.size


def _window_hashes(tokens):
    """A hash of each window of 13 tokens, sum_j t_{n+j} FACTOR^(13-j) modulo 2^64, built from windows of 1, 2, 4, 8."""
    if len(tokens) < WINDOW:
        return np.zeros(0, np.uint64)

    def joined(left, right, width_left, width_right):
        """The hashes of windows of `left`, each joined to the window of `right` that follows it."""
        right = right[width_left:]
        return left[: len(right)] * np.uint64(pow(FACTOR, width_right, 2**64)) + right

    one = tokens.astype(np.uint64)
    two = joined(one, one, 1, 1)
    four = joined(two, two, 2, 2)
    eight = joined(four, four, 4, 4)
    twelve = joined(eight, four, 8, 4)
    return joined(twelve, one, 12, 1) * np.uint64(FACTOR)  # the last factor lets the last token affect the first bits


def _local_parts(data, seed):
    path = Path(data.path)
    groups = _local_files(path)
    files = [file for group in groups.values() for file in group]
    kinds = {LOADERS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise RecipeError(
            f"data.path: {path}: found {sorted(k or 'unknown' for k in kinds) or 'no text'}; expected "
            f"files of one kind: {', '.join(LOADERS)}"
        )
    kind = kinds.pop()
    sizes = {file: file.stat().st_size for file in files}
    for file in files:
        if sizes[file] == 0 and (kind != "text" or len(files) == 1):  # source folders have empty modules
            raise RecipeError(f"data.path: {file} is empty; expected text (or delete the file)")
    column = "text" if kind == "text" else data.text_column
    read = _shuffled if sum(sizes.values()) <= SHUFFLED_BYTES else _streamed
    return [
        _part(split, [_file_shard(file, kind) for file in group], column, kind == "text", seed, read)
        for split, group in groups.items()
    ]


def _local_files(path):
    """The files of each split, held-out splits first, if file names cover all three; else all files, under None."""
    if not path.is_dir():
        return {None: [path]}
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in LOADERS)
    groups = {"validation": [], "test": [], "train": []}
    for file in files:
        if found := SPLIT_FILE.fullmatch(file.stem):
            groups[("train", "validation", "test")[found.lastindex - 1]].append(file)
    if all(groups.values()):
        return groups
    missing = [split for split, group in groups.items() if not group]
    if groups["train"] and len(missing) == 1 and sum(map(len, groups.values())) == len(files):
        raise RecipeError(
            f"data.path: {path}: found files of two splits; expected {missing[0]}.{files[0].suffix[1:]} as well, or "
            "files with other names, whose documents are split 90/5/5"
        )
    return {None: files}


def _file_shard(file, kind):
    from datasets import disable_progress_bars, load_dataset
    from datasets.utils.logging import CRITICAL, set_verbosity

    disable_progress_bars()
    set_verbosity(CRITICAL)  # `complaint` reports its errors, in one line

    def opened():
        options = {"keep_linebreaks": True} if kind == "text" else {}
        return load_dataset(kind, data_files=[glob.escape(str(file))], split="train", streaming=True, **options)

    def complaint(error):
        line, reason = (_broken_line(file) if kind == "json" else None) or (None, _first_line(error))
        return (
            f"data.path: {file}{f', line {line}' if line else ''}: cannot be read as {kind} ({reason}); "
            "what is tokenised is kept: repair the file and run the same command again to resume"
        )

    return Shard(str(file), opened, complaint)


def _hub_parts(data, seed):
    from datasets import load_dataset

    try:
        found = load_dataset(data.name, data.subset, revision=data.revision, streaming=True)
    except Exception as error:  # network, permission and format errors have no common class
        raise RecipeError(
            f"data.name: {data.name} cannot be read from the Hub ({_first_line(error)}); "
            "expected a reachable data set, or data.path=<local folder>"
        ) from error
    if "train" not in found:
        raise RecipeError(f"data.name: {data.name}: found splits {', '.join(found)}; expected one called train")
    splits = {"validation": "validation", "test": "test", "train": "train"}
    if not splits.keys() <= found.keys():
        splits = {None: "train"}
    return [
        _part(split, _hub_shards(data.name, name, found[name]), data.text_column, False, seed, _streamed)
        for split, name in splits.items()
    ]


def _hub_shards(name, split, rows):
    def complaint(error):
        return (
            f"data.name: {name} could not be read to the end ({_first_line(error)}); what is tokenised is kept: run "
            "the same command again to resume"
        )

    count = rows.num_shards
    return [
        Shard(f"{name}, {split} {number + 1} of {count}", lambda n=number: rows.shard(count, n), complaint)
        for number in range(count)
    ]


def _part(split, shards, column, pieces, seed, read):
    return Part(split, lambda place: read(shards, column, pieces, seed, place), [shard.name for shard in shards])


def _shuffled(shards, column, pieces, seed, place):
    """All documents of small files, shuffled; a place is [documents read, documents in all]."""
    texts = [document.text for document in _in_order(shards, column, pieces, None)]
    begin, count = place or (0, len(texts))
    if count != len(texts):
        raise RecipeError(
            f"data: {shards[0].name} and the files read with it had {count} documents when tokenising began, now "
            f"{len(texts)}; expected the same text (or delete the run's data.partial to start again)"
        )
    order = np.random.default_rng(seed).permutation(count)
    for number in range(begin, count):
        yield Document(texts[order[number]], texts[order[number]], [number + 1, count])


def _streamed(shards, column, pieces, seed, place):
    """The documents of shuffled shards; there is no shuffle buffer, as its documents would be lost with the process."""
    order = np.random.default_rng(seed).permutation(len(shards))
    return _in_order([shards[number] for number in order], column, pieces, place)


def _in_order(shards, column, pieces, place):
    """The documents of shards, in order; a place is [shard index, state of its rows]."""
    begin, state = place or (0, None)
    for number in range(begin, len(shards)):
        shard = shards[number]
        try:
            rows = shard.open()
            if rows.column_names:
                _require_column(rows.column_names, column, shard.name)
                rows = rows.select_columns([column])
            if state is not None:
                rows.load_state_dict(state)
                state = None
            texts = (_text(row, column, shard.name) for row in rows)
            for text in _pieces(texts) if pieces else texts:
                if text:
                    yield Document(text, text, [number, rows.state_dict()])
        except RecipeError:
            raise
        except Exception as error:  # parsers, file systems and the network have no common class
            raise RecipeError(shard.complaint(error)) from error


def _text(row, column, where):
    """The text of a row; an empty string for an empty row."""
    _require_column(row, column, where)
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise RecipeError(
            f"data: {where}: found {type(value).__name__} values; expected data.text_column to name a column of text"
        )
    return value or ""


def _require_column(columns, column, where):
    if column not in columns:
        raise RecipeError(
            f"data: {where}: found columns {', '.join(columns)}; expected data.text_column to name one of them "
            f"(it is {column})"
        )


def _pieces(lines):
    piece, size = [], 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size > PIECE:
            yield "".join(piece)
            piece, size = [], 0
    yield "".join(piece)


def _broken_line(file):
    """Line and reason of the first error in a file of JSON lines, or of one JSON list; None if there is none."""
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1 and line.lstrip().startswith(b"["):
                    line = line + lines.read()
                if line.strip() and not isinstance(json.loads(line), (dict, list)):
                    return number, "not a JSON object"
    except json.JSONDecodeError as error:
        return number + error.lineno - 1, error.msg
    except UnicodeDecodeError as error:
        return number, str(error)
    except OSError:
        return None
    return None


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _digest(text):
    return hashlib.sha256(text.encode()).digest()


_orders = {}


def _order(count, seed, epoch):
    """The permutation of one pass, cached because every batch of the pass uses it."""
    key = (count, seed, epoch)
    if key not in _orders:
        _orders.clear()
        _orders[key] = np.random.default_rng((seed, epoch)).permutation(count)
    return _orders[key]
