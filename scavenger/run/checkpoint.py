"""Folders that are either complete or visibly not, and the step checkpoints that a training resumes from.

Work in progress lives in `<folder>.partial` and is renamed when it is complete. So a folder that exists is complete,
and a kill at any moment leaves either the folder or something to resume from. Every step checkpoint has a manifest with
the size and checksum of each of its files.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import secrets
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from scavenger.recipe import Recipe, RecipeError, differences, resolved
from scavenger.run.run import Run


PACKAGES = ("torch", "transformers", "accelerate", "datasets", "scipy", "safetensors")
KEPT = 2  # step checkpoints: the newest, and the one before it in case the newest is damaged
MANIFEST = "manifest.json"
BESIDE_RECIPE = ("environment.json", "inputs.json", "lock")  # written before anything is made
SHARED_SECONDS = 60.0  # a network file system shows a new file to other machines within this time


def start_run(recipe: Recipe) -> Path:
    """Make the run's folder with its resolved recipe; refuses a folder in which another recipe has made something."""
    run_dir = Path(recipe.run_dir)
    saved = run_dir / "recipe.yaml"
    if saved.is_file() and not {path.name for path in run_dir.iterdir()} <= {saved.name, *BESIDE_RECIPE}:
        differing = differences(saved.read_text(encoding="utf-8"), recipe)
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise RecipeError(
                f"{saved}: the run was started with another recipe: {'; '.join(differing[:3])}{more}; "
                "expected the same recipe: choose another run_dir, or delete the folder to start anew"
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
    """The run's folder, locked until the context or the process ends.

    Raises RecipeError for a folder that another process uses, or that not all processes of the launch share.
    """
    run_dir = Path(recipe.run_dir)
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            file = stack.enter_context(open(start_run(recipe) / "lock", "a"))
            _lock(file, run_dir)
            file.truncate(0)
            file.write(secrets.token_hex(8))
            file.flush()
        _require_shared(run_dir, accelerator)
        yield run_dir


def _lock(file, run_dir):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RecipeError(
            f"run_dir: {run_dir} is in use by another process; expected one run at a time in a folder"
        ) from None
    except OSError as error:  # some network file systems have no locks
        print(f"run_dir: {run_dir} cannot be locked ({error.strerror}); make sure that only one run uses it")


def _require_shared(run_dir, accelerator):
    """RecipeError where a process does not find what the main one has written: machines with folders of their own."""
    lock = run_dir / "lock"
    (written,) = broadcast_object_list([lock.read_text() if accelerator.is_main_process else None])
    deadline = time.monotonic() + SHARED_SECONDS
    while not (found := lock.is_file() and lock.read_text() == written) and time.monotonic() < deadline:
        time.sleep(0.1)
    lacking = [rank for rank, each in enumerate(gather_object([found])) if not each]
    if lacking:
        raise RecipeError(
            f"run_dir: processes {', '.join(map(str, lacking))} do not see what the main process writes to {run_dir}; "
            "expected a folder that all machines of the launch share, such as one on a network file system"
        )


def require_same_inputs(run_dir: Path, found: dict[str, dict[str, dict]]):
    """Compare the files that a run reads, {section: {file: identity}}, with those it began with, in `inputs.json`.

    Once the text is tokenised, a file that has changed, is gone or is new raises RecipeError. Before, tokenising begins
    anew with the files as they are.
    """
    path = run_dir / "inputs.json"
    before = read_json(path) if path.is_file() else found  # an earlier version began the run
    for section, files in found.items():
        then = before.get(section, {})
        for name in sorted(files.keys() | then.keys()):
            if files.get(name) == then.get(name):
                continue
            how = "is gone" if name not in files else "is new" if name not in then else "has changed"
            if (run_dir / "data").is_dir():
                raise RecipeError(
                    f"{section}: {name} {how} since {run_dir} was begun; expected the same files: put them back as "
                    "they were, or choose another run_dir"
                )
            for made in ("data.partial", "tokenizer", "tokenizer.partial"):
                shutil.rmtree(run_dir / made, ignore_errors=True)
    write_json(path, found)


def complete(folder: Path) -> bool:
    """Whether the folder exists, hence is complete; removes what a kill right after the rename left in it."""
    if folder.is_dir():
        _sweep(folder)
        return True
    return False


def partial(folder: Path) -> Path:
    """Where the folder is written before it is complete."""
    return folder.with_name(folder.name + ".partial")


def finish(folder: Path) -> Path:
    """Declare a folder complete: sync `<folder>.partial` to disk, rename it, remove its step checkpoints."""
    beside = partial(folder)
    for path in [*beside.rglob("*"), beside]:
        _synchronise(path)
    os.replace(beside, folder)
    _synchronise(folder.parent)
    _sweep(folder)
    return folder


def _synchronise(path):
    """fsync: otherwise the rename may reach the disk before the contents do."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder):
    """Remove what was only needed to make the folder: step checkpoints, and the students between turns."""
    for path in [folder / "steps", *folder.glob("turn_*")]:
        shutil.rmtree(path, ignore_errors=True)


def finish_model(run: Run, model, history: list[dict], folder: Path, more=lambda beside: None):
    """Write model, tokenizer and history so that `from_pretrained` opens the folder, and declare it complete.

    `more(folder)` may write further files before that.
    """
    beside = partial(folder)
    there = list(beside.iterdir()) if beside.is_dir() else []
    with written(beside, beside / "steps", run.accelerator, keep=there):
        if run.accelerator.is_main_process:
            beside.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(beside)
            run.tokenizer.save_pretrained(beside)
            write_json(beside / "history.json", history)
            more(beside)
            finish(folder)


def save_step(run: Run, steps_dir: Path, step: int, history: list[dict]):
    """Write the state of a training after `step` steps; keeps the checkpoint before it and removes all others."""
    accelerator, folder = run.accelerator, steps_dir / f"{step:09d}"
    beside = partial(folder)
    with written(beside, steps_dir, accelerator):
        if accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
    with written(beside, steps_dir, accelerator):
        accelerator.save_state(str(beside))
    with written(beside, steps_dir, accelerator):
        if accelerator.is_main_process:
            write_json(beside / "history.json", history)
            facts = {"step": step, "recipe": resolved(run.recipe), "files": _files(beside)}
            write_json(beside / MANIFEST, _sealed(facts))
            finish(folder)
            kept = _steps(steps_dir)[-KEPT:]
            for path in set(steps_dir.iterdir()) - set(kept):
                shutil.rmtree(path, ignore_errors=True)


def resume_step(run: Run, steps_dir: Path) -> tuple[int, list[dict]]:
    """Load the newest intact step checkpoint of this recipe; returns its step and history, 0 and [] if there is none.

    The main process chooses for all. Nothing is unpickled before its checksum has been verified (a check against
    damage, not against malice: the checksum lies in the same folder).
    """
    found = [_newest_whole(steps_dir, run.recipe) if run.accelerator.is_main_process else None]
    folder = broadcast_object_list(found)[0]
    if folder is None:
        return 0, []
    run.accelerator.load_state(str(folder))
    return int(folder.name), read_json(folder / "history.json")


@contextlib.contextmanager
def written(beside: Path, steps_dir: Path, accelerator, keep=()):
    """Inside the context every process may write to `beside`; if any of them fails, all raise the same RecipeError.

    Then everything in `beside` except `keep` is removed. The message names the checkpoint that a rerun resumes from.
    """
    why = None
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's writer raises a plain RuntimeError that names its source file.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        why = _reason(error, beside)
    why = next((found for found in gather_object([why]) if found is not None), None)
    if why is None:
        return
    if accelerator.is_main_process and beside.is_dir():
        for path in set(beside.iterdir()) - set(keep):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not keep:
            beside.rmdir()
    steps = _steps(steps_dir)
    intact = f"the checkpoint of step {int(steps[-1].name)} is intact" if steps else "there is no checkpoint before it"
    raise RecipeError(f"{beside}: cannot be written ({why}); {intact}; run the same command again to resume")


def _reason(error, folder):
    """The operating system's words where the error has them."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
    exists = next(path for path in [folder, *folder.parents] if path.exists())
    return f"a write failed; {shutil.disk_usage(exists).free / 2**20:,.1f} MiB are free there"


def _steps(steps_dir):
    """The folders of the step checkpoints, oldest first."""
    return sorted(path for path in steps_dir.glob("[0-9]*") if path.name.isdigit())


def _newest_whole(steps_dir, recipe):
    """The newest step checkpoint that can be resumed from, or None; damaged ones are reported and set aside."""
    refused, found = {}, None
    for folder in reversed(_steps(steps_dir)):
        why = _fault(folder, recipe)
        if why is None:
            found = folder
            break
        refused[folder] = why
    instead = f"resuming from step {int(found.name)}" if found else "the stage starts anew"
    for folder, why in refused.items():
        print(f"scavenger: {folder}: {why}; {instead}", file=sys.stderr)
        aside = folder.with_name(folder.name + ".refused")  # until the next checkpoint is written
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    return found


def _fault(folder, recipe):
    """Why training cannot resume from a step checkpoint; None if it is intact and of this recipe."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest != _sealed(manifest):
            return f"{MANIFEST} is altered"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    # The folder of the run, and the repository it is pushed to, do not change the training.
    differing = [text for text in differences(manifest["recipe"], recipe) if not text.startswith("run_dir ")]
    if differing:
        return f"it is of another recipe: {differing[0].replace('the run has', 'it has')}"
    try:
        found = _files(folder)
    except OSError as error:
        return f"its files cannot be read ({error.strerror})"
    for name, facts in manifest["files"].items():
        if name not in found:
            return f"{name} is missing"
        if found[name]["bytes"] < facts["bytes"]:
            return f"{name} is truncated ({found[name]['bytes']:,} bytes of {facts['bytes']:,})"
        if found[name] != facts:
            return f"{name} is altered (its checksum is wrong)"
    if found.keys() != manifest["files"].keys():
        return f"{min(found.keys() - manifest['files'].keys())} is not in its manifest"
    return None


def _files(folder):
    """Size and checksum of every file below a step checkpoint, except the manifest."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def _sealed(manifest):
    """A manifest with its own checksum."""
    facts = {key: value for key, value in manifest.items() if key != "sha256"}
    return facts | {"sha256": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}


def write_text(path: Path, text: str):
    """Write a temporary file and rename it: readers see the old file or the new one."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, values):
    write_text(path, json.dumps(values, indent=1) + "\n")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
