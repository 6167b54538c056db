"""Contenders: a teacher or a student with one of the caches it can generate with, and the measurement of one of them.

contender = Dynamic(model, Case(batch=16, prompt=512, new=256))
found = generated(contender, ids, seconds=10.0)
"""

import ctypes
import gc
import importlib.util
import inspect
import os
import re
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from scavenger.measure import state_bytes
from scavenger.model.attention import AttentionCacheLayer, Tokens
from scavenger.model.decoding import Decoder, PackedLinear, packed
from scavenger.report.evaluated import Evaluated


PROBE = 2  # steps that decide whether all steps can be timed
# Timed steps of an uneven contender, at least. Exact decoding with one filter a channel also has rarer, longer steps,
# which so few do not contain; with wider heads it has none.
LEAST = 32
READ_AGAIN = 4096  # tokens read at once without a cache; of a larger batch only so many rows are timed


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `prompt` tokens and `new` generated tokens for each; as text 64x512+256."""

    batch: int
    prompt: int
    new: int

    def __post_init__(self):
        if self.batch < 1 or self.prompt < 2 or self.new < 1:
            raise ValueError(f"found {self}; expected one sequence or more, prompts of 2 tokens or more, and new ones")

    def __str__(self):
        return f"{self.batch}x{self.prompt}+{self.new}"

    @classmethod
    def parsed(cls, text: str):
        """From a value of --cases."""
        found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
        try:
            return cls(*map(int, found.groups() if found else (0, 0, 0)))
        except ValueError:
            raise ValueError(
                f"--cases: found {text}; expected BATCHxPROMPT+NEW with prompts of 2 tokens or more, such as 64x512+256"
            ) from None


class Contender:
    """A model with one kind of cache, for the sequences of one case.

    Unless it is uneven it also has `skip(count)`, which fills the cache as `count` more tokens would; which tokens they
    are does not change the time of a step.
    """

    name: str  # of the cache, in tables
    student: str | None = None  # the student's kind of filter; None for a Transformer
    packs = False  # whether linear layers are packed, as the Decoder's are on a CPU
    compiled = False  # whether its first steps compile; the object then serves all turns
    warm = False  # whether it was warmed up
    uneven = False  # whether some steps take much longer than others, so that a few cannot stand for all

    def __init__(self, model, case: Case):
        self.model = self.step_model = packed(model, case.batch) if self.packs else model
        self.case, self.batch = case, case.batch

    def read(self, ids: Tensor) -> Tensor:  # (batch, prompt) -> (batch, vocabulary)
        """Forget all sequences and read new prompts; the logits of the next token."""
        self.cache = None
        return self._next(self.model, ids)

    def step(self, tokens: Tensor) -> Tensor:  # (batch,) -> (batch, vocabulary)
        """Read one more token of every sequence; the logits of the next."""
        return self._next(self.step_model, tokens[:, None])

    def _next(self, model, ids):
        out = model(input_ids=ids, cache=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.cache
        return out.logits[:, -1]

    @property
    def kept(self) -> int:
        """Bytes kept between tokens, of all sequences."""
        return state_bytes(self.cache)

    @property
    def weights(self) -> int:
        """Bytes of all weights, the step's own copies included."""
        packs = [m.weight.numel() * m.weight.itemsize for m in self.step_model.modules() if isinstance(m, PackedLinear)]
        parameters = {id(p): p for model in (self.model, self.step_model) for p in model.parameters()}
        return sum(p.nbytes for p in parameters.values()) + sum(packs)


class Dynamic(Contender):
    """A Transformer that appends keys and values to its cache."""

    name = "dynamic cache"

    def skip(self, count):
        for layer in self.cache.layers:
            layer.update(_repeated(layer.keys, 2, count), _repeated(layer.values, 2, count))


class OwnState(Contender):
    """A model with states of its own kind, as state-space models and their mixtures with attention."""

    name = "its own state"
    uneven = True  # how to fill an unknown state is not known

    def _next(self, model, ids):
        known = inspect.signature(model.forward).parameters
        name = "cache" if "cache" in known else "state"
        last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        out = model(input_ids=ids, use_cache=True, **{name: self.cache}, **last)
        self.cache = getattr(out, name)
        return out.logits[:, -1]


