"""Speed, memory and state of generation: every model with every cache it can have, side by side in one run.

A case reads prompts and generates behind them, greedily, with all models loaded. Rounds go through all contenders and
back, so that a machine that grows slower does so for all of them. Speeds are of all rounds together, other times the
median over rounds. Ratios and break-even lengths are of one run and of the stated shapes.
"""

import ctypes
import gc
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, StaticCache

from scavenger.measure import state_bytes
from scavenger.model.attention import AttentionCacheLayer
from scavenger.model.decoding import Decoder, PackedLinear, packed
from scavenger.report import metrics
from scavenger.report.evaluated import Evaluated
from scavenger.report.metrics import Metric
from scavenger.report.results import Results


PROBE = 2  # steps by which it is decided whether all are timed
# Steps of an uneven contender that are timed in any case, and of every context. Exact decoding of one filter a channel
# has rarer, larger steps that are not among so few behind a round context; that of wider heads has none.
LEAST = 32


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `prompt` tokens and `new` more tokens for each, as text 64x512+256."""

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
        """From the word of a command's --cases."""
        found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
        try:
            return cls(*map(int, found.groups() if found else (0, 0, 0)))
        except ValueError:
            raise ValueError(
                f"--cases: found {text}; expected BATCHxPROMPT+NEW with prompts of 2 tokens or more, such as 64x512+256"
            ) from None


@dataclass(frozen=True)
class Settings:
    """What is timed, how often and how long.

    `contexts`: lengths after which LEAST steps of one sequence are timed. `seconds`: of all timed steps of a row, and
    of all its prompts, about. `memory`: GiB that the largest batch is computed for.
    """

    # The paper's prompts of 512 and 256 new tokens (arXiv:2310.18780, section 5.4) at batches up to its 64, one longer.
    cases: tuple[Case, ...] = (Case(1, 512, 256), Case(16, 512, 256), Case(64, 512, 256), Case(1, 2048, 256))
    contexts: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    rounds: int = metrics.LEAST_ITEMS
    seconds: float = 10.0
    memory: float = 16.0
    seed: int = 0

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"found {self.rounds} rounds; expected 1 or more")
        for name in ("seconds", "memory"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"found {name} {getattr(self, name)}; expected a number above 0")
        for length in self.contexts:
            if length < 2:
                raise ValueError(f"found a context of {length} tokens; expected 2 or more")
        if not self.cases and not self.contexts:
            raise ValueError("found no cases and no contexts; expected one of them or more")


def run(
    models: list[Evaluated], settings: Settings, stream: np.ndarray | None = None, progress: bool = True
) -> list[dict]:
    """One result for each model, all measured side by side; the first is the reference of the ratios.

    Prompts are pieces of `stream`, ids that all models know; without it ids are drawn. `rows` has a row for each case
    and cache, `contexts` the same for one sequence after each context length.
    """
    contenders = [(model, kind) for model in models for kind in kinds(model)]
    ids = _prompts(min(model.model.config.vocab_size for model in models), settings.seed, stream)
    for model in models:  # weights that lie in a file are read when they are first used
        _touch(model.model)
    cases = [*settings.cases, *(Case(1, length, LEAST) for length in sorted(set(settings.contexts)))]
    total = len(cases) * len(contenders) * settings.rounds
    with tqdm(
        total=total, desc="speed", unit="turn", leave=False, dynamic_ncols=True, disable=None if progress else True
    ) as bar:
        turns = [_turns(contenders, case, ids(case), settings, bar) for case in cases]
    found = [_result(model, settings) for model in models]
    for place, (case, own) in enumerate(zip(cases, turns, strict=True)):
        rows = [_row(case, kind, each, settings) for (_, kind), each in zip(contenders, own, strict=True)]
        _compare([row for row, (model, _) in zip(rows, contenders, strict=True) if model is models[0]], rows)
        counted = place < len(settings.cases)
        for model, result in zip(models, found, strict=True):
            mine = [(row, each) for row, each, (whose, _) in zip(rows, own, contenders, strict=True) if whose is model]
            result["rows" if counted else "contexts"] += [row for row, _ in mine]
            if counted:
                result["metrics"] += [metrics.packed(metric) for metric in _metrics(case, mine)]
    return found


