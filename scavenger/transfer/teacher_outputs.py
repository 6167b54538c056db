"""The teacher's outputs on disk (the recipe's section `cache`), so that its forward pass is needed only once.

A folder for each teacher, text and length holds shards. A shard holds the outputs for some sequences, each sequence
identified by a digest of its tokens: recipes that differ in seed, steps, learning rates or student share what they have
in common, and a longer one adds what is missing. A shard carries a checksum; a damaged one is made anew.

Kinds of outputs: `activations`, the inputs and outputs of every attention layer; `top<k>`, the k most likely tokens.
Cached activations pay from the second pass on, on a CPU: on the quickstart a pass takes 30 % less CPU time, and filling
the cache 1.2 times what a pass saves (240 sequences of 256 tokens, three rounds in turn, one thread).
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from scavenger import data, losses, teacher
from scavenger.recipe import RecipeError
from scavenger.run import checkpoint
from scavenger.run.run import Run


FORMAT = 1  # of the shards; another format is another folder
SHARD_BYTES = 2**28  # the most that an interruption loses; a terabyte is then four thousand files
OPEN_SHARDS = 64  # files mapped at once: some batches' worth, far from any system's limit
# Bytes left free for each of the teacher's parameters: three step checkpoints (two are kept, one is being written) of a
# student of its size, float32 weights and two moments each.
SPARE = checkpoint.KEPT * 12 + 12
ACTIVATIONS = "activations"


def run(run: Run, frozen: PreTrainedModel) -> "TeacherOutputs | None":
    """The teacher's outputs for all sequences that the transfer reads; what the disk lacks is computed and written.

    None where the recipe has no section `cache`. Process n of N makes every N-th shard. Raises RecipeError, before
    anything is written, where the disk is too small.
    """
    settings, config = run.recipe.cache, frozen.config
    if settings is None:
        return None
    if settings.logits is not None and settings.logits > config.vocab_size:
        raise RecipeError(
            f"cache.logits: found {settings.logits}; expected 1 to the teacher's vocabulary, {config.vocab_size}"
        )
    blocks = run.blocks("train")
    wanted = _wanted(run.recipe, len(blocks))
    keys = _keys(blocks, np.unique(np.concatenate(list(wanted.values()))))
    sizes = {kind: row_bytes(kind, config, blocks.shape[1]) for kind in wanted}
    facts = _facts(run, frozen)
    folder = Path(settings.folder) / _name(facts)
    with _held(folder, run.accelerator):
        there = _whole_shards(folder, wanted, run.accelerator)
        work = _missing(folder, there, wanted, keys, sizes)
        _require_room(run, folder, wanted, work, sizes, SPARE * frozen.num_parameters())
        _fill(run, frozen, blocks, work)
        shards = there + [shard for shard, _ in work]
        if run.accelerator.is_main_process:
            counts = {kind: sum(len(shard.keys) for shard in shards if kind in shard.kinds) for kind in wanted}
            held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            checkpoint.write_json(folder / "cache.json", facts | {"sequences": counts, "bytes": held})
    places = {kind: _places(kind, shards, wanted[kind], keys) for kind in wanted}
    return TeacherOutputs(settings.activations, settings.logits, [shard.path for shard in shards], places)


class Shard(NamedTuple):
    """A file, the kinds of output that it holds, and the keys of its sequences."""

    path: Path
    kinds: tuple[str, ...]
    keys: np.ndarray


@dataclasses.dataclass(frozen=True)
class TeacherOutputs:
    """Reads what `run` wrote; `rows` are places in the train array, as in data.Batch."""

    activations: bool
    logits: int | None
    shards: list[Path]
    places: dict[str, np.ndarray]  # (block, 2) of each kind: the shard and the place in it; -1 for blocks not read
    opened: Callable = dataclasses.field(default_factory=lambda: functools.lru_cache(OPEN_SHARDS)(_opened))

    def attention(self, rows: np.ndarray, layers: Sequence[int], device: torch.device) -> tuple[dict, dict]:
        """As teacher.attention, rounded to 16 bits: a relative error of 4e-8 in energy for float16 (measured)."""
        return tuple(
            {layer: self._read(ACTIVATIONS, rows, f"{side}.{layer}").to(device) for layer in layers}
            for side in ("inputs", "outputs")
        )

    def top(self, rows: np.ndarray, device: torch.device) -> losses.TopK:
        """The distribution at each position, of total mass 1.

        It is stored in 16 bits; the KL divergence from the unrounded distribution is 7e-8 nats per position on average
        and 2e-7 at most (measured on the quickstart's teacher and text, 64 tokens kept).
        """
        kind = top_kind(self.logits)
        log_p, tokens, log_rest = (self._read(kind, rows, name).to(device) for name in losses.TopK._fields)
        log_p = log_p.float()
        total = torch.cat([log_p, log_rest[..., None]], -1).logsumexp(-1)
        return losses.TopK(log_p - total[..., None], tokens.long(), log_rest - total)

    def _read(self, kind, rows, name):
        shards, places = self.places[kind][rows].T
        if shards.min() < 0:
            raise ValueError(f"the cache has no {kind} of blocks {np.asarray(rows)[shards < 0].tolist()}")
        return torch.stack(
            [
                self.opened(self.shards[shard]).get_slice(f"{kind}.{name}")[int(place)]
                for shard, place in zip(shards, places, strict=True)
            ]
        )


def _opened(path):
    return safe_open(path, "pt")


def _wanted(recipe, count):
    """For each kind of output, the places in the train array at which the transfer reads it, sorted.

    A phase that may end early leaves open where those after it begin: then from the earliest possible place.
    """
    kinds = [ACTIVATIONS if recipe.cache.activations else None] * len(recipe.transfer.activations)
    kinds += [top_kind(recipe.cache.logits) if recipe.cache.logits else None] * len(recipe.transfer.logits)
    found, least, most = {}, 0, 0
    for phase, kind in zip(recipe.transfer.phases, kinds, strict=True):
        size = phase.steps * phase.batch_size
        if kind is not None:
            read = data.rows(count, least, most + size - least, recipe.seed)
            found[kind] = np.union1d(found.get(kind, []), read).astype(np.int64)
        least += 0 if getattr(phase, "flat", None) is not None else size
        most += size
    return found


def top_kind(kept: int) -> str:
    return f"top{kept}"


def _keys(blocks, places):
    """A digest of the tokens of each block at `places`, (block,); 0 for the others.

    64 bits: among ten million sequences, two have the same digest with a probability of 3e-6.
    """
    keys = np.zeros(len(blocks), dtype=np.int64)
    for place in places:
        digest = hashlib.blake2b(blocks[place].tobytes(), digest_size=8).digest()
        keys[place] = int.from_bytes(digest, "little", signed=True)
    return keys


def row_bytes(kind: str, config, length: int) -> int:
    """Bytes of one sequence on the disk."""
    if kind == ACTIVATIONS:
        return 2 * 2 * config.num_hidden_layers * length * config.hidden_size
    kept = int(kind.removeprefix("top"))
    return length * (kept * (2 + _token_type(config).itemsize) + 4)


def _token_type(config):
    return torch.uint16 if config.vocab_size <= 2**16 else torch.int32


def _facts(run, frozen):
    """What the folder holds, for people and for its name: the teacher by its weights, wherever they came from."""
    recipe = run.recipe
    naming = ("_name_or_path", "transformers_version", "architectures", "dtype")
    shape = {key: value for key, value in frozen.config.to_diff_dict().items() if key not in naming}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for part in _as_bytes(frozen.state_dict()):
        digest.update(part)
    text = dataclasses.asdict(recipe.data)
    # Held-out text is not trained on, and the outputs are those at every token, whether it has a loss or not.
    del text["evaluation_tokens"], text["chat_loss"]
    if text["chat_column"] is None:  # caches of earlier versions keep their names
        del text["chat_column"]
    return {
        "format": FORMAT,
        "teacher": {
            "name": str(recipe.teacher.folder or recipe.teacher.name or run.folder / "teacher"),
            "revision": recipe.teacher.revision,
            "dtype": str(frozen.dtype).removeprefix("torch."),
            "sha256": digest.hexdigest(),
        },
        "data": text,
    }


def _name(facts):
    named = {"format": facts["format"], "teacher": facts["teacher"]["sha256"], "data": facts["data"]}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


def _as_bytes(tensors):
    """Everything that distinguishes one set of named tensors from another."""
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.flatten().view(torch.uint8).numpy()


@contextlib.contextmanager
def _held(folder, accelerator):
    """One run at a time uses the folder; another waits, and finds what this one has written."""
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(folder / "lock", "w"))
            except OSError as error:
                raise RecipeError(f"cache.folder: {folder} cannot be written ({error.strerror})") from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"cache: waiting for another run that is writing to {folder}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            for path in folder.glob("*.partial"):  # of a run that was killed
                path.unlink()
        accelerator.wait_for_everyone()
        yield


def _whole_shards(folder, wanted, accelerator):
    """The intact shards that hold something wanted; damaged ones are reported and removed."""
    paths = sorted(path.name for path in folder.glob("*.safetensors") if set(_kinds(path)) & wanted.keys())
    paths = [folder / name for name in broadcast_object_list([paths])[0]]
    own = paths[accelerator.process_index :: accelerator.num_processes]
    own = tqdm(own, desc="cache: checking", unit="shard", leave=False, disable=not accelerator.is_main_process)
    faults = {path: why for path, why in gather_object([(path, _fault(path)) for path in own]) if why is not None}
    if accelerator.is_main_process:
        for path, why in faults.items():
            print(f"scavenger: {path}: {why}; it is made anew", file=sys.stderr)
            path.unlink()
    shards = []
    for path in paths:
        if path not in faults:
            with safe_open(path, "pt") as file:
                shards.append(Shard(path, _kinds(path), file.get_tensor("keys").numpy().copy()))
    return shards


def _kinds(path):
    return tuple(path.name.split("-")[0].split("_"))


def _fault(path):
    """Why a shard cannot be used; None if it is intact."""
    try:
        with safe_open(path, "pt") as file:
            checksum = (file.metadata() or {}).get("crc32")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        return f"cannot be read ({str(error).removeprefix('Error while deserializing header: ')})"
    return None if checksum == _checksum(tensors) else "is altered (its checksum is wrong)"


def _checksum(tensors):
    """Against damage, not against malice: three times as fast as SHA-256 (measured), and all is read at each start."""
    return f"{functools.reduce(lambda found, part: zlib.crc32(part, found), _as_bytes(tensors), 0):08x}"


def _missing(folder, there, wanted, keys, sizes):
    """The shards that are to be made, each with the places in the train array of its sequences.

    Sequences that lack both kinds go into shards of both, made by one forward pass. The same recipe cuts in the same
    places, whichever shards exist already.
    """
    lacking = np.zeros((len(keys), len(wanted)), dtype=bool)
    for column, (kind, places) in enumerate(wanted.items()):
        have = [shard.keys for shard in there if kind in shard.kinds]
        places = places[~np.isin(keys[places], np.concatenate(have))] if have else places
        lacking[places[np.unique(keys[places], return_index=True)[1]], column] = True  # recurring sequences once
    work = []
    for lacks in np.unique(lacking[lacking.any(1)], axis=0)[::-1]:
        kinds = tuple(kind for kind, lacks_it in zip(wanted, lacks, strict=True) if lacks_it)
        places = np.flatnonzero((lacking == lacks).all(1))
        rows = max(1, SHARD_BYTES // sum(sizes[kind] for kind in kinds))
        for part in np.split(places, range(rows, len(places), rows)):
            digest = hashlib.sha256(keys[part].tobytes()).hexdigest()[:16]
            work.append((Shard(folder / f"{'_'.join(kinds)}-{digest}.safetensors", kinds, keys[part]), part))
    return work


def _require_room(run, folder, wanted, work, sizes, spare):
    """Print what will be written; RecipeError where the disk has no room for it."""
    accelerator, settings = run.accelerator, run.recipe.cache
    free = broadcast_object_list([shutil.disk_usage(folder).free])[0]
    lacking = {kind: sum(len(shard.keys) for shard, _ in work if kind in shard.kinds) for kind in wanted}
    needed = {kind: lacking[kind] * sizes[kind] for kind in wanted}
    if not work:
        accelerator.print(f"cache     {folder}: complete")
        return
    what = "; ".join(
        f"{_in_words(kind)} of {lacking[kind]:,} sequences ({len(wanted[kind]):,} are read), {_in_bytes(needed[kind])}"
        for kind in wanted
        if lacking[kind]
    )
    total = sum(needed.values())
    accelerator.print(f"cache     {folder}: {what}; {_in_bytes(total)} to write, {_in_bytes(free)} free")
    if total + spare <= free:
        return
    fits = ["another cache.folder"]
    rest = free - spare - needed.get(ACTIVATIONS, 0)
    top = next((kind for kind in wanted if kind != ACTIVATIONS), None)
    if top is not None and settings.logits * rest // max(needed[top], 1) >= 1:
        fits.append(f"cache.logits={settings.logits * rest // needed[top]} or less")
    if ACTIVATIONS in wanted and top is not None and needed[top] + spare <= free:
        fits.append("cache.activations=false")
    raise RecipeError(
        f"cache: needs {_in_bytes(total)} in {folder} and {_in_bytes(spare)} for checkpoints, but {_in_bytes(free)} "
        f"are free there; expected {', or '.join(fits)}"
    )


def _in_words(kind):
    return kind if kind == ACTIVATIONS else f"the {kind.removeprefix('top')} most likely tokens"


def _in_bytes(count):
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _fill(run, frozen, blocks, work):
    """Write this process's share of the shards; returns when all processes have written theirs."""
    accelerator, recipe = run.accelerator, run.recipe
    parts = accelerator.num_processes * recipe.training.accumulate
    size = max(1, min(phase.batch_size for phase in recipe.transfer.phases) // parts)  # no more memory than training
    own = work[accelerator.process_index :: accelerator.num_processes]
    total = sum(len(places) for _, places in own)
    why = None
    with tqdm(total=total, desc="cache", unit="seq", disable=not accelerator.is_main_process or not own) as bar:
        for shard, places in own:
            made = []
            for rows in np.split(places, range(size, len(places), size)):
                ids = torch.from_numpy(blocks[rows].astype(np.int64))
                ids = ids * (ids != data.padding(blocks.dtype))
                made.append(_outputs(frozen, ids.to(accelerator.device), shard.kinds))
                bar.update(len(rows))
            tensors = {name: _joined([part[name] for part in made]) for name in made[0]}
            beside = checkpoint.partial(shard.path)
            try:
                _write(beside, tensors | {"keys": torch.from_numpy(shard.keys)})
                os.replace(beside, shard.path)
            except (OSError, SafetensorError) as error:
                beside.unlink(missing_ok=True)
                why = f"{shard.path}: cannot be written ({getattr(error, 'strerror', None) or error})"
                break
    why = next((found for found in gather_object([why]) if found is not None), None)
    if why is not None:
        raise RecipeError(f"{why}; the shards before it are kept; run the same command again to resume")


@torch.no_grad()
def _outputs(frozen, ids, kinds):
    """The teacher's outputs of these kinds, from one forward pass: named tensors (batch, …) on the CPU."""
    tops = [kind for kind in kinds if kind != ACTIVATIONS]
    layers = range(frozen.config.num_hidden_layers) if ACTIVATIONS in kinds else ()
    if not tops:
        inputs, outputs = teacher.attention(frozen, ids, layers)
    else:
        with teacher.recording(frozen, layers) as (inputs, outputs):
            last, _ = teacher.hidden_states(frozen, ids, False)
    found = {}
    for side, recorded in (("inputs", inputs), ("outputs", outputs)):
        found |= {f"{ACTIVATIONS}.{side}.{layer}": _halved(x).cpu() for layer, x in recorded.items()}
    for kind in tops:
        log_p, tokens, log_rest = most_likely(last, losses.Head.of(frozen), int(kind.removeprefix("top")))
        # Relative to the most likely token: float16 is finest near 0.
        log_p, log_rest = log_p - log_p[..., :1], log_rest - log_p[..., 0]
        kept = losses.TopK(log_p.half(), tokens.to(_token_type(frozen.config)), log_rest.float())
        found |= {f"{kind}.{name}": item.cpu() for name, item in kept._asdict().items()}
    return found


def _halved(x):
    """In 16 bits: unchanged if it has no more, in float16 where its range suffices, else in bfloat16."""
    if x.element_size() == 2:
        return x
    return x.half() if x.abs().max() <= torch.finfo(torch.float16).max else x.bfloat16()


def most_likely(last: Tensor, head: losses.Head, kept: int) -> losses.TopK:
    """The `kept` most likely tokens of softmax(last Wᵀ + b) and the mass of the others, in float32 or wider.

    last (batch, length, channel); the logits are computed in chunks of positions.
    """
    found = []
    for part in last.flatten(0, 1).split(losses.chunk_rows(len(head.weight))):
        logits = losses.wide(F.linear(part, *head))  # the teacher's own dtype, as its forward pass computes them
        log_p, tokens = logits.topk(kept)
        log_rest = logits.scatter_(-1, tokens, -torch.inf).logsumexp(-1)
        total = torch.logaddexp(log_p.logsumexp(-1), log_rest)
        found.append(losses.TopK(log_p - total[:, None], tokens, log_rest - total))
    return losses.TopK(*(torch.cat(items).unflatten(0, last.shape[:2]) for items in zip(*found, strict=True)))


def _joined(parts):
    """The parts as one tensor; in bfloat16 if any of them needed it."""
    whole = torch.cat(parts)
    return whole if whole.dtype == parts[0].dtype else whole.bfloat16()


def _write(path, tensors):
    save_file(tensors, path, metadata={"crc32": _checksum(tensors)})


def _places(kind, shards, places, keys):
    """For each place in the train array, the shard that holds its output and the place in it, (block, 2)."""
    shards = [(index, shard.keys) for index, shard in enumerate(shards) if kind in shard.kinds]
    held = np.concatenate([own for _, own in shards])
    where = np.concatenate([np.stack([np.full(len(own), index), np.arange(len(own))], 1) for index, own in shards])
    order = np.argsort(held)
    found = np.full((len(keys), 2), -1)
    found[places] = where[order[np.searchsorted(held, keys[places], sorter=order)]]
    return found
