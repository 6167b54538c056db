"""Checkpoints and tokenizers, used only after they have been found whole.

transformers fills what a checkpoint lacks with random numbers, drops what it has too much, and makes an empty tokenizer
where there is none. Here each of these is an error. Nothing asks on the terminal, and code that comes with a checkpoint
runs only where the caller trusts it.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from scavenger.recipe import RecipeError


# transformers passes over the causal masks and rotary tables in checkpoints of its earlier versions, but for GPT-2's.
OBSOLETE = re.compile(r"\.attn\.masked_bias$")
OWN_CODE = "has code of its own; expected trust_remote_code, once you have read that code"
LINE = "The quick brown fox jumps over 13 lazy dogs; then it rests."
LFS = b"version https://git-lfs.github.com/spec/"  # a file of Git LFS begins so until it is downloaded
LFS_BYTES = 1024  # at most, by the specification
ADAPTER = (
    "found a PEFT adapter (adapter_config.json) beside the weights; expected merged weights alone: merge them with "
    "merge_and_unload() and save_pretrained(), or remove the adapter's files where they are merged already"
)
SAMPLE_BYTES = 2**16  # at each of four places in a file, so that a large model takes no longer than a small one


def configuration(where: str | Path, **options) -> PreTrainedConfig:
    """`AutoConfig.from_pretrained(where, **options)`; RecipeError if that fails."""
    with _one_line(where):
        require_files(where)
        return AutoConfig.from_pretrained(where, **options)


def model(kind, where: str | Path, **options) -> PreTrainedModel:
    """`kind.from_pretrained(where, **options)`, every weight of it from the checkpoint and finite.

    Raises RecipeError for weights that are missing, surplus, of another shape, NaN or infinite (it names the first of
    them), for files of Git LFS that were not downloaded, and for a PEFT adapter beside the weights.
    """
    with _one_line(where):
        require_files(where)
        with _silence():  # what it would print in a table is an error here
            found, report = kind.from_pretrained(
                where, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        _require_whole(found, report)
    return found


def skeleton(where: str | Path, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """`make()` without weights, on the meta device; RecipeError if it fails, as for sizes that do not fit."""
    with _one_line(where), torch.device("meta"):
        return make()


def tokenizer(
    where: str | Path, rows: int | None = None, trust_remote_code: bool = False, **options
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint whose model has so many embedding `rows`.

    Raises RecipeError for one that cannot encode ordinary text (transformers makes an empty one for a folder that has
    none), that has no end-of-text token, or ids for which the model has no row.
    """
    with _one_line(where):
        require_files(where)
        try:
            found = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
        except Exception as error:
            own = "AutoTokenizer" in (get_tokenizer_config(where, **options).get("auto_map") or ())
            if own and not trust_remote_code:
                raise RecipeError(f"the tokenizer {OWN_CODE}") from error
            raise
        ids = found(LINE, add_special_tokens=False)["input_ids"]
        read = found.decode(ids)
        if _letters(read) != _letters(LINE):
            raise RecipeError(
                f"the tokenizer turns {LINE!r} into {len(ids)} tokens that read {read[:80]!r}; expected the same text: "
                "tokenizer files are missing or damaged (save the tokenizer beside the model with save_pretrained)"
            )
        require_ids(found, rows)
    return found


def require_ids(tokenizer: PreTrainedTokenizerBase, rows: int | None):
    """Raise RecipeError unless there is an end-of-text token, and an embedding row for each id.

    More rows than ids are normal: Pythia has 50,277 tokens and 50,304 rows, the larger models more.
    """
    if tokenizer.eos_token_id is None:
        raise RecipeError("the tokenizer has no end-of-text token; expected one, to separate documents")
    largest = max(tokenizer.get_vocab().values())
    if rows is not None and largest >= rows:
        raise RecipeError(
            f"the tokenizer has ids up to {largest:,}, the model has {rows:,} embedding rows; expected ids below "
            f"{rows:,}: the tokenizer is another model's, or tokens were added to it"
        )


def require_files(where: str | Path):
    """Raise RecipeError if a local folder holds files of Git LFS that were not downloaded, or a PEFT adapter."""
    folder = Path(where)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():
        raise RecipeError(ADAPTER)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if path.stat().st_size <= LFS_BYTES and path.read_bytes().startswith(LFS):
            raise RecipeError(
                f"{path.name} is a Git LFS pointer, not the file itself; expected its content (run `git lfs pull`)"
            )


def identity(path: Path) -> dict:
    """What tells a file from another of the same name: its size, and a hash of its beginning, middle and end."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for place in range(4):
            file.seek(max(0, size - SAMPLE_BYTES) * place // 3)
            digest.update(file.read(SAMPLE_BYTES))
    return {"bytes": size, "sampled_sha256": digest.hexdigest()}


@contextlib.contextmanager
def _silence():
    """Without transformers' warnings and its bar of weights; a download keeps its own bar."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    hook = logging.set_tqdm_hook(lambda made, args, kwargs: made(*args, **kwargs | {"disable": True}))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)


@contextlib.contextmanager
def _one_line(where):
    """Whatever the libraries raise about a foreign file, as one RecipeError that names the checkpoint."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except Exception as error:
        told = str(error).strip() or type(error).__name__
        if "trust_remote_code" in told:
            raise RecipeError(f"{where}: {OWN_CODE}") from error
        reason, expected = told.splitlines()[0], "a checkpoint as save_pretrained writes it"
        if "sentencepiece" in told or "tiktoken" in told:  # whichever of the two the tokenizer needs
            expected = "sentencepiece or tiktoken to be installed, or the fast tokenizer's tokenizer.json"
        elif isinstance(error, ImportError):
            reason, expected = " ".join(told.split())[:300], "that package to be installed"
        elif not Path(where).is_dir():
            expected = "a local folder, or the name of a repository on the Hub that can be reached and has safetensors"
        raise RecipeError(f"{where}: cannot be loaded ({reason}); expected {expected}") from error


def _require_whole(found, report):
    if getattr(found, "_hf_peft_config_loaded", False):
        raise RecipeError(ADAPTER)
    surplus = {key for key in report["unexpected_keys"] if not OBSOLETE.search(key)}
    for what, keys in (
        ("lacks", report["missing_keys"]),
        ("has, in another shape than its config.json says,", {key for key, *_ in report["mismatched_keys"]}),
        ("has, unknown to its config.json,", surplus),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise RecipeError(
                f"the checkpoint {what} {sorted(keys)[0]}{more}; expected exactly the weights of a "
                f"{type(found).__name__}"
            )
    for name, values in found.state_dict().items():
        if not values.isfinite().all():
            count = values.numel() - int(values.isfinite().sum())
            raise RecipeError(
                f"{name} has {count:,} of {values.numel():,} values that are NaN or infinite; expected finite weights"
            )


def _letters(text):
    """Without spaces and case, which tokenizers may change."""
    return "".join(text.split()).casefold()
