"""A model to evaluate, from a checkpoint folder or the Hub, loaded on first use."""

import dataclasses
import functools
import gc
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import scavenger.model  # registers the student with AutoModel
from scavenger import loading


POSITIONS = re.compile(r"(^|\.|_)(wpe|position\w*)(\.weight)?$")  # names of tables with a row for each position


@dataclass(frozen=True)
class Evaluated:
    """A model to evaluate: its label in the tables, and the folder or Hub name that it is loaded from.

    Only safetensors weights are loaded. Code from the checkpoint runs only with `trust_remote_code`, never that of a
    student: its class is this package's.
    A model that cannot be loaded raises a one-line RecipeError. `close` frees the memory.
    """

    label: str
    path: str
    dtype: str = "float32"
    revision: str | None = None  # of a Hub name
    loader: Callable[[], nn.Module] | None = None  # loads the weights instead, if given
    trust_remote_code: bool = False

    @classmethod
    def parsed(cls, word: str, dtype: str = "float32", trust_remote_code: bool = False):
        """Parse `FOLDER`, `NAME` or `NAME@REVISION`, optionally preceded by `LABEL=`."""
        label, equals, path = (word, "", "") if Path(word).is_dir() else word.partition("=")
        if equals and not (label and path):
            raise ValueError(f"found {word}; expected FOLDER or LABEL=FOLDER")
        path, revision = path or label, None
        if "@" in path and not Path(path).is_dir():
            path, _, revision = path.rpartition("@")
        return cls(label, path, dtype, revision, trust_remote_code=trust_remote_code)

    @functools.cached_property
    def config(self):
        return loading.configuration(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        rows = self.config.get_text_config().vocab_size
        return loading.tokenizer(self.path, rows, self.trust_remote_code, revision=self.revision)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The model in evaluation mode, on the GPU if there is one."""
        if self.loader is not None:
            model = self.loader().to(getattr(torch, self.dtype))
        else:
            model = loading.model(
                AutoModelForCausalLM,
                self.path,
                revision=self.revision,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                trust_remote_code=self.trust_remote_code,
            )
        return model.eval().requires_grad_(False).to(self.device)

    @functools.cached_property
    def skeleton(self) -> nn.Module:
        """The model without weights, on the meta device."""
        trust = {"trust_remote_code": self.trust_remote_code}
        return loading.skeleton(self.path, lambda: AutoModelForCausalLM.from_config(self.config, **trust))

    @property
    def longest(self) -> int | None:
        """The tokens that the model can read at most: those of its table of positions; None where it has no table."""
        model, stated = self.skeleton, self.stated_context
        tables = [
            table for name, table in [*model.named_parameters(), *model.named_buffers()] if POSITIONS.search(name)
        ]
        # OPT and its kin have two rows more, for padding.
        return stated if any(t.dim() == 2 and len(t) in (stated, (stated or 0) + 2) for t in tables) else None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def is_student(self) -> bool:
        return self.config.model_type == scavenger.model.HyenaConfig.model_type

    @property
    def is_recurrent(self) -> bool:
        return self.is_student and self.config.filter == "modal"

    @property
    def attention_window(self) -> int | None:
        """Tokens that a student's attention sees at most, 0: all; None without attention, and for other models."""
        return self.config.widest_window if self.is_student else None

    @property
    def stated_context(self) -> int | None:
        """The context length of its training in tokens, if its configuration has it."""
        stated = (getattr(self.config, key, None) for key in ("context_length", "max_position_embeddings"))
        return next((length for length in stated if length is not None), None)

    @property
    def training_context(self) -> int:
        """`stated_context`; ValueError if the configuration does not have it."""
        if self.stated_context is not None:
            return self.stated_context
        raise ValueError(f"{self.path}: the configuration names no training context; expected --context-length")

    @functools.cached_property
    def weights(self) -> str:
        """Identifies the weights: by names, sizes and times of a folder's files, or by the commit of a Hub model."""
        folder = Path(self.path)
        if folder.is_dir():
            files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json"))
            facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        else:
            facts = [self.path, self.revision, getattr(self.config, "_commit_hash", None)]
        return hashlib.sha256(json.dumps([*facts, self.dtype]).encode()).hexdigest()[:16]

    def in_dtype(self, dtype: str) -> "Evaluated":
        """The same model in another dtype, not loaded yet."""
        return dataclasses.replace(self, dtype=dtype)

    def close(self):
        """Free the model; it is loaded again on the next access."""
        self.__dict__.pop("model", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def readable(models: list[Evaluated], tokens: int, what: str) -> int:
    """`tokens`, or what the models can read at most if that is less; a line on stderr says so."""
    limit, label = min(((model.longest, model.label) for model in models if model.longest), default=(tokens, ""))
    if limit < tokens:
        print(f"{what}: {label} has positions for {limit:,} tokens, all models read no more", file=sys.stderr)
    return min(limit, tokens)


def same_tokenizer(models: list[Evaluated]) -> bool:
    """Whether all models have the same tokenizer vocabulary."""
    vocabularies = [model.tokenizer.get_vocab() for model in models]
    return all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def same_outputs(models: list[Evaluated]) -> bool:
    """Whether they also have the same number of logits: some models pad their vocabulary further."""
    return same_tokenizer(models) and len({model.config.vocab_size for model in models}) == 1
