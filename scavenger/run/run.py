"""A run: a recipe that is being carried out in a folder, by one or more processes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from scavenger.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Run:
    """What every stage works on: the recipe, the run's folder, the processes of the launch, and the tokenizer."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    def blocks(self, split: str) -> np.ndarray:
        """The tokens of a split (train, validation or test), memory-mapped: (block, length)."""
        return blocks(self.folder / "data", split)

    def counted(self, split: str) -> np.ndarray | None:
        """Which tokens of a split have a loss, memory-mapped: (block, length) bool; None: all of them."""
        return counted(self.folder / "data", split) if self.recipe.data.chat_loss == "assistant" else None


def blocks(folder: Path, split: str) -> np.ndarray:
    """The tokens of a split in a run's `data` folder, memory-mapped: (block, length).

    Raises RecipeError where the file is missing or damaged.
    """
    return _mapped(folder, f"{split}.npy")


def counted(folder: Path, split: str) -> np.ndarray:
    """Which tokens of a split have a loss, from the same folder, memory-mapped: (block, length) bool.

    Raises RecipeError where the file is missing or damaged.
    """
    return _mapped(folder, f"{split}_counted.npy")


def _mapped(folder, name):
    path = folder / name
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        wrong = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({reason})"
        raise RecipeError(
            f"data: {path} {wrong}; expected the tokens of this run: delete {folder} and run the same command again "
            "to make them anew"
        ) from None
