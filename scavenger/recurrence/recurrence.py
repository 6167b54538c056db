"""Stage two: every long filter becomes poles and residues, and the student generates from a state of constant size."""

import copy
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

from scavenger import data, loading, measure
from scavenger import student as students
from scavenger.model import HyenaConfig, HyenaForCausalLM
from scavenger.model.filters import ModalFilter, PositiveFilter
from scavenger.recipe import REMOVED, Data, RecipeError, Recurrence
from scavenger.recurrence import allocation, certificate
from scavenger.recurrence.reduction import workers
from scavenger.recurrence.reduction.reduced import TOGETHER, ReducedFilter
from scavenger.run import checkpoint
from scavenger.run.run import Run


HELD_OUT_TOKENS = 32_768  # of text that a folder's certificate is measured on; a run has its own validation split
NUMBERS = ("direct", "real_states", "relative_error", "floor", "gain_error", "gain_floor", "tail")
ARRAYS = ("poles", "residues", "hankel_values")


def run(run: Run) -> Path:
    """Make `recurrence/`: the recurrent student, and certificate.json with the error of filters, layers and model."""
    folder = run.folder / "recurrence"
    if checkpoint.complete(folder):
        return folder
    student, text = students.load(run.folder / "transfer"), run.blocks("validation")
    counted = run.counted("validation")
    return distil(student, run.recipe.recurrence, folder, run.accelerator, run.tokenizer, text, counted=counted)


def of_folder(
    source: Path,
    settings: Recurrence,
    to: Path,
    text: Path | None,
    split: str,
    accelerator,
    trust_remote_code: bool = False,  # of the tokenizer
) -> Path:
    """Make `to`, the recurrent student of any folder with long filters, and its certificate; prints what was found.

    A folder that is there already is only accepted as this very result.
    """
    logging.disable_progress_bar()  # one bar is ours
    student, tokenizer = opened(source, trust_remote_code)
    horizon = settings.horizon or student.config.horizon
    blocks = None if tokenizer is None else held_out_text(text, split, tokenizer, student.config.context_length)
    asked = {
        "settings": certificate.described(settings, horizon),
        "student_sha256": _digest(student.config.to_json_string(), student.state_dict()),
        "text": None if tokenizer is None else "the Python standard library" if text is None else text.resolve().name,
        "text_sha256": None if blocks is None else _digest("", {"text": torch.from_numpy(blocks.astype(np.int64))}),
    }
    if to.exists():
        try:
            saved = checkpoint.read_json(to / "certificate.json")
        except (OSError, ValueError):
            saved = {}
        kept = (saved.get("settings") or {}).items()
        kept = {key: value for key, value in kept if (f"recurrence.{key}", value) not in REMOVED.items()}
        saved["settings"] = {"dtype": "float32"} | kept  # an earlier version had no other
        if {key: saved.get(key) for key in asked} != asked:
            raise RecipeError(
                f"--to: {to} exists already and was made from another student, with other settings or on other text; "
                "expected the name of a new folder"
            )
        accelerator.print(f"{to} (complete)")
    else:
        distil(student, settings, to, accelerator, tokenizer, blocks, more=asked)
    if accelerator.is_main_process:
        found = checkpoint.read_json(to / "certificate.json")
        print(f"{certificate.aligned(*certificate.table(found))}\n\n{found['verdict']}\n\nrecurrence: {to}")
    return to


def opened(source: Path, trust_remote_code: bool = False):
    """The student of a folder and its tokenizer, None where there is none."""
    if not source.is_dir():
        raise RecipeError(f"{source}: no such folder; expected a student, as runs/quickstart/transfer")
    if not (source / "config.json").is_file():
        inside = source / "transfer"
        near = f" (did you mean {inside}?)" if (inside / "config.json").is_file() else ""
        raise RecipeError(f"{source}: has no config.json; expected a student, as runs/quickstart/transfer{near}")
    student, tokenizer = students.load(source), None
    if (source / "tokenizer_config.json").is_file() or (source / "tokenizer.json").is_file():
        tokenizer = loading.tokenizer(source, student.config.vocab_size, trust_remote_code)
    if all(not hasattr(layer.mixer, "filter") for layer in student.model.layers):
        raise RecipeError(f"{source}: keeps attention in every layer; expected a student with long filters")
    return student, tokenizer