class PackedDynamic(Dynamic):
    name = "dynamic cache, packed"
    packs = True


class Static(Contender):
    """A Transformer whose cache has its full size from the start."""

    name = "static cache"

    def __init__(self, model, case):
        super().__init__(model, case)
        self.cache = StaticCache(config=model.config, max_cache_len=case.prompt + case.new)

    def read(self, ids):
        self.cache.reset()
        return self._next(self.model, ids)

    def skip(self, count):
        for layer in self.cache.layers:
            layer.cumulative_length.add_(count)


class PackedStatic(Static):
    name = "static cache, packed"
    packs = True


def compiles() -> bool:
    """Whether torch.compile is on, and has what it needs: a C++ compiler, or on a GPU Triton and a C compiler."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":  # torch's own switch
        return False
    if torch.cuda.is_available():
        return importlib.util.find_spec("triton") is not None and _found("CC", "gcc", "clang")
    return _found("CXX", "g++")


def _found(variable, *usual):
    """Whether one of these compilers is there, or the one that the environment names."""
    return any(map(shutil.which, [os.environ[variable]] if variable in os.environ else usual))


class CompiledStatic(Static):
    name = "static cache, compiled"
    compiled = True

    def __init__(self, model, case):
        super().__init__(model, case)
        if torch.cuda.is_available():
            self.step_model = torch.compile(model, mode="reduce-overhead")
        else:  # weights become constants, which the compiler packs itself
            self.step_model = torch.compile(model, options={"freezing": True})
        self.known = None  # the prompts in the cache, and the logits after them

    def read(self, ids):
        """As the static cache does; of prompts that are in the cache already only what came after is forgotten."""
        if self.known is None or not torch.equal(self.known[0], ids):
            self.known = ids, super().read(ids)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(ids.shape[1])
        return self.known[1]


class ReadAgain(Contender):
    """The student with implicit filters and no cache: every token reads the whole sequence again."""

    name = "read again"
    student = "implicit"

    def __init__(self, model, case):
        super().__init__(model, case)
        self.batch = max(1, min(case.batch, READ_AGAIN // (case.prompt + case.new)))

    def read(self, ids):
        self.ids = ids
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    def step(self, tokens):
        return self.read(torch.cat([self.ids, tokens[:, None]], dim=1))

    def skip(self, count):
        self.ids = torch.cat([self.ids, _repeated(self.ids, 1, count)], dim=1)

    @property
    def kept(self):
        return self.ids.nbytes


class Exact(Contender):
    """The student with implicit filters and the cache of exact online convolution."""

    name = "exact"
    student = "implicit"
    uneven = True  # because of the tiles


class ModelCalls(Contender):
    """The recurrent student, called as `generate` calls it."""

    name = "model(...)"
    student = "modal"

    def skip(self, count):
        self.cache.seen, self.cache.real = self.cache.seen + count, self.cache.real + count
        for index, layer in enumerate(self.cache.layers):
            if self.model.config.kept_window(index) == 0:
                ring = layer.ring if isinstance(layer, AttentionCacheLayer) else layer.kept
                if ring.keys is not None:
                    tokens = _repeated(ring.keys, 2, count), _repeated(ring.values, 2, count)
                    ring.extend(Tokens(*tokens, _repeated(ring.real, 1, count)), 0)


class Decoded(Contender):
    """The recurrent student with its Decoder."""

    name = "Decoder"
    student = "modal"
    state_dtype = None  # of the modes: the filters' own

    def __init__(self, model, case):
        super().__init__(model, case)
        self.decoder, self.rows = Decoder(model, case.batch, self.state_dtype), []
        self.step_model, self.cache = self.decoder.model, self.decoder.cache

    def read(self, ids):
        self.decoder.remove(self.rows)
        self.rows = self.decoder.add(list(ids))
        return self.decoder.logits

    def step(self, tokens):
        return self.decoder.step(tokens)

    def skip(self, count):
        """Nothing to do: a step does not depend on how many there were."""


def kinds(model: Evaluated) -> list[type[Contender]]:
    """The contenders that a report times for a model: those that may be its best, and its plain ones."""
    if not model.is_student and not _attends(model):
        return [OwnState]
    if not model.is_student:
        packs = model.device.type == "cpu" and model.dtype == "float32" and torch.backends.mkldnn.is_available()
        return [Dynamic, Static, *([PackedStatic] if packs else []), *([CompiledStatic] if compiles() else [])]
    if not model.is_recurrent:
        return [Exact]
    # A student's step is machine code on a CPU, and a captured graph on a GPU.
    return [ModelCalls] if model.config.state_bytes is None else [ModelCalls, Decoded]


def _attends(model):
    """Whether all that a model keeps is keys and values."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    own = any(hasattr(layer, "recurrent_states") for layer in layers)
    return not own and "cache" in inspect.signature(model.skeleton.forward).parameters


