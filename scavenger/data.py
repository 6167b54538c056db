"""Tokenises text into blocks of tokens, identically on every machine.

Text in files or folders named train, validation and test has these splits. Other text is split by a hash of what names
each document (train 90 %, validation 5 %, test 5 %), so a document is in the same split whatever the order, the machine
or the amount read. A plain text file has no documents and is cut into pieces. Tokens are packed end to end, documents
separated by the tokenizer's end-of-text token, and cut into blocks of `context_length`. They go to disk as they are
made; an interrupted run resumes with the next document.

A document of the recipe's `chat_column` is a conversation: as a text, the JSON of its messages; as tokens, what chat.py
makes of them. With `chat_loss: assistant`, which tokens the assistant wrote is written beside the tokens.
"""

import codecs
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

from scavenger import chat, loading
from scavenger.recipe import Data, Recipe, RecipeError
from scavenger.run import checkpoint
from scavenger.run.run import blocks, counted


SPLITS = ("train", "validation", "test")
# Not part of the text: test suites (absent from some installations), installed packages, and generated tables of code
# points and of build settings.
STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
# Characters: a plain text file has no documents and is cut at line ends into pieces of about this size, a longer line
# after so many characters.
PIECE = 16_384
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"} | dict.fromkeys(
    (".txt", ".md", ".py"), "text"
)
# Files that describe the text beside them, not text of their own: cards, and what `datasets` writes.
ABOUT = re.compile(r"(readme|licen[cs]e|changelog|citation)\.(md|txt)|(dataset_(info|infos|dict)|state)\.json")
# Words that name a split, in the name of a folder or file, as `datasets` knows them on the Hub.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLIT_WORD = re.compile(rf"(?<![^\W_])(?:{'|'.join(SPLIT_WORDS)})(?![^\W\d_])", re.IGNORECASE)
SHARD_NUMBER = re.compile(r"[-_.]?(?:\d+(?:[-_.]of[-_.]\d+(?:-[0-9a-f]+)?)?)?", re.IGNORECASE)  # -00000-of-00005
PACKED = {".gz", ".zip", ".zst", ".xz", ".bz2"}
# What compressed files begin with.
COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
SHUFFLED_BYTES = 2**30  # up to this, local text is held in memory and its documents are shuffled; above, the files are
CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 1024, 2**22  # per tokenizer call: enough for many cores, about 100 MB of memory
CONTENT = ("content", "tool_calls")  # a message has one of them: a call of a tool may have no content
WINDOW = 13  # tokens: the GPT-3 paper searches for test text by 13-grams (arXiv:2005.14165, appendix C)
OVERLAP_CHUNK = 2**16  # windows of the train split per pass: half a MB of hashes fits in a core's cache
FACTOR = 0x9E3779B97F4A7C15  # base of the windows' hash: 2**64 / golden ratio, an odd number with irregular bits


class Batch(NamedTuple):
    """Sequences of the train split; `mask` is False where `ids` is padding."""

    rows: np.ndarray  # (batch,) row indices in the train array
    ids: Tensor  # (batch, length) int64
    mask: Tensor  # (batch, length) bool
    counted: Tensor | None = None  # (batch, length) bool: tokens whose prediction has a loss; None: all of the mask

    @property
    def predicted(self) -> Tensor:
        """The tokens whose prediction from those before has a loss, (batch, length) bool."""
        return self.mask if self.counted is None else self.counted


class Document(NamedTuple):
    """A text, its name, and the place after it, from which reading its part resumes; places are stored as JSON."""

    name: str
    text: str
    place: int | list
    where: str = ""  # the file and row of a conversation, for messages


class Part(NamedTuple):
    """Text of one split, or (split None) of all three, assigned by the hash of each document's name."""

    split: str | None
    read: Callable[[int | list | None], Iterator[Document]]  # from a document's place, or from the beginning
    shards: list[str]  # names of the shards, in reading order; a resumed run must find the same


