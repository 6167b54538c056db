"""Results on disk: one file for each measurement of each model, so that no measurement is repeated."""

import importlib.metadata
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

from scavenger.report.evaluated import Evaluated
from scavenger.run import checkpoint


OWN = importlib.metadata.version("scavenger")
PACKAGES = ("torch", "transformers", "tokenizers", "lm-eval")


class Results:
    """A folder of measurements; if it is None, nothing is stored or reused."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def of(self, measurement: str, model: Evaluated, settings: dict, measure: Callable[[], dict]) -> dict:
        """The stored result for these settings, weights and versions, or else a new one from `measure`.

        The result includes the measurement's name, model, settings and versions, and the seconds it took.
        """
        what = {"measurement": measurement, "model": model.label, "path": model.path, "weights": model.weights}
        what |= {"settings": json.loads(json.dumps(settings)), "measured_by": versions() | {"scavenger": OWN}}
        path = self.path(measurement, model)
        if path is not None and path.is_file():
            found = _read(path)
            if all(found.get(key) == value for key, value in what.items()):
                return found
        began = time.perf_counter()
        found = json.loads(json.dumps(measure()))  # as it would be read from the file
        found = what | {"versions": versions()} | found | {"seconds": time.perf_counter() - began}
        if path is not None:
            checkpoint.write_text(path, json.dumps(found) + "\n")
        return found

    def path(self, measurement: str, model: Evaluated) -> Path | None:
        """The file of a measurement of a model; None without a folder."""
        name = re.sub(r"[^\w.=-]+", "-", f"{measurement} {model.label}").strip("-")
        return None if self.folder is None else self.folder / f"{name}.json"


def _read(path):
    """The content of a file, or {} if it is damaged, so that the measurement is repeated."""
    try:
        found = checkpoint.read_json(path)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def versions() -> dict[str, str]:
    """The software versions that results depend on, besides weights and settings."""
    installed = {distribution.metadata["Name"].lower(): distribution.version for distribution in _distributions()}
    return {"python": platform.python_version()} | installed


def _distributions():
    for package in PACKAGES:
        yield from importlib.metadata.distributions(name=package)
