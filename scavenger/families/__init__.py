"""The families of teachers: all that scavenger knows of one is in the file with the name of its model type."""

import importlib
from pathlib import Path


# Taken from the files' names, so that a recipe is checked without importing transformers.
MODEL_TYPES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "family"))
TRAINED = "gpt_neox"  # of a teacher that a recipe trains, unless it names another


def of(model_type: str):
    """The `Family` of one of MODEL_TYPES."""
    if model_type not in MODEL_TYPES:
        raise KeyError(model_type)
    return importlib.import_module(f"{__name__}.{model_type}").FAMILY
