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

    The split is what a run on this text has in it, so that nothing it trained on is among a held-out one: by the names
    of files and folders, or by a hash of each document. The split "all" is the whole text. Plain text has no documents
    and is cut into pieces of about 16,000 characters.
    """
    source = Data(name=dataset, subset=subset, revision=revision, path=path, text_column=column)
    documents = [text for text in itertools.islice(data.in_split(source, 0, split), limit) if text.strip()]
    where = path or dataset or "the standard library"
    if not documents:
        if split == "all":
            raise ValueError(f"{where}: found no text; expected one document at least")
        raise ValueError(f"{where}: found no document in the {split} split; expected more documents, or --split all")
    digest = hashlib.sha256("\0".join(documents).encode(errors="surrogatepass")).hexdigest()[:16]
    return Text(where if split == "all" else f"{where}, {split} split", digest, documents, limit)


@dataclass(frozen=True)
class Blocks:
    """A run's held-out blocks of tokens (block, length), each read independently.

    `counted` (block, length) says which tokens' predictions are measured as perplexity; None: all.
    """

    name: str
    blocks: np.ndarray
    counted: np.ndarray | None = None

    @property
    def predictions(self) -> np.ndarray:
        """Whether the prediction of each token but a block's first is measured, (block, length - 1) bool."""
        return np.ones_like(self.blocks[:, 1:], dtype=bool) if self.counted is None else np.array(self.counted[:, 1:])

    def stream(self, tokenizer) -> np.ndarray:
        """All blocks concatenated: (token,) int64."""
        return np.asarray(self.blocks).reshape(-1).astype(np.int64)

    @property
    def settings(self) -> dict:
        """What is recorded about the text with each measurement."""
        digest = hashlib.sha256(np.ascontiguousarray(self.blocks)).hexdigest()[:16]
        found = {"text": self.name, "text_sha256": digest, "tokens": int(self.blocks.size)}
        return found if self.counted is None else found | {"counted_tokens": int(self.predictions.sum())}