class Shard(NamedTuple):
    """A file, or one shard of a data set on the Hub."""

    name: str
    # Texts, each with its file and row if it is a conversation, and the place after it.
    read: Callable[[int | list | None], Iterator[tuple[str, str, int | list]]]
    complaint: Callable[[Exception], str]  # the one-line message for an error while it is read


def run(recipe: Recipe, run_dir: Path, tokenizer) -> Path:
    """Write `data/{train,validation,test}.npy` and `data/source.json`; returns the folder.

    With `chat_loss: assistant` also `data/{train,validation,test}_counted.npy`.
    """
    folder = run_dir / "data"
    if checkpoint.complete(folder):
        return folder
    beside = checkpoint.partial(folder)
    made = tokenise(recipe, tokenizer, beside)
    tokens = {split: blocks(beside, split).size for split in SPLITS}
    overlap = overlaps(beside)
    conversations = _chat_facts(recipe.data, tokenizer, beside) if recipe.data.chat_column is not None else {}
    checkpoint.write_json(
        beside / "source.json",
        source(recipe.data)
        | {
            "splits": "its own" if made["named"] else "90/5/5 by a hash of each document",
            "files": _below(recipe.data.path, made["files"]),
            "tokens": tokens,
            # left_out: documents of the train split that are also in a held-out split.
            "documents": made["documents"] | {"left_out": made["left_out"]},
            "packing": {"kind": recipe.data.packing, "padding": _padding_share(blocks(beside, "train"))},
            "begins_with": tokenizer.convert_ids_to_tokens(beginning(tokenizer)),  # before each document's first token
            "overlap": {"window": WINDOW} | overlap,
            **conversations,
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


def batch(array: np.ndarray, first: int, size: int, seed: int, counted: np.ndarray | None = None) -> Batch:
    """Sequences `first … first + size - 1` of an endless stream that is reshuffled at each pass.

    They depend on position and seed only, so a resumed or distributed run sees the same text. `counted` (block, length)
    says which tokens have a loss; None: all.
    """
    places = rows(len(array), first, size, seed)
    ids = torch.from_numpy(array[places].astype(np.int64))
    mask = ids != padding(array.dtype)
    return Batch(places, ids * mask, mask, None if counted is None else torch.from_numpy(np.array(counted[places])))


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


def frame(ids: list[int], tokenizer) -> tuple[list[int], list[int]]:
    """What precedes and follows a conversation in running text, as in `framed`, but nothing that its template wrote.

    The template wrote the end-of-text token also if whitespace follows it, and where that token begins every document
    also if it wrote it at the beginning only.
    """
    first, end = beginning(tokenizer), tokenizer.eos_token_id
    begun = ids[:1] == [first]
    last = next((token for token in reversed(ids) if not tokenizer.decode([token]).isspace()), None)
    ended = last == end or (begun and first == end)
    return [] if begun or first == end else [first], [] if ended else [end]


def split_of(name: str) -> str:
    """train, validation or test, by a hash of the document's name."""
    place = int.from_bytes(_digest(name)[:4], "big") % 100
    return "test" if place < 5 else "validation" if place < 10 else "train"


def in_split(data: Data, seed: int, split: str) -> Iterator[str]:
    """The documents that a run has in a split, or with "all" every document."""
    parts = text_parts(data, seed)
    for part in parts if split == "all" else [part for part in parts if part.split in (None, split)]:
        for document in part.read(None):
            if part.split is not None or split in ("all", split_of(document.name)):
                yield document.text


def tokenise(recipe: Recipe, tokenizer, folder: Path) -> dict:
    """Write `{split}.npy` to the folder, documents in stream order, until each split is full or the text ends.

    Each chunk of documents is appended, then `state.json` says so: an interrupted run resumes with the
    first document that is not in it. Returns the state.
    """
    if recipe.data.chat_column is not None:
        chat.require_template(tokenizer, recipe.data.chat_loss == "assistant")
    length = recipe.data.context_length
    wanted = dict.fromkeys(SPLITS, recipe.data.evaluation_tokens) | {"train": tokens_needed(recipe)}
    kind = np.dtype(np.uint16 if _largest_id(tokenizer) < padding(np.uint16) else np.uint32)
    whole_blocks = recipe.data.packing == "documents"
    parts = text_parts(recipe.data, recipe.seed)
    print(f"data: {taken(recipe.data, parts)}", flush=True)
    with _Files(folder, kind, length, wanted, parts, recipe.data.chat_loss == "assistant") as files:
        for number in range(files.state["part"], len(parts)):
            split, read, _ = parts[number]
            awaited = SPLITS if split is None else (split,)
            for chunk in _chunks(read(files.state["place"])) if not files.full(*awaited) else ():
                named = [(split or split_of(document.name), document) for document in chunk]
                named = [(split, document) for split, document in named if not files.full(split)]
                made = _tokens(tokenizer, [document for _, document in named], recipe.data)
                for (into, document), (ids, own) in zip(named, made, strict=True):
                    if not files.full(into) and not files.held_out(into, document.text):
                        ids, padded = np.array(ids, kind), whole_blocks and into == "train"
                        files.append(into, _padded(ids, length, padding(kind)) if padded else ids)
                        if own is not None:
                            files.count(into, _padded(own, length, False) if padded else own)
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
            for document in part.read(None):
                yield document.name, document.text


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


def identities(data: Data, run_dir: Path) -> dict[str, dict]:
    """The identity of each file of local text, or of the standard library as a whole; nothing for text on the Hub.

    Once a run has tokenised its text it does not read it again: of the files that it began with, those that are still
    there are looked at, and the others count as unchanged.
    """
    path, inputs = Path(data.path or ""), run_dir / "inputs.json"
    if (run_dir / "data").is_dir():
        known = checkpoint.read_json(inputs).get("data", {}) if inputs.is_file() else {}
        folder = path if path.is_dir() else path.parent
        there = {name: folder / name for name in known if data.path is not None and (folder / name).is_file()}
        return known | {name: loading.identity(file) for name, file in there.items()}
    if data.path is not None:
        files = [file for group in _local_files(path).values() for file in group]
        return {str(file.relative_to(path) if path.is_dir() else file.name): loading.identity(file) for file in files}
    return {} if data.name is not None else {"the standard library": source(data)}


def taken(data: Data, parts: list[Part]) -> str:
    """What is read as which split, in one line."""
    where = data.path or data.name or "the standard library"
    if parts[0].split is None:
        files = f"{len(parts[0].shards)} files" if data.path and len(parts[0].shards) > 1 else ""
        what = "its train split" if data.name else files
        return f"{where}{f' ({what})' if what else ''}, split 90/5/5 by a hash of each document"
    counts = []
    for part in sorted(parts, key=lambda part: SPLITS.index(part.split)):
        first, *others = _below(data.path, {"": part.shards})[""]
        counts.append(f"{part.split} {first}" + (f" and {len(others)} more" if others else ""))
    return f"{where}, its own splits: {'; '.join(counts)}"


def _below(path, files):
    """Names of files by split, relative to the folder of the text."""
    return {
        split: [os.path.relpath(name, path) if path and name != path else name for name in names]
        for split, names in files.items()
    }


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

    def __init__(self, folder, kind, length, wanted, parts, counts):
        self.folder, self.kind, self.length, self.wanted, self.counts = folder, kind, length, wanted, counts
        self.state = _state(folder, kind, length, parts, counts)
        sizes = _sizes(self.state, kind, length, counts)
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

    def count(self, split, counted):
        """Which of the tokens appended last have a loss."""
        self.files[f"{split}_counted.npy"].write(counted.data)

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
        for name, size in _sizes(self.state, self.kind, self.length, self.counts).items():
            self.files[name].truncate(size)
        for split, count in whole.items():
            for name, kind in _arrays(split, self.kind, self.counts).items():
                self.files[name].seek(0)
                self.files[name].write(_header(kind, count, self.length))


def _state(folder, kind, length, parts, counts):
    """The state to resume from: the saved one, or an empty one if there is no valid one."""
    files = {part.split or "all": part.shards for part in parts}
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):  # KeyError: a state of an earlier version
        state = checkpoint.read_json(folder / "state.json")
        before, now = ({name for some in each.values() for name in some} for each in (state["files"], files))
        differing = dict.fromkeys(sorted(before - now), "is gone") | dict.fromkeys(sorted(now - before), "is new")
        if not differing and state["files"] != files:
            differing = {"a file": "is in another split"}
        for name, how in differing.items():
            raise RecipeError(
                f"data: {name} {how}, but {folder} holds tokens of the earlier text; expected the same text "
                "(or delete that folder to start again)"
            )
        sizes = _sizes(state, kind, length, counts)
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
        "files": files,
    }