def generated(contender: Contender, ids: Tensor, seconds: float) -> dict:
    """Seconds that a contender takes to read prompts and to generate its case's new tokens greedily, once it is warm.

    Where all steps would take longer than `seconds`, three runs of steps stand for them: at the first, the middle and
    the last positions, with the cache filled up to there; of an uneven contender, the first steps.

    warm_up: seconds of the warm-up, in which what is compiled compiles; 0 for a contender that is warm.
    prompt, first: seconds until the prompt is read, and until its first new token is chosen.
    generation, steps: seconds of all new tokens after that, and of each step that was timed.
    kept_first, kept_last: bytes kept after the prompt, and after the last token if it was reached.
    tokens: of the first sequence, up to the first position that was skipped.
    """
    new, device = contender.case.new, ids.device
    began = now(device)
    if not contender.warm:
        token = contender.read(ids[:, :2]).argmax(-1)
        for _ in range(min(2, new)):  # a compiled step is captured in its second call
            token = contender.step(token).argmax(-1)
        contender.warm = True
    warm_up, began = now(device) - began, now(device)
    logits = contender.read(ids)
    prompt = now(device) - began
    token = logits.argmax(-1)
    first = now(device) - began
    kept, tokens, runs, position = contender.kept, [token], [[]], 0

    def run(start, stop):
        nonlocal token, position
        if start > position:
            contender.skip(start - position)
            runs.append([])
            position = start
        for _ in range(position, stop):
            began = now(device)
            token = contender.step(token).argmax(-1)
            runs[-1].append(now(device) - began)
            tokens.append(token)
        position = max(position, stop)

    run(0, min(PROBE, new))
    quickest = min(runs[0])
    if contender.uneven:
        run(position, min(LEAST, new))
        while position < new and sum(runs[0]) < seconds:
            run(position, position + 1)
    elif new < 3 * PROBE or quickest * new <= seconds:
        run(position, new)
    else:
        count = max(PROBE, min(new // 3, int(seconds / 3 / quickest)))
        for start, stop in ((0, count), ((new - count) // 2, (new + count) // 2), (new - count, new)):
            run(start, stop)
    steps = [step for each in runs for step in each]
    # The step after a prompt also does what reading the prompt left undone, so it stands only for itself.
    means = [statistics.mean(each) for each in (runs[0][1:], *runs[1:]) if each]
    generation = sum(steps) if len(steps) == new else steps[0] + (new - 1) * statistics.mean(means)
    return {
        "warm_up": warm_up,
        "prompt": prompt,
        "first": first,
        "generation": generation,
        "steps": steps,
        "kept_first": kept,
        "kept_last": contender.kept if position == new else None,
        "tokens": torch.stack(tokens[: len(runs[0]) + 1], dim=1)[0].tolist(),
    }


def now(device: torch.device) -> float:
    """A clock in seconds, read when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def begin_peak(device: torch.device) -> int | None:
    """Reset the peak of memory in use, and return the bytes in use now; None where the system cannot reset it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return in_use(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # memory that is free but not returned would hide what is allocated from it
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return in_use(device)


def in_use(device: torch.device) -> int:
    """Bytes allocated on the GPU, or resident in memory of this process."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else _resident("VmRSS")


def peak_use(device: torch.device) -> int:
    """The peak of `in_use` since `begin_peak`, or since the process started."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")


def _resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _repeated(x, axis, count):
    """`count` entries along an axis: those of `x`, repeated from its start as often as needed."""
    return x.index_select(axis, torch.arange(count, device=x.device) % x.shape[axis])
