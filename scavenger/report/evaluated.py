"""Any checkpoint folder or Hub name, loaded when it is measured and not before."""

import contextlib
import functools
import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import scavenger.model  # AutoModel knows the student


@dataclass(frozen=True)
class Evaluated:
    """A model under measurement: what the tables call it, and the folder or Hub name it is read from.

    Weights come from safetensors only, and no code that came with them is run: the student's class is this package's.
    What cannot be read is a ValueError of one line. `close` gives the memory back.
    """

    label: str
    path: str
    dtype: str = "float32"
    revision: str | None = None  # of a Hub name
    loader: Callable[[], nn.Module] | None = None  # where the weights are read in another way

    @classmethod
    def parsed(cls, word: str, dtype: str = "float32"):
        """From `FOLDER`, `NAME` or `NAME@REVISION`, or one of these behind `LABEL=`."""
        label, equals, path = (word, "", "") if Path(word).is_dir() else word.partition("=")
        if equals and not (label and path):
            raise ValueError(f"found {word}; expected FOLDER or LABEL=FOLDER")
        path, revision = path or label, None
        if "@" in path and not Path(path).is_dir():
            path, _, revision = path.rpartition("@")
        return cls(label, path, dtype, revision)

    @functools.cached_property
    def config(self):
        with _named(self.path):
            return AutoConfig.from_pretrained(self.path, revision=self.revision)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        with _named(self.path):
            found = AutoTokenizer.from_pretrained(self.path, revision=self.revision)
            if found.eos_token_id is None:
                raise ValueError("its tokenizer has no end-of-text token; expected one, to begin documents with")
        return found

    @functools.cached_property
    def model(self) -> nn.Module:
        """In evaluation mode, on the GPU where there is one."""
        with _named(self.path):
            if self.loader is not None:
                model = self.loader()
            else:
                model, found = AutoModelForCausalLM.from_pretrained(
                    self.path,
                    revision=self.revision,
                    dtype=getattr(torch, self.dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                )
                if found["missing_keys"]:  # which would be filled at random
                    missing = sorted(found["missing_keys"])
                    raise ValueError(f"{len(missing)} of its weights are not in the file, {missing[0]} among them")
        return model.eval().requires_grad_(False).to(self.device)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def is_student(self) -> bool:
        return self.config.model_type == scavenger.model.HyenaNeoXConfig.model_type

    @property
    def is_recurrent(self) -> bool:
        return self.is_student and self.config.filter == "modal"

    @property
    def stated_context(self) -> int | None:
        """Tokens that it was trained to read at once, where its configuration says so."""
        stated = (getattr(self.config, key, None) for key in ("context_length", "max_position_embeddings"))
        return next((length for length in stated if length is not None), None)

    @property
    def training_context(self) -> int:
        """The same; ValueError where it does not."""
        if self.stated_context is not None:
            return self.stated_context
        raise ValueError(f"{self.path}: the configuration names no training context; expected --context-length")

    @functools.cached_property
    def weights(self) -> str:
        """What changes when the model does: of a folder the names, sizes and times of files, of the Hub the commit."""
        folder = Path(self.path)
        if folder.is_dir():
            files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json"))
            facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        else:
            facts = [self.path, self.revision, getattr(self.config, "_commit_hash", None)]
        return hashlib.sha256(json.dumps([*facts, self.dtype]).encode()).hexdigest()[:16]

    def close(self):
        """Forget the model; it is loaded again when it is asked for."""
        self.__dict__.pop("model", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def numbers(logits: torch.Tensor) -> torch.Tensor:
    """The same; ValueError where a model gives what is no number, of which every comparison would be false."""
    if logits.isnan().any():
        raise ValueError("a model gives probabilities that are not numbers; expected weights that are finite")
    return logits


def same_tokenizer(models: list[Evaluated]) -> bool:
    """Whether all models read text as the same tokens."""
    vocabularies = [model.tokenizer.get_vocab() for model in models]
    return all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def same_outputs(models: list[Evaluated]) -> bool:
    """Whether, besides, all give probabilities to as many tokens: some models' vocabularies are padded further."""
    return same_tokenizer(models) and len({model.config.vocab_size for model in models}) == 1


@contextlib.contextmanager
def _named(path):
    """What loading raises, as one line that begins with the model."""
    try:
        yield
    except Exception as error:  # whatever a foreign file makes the libraries raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: cannot be loaded ({reason})") from error
