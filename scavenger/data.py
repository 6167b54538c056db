"""Text into blocks of tokens, the same on every machine.

Documents are split by a hash of what names them (train 90 %, validation 5 %, test 5 %), so a document is in the same
split whatever the order, the machine or the amount read. A plain text file has no documents and is cut into pieces.
Tokens are packed end to end, documents separated by the tokenizer's end-of-text token, and cut into blocks of
`context_length`.
"""

import hashlib
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from scavenger import checkpoint
from scavenger.recipe import Data, Recipe, RecipeError


SPLITS = ("train", "validation", "test")
# Not source that somebody writes and reads: test suites (absent from some installations), installed packages, and
# generated tables of code points and of build settings.
STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
PIECE = 16_384  # characters; a plain text file has no documents, so it is cut at line ends into pieces of about this
SHUFFLE_BUFFER = 10_000  # documents held while streaming from the Hub
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text", ".py": "text"}


def run(recipe: Recipe, run_dir: Path, tokenizer) -> Path:
    """Write `data/{train,validation,test}.npy` and `data/source.json`; returns the folder."""
    folder = run_dir / "data"
    if checkpoint.complete(folder):
        return folder
    wanted = {
        "train": tokens_needed(recipe),
        "validation": recipe.data.evaluation_tokens,
        "test": recipe.data.evaluation_tokens,
    }
    tokens = tokenise(documents(recipe.data, recipe.seed), tokenizer, wanted)
    length = recipe.data.context_length
    for split in SPLITS:
        if len(tokens[split]) < length:
            raise RecipeError(
                f"data: the {split} split has {len(tokens[split])} tokens, less than one context of "
                f"{length}; documents go 90/5/5 by hash, so expected a hundred documents or more"
            )
    beside = checkpoint.partial(folder)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for split, ids in tokens.items():
        np.save(beside / f"{split}.npy", ids[: len(ids) // length * length].reshape(-1, length))
    checkpoint.write_json(
        beside / "source.json",
        source(recipe.data)
        | {
            "tokens": {split: len(ids) // length * length for split, ids in tokens.items()},
            "sha256": {split: hashlib.sha256(ids.tobytes()).hexdigest() for split, ids in tokens.items()},
        },
    )
    return checkpoint.finish(folder)


def blocks(folder: Path, split: str) -> np.ndarray:
    """The blocks of a split, memory-mapped: (block, length)."""
    return np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)


def batch(array: np.ndarray, first: int, size: int, seed: int) -> torch.Tensor:
    """Blocks `first … first + size - 1` of an endless shuffled stream, each pass in an order of its own.

    The position alone decides, so a run that resumes, or is spread over processes, sees the same text.
    """
    rows = []
    for index in range(first, first + size):
        epoch, place = divmod(index, len(array))
        rows.append(_order(len(array), seed, epoch)[place])
    return torch.from_numpy(array[rows].astype(np.int64))


def tokens_needed(recipe: Recipe) -> int:
    """Tokens of training text that the longest training of the recipe sees."""
    sequences = [stage.steps * stage.batch_size for stage in [recipe.teacher.train] if stage]
    if recipe.transfer:
        sequences.append(
            sum(stage.steps * stage.batch_size for stage in (recipe.transfer.activations, recipe.transfer.logits))
        )
    return max(sequences) * recipe.data.context_length


def split_of(name: str) -> str:
    """train, validation or test, by a hash of the document's name."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "test" if place < 5 else "validation" if place < 10 else "train"


def tokenise(stream: Iterator[tuple[str, str]], tokenizer, wanted: dict[str, int]) -> dict[str, np.ndarray]:
    """Token ids of each split, documents in stream order, until each has what is wanted or the text ends."""
    kept = {split: [] for split in SPLITS}
    counts = dict.fromkeys(SPLITS, 0)
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end = tokenizer.eos_token_id
    with tqdm(total=sum(wanted.values()), unit="tok", unit_scale=True, desc="data", leave=False) as bar:
        for name, text in stream:
            split = split_of(name)
            if counts[split] >= wanted[split]:
                continue
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + [end]
            kept[split].append(np.asarray(ids, dtype=kind))
            counts[split] += len(ids)
            bar.update(len(ids))
            if all(counts[s] >= wanted[s] for s in SPLITS):
                break
    return {
        split: np.concatenate(parts)[: wanted[split]] if parts else np.zeros(0, kind) for split, parts in kept.items()
    }


def documents(data: Data, seed: int) -> Iterator[tuple[str, str]]:
    """(name, text) of every document, in an order that the seed decides."""
    if data.path is not None:
        yield from _local_documents(data, seed)
    elif data.name is not None:
        yield from _hub_documents(data, seed)
    else:
        files = stdlib_files()
        for name in sorted(files, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest()):
            yield name, files[name].read_text(encoding="utf-8", errors="replace")


def stdlib_files() -> dict[str, Path]:
    """The standard library's modules on this machine, by path relative to its folder."""
    root = Path(sysconfig.get_path("stdlib"))
    return {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*.py"))
        if not STDLIB_EXCLUDED & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    }


def source(data: Data) -> dict:
    """What the text is, for the record: a name and revision, or the library's version and content hash."""
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


def _local_documents(data, seed):
    from datasets import load_dataset

    path = Path(data.path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in LOADERS) if path.is_dir() else [path]
    kinds = {LOADERS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise RecipeError(
            f"data.path: {path}: found {sorted(k or 'unknown' for k in kinds) or 'no text'}; expected "
            f"files of one kind: {', '.join(LOADERS)}"
        )
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        rows = load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
    except Exception as error:  # datasets wraps every parser's own errors
        raise RecipeError(f"data.path: {path}: cannot be read as {kind} ({_first_line(error)})") from error
    column = "text" if kind == "text" else data.text_column
    _require_column(rows.column_names, column, f"data.path: {path}")
    if kind != "text":
        rows = rows.shuffle(seed=seed)
        texts = (row[column] for row in rows)
    else:
        pieces = [piece for row in rows for piece in _pieces(row[column])]
        texts = (pieces[index] for index in _order(len(pieces), seed, 0))
    for value in texts:
        text = _text(value, f"data.path: {path}")
        if text is not None:
            yield text, text


def _hub_documents(data, seed):
    from datasets import load_dataset

    try:
        rows = load_dataset(data.name, data.subset, revision=data.revision, split="train", streaming=True)
        first = next(iter(rows))
    except Exception as error:  # network, permission and format errors have no common class
        raise RecipeError(
            f"data.name: {data.name} cannot be read from the Hub ({_first_line(error)}); "
            "expected a reachable data set, or data.path=<local folder>"
        ) from error
    _require_column(list(first), data.text_column, f"data.name: {data.name}")
    stream = iter(rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as error:  # as above, hours later
            raise RecipeError(
                f"data.name: {data.name} could not be read to the end ({_first_line(error)}); "
                "the same command reads again"
            ) from error
        text = _text(row[data.text_column], f"data.name: {data.name}")
        if text is not None:
            yield text, text


def _text(value, where):
    """The text of a row; None for an empty one."""
    if value is not None and not isinstance(value, str):
        raise RecipeError(
            f"{where}: found a {type(value).__name__} in the column; expected data.text_column to name text"
        )
    return value or None


def _require_column(columns, column, where):
    if column not in columns:
        raise RecipeError(
            f"{where}: found columns {', '.join(columns)}; expected data.text_column to name one of them "
            f"(it says {column})"
        )


def _pieces(text):
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_orders = {}


def _order(count, seed, epoch):
    """The permutation of one pass, kept because every batch of the pass asks for it."""
    key = (count, seed, epoch)
    if key not in _orders:
        _orders.clear()
        _orders[key] = np.random.default_rng((seed, epoch)).permutation(count)
    return _orders[key]