def kept(models: list[Evaluated], settings: Settings, results: Results, stream: np.ndarray | None = None) -> list[dict]:
    """What `run` finds, as one record: ratios are of one run, so all models and the machine are among its settings."""
    record = described(settings) | machine(models[0].device, models[0].dtype)
    record |= {f"weights of {model.label}": model.weights for model in models}
    record |= {"order": [model.label for model in models], "prompts": "drawn" if stream is None else "text"}
    found = results.of("speed", models[0], record, lambda: {"results": run(models, settings, stream)})
    return [{"path": model.path} | result for model, result in zip(models, found["results"], strict=True)]


def described(settings: Settings) -> dict:
    """For the record."""
    return {
        "cases": " ".join(map(str, settings.cases)),
        "contexts": " ".join(map(str, settings.contexts)),
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "memory_gib": settings.memory,
        "seed": settings.seed,
    }


def kinds(model: Evaluated) -> list[type["DynamicTeacher"]]:
    """The contenders that a model can be."""
    if not model.is_student:
        packs = model.device.type == "cpu" and model.dtype == "float32" and torch.backends.mkldnn.is_available()
        return [DynamicTeacher, StaticTeacher, *([PackedTeacher] if packs else [])]
    if not model.is_recurrent:
        return [Exact]
    return [Steps] if model.config.state_bytes is None else [Steps, Decoded]


