"""Held-out documents from a local file or folder, a data set on the Hub, or the standard library."""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from scavenger import data
from scavenger.recipe import Data


@dataclass(frozen=True)
class Text:
    """Documents, their name in tables, and a hash of the text; `limit` is set if more documents may exist."""

    name: str
    digest: str
    documents: list[str]
    limit: int | None = None

    def ids(self, tokenizer) -> list[list[int]]:
        """Token ids of each document, preceded by the token that `data.beginning` names, as in training."""
        found = tokenizer(self.documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [[data.beginning(tokenizer), *ids] for ids in found["input_ids"]]

    def stream(self, tokenizer) -> np.ndarray:
        """All documents concatenated, as `data.framed` has them, after one first token: (token,) int64."""
        between = [] if data.beginning(tokenizer) == tokenizer.eos_token_id else [tokenizer.eos_token_id]
        documents = ([*ids, *between] for ids in self.ids(tokenizer))
        return np.array(list(itertools.chain.from_iterable(documents)), dtype=np.int64)

    @property
    def settings(self) -> dict:
        """What is recorded about the text with each measurement."""
        found = {"text": self.name, "text_sha256": self.digest, "documents": len(self.documents)}
        return found | ({"limit": self.limit} if self.limit is not None else {})


def read(
    path: str | None = None,
    dataset: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    split: str = "test",
    column: str = "text",
    limit: int | None = None,
) -> Text:
    """The documents of a split in a fixed shuffled order, only the first `limit` if it is given.

    Files named train, validation and test are those splits, as are a data set's own splits. Other local text is read
    whole; other text on the Hub and the standard library are split by a hash of each document, as in a recipe. Plain
    text has no documents and is cut into pieces of about 16,000 characters.
    """
    source = Data(name=dataset, subset=subset, revision=revision, path=path, text_column=column)
    parts = data.text_parts(source, seed=0)
    named = parts[0].split is not None
    stream = itertools.chain.from_iterable(part.read(None) for part in parts if part.split in (None, split))
    whole = named or path is not None
    texts = (document.text for document in stream if whole or data.split_of(document.name) == split)
    documents = [text for text in itertools.islice(texts, limit) if text.strip()]
    where = path or dataset or "the standard library"
    if not documents:
        raise ValueError(f"{where}: found no text in the {split} split; expected at least one document")
    digest = hashlib.sha256("\0".join(documents).encode(errors="surrogatepass")).hexdigest()[:16]
    name = where if path and not named else f"{where}, {split} split"
    return Text(name, digest, documents, limit)


@dataclass(frozen=True)
class Blocks:
    """A run's held-out blocks of tokens (block, length), each read independently."""

    name: str
    blocks: np.ndarray

    def stream(self, tokenizer) -> np.ndarray:
        """All blocks concatenated: (token,) int64."""
        return np.asarray(self.blocks).reshape(-1).astype(np.int64)

    @property
    def settings(self) -> dict:
        """What is recorded about the text with each measurement."""
        digest = hashlib.sha256(np.ascontiguousarray(self.blocks)).hexdigest()[:16]
        return {"text": self.name, "text_sha256": digest, "tokens": int(self.blocks.size)}