def held_out_text(text: Path | None, split: str, tokenizer, length: int) -> np.ndarray:
    """HELD_OUT_TOKENS or fewer, in blocks of a length, of a split of a given text or of the standard library."""
    ids = []
    for words in data.in_split(Data(path=None if text is None else str(text)), 0, split):
        ids += data.framed(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"], tokenizer)
        if len(ids) >= HELD_OUT_TOKENS:
            break
    count = min(len(ids), max(length, HELD_OUT_TOKENS)) // length
    if count == 0:
        more = "" if split == "all" else ", or --split all"
        raise RecipeError(
            f"--text: found {len(ids)} tokens in the {split} split; expected a context of the student ({length}) or "
            f"more{more}"
        )
    return np.array(ids[: count * length]).reshape(count, length)


def distil(
    student: HyenaForCausalLM,
    settings: Recurrence,
    folder: Path,
    accelerator,
    tokenizer,  # None: there is none to write
    blocks: np.ndarray | None,  # (block, length) held-out text; None: nothing is measured on text
    more: dict | None = None,  # facts for the certificate
    counted: np.ndarray | None = None,  # (block, length) tokens whose predictions it measures; None: all
) -> Path:
    """Make `folder`, the recurrent student with its certificate; resumes after the layers that are done.

    Layers are shared out over the processes; every process ends with the same student, the main one measures it.
    """
    if settings.state_bytes is not None:
        if blocks is None:
            raise RecipeError(
                "recurrence.state_bytes: found no tokenizer, so there is no text to measure on; expected a tolerance"
            )
        allocation.check(student.config, settings.state_bytes, settings.itemsize)
    student.to(accelerator.device)
    horizon = settings.horizon or student.config.horizon
    beside = checkpoint.partial(folder)
    read, measured = blocks, blocks
    if settings.state_bytes is not None and len(blocks) > 1:  # a budget is not measured on the text it was spent on
        read, measured = np.array_split(blocks, 2)
        counted = None if counted is None else np.array_split(counted, 2)[1]
    made, predicted = reduced(student, settings, horizon, read, beside / "layers", accelerator)
    recurrent = recurrent_student(student, made, settings.method == "positive")
    there = list(beside.iterdir())
    with checkpoint.written(beside, beside / "steps", accelerator, keep=there):
        if accelerator.is_main_process:
            facts = certificate.measure_all(student, recurrent, made, settings, measured, predicted, counted)
            recurrent.save_pretrained(beside)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
            checkpoint.write_json(beside / "certificate.json", facts | (more or {}))
            shutil.rmtree(beside / "layers")
            checkpoint.finish(folder)
    return folder


def reduced(student, settings: Recurrence, horizon: int, blocks: np.ndarray | None, saved: Path, accelerator):
    """For each layer the reduction of each filter; and, where a budget decides, the divergence predicted."""
    found = reductions(student, settings, horizon, saved, accelerator)
    rungs, predicted = allocated(student, found, settings, blocks, saved, accelerator)
    chosen = [[found[layer][rung][filter] for filter, rung in enumerate(own)] for layer, own in enumerate(rungs)]
    return chosen, predicted


def reductions(
    student: HyenaForCausalLM, settings: Recurrence, horizon: int, saved: Path, accelerator
) -> list[list[list[ReducedFilter]]]:
    """For each layer and each aim the reduction of each filter; a layer without filters has none.

    Every layer is a file below `saved`, made by one process and read by all; one that was made from other filters or
    with other settings is made again. Filters are reduced on the CPU, by as many worker processes as it has cores.
    """
    filters, found = long_filters(student), {}
    wanted = aims(settings)

    def read_or_make(layers, shown):
        paths = {index: saved / f"layer_{index:03d}.safetensors" for index in layers}
        keys = {index: _key(student.config, filters[index], settings, horizon) for index in layers}
        found.update({index: _read(paths[index], keys[index]) for index in layers})
        missing = [index for index in layers if found[index] is None]
        count = sum(filters[index].num_filters for index in missing)
        several = count * horizon * len(wanted) >= workers.WORKERS_PAY
        bar = tqdm(total=count, desc="recurrence", unit="filter", dynamic_ncols=True, disable=not shown)
        with workers.started(workers.available() if several else 1) as each, bar:
            # All layers are begun, so that no worker waits for the end of one.
            begun = {
                index: parts(measure.filter_taps(filters[index], horizon), settings, wanted, each) for index in missing
            }
            for index in missing:
                made = gathered(begun.pop(index), len(wanted), bar.update)
                if type(filters[index]) is own_kind(settings):
                    made = [with_own_modes(filters[index], rung) for rung in made]
                _write(paths[index], keys[index], made)
                found[index] = made

    mine = list(filters)[accelerator.process_index :: accelerator.num_processes]
    read_or_make(mine, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    read_or_make(filters.keys() - set(mine), False)
    return [found.get(index, [[]]) for index in range(len(student.model.layers))]


def long_filters(student: HyenaForCausalLM) -> dict[int, nn.Module]:
    """The filters of each layer that has some."""
    layers = enumerate(student.model.layers)
    return {index: layer.mixer.filter for index, layer in layers if hasattr(layer.mixer, "filter")}


def reduce_filters(taps: Tensor, settings: Recurrence, wanted: list[dict], each=map) -> list[list[ReducedFilter]]:
    """For each aim the reductions of the filters, `taps` (filter, length); `each` is a map of `workers.started`."""
    return gathered(parts(taps, settings, wanted, each), len(wanted))


def parts(taps: Tensor, settings: Recurrence, wanted: list[dict], each) -> Iterator[list[ReducedFilter]]:
    """The reductions of TOGETHER filters after the other, each to one aim after the other."""
    if not taps.isfinite().all():
        raise RecipeError("recurrence: a layer's filters are not finite; the transfer diverged")
    groups = [(rows.numpy(), aim) for rows in taps.cpu().split(TOGETHER) for aim in wanted]
    method, most = itertools.repeat(settings.method), itertools.repeat(settings.max_state_size)
    return each(workers.reduce, method, *zip(*groups, strict=True), most)


def gathered(parts: Iterator[list[ReducedFilter]], aims: int, reduced=lambda count: None) -> list[list[ReducedFilter]]:
    """For each of so many aims the reductions of all filters; says how many filters are reduced as it goes."""
    made = [[] for _ in range(aims)]
    for place, part in enumerate(parts):
        made[place % aims] += part
        if place % aims == aims - 1:
            reduced(len(part))
    return made


@torch.no_grad()
def with_own_modes(
    filter: ModalFilter, reduced: list[ReducedFilter], rows: list[int] | None = None
) -> list[ReducedFilter]:
    """The reductions, but of a filter that is modal already with no more modes than its reduction the filter itself."""
    wide = copy.deepcopy(filter).double()
    poles, residues = (z.to(torch.complex128).cpu().split(filter.state_sizes) for z in (wide.poles, wide.residues))
    rows = list(range(filter.num_filters)) if rows is None else rows
    own_modes = ([part[row] for row in rows] for part in (poles, residues))
    return [
        f
        if f.state_size < len(own)
        else dataclasses.replace(
            f,
            poles=own.numpy(),
            residues=residue.numpy(),
            direct=float(direct),
            real_states=int(torch.where(own.imag == 0, 1, 2).sum()),
            **dict.fromkeys(("relative_error", "floor", "gain_error", "gain_floor", "tail"), 0.0),
        )
        for f, own, residue, direct in zip(reduced, *own_modes, wide.direct[rows], strict=True)
    ]


def own_kind(settings: Recurrence) -> type[ModalFilter]:
    """The filters that a method makes."""
    return PositiveFilter if settings.method == "positive" else ModalFilter


def aims(settings: Recurrence) -> list[dict]:
    """What a filter is reduced to: the tolerance, or each size of the ladder that a budget is spread over."""
    if settings.state_bytes is None:
        return [{"tolerance": settings.tolerance}]
    # No filter is further from its recurrence than from nothing: at a tolerance of 1 it keeps its first tap alone.
    return [{"tolerance": 1.0}] + [{"state_size": size} for size in allocation.ladder(settings.max_state_size)]


def allocated(student, found, settings: Recurrence, blocks, saved: Path, accelerator):
    """For each layer the aim that each of its filters takes; and, where a budget decides, the divergence predicted."""
    if settings.state_bytes is None:
        return [[0] * len(layer[0]) for layer in found], None
    described = json.dumps([settings.state_bytes, settings.itemsize, settings.method, aims(settings), settings.horizon])
    text = {"text": torch.from_numpy(blocks.astype(np.int64))}
    path, key = saved / "allocation.json", _digest(described, student.state_dict() | text)
    if accelerator.is_main_process and not (path.is_file() and checkpoint.read_json(path)["key"] == key):
        positive = settings.method == "positive"
        budget = settings.state_bytes
        rungs, predicted = allocation.spread(student, found, budget, blocks, positive, settings.itemsize)
        checkpoint.write_json(path, {"key": key, "rungs": rungs, "predicted": predicted})
    accelerator.wait_for_everyone()
    made = checkpoint.read_json(path)
    return made["rungs"], made["predicted"]


@torch.no_grad()
def recurrent_student(
    student: HyenaForCausalLM, reduced: list[list[ReducedFilter]], positive: bool = False
) -> HyenaForCausalLM:
    """The same student with modal filters; every other parameter is the student's own."""
    sizes = [[f.state_size for f in layer] for layer in reduced]
    recurrent = HyenaForCausalLM(recurrent_configuration(student.config, sizes, positive))
    recurrent.generation_config = copy.deepcopy(student.generation_config)
    recurrent.to(student.device, student.dtype)
    kept = {key: value for key, value in student.state_dict().items() if "filter." not in key.split("mixer.")[-1]}
    recurrent.load_state_dict(kept, strict=False)
    for layer, filters in zip(recurrent.model.layers, reduced, strict=True):
        if filters:
            layer.mixer.filter.load_state_dict(allocation.modal_filter(filters, positive).state_dict())
    return recurrent.eval()


def recurrent_configuration(config: HyenaConfig, sizes: list[list[int]], positive: bool = False) -> HyenaConfig:
    """The student's configuration with modal filters of these sizes, of real modes or complex ones."""
    changes = {"filter": "modal", "positive": positive, "state_sizes": sizes}
    return HyenaConfig.from_dict(config.to_dict() | changes)


def _key(config, filter, settings, horizon):
    """What a layer's reductions depend on."""
    asked = json.dumps([settings.method, aims(settings), settings.max_state_size, horizon])
    return _digest(asked + config.to_json_string(), filter.state_dict())


def _digest(text, tensors):
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path, key, made):
    """The reductions of a layer as one file, written beside and renamed."""
    filters = [f for aim in made for f in aim]
    tensors = {
        "aims": torch.tensor(len(made)),
        "numbers": torch.tensor([[getattr(f, name) for name in NUMBERS] for f in filters], dtype=torch.float64),
    }
    for name in ARRAYS:
        parts = [np.asarray(getattr(f, name)) for f in filters]
        joined = torch.from_numpy(np.concatenate(parts))
        tensors[name] = torch.view_as_real(joined) if joined.is_complex() else joined
        tensors[name + "_sizes"] = torch.tensor([len(part) for part in parts])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    save_file(tensors, beside, metadata={"key": key})
    os.replace(beside, path)


def _read(path, key):
    """The reductions of a layer, or None where there are none by this key."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    arrays = {}
    for name in ARRAYS:
        joined = tensors[name] if tensors[name].ndim == 1 else torch.view_as_complex(tensors[name])
        arrays[name] = [part.numpy() for part in joined.split(tensors[name + "_sizes"].tolist())]
    filters = []
    for index, row in enumerate(tensors["numbers"].tolist()):
        numbers = dict(zip(NUMBERS, row, strict=True))
        numbers["real_states"] = int(numbers["real_states"])
        filters.append(ReducedFilter(**numbers, **{name: arrays[name][index] for name in ARRAYS}))
    count = len(filters) // int(tensors["aims"])
    return [filters[start : start + count] for start in range(0, len(filters), count)]