class DynamicTeacher:
    """A Transformer whose keys and values are appended to."""

    name = "dynamic cache"
    student = None  # or the filters that its student has
    uneven = False  # whether single steps take much longer than others, so that a few do not stand for all

    def __init__(self, model, case: Case):
        self.model, self.batch, self.case = model, case.batch, case
        self.step_model = model

    @property
    def weights(self) -> int:
        """Bytes of all weights, the copies included that are packed."""
        copies = sum(m.weight.nbytes for m in self.step_model.modules() if isinstance(m, PackedLinear))
        return sum(p.nbytes for p in self.model.parameters()) + copies

    def read(self, ids: Tensor) -> Tensor:  # (batch, prompt) -> (batch, vocabulary)
        self.cache = DynamicCache(config=self.model.config)
        return self._next(self.model, ids)

    def step(self, tokens: Tensor) -> Tensor:  # (batch,) -> (batch, vocabulary)
        return self._next(self.step_model, tokens[:, None])

    def _next(self, model, ids):
        return model(input_ids=ids, cache=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def skip(self, count: int):
        """As if `count` more tokens had been read: which ones they were makes no difference to the time of a step."""
        for layer in self.cache.layers:
            again = torch.arange(count, device=layer.keys.device) % layer.keys.shape[2]
            layer.update(layer.keys[:, :, again], layer.values[:, :, again])

    @property
    def kept(self) -> int:
        """Bytes between tokens, of all rows."""
        return state_bytes(self.cache)


class StaticTeacher(DynamicTeacher):
    """A Transformer whose keys and values have their places from the start."""

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


class PackedTeacher(StaticTeacher):
    """With linear layers as the Decoder has them on a CPU, so that the packing is not what is compared."""

    name = "static cache, packed"

    def __init__(self, model, case):
        super().__init__(model, case)
        self.model = self.step_model = packed(model, case.batch)


class Exact(DynamicTeacher):
    """The student as convolution: prompts at once, and the cache of exact online convolution."""

    name = "exact"
    student = "implicit"
    uneven = True  # by the tiles

    def read(self, ids):
        self.cache = None
        return self._next(self.model, ids)

    def _next(self, model, ids):
        out = model(input_ids=ids, cache=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.cache
        return out.logits[:, -1]


class Steps(Exact):
    """The recurrent student by calls of the model, as `generate` makes them."""

    name = "model(...)"
    student = "modal"
    uneven = False

    def skip(self, count):
        self.cache.seen, self.cache.real = self.cache.seen + count, self.cache.real + count
        if not self.model.config.attention_window:
            for layer in self.cache.layers:
                if isinstance(layer, AttentionCacheLayer):
                    again = torch.arange(count, device=layer.keys.device) % layer.keys.shape[2]
                    layer.extend(layer.keys[:, :, again], layer.values[:, :, again], layer.real[:, again], 0)


class Decoded(Steps):
    """The recurrent student's Decoder."""

    name = "Decoder"
    compiled = False

    def __init__(self, model, case):
        super().__init__(model, case)
        self.decoder, self.held = Decoder(model, case.batch, compiled=self.compiled), []
        self.step_model, self.cache = self.decoder.model, self.decoder.cache

    def read(self, ids):
        self.decoder.remove(self.held)
        self.held = self.decoder.add(list(ids))
        return self.decoder.logits

    def step(self, tokens):
        return self.decoder.step(tokens)

    def skip(self, count):
        """Its steps do not depend on how many there were."""


def generated(contender: DynamicTeacher, ids: Tensor, new: int, seconds: float) -> dict:
    """Seconds of a prompt, and of `new` greedy tokens behind it.

    Where they would take longer than `seconds`, three runs of steps stand for all: the first, the middle and the last,
    the cache filled up to there; of an uneven contender the first steps.
    """
    device = ids.device
    began = now(device)
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
    # The step after a prompt also settles what the prompt left to later: it stands for itself alone.
    rest = [statistics.mean(each) for each in (runs[0][1:], *runs[1:]) if each]
    generation = sum(steps) if len(steps) == new else steps[0] + (new - 1) * statistics.mean(rest)
    return {
        "prompt": prompt,
        "first": first,
        "generation": generation,
        "steps": steps,
        "kept_first": kept,
        "kept_last": contender.kept if position == new else None,
        "tokens": torch.stack(tokens[: len(runs[0]) + 1], dim=1)[0].tolist(),  # of the first row, up to the first jump
    }


def table(results: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people, case by case; what was not measured is a dash."""
    memory = results[0]["settings"]["memory_gib"]
    header = ["case", "model", "cache", "prompt tokens/s", "first ms", "next ms", "95 % ms", "new tokens/s", "range"]
    header += ["timed", "× best", "× dynamic", "peak MiB", "weights MiB", "state KiB", "at the end"]
    header.append(f"batch in {memory:g} GiB, computed")
    rows = []
    for case, result, row in _by_case(results, "rows"):
        spread = None if row["rounds"] < 2 else (row["tokens_per_second_low"], row["tokens_per_second_high"])
        rows.append(
            [
                case,
                result["model"],
                row["cache"],
                _shown(row["prompt_tokens_per_second"], ",.0f"),
                *(_shown(row[key], ".2f", 1e3) for key in ("first_token_seconds", "next_token_seconds")),
                _shown(row["next_token_seconds_95"], ".2f", 1e3),
                _shown(row["tokens_per_second"], ",.1f"),
                "–" if spread is None else "–".join(f"{end:,.1f}" for end in spread),
                "out of memory" if row["rounds"] == 0 else f"{row['rounds']} × {row['timed']}",
                *(_shown(row[key], ".2f") for key in ("to_best", "to_dynamic")),
                *(_shown(row[key], ",.1f", 2**-20) for key in ("peak_bytes", "weights_bytes")),
                *(_shown(row[key], ",.1f", 2**-10) for key in ("state_bytes", "state_bytes_last")),
                _shown(row["largest_batch"], ","),
            ]
        )
    return header, rows


def context_table(results: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The same of one sequence, by the tokens it has read."""
    header = ["context", "model", "cache", "prompt s", "ms a step", "state KiB", "peak MiB"]
    rows = [
        [
            f"{row['prompt']:,}",
            result["model"],
            row["cache"],
            _shown(row["prefill_seconds"], ".3f"),
            _shown(row["step_seconds"], ".2f", 1e3),
            _shown(row["state_bytes"], ",.1f", 2**-10),
            _shown(row["peak_bytes"], ",.1f", 2**-20),
        ]
        for _, result, row in _by_case(results, "contexts")
    ]
    return header, rows


def verdicts(results: list[dict]) -> list[str]:
    """For each case, who generates quickest and by how much; where the reference wins, that."""
    found = []
    for case in dict.fromkeys(case for case, _, _ in _by_case(results, "rows")):
        own = [(result["model"], row) for name, result, row in _by_case(results, "rows") if name == case]
        own = [(model, row) for model, row in own if row["tokens_per_second"] is not None]
        if len(results) > 1:  # each model with its best cache; a model alone, its caches
            own = [max((pair for pair in own if pair[0] == model), key=_speed) for model in dict(own)]
        found.append(_verdict(case, sorted(own, key=_speed, reverse=True), results[0]["model"]))
    return found


def break_even(results: list[dict]) -> dict:
    """By student, from which length on its state is smaller, and its step quicker, than the reference's.

    `bytes`: the reference's dynamic cache of so many tokens is as large as the student's constant state, or larger.
    `tokens`: the shortest measured context from which on a step of the student's best cache is quicker than one of the
    reference's best cache, there and at all longer ones. None: at no length, or none that was measured.
    """
    reference, *others = results
    dynamic = [row for row in reference["rows"] + reference["contexts"] if row["cache"] == DynamicTeacher.name]
    per_token = next((row["state_bytes"] // row["prompt"] for row in dynamic if row["state_bytes"] is not None), None)
    own = _step_seconds(reference)
    found = {}
    for result in others:
        states = [row["state_bytes"] for row in result["rows"] + result["contexts"] if row["state_bytes"] is not None]
        state = max(states) if states and result["constant_state"] else None
        mine, tokens = _step_seconds(result), None
        lengths = sorted(own.keys() & mine.keys())
        for length in reversed(lengths):
            if mine[length] >= own[length]:
                break
            tokens = length
        found[result["model"]] = {
            "state_bytes": state,
            "grows": bool(states) and not result["constant_state"],
            "bytes": None if state is None or per_token is None else -(-state // per_token),
            "tokens": tokens,
            "shortest": lengths[0] if lengths else None,
            "longest": lengths[-1] if lengths else None,
        }
    return found


def break_even_lines(results: list[dict]) -> list[str]:
    """Break-even lengths in words, a line for each student."""
    reference, lines = results[0]["model"], []
    for label, found in break_even(results).items():
        said = []
        if found["bytes"] is not None:
            said.append(
                f"keeps {found['state_bytes']:,} bytes for a sequence of any length, no more than {reference}'s "
                f"dynamic cache from {found['bytes']:,} tokens on"
            )
        elif found["grows"]:
            said.append("keeps more with every token")
        if found["longest"] is not None and found["tokens"] is None:
            said.append(
                f"a step is not quicker than {reference}'s, each with its best cache, at {found['longest']:,} tokens, "
                "the longest at which both were measured"
            )
        elif found["longest"] is not None:
            least = ", the shortest measured" if found["tokens"] == found["shortest"] else ""
            said.append(
                f"by medians a step is quicker than {reference}'s, each with its best cache, from "
                f"{found['tokens']:,} tokens on{least} (up to {found['longest']:,} measured)"
            )
        if said:
            lines.append(f"{label}: {'; '.join(said)}.")
    return lines


def machine(device: torch.device, dtype: str) -> dict:
    """What speeds depend on, beside the model."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": dtype,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")  # Linux; elsewhere Python's own word for it
    lines = about.read_text().splitlines() if about.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def now(device: torch.device) -> float:
    """Seconds, all work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def begin_peak(device: torch.device) -> int | None:
    """Bytes in use, the high-water mark begun anew; None where the system does not say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return in_use(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # what is free but held back would hide what is taken from it
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return in_use(device)


def in_use(device: torch.device) -> int:
    """Bytes allocated on the GPU, or resident of this process."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else _resident("VmRSS")


def peak_use(device: torch.device) -> int:
    """The high-water mark of `in_use`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")


def _resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _prompts(vocabulary: int, seed: int, stream: np.ndarray | None) -> Callable[[Case], Tensor]:
    """Prompts of a case, (batch, prompt), the same for all contenders."""
    if stream is not None and (len(stream) == 0 or stream.max() >= vocabulary):
        raise ValueError(
            f"found {len(stream)} ids up to {max(stream, default=0)}; expected some, all below {vocabulary}, the "
            "smallest vocabulary of the models"
        )

    def prompts(case):
        rng = np.random.default_rng([seed, case.batch, case.prompt])
        if stream is None:
            return torch.from_numpy(rng.integers(vocabulary, size=(case.batch, case.prompt)))
        text = np.resize(stream, max(len(stream), case.prompt)).astype(np.int64)  # a short text again and again
        starts = rng.integers(len(text) - case.prompt + 1, size=case.batch)
        return torch.from_numpy(np.stack([text[start : start + case.prompt] for start in starts]))

    return prompts


@torch.inference_mode()
def _touch(model):
    model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)


def _turns(contenders, case, ids, settings, bar):
    """What each contender's turns found, one a round; of one that has not the memory, none."""
    found, done, rounds = [[] for _ in contenders], 0, settings.rounds
    while done < rounds:
        order = range(len(contenders))
        for index in order if done % 2 == 0 else reversed(order):
            model, kind = contenders[index]
            bar.set_postfix_str(f"{case}, {model.label}, {kind.name}")
            if len(found[index]) == done:
                try:
                    found[index].append(_turn(kind, model.model, case, ids, settings.seconds / settings.rounds))
                except torch.OutOfMemoryError:
                    found[index].clear()
                    torch.cuda.empty_cache()
            bar.update()
        done += 1
        if done == 1:  # long prompts are not read as often
            slowest = max((turns[0]["first"] for turns in found if turns), default=settings.seconds)
            rounds = max(1, min(rounds, int(settings.seconds / slowest)))
            bar.total -= (settings.rounds - rounds) * len(contenders)
            bar.refresh()
    return found


@torch.inference_mode()
def _turn(kind, model, case, ids, seconds):
    device, ids = model.device, ids.to(model.device)
    before = begin_peak(device)
    contender = kind(model, case)
    contender.step(contender.read(ids[:, :2]).argmax(-1))  # the first calls pay for start-up
    found = generated(contender, ids, case.new, seconds)
    found["weights"] = contender.weights
    copies = found["weights"] - sum(p.nbytes for p in model.parameters())
    return found | {"peak": None if before is None else max(0, peak_use(device) - before - copies)}


def _result(model, settings):
    """A model's result, with nothing in it yet."""
    return {
        "model": model.label,
        "settings": described(settings),
        "machine": machine(model.device, model.dtype),
        "constant_state": model.is_recurrent and model.config.state_bytes is not None,
        "metrics": [],
        "rows": [],
        "contexts": [],
    }


ROW = (  # what a row holds of measurements, each None where there was none
    "prefill_seconds",
    "prompt_tokens_per_second",
    "first_token_seconds",  # from the prompt to its first new token
    "next_token_seconds",  # median over all timed steps
    "next_token_seconds_95",  # in 95 % of them it took no longer
    "step_seconds",  # mean of a step, the one after the prompt left out
    "generation_seconds",  # of each round
    "tokens_per_second",  # new ones of all sequences, over all rounds
    "tokens_per_second_low",
    "tokens_per_second_high",
    "weights_bytes",
    "state_bytes",  # of a sequence after its prompt
    "state_bytes_last",  # and after its last token
    "peak_bytes",  # growth while it reads and generates, weights not included
    "largest_batch",  # computed from weights and the state at the end
    "to_best",  # new tokens/s over the reference's with its best cache
    "to_dynamic",
)


def _row(case, kind, turns, settings):
    """The rounds in one."""
    row = {"case": str(case), "batch": case.batch, "prompt": case.prompt, "new": case.new, "cache": kind.name}
    row |= {"rounds": len(turns), "timed": min((len(turn["steps"]) for turn in turns), default=0)} | dict.fromkeys(ROW)
    if not turns:
        return row
    steps = [step for turn in turns for step in turn["steps"]]
    seconds = [turn["generation"] for turn in turns]
    rates = [case.batch * case.new / each for each in seconds]
    states = [turn["kept_last"] for turn in turns if turn["kept_last"] is not None]
    last = -(-states[0] // case.batch) if states else None
    peaks, weights = [turn["peak"] for turn in turns if turn["peak"] is not None], turns[0]["weights"]
    prefill = statistics.median(turn["prompt"] for turn in turns)
    return row | {
        "prefill_seconds": prefill,
        "prompt_tokens_per_second": case.batch * case.prompt / prefill,
        "first_token_seconds": statistics.median(turn["first"] for turn in turns),
        "next_token_seconds": statistics.median(steps),
        "next_token_seconds_95": float(np.quantile(steps, 0.95)),
        "step_seconds": statistics.median(_after_first(turn, case) for turn in turns),
        "generation_seconds": seconds,
        "tokens_per_second": len(seconds) * case.batch * case.new / sum(seconds),
        "tokens_per_second_low": min(rates),
        "tokens_per_second_high": max(rates),
        "weights_bytes": weights,
        "state_bytes": -(-turns[0]["kept_first"] // case.batch),
        "state_bytes_last": last,
        "peak_bytes": min(peaks, default=None),  # a process' first turn pays for start-up
        "largest_batch": None if last is None else largest_batch(settings.memory, weights, last),
    }


def largest_batch(memory: float, weights: int, state: int) -> int:
    """Sequences whose states fit beside the weights into `memory` GiB."""
    return max(0, int((memory * 2**30 - weights) // state))


def _after_first(turn, case):
    if case.new == 1:
        return turn["generation"]
    return (turn["generation"] - turn["steps"][0]) / (case.new - 1)


def _compare(reference, rows):
    """Speed of each row as a multiple of the reference's rows."""
    speeds = {row["cache"]: row["tokens_per_second"] for row in reference if row["tokens_per_second"] is not None}
    for row in rows:
        if row["tokens_per_second"] is not None and speeds:
            row["to_best"] = row["tokens_per_second"] / max(speeds.values())
            if DynamicTeacher.name in speeds:
                row["to_dynamic"] = row["tokens_per_second"] / speeds[DynamicTeacher.name]


def _metrics(case, rows):
    """New tokens a second of a model's best cache, its items the rounds."""
    best = max((row for row, turns in rows if turns), key=lambda row: row["tokens_per_second"], default=None)
    if best is None:
        return []
    seconds = best["generation_seconds"]
    tokens = [float(case.batch * case.new)] * len(seconds)
    return [Metric(f"new tokens/s at {case}", tokens, seconds, "rate", "higher", headline=True)]


def _by_case(results, key):
    """(case, result, row) of all results, one case after the other."""
    cases = dict.fromkeys(row["case"] for result in results for row in result[key])
    return [(case, result, row) for case in cases for result in results for row in result[key] if row["case"] == case]


def _speed(entry):
    return entry[1]["tokens_per_second"]


def _verdict(case, ranked, reference):
    """`ranked`: (model, row), the quickest first."""
    if not ranked:
        return f"At {case} nothing was measured: there was not enough memory."
    (model, best), own = ranked[0], dict(ranked)
    # Rounds that overlap tell nothing apart.
    level = [pair for pair in ranked[1:] if pair[1]["tokens_per_second_high"] >= best["tokens_per_second_low"]]
    behind = [pair for pair in ranked[1:] if pair not in level]
    said = f"At {case} {_named(ranked[0])} is "
    if level:
        rates = [f"{_rate(best, pair):.2f}" for pair in level]
        said += f"level with {_joined(map(_named, level))}: {_joined(rates)} times, in rounds that overlap"
    else:
        few = best["rounds"] < metrics.LEAST_ITEMS  # of equals one is ahead in all of two rounds one time in three
        once = f", in {best['rounds']} round{'s' if best['rounds'] > 1 else ''}" if few else ""
        said += f"the quickest, {best['tokens_per_second']:,.1f} new tokens/s{once}"
    if behind:
        said += f"{'; it is' if level else ':'} {_times(best, behind)}"
    if len(own) == 1 or reference not in own:
        return f"{said}."
    if model == reference:
        return f"{said}." if level else f"{said}. {reference} wins."
    beaten = [pair for pair in behind if _speed(pair) < own[reference]["tokens_per_second"]]
    return f"{said}. {reference} is {_times(own[reference], beaten)}." if beaten else f"{said}."


def _named(pair):
    return f"{pair[0]} ({pair[1]['cache']})"


def _rate(best, pair):
    return best["tokens_per_second"] / _speed(pair)


def _times(best, pairs):
    return _joined(f"{_rate(best, pair):.2f} times {_named(pair)}" for pair in pairs)


def _joined(words):
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _step_seconds(result):
    """By context, the seconds of a step with the best cache."""
    found = {}
    for row in result["contexts"]:
        if row["step_seconds"] is not None:
            found[row["prompt"]] = min(row["step_seconds"], found.get(row["prompt"], float("inf")))
    return found


def _shown(value, form, scale=1):
    return "–" if value is None else f"{scale * value:{form}}"
