"""Folders that are either complete or visibly not.

Work in progress lives in `<folder>.partial` and is renamed when it is whole, so a folder that exists is complete, and
a kill at any moment leaves either the folder or something to go on from.
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from scavenger.recipe import Recipe, RecipeError, differences, resolved


PACKAGES = ("torch", "transformers", "accelerate", "datasets", "scipy", "safetensors")


def start_run(recipe: Recipe) -> Path:
    """The run's folder, holding the resolved recipe; refuses a folder that was made by another recipe."""
    run_dir = Path(recipe.run_dir)
    saved = run_dir / "recipe.yaml"
    if saved.is_file():
        differing = differences(saved.read_text(encoding="utf-8"), recipe)
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise RecipeError(
                f"{saved}: the run was started with another recipe: {'; '.join(differing[:3])}{more}; "
                "name another run_dir, or delete the folder to start anew"
            )
        return run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise RecipeError(f"run_dir: {run_dir} is a file; expected a folder")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(
            run_dir / "environment.json",
            {"python": platform.python_version(), "machine": platform.machine()}
            | {package: version(package) for package in PACKAGES},
        )
        write_text(saved, resolved(recipe))
    except OSError as error:
        raise RecipeError(f"run_dir: {run_dir} cannot be written ({error.strerror})") from None
    return run_dir


@contextlib.contextmanager
def open_run(recipe: Recipe, accelerator):
    """The run's folder, held until the context ends, however the process ends; refuses one that another run holds."""
    with accelerator.main_process_first():
        run_dir = start_run(recipe)
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            file = stack.enter_context(open(run_dir / "lock", "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RecipeError(
                    f"run_dir: {run_dir} is in use by another process; expected one run at a time in a folder"
                ) from None
        yield run_dir


def complete(folder: Path) -> bool:
    """Whether the folder is there, hence whole; what a kill left behind after the rename is swept away."""
    if folder.is_dir():
        _sweep(folder)
        return True
    return False


def partial(folder: Path) -> Path:
    """Where the folder is made."""
    return folder.with_name(folder.name + ".partial")


def finish(folder: Path) -> Path:
    """Declare a folder whole: `<folder>.partial` becomes `<folder>`, and its step checkpoints go."""
    os.replace(partial(folder), folder)
    _sweep(folder)
    return folder


def _sweep(folder):
    """Remove what only making the folder needed: step checkpoints, and the turns of a progressive schedule."""
    for path in [folder / "steps", *folder.glob("turn_*")]:
        shutil.rmtree(path, ignore_errors=True)


def step_folder(steps: Path, step: int) -> Path:
    return steps / f"{step:09d}"


def latest_step(steps: Path) -> int | None:
    """The newest whole step checkpoint below `steps`, or None."""
    found = [int(path.name) for path in steps.glob("[0-9]*") if path.name.isdigit()] if steps.is_dir() else []
    return max(found, default=None)


def keep_only(steps: Path, step: int):
    """Remove every other step checkpoint and half-written one."""
    for path in steps.iterdir():
        if path != step_folder(steps, step):
            shutil.rmtree(path, ignore_errors=True)


def finish_model(model, tokenizer, history: list[dict], folder: Path, accelerator, more=lambda beside: None):
    """Write model, tokenizer and history so that `from_pretrained` opens the folder, and declare it whole.

    `more(folder)` may write further files before that.
    """
    if accelerator.is_main_process:
        beside = partial(folder)
        beside.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        write_json(beside / "history.json", history)
        more(beside)
        finish(folder)
    accelerator.wait_for_everyone()


def write_text(path: Path, text: str):
    """Write beside and rename: readers see the old file or the new one."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, values):
    write_text(path, json.dumps(values, indent=1) + "\n")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