def _sizes(state, kind, length, counts):
    """Number of valid bytes of each file."""
    return {
        name: len(_header(own, 0, length)) + own.itemsize * state["tokens"][split]
        for split in SPLITS
        for name, own in _arrays(split, kind, counts).items()
    } | {"held_out.bin": 8 * state["held_out"]}


def _arrays(split, kind, counts):
    """The files of a split and their types: tokens, and where tokens are counted which of them."""
    return {f"{split}.npy": kind} | ({f"{split}_counted.npy": np.dtype(bool)} if counts else {})


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


def _tokens(tokenizer, documents, settings):
    """Each document's tokens as they stand in running text, and which of them have a loss (None: all)."""
    if settings.chat_column is None:
        return [(framed(ids, tokenizer), None) for ids in _ids(tokenizer, [document.text for document in documents])]
    conversations = [chat.Conversation(json.loads(document.text), document.where) for document in documents]
    made = []
    for ids, own in chat.tokens(conversations, tokenizer, settings.chat_loss == "assistant"):
        before, after = frame(ids, tokenizer)
        # What is put around a conversation is nobody's.
        own = None if own is None else np.pad(own, (len(before), len(after)))
        made.append(([*before, *ids, *after], own))
    return made


def _ids(tokenizer, texts):
    """Token ids of each text; a fast tokenizer processes a list on all cores."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _largest_id(tokenizer):
    return max(tokenizer.get_vocab().values())


def _padded(values, length, filler):
    """A document padded to whole blocks; a single token in the last block would predict nothing and is dropped."""
    if len(values) % length == 1:
        values = values[:-1]
    return np.pad(values, (0, -len(values) % length), constant_values=filler)


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


def _chat_facts(settings, tokenizer, folder):
    """What source.json says of conversations; RecipeError where a split has no token with a loss."""
    facts = {
        "column": settings.chat_column,
        "loss": settings.chat_loss,
        "template_sha256": hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest(),
    }
    if settings.chat_loss == "assistant":
        facts["counted"] = {split: int(counted(folder, split)[:, 1:].sum()) for split in SPLITS}
        for split, count in facts["counted"].items():
            if count == 0:
                shutil.rmtree(folder)  # so that other text can be tried
                raise RecipeError(
                    f"data: the {split} split has no token that the assistant wrote; expected messages whose role is "
                    "assistant (chat_loss: all counts every token)"
                )
    return {"chat": facts}


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
    kinds = {LOADERS.get(file.suffix.lower()) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise RecipeError(
            f"data.path: {path}: found {', '.join(sorted(k or 'unknown' for k in kinds)) or 'no text'}; expected "
            f"files of one kind: {', '.join(LOADERS)}"
        )
    kind = kinds.pop()
    if data.chat_column is not None and kind == "text":
        raise RecipeError(
            f"data.path: {path}: found plain text, which has no column {data.chat_column}; expected .jsonl, .json, "
            ".parquet or .arrow with data.chat_column"
        )
    sizes = {file: file.stat().st_size for file in files}
    for split, group in groups.items():
        if not any(sizes[file] for file in group):
            where = f"{group[0]} is" if len(group) == 1 else f"{path}: all files{f' of {split}' if split else ''} are"
            raise RecipeError(f"data.path: {where} empty; expected text")
    read = _shuffled if sum(sizes.values()) <= SHUFFLED_BYTES else _streamed
    return [
        _part(split, [_file_shard(file, kind, data) for file in group if sizes[file]], seed, read)
        for split, group in groups.items()
    ]


def _local_files(path):
    """The files of each split, held-out splits first, if their names give all three; else all files, under None.

    Where every file is in a split, or names differ in the split's word alone (wiki.train.txt, wiki.test.txt), all three
    splits must be there and every file in one of them. In any other text it is an ordinary word, as in the sources and
    the manual of a program, which may well have a train.py and a test.py.
    """
    if not path.is_dir():
        if not path.is_file():
            raise RecipeError(f"data.path: {path}: found neither a file nor a folder; expected text")
        _require_unpacked(path)
        return {None: [path]}
    files = _text_files(path)
    named, sets = _named_splits(path, files)
    groups = {split: [file for file in files if named.get(file) == split] for split in ("validation", "test", "train")}
    others = [file for file in files if file not in named]
    if not others and all(groups.values()):
        return groups
    sources = any(file.suffix in (".py", ".md") for file in files)
    if (others and (sources or not sets)) or not (groups["validation"] or groups["test"]):
        return {None: files}
    shown = {split: groups[split] for split in SPLITS} | {"in no split": others}
    found = "; ".join(f"{split}: {_some(path, group)}" for split, group in shown.items() if group)
    raise RecipeError(
        f"data.path: {path}: found these splits by file name: {found}; expected files of all three splits and no "
        "others, or data.path to name the files of one split, whose documents are then split 90/5/5"
    )


def _text_files(path):
    """The files of text below a folder, without hidden ones and without those that only describe the others."""
    files, visited = [], set()

    def unreadable(error):
        raise RecipeError(f"data.path: {error.filename} cannot be read ({error.strerror}); expected a folder of text")

    for folder, folders, names in os.walk(path, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = () if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            visited.add(real)
            files += [Path(folder) / name for name in sorted(names) if not name.startswith(".")]
    for file in files:
        if not file.exists():
            raise RecipeError(f"data.path: {file} is a link to a file that is not there; expected text")
        if Path(file.stem).suffix.lower() in LOADERS:
            _require_unpacked(file)
    files = sorted(file for file in files if file.is_file() and file.suffix.lower() in LOADERS)
    files = [file for file in files if not (file.suffix == ".arrow" and file.name.startswith("cache-"))]
    text = [file for file in files if not ABOUT.fullmatch(file.name.lower())]
    tables = {LOADERS[file.suffix.lower()] for file in text} - {"text"}
    return text if tables or (text and len(_named_splits(path, text)[0]) == len(text)) else files


def _require_unpacked(file):
    if file.suffix.lower() in PACKED:
        raise RecipeError(f"data.path: {file} is compressed; expected an unpacked file")


def _named_splits(path, files):
    """The split of each file whose name below `path` gives one, and whether some names differ in that word alone.

    A folder's name is the word; a file's name is it, or ends with it and perhaps a number (corpus-test, wiki.valid.2).
    A word further to the front (train_clean, latest-test-results) counts only where another split has the same name.
    """
    found, sets = {}, {}
    for file in files:
        relative = file.relative_to(path)
        above = [folder for folder in reversed(relative.parents) if folder.name.lower() in SPLIT_WORDS]
        words = list(SPLIT_WORD.finditer(file.stem))
        if above:
            word, likes, alone = above[0].name, (above[0].parent, "", ""), True
        elif words:
            last = words[-1]
            before, after = file.stem[: last.start()], file.stem[last.end() :]
            alone = SHARD_NUMBER.fullmatch(after) is not None
            word, likes = last.group(), (relative.parent, before, "" if alone else after)
        else:
            continue
        found[file] = SPLIT_WORDS[word.lower()], likes, alone
        sets.setdefault(likes, set()).add(SPLIT_WORDS[word.lower()])
    named = {file: split for file, (split, likes, alone) in found.items() if alone or len(sets[likes]) > 1}
    return named, any(len(splits) > 1 for splits in sets.values())


def _some(path, files):
    names = [str(file.relative_to(path)) for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _file_shard(file, kind, data):
    def opened():
        from datasets import disable_progress_bars, load_dataset
        from datasets.utils.logging import CRITICAL, set_verbosity

        disable_progress_bars()
        set_verbosity(CRITICAL)  # `complaint` reports its errors, in one line
        return load_dataset(kind, data_files=[glob.escape(str(file))], split="train", streaming=True)

    def complaint(error):
        with contextlib.suppress(OSError), open(file, "rb") as opened:
            begin = opened.read(8)
            for magic, name in COMPRESSED.items():
                if begin.startswith(magic):
                    error = ValueError(f"it is a {name} file, expected an unpacked one")
        return (
            f"data.path: {file}: cannot be read as {kind} ({_first_line(error)}); expected a file that can be: "
            "repair it and run the same command again"
        )

    match kind:
        case "text":
            read = _pieces(file)
        case "json":
            read = _json_rows(file, data)
        case _:
            read = _rows(opened, data, str(file))
    return Shard(str(file), read, complaint)


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
    named = {SPLIT_WORDS.get(name.lower()): name for name in reversed(list(found))} | {"train": "train"}
    splits = {split: named[split] for split in ("validation", "test", "train") if split in named}
    if len(splits) < 3:
        splits = {None: "train"}
    return [_part(split, _hub_shards(data, name, found[name]), seed, _streamed) for split, name in splits.items()]


def _hub_shards(data, split, rows):
    def complaint(error):
        return (
            f"data.name: {data.name} could not be read to the end ({_first_line(error)}); what is tokenised is kept: "
            "run the same command again to resume"
        )

    count, shards = rows.num_shards, []
    for number in range(count):
        where = f"{data.name}, {split} {number + 1} of {count}"
        shards.append(Shard(where, _rows(lambda n=number: rows.shard(count, n), data, where), complaint))
    return shards


def _part(split, shards, seed, read):
    return Part(split, lambda place: read(shards, seed, place), [shard.name for shard in shards])


def _shuffled(shards, seed, place):
    """All documents of small files, shuffled; a place is [documents read, documents in all]."""
    texts = [(document.text, document.where) for document in _in_order(shards, None)]
    begin, count = place or (0, len(texts))
    if count != len(texts):
        raise RecipeError(
            f"data: {shards[0].name} and the files read with it had {count} documents when tokenising began and "
            f"have {len(texts)} now; expected the same text (or delete the run's data.partial to start again)"
        )
    order = np.random.default_rng(seed).permutation(count)
    for number in range(begin, count):
        text, where = texts[order[number]]
        yield Document(text, text, [number + 1, count], where)


def _streamed(shards, seed, place):
    """The documents of shuffled shards; there is no shuffle buffer, as its documents would be lost with the process."""
    order = np.random.default_rng(seed).permutation(len(shards))
    return _in_order([shards[number] for number in order], place)


def _in_order(shards, place):
    """The documents of shards, in order; a place is [shard index, place in the shard]."""
    begin, inside = place or (0, None)
    for number in range(begin, len(shards)):
        try:
            for text, where, after in shards[number].read(inside):
                if text:
                    yield Document(text, text, [number, after], where)
        except RecipeError:
            raise
        except Exception as error:  # parsers, file systems and the network have no common class
            raise RecipeError(shards[number].complaint(error)) from error
        inside = None


def _rows(opened, data, where):
    """Reads the texts of a streaming data set; a place is [rows read, state of the rest]."""

    def read(place):
        first, state = place or (0, None)
        rows = opened()
        if rows.column_names:
            _require_column(rows.column_names, data, where)
            rows = rows.select_columns([_column(data)[1]])
        if state is not None:
            rows.load_state_dict(state)
        for count, row in enumerate(rows, first + 1):
            yield *_text_of(row, data, f"{where}, row {count}"), [count, rows.state_dict()]

    return read


def _json_rows(file, data):
    """Reads the texts of a file of JSON lines, or of one JSON list; a place is [rows read, place in the file].

    Without `datasets`, whose parser ends the process at some lines (null) and reads others as something else.
    """

    def read(place):
        first, offset = place or (0, 0)
        with open(file, "rb") as opened:
            if _is_list(opened):
                rows = json.loads(opened.read().decode("utf-8-sig"))
                for number, row in enumerate(rows[first:], first + 1):
                    yield *_text_of(row, data, f"{file}, row {number}"), [number, 0]
                return
            opened.seek(offset)
            number = first
            while line := opened.readline():
                number += 1
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    yield *_text_of(_parsed(line, number), data, f"{file}, line {number}"), [number, opened.tell()]

    return read


def _is_list(opened):
    """Whether a file of JSON begins with a list; it is read from the beginning again."""
    begin = opened.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    opened.seek(0)
    return begin.startswith(b"[")


def _parsed(line, number):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or too long a number
        raise ValueError(f"line {number}: {getattr(error, 'msg', None) or _first_line(error)}") from error


def _text_of(row, data, where):
    """The text of a row, an empty string for null; and if it is a conversation `where`, the file and row."""
    key, column = _column(data)
    if not isinstance(row, dict):
        raise RecipeError(f"data: {where}: found {json.dumps(row)[:20]}; expected an object with the column {column}")
    _require_column(row, data, where)
    text = row[column]
    if text is not None and data.chat_column is not None:
        text = _conversation(text, column, where)
    if text is not None and not isinstance(text, str):
        raise RecipeError(
            f"data: {where}: found {type(text).__name__} values in {column}; expected data.{key} to name a column of "
            "text"
        )
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise RecipeError(f"data: {where}: found half a surrogate pair in {column}; expected Unicode text") from error
    return text or "", where if data.chat_column is not None else ""


def _conversation(messages, column, where):
    """A list of messages as JSON, without the nulls that tables have in place of absent keys."""
    found = None
    if not isinstance(messages, list) or not messages:
        found = f"an empty list in {column}" if messages == [] else f"{type(messages).__name__} values in {column}"
    for number, message in enumerate(messages if found is None else (), 1):
        if not isinstance(message, dict):
            found = f"{type(message).__name__} as message {number} of {column}"
        elif not isinstance(message.get("role"), str) or message.keys().isdisjoint(CONTENT):
            found = f"the keys {', '.join(map(str, message)) or '(none)'} in message {number} of {column}"
        if found is not None:
            break
    try:
        if found is None:
            kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
            return json.dumps(kept, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # bytes and dates of a table
        found = f"values in {column} that JSON does not have ({_first_line(error)})"
    raise RecipeError(
        f"data: {where}: found {found}; expected data.chat_column to name a column of conversations, lists of messages "
        "{role, content}"
    )


def _column(data):
    """The key of the recipe that names the column that is read, and the column."""
    return ("text_column", data.text_column) if data.chat_column is None else ("chat_column", data.chat_column)


def _require_column(columns, data, where):
    key, column = _column(data)
    if column not in columns:
        raise RecipeError(
            f"data: {where}: found columns {', '.join(columns) or '(none)'}; expected data.{key} to name one of them "
            f"(it is {column})"
        )


def _pieces(file):
    """Reads the pieces of a plain text file; a place is that in the file."""

    def read(place):
        with open(file, encoding="utf-8-sig") as text:
            text.seek(place or 0)
            while piece := _piece(text):
                if "\0" in piece:
                    raise ValueError("found a NUL character, expected UTF-8 text")
                yield piece, "", text.tell()

    return read


def _piece(text):
    lines, size = [], 0
    while size <= PIECE and (line := text.readline(PIECE + 1)):
        lines.append(line)
        size += len(line)
    return "".join(lines)


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
