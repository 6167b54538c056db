"""Speed, memory and state of generation: every model with every cache it can have, side by side in one run.

A case reads prompts and generates greedily after them, with all models loaded. Each round goes through all contenders,
every second round in reverse, so that a machine that slows down does so for all of them. Where there are several
rounds, one more comes before them: it chooses the best cache of each model and is not in any other figure, so that what
is compared was not chosen for being quick in the same rounds. Speeds are over all rounds together; other times are
medians over rounds. What is compiled compiles once for a case, in a warm-up that has a column of its own and is in no
speed. Ratios and break-even lengths hold for one run and for the given shapes.
"""

import dataclasses
import math
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from scavenger.report import metrics
from scavenger.report.contenders import (
    LEAST,
    Case,
    CompiledStatic,
    Dynamic,
    Static,
    begin_peak,
    generated,
    kinds,
    peak_use,
)
from scavenger.report.evaluated import Evaluated
from scavenger.report.metrics import Metric
from scavenger.report.results import Results


@dataclass(frozen=True)
class Settings:
    """What is timed, how often and how long.

    contexts: lengths after which LEAST steps of one sequence are timed.
    rounds: those that are compared; from 2 on, one more chooses each model's best cache.
    seconds: about so long for all timed steps of a row, and again for all its prompts.
    memory: GiB for which the largest batch is computed.
    """

    # Prompts of 512 and 256 new tokens, batches up to 64 (arXiv:2310.18780, section 5.4), and one longer prompt.
    cases: tuple[Case, ...] = (Case(1, 512, 256), Case(16, 512, 256), Case(64, 512, 256), Case(1, 2048, 256))
    contexts: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    rounds: int = metrics.LEAST_ITEMS
    seconds: float = 10.0
    memory: float = 16.0
    seed: int = 0

    @property
    def turns(self) -> int:
        """Rounds with the one that chooses."""
        return self.rounds + (self.rounds > 1)

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


def dtypes(device: torch.device, own: str = "float32") -> list[str]:
    """What models of a dtype are timed in: float32 ones, on a GPU, also in that which they are served in."""
    return ["float32", "bfloat16"] if device.type == "cuda" and own == "float32" else [own]


def run(
    models: list[Evaluated], settings: Settings, stream: np.ndarray | None = None, progress: bool = True
) -> list[dict]:
    """One result for each model, all measured side by side; ratios are to the first.

    Prompts are pieces of `stream`, token ids below every model's vocabulary size; without it they are random. `rows` of
    a result has one row for each case and cache, `contexts` one for each context length and cache.
    """
    settings = fitting(models, settings)
    contenders = [(model, kind) for model in models for kind in kinds(model)]
    ids = _prompts(min(model.model.config.vocab_size for model in models), settings.seed, stream)
    for model in models:  # memory-mapped weights are read from the file when they are first used
        _touch(model.model)
    cases = [*settings.cases, *(Case(1, length, LEAST) for length in sorted(set(settings.contexts)))]
    total = len(cases) * len(contenders) * settings.turns
    with tqdm(
        total=total, desc="speed", unit="turn", leave=False, dynamic_ncols=True, disable=None if progress else True
    ) as bar:
        found = [_turns(contenders, case, ids(case), settings, bar) for case in cases]
    results = [_result(model, settings) for model in models]
    for index, (case, turns) in enumerate(zip(cases, found, strict=True)):
        rows = [_row(case, kind, *own, settings) for (_, kind), own in zip(contenders, turns, strict=True)]
        by_model = [[row for row, (own, _) in zip(rows, contenders, strict=True) if own is model] for model in models]
        _compare(by_model[0], rows)
        for result, own in zip(results, by_model, strict=True):
            if index < len(settings.cases):
                result["rows"] += own
                result["metrics"] += [metrics.packed(metric) for metric in _metrics(case, own)]
            else:
                result["contexts"] += own
    return results


def fitting(models: list[Evaluated], settings: Settings) -> Settings:
    """The cases and contexts that all models can read; ValueError if there are none, else a line on stderr."""
    most = min((model.longest for model in models if model.longest), default=math.inf)
    cases = tuple(case for case in settings.cases if case.prompt + case.new <= most)
    contexts = tuple(length for length in settings.contexts if length + LEAST <= most)
    lost = len(settings.cases) - len(cases) + len(settings.contexts) - len(contexts)
    if lost:
        said = f"{most:,} tokens, for which some model has positions"
        if not cases and not contexts:
            raise ValueError(f"found no case or context within {said}; expected shorter ones")
        print(f"speed: {lost} of the cases and contexts are left out: they exceed the {said}", file=sys.stderr)
    return dataclasses.replace(settings, cases=cases, contexts=contexts)


def kept(models: list[Evaluated], settings: Settings, results: Results, stream: np.ndarray | None = None) -> list[dict]:
    """The results of `run`, kept as one record: ratios hold for one run, so its key has all models and the machine."""
    record = described(settings) | machine(models[0].device, models[0].dtype)
    record |= {f"weights of {model.label}": model.weights for model in models}
    record |= {"order": [model.label for model in models], "prompts": "drawn" if stream is None else "text"}
    found = results.of("speed", models[0], record, lambda: {"results": run(models, settings, stream)})
    return [{"path": model.path} | result for model, result in zip(models, found["results"], strict=True)]


def described(settings: Settings) -> dict:
    """The settings as they are recorded."""
    return {
        "cases": " ".join(map(str, settings.cases)),
        "contexts": " ".join(map(str, settings.contexts)),
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "memory_gib": settings.memory,
        "seed": settings.seed,
    }


def table(results: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of cases; a dash means not measured."""
    memory = results[0]["settings"]["memory_gib"]
    header = ["case", "model", "cache", "compile s", "prompt tokens/s", "first ms", "next ms", "95 % ms"]
    header += ["new tokens/s", "range"]
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
                _shown(row.get("compile_seconds"), ".1f"),
                _shown(row["prompt_tokens_per_second"], ",.0f"),
                *(_shown(row[key], ".2f", 1e3) for key in ("first_token_seconds", "next_token_seconds")),
                _shown(row["next_token_seconds_95"], ".2f", 1e3),
                _shown(row["tokens_per_second"], ",.1f"),
                "–" if spread is None else "–".join(f"{end:,.1f}" for end in spread),
                f"{row['rounds']} × {row['timed']}" if row["rounds"] else row.get("why") or "out of memory",
                *(_shown(row[key], ".2f") for key in ("to_best", "to_dynamic")),
                *(_shown(row[key], ",.1f", 2**-20) for key in ("peak_bytes", "weights_bytes")),
                *(_shown(row[key], ",.1f", 2**-10) for key in ("state_bytes", "state_bytes_last")),
                _shown(row["largest_batch"], ","),
            ]
        )
    return header, rows


def context_table(results: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of one sequence by context length."""
    header = ["context", "model", "cache", "compile s", "prompt s", "ms a step", "state KiB", "peak MiB"]
    rows = [
        [
            f"{row['prompt']:,}",
            result["model"],
            row["cache"],
            _shown(row.get("compile_seconds"), ".1f"),
            _shown(row["prefill_seconds"], ".3f"),
            _shown(row["step_seconds"], ".2f", 1e3),
            _shown(row["state_bytes"], ",.1f", 2**-10),
            _shown(row["peak_bytes"], ",.1f", 2**-20),
        ]
        for _, result, row in _by_case(results, "contexts")
    ]
    return header, rows


def verdicts(results: list[dict]) -> list[str]:
    """A sentence for each case: which model generates fastest, by how much, and whether the reference wins."""
    found = []
    for case in dict.fromkeys(case for case, _, _ in _by_case(results, "rows")):
        own = [(result["model"], row) for name, result, row in _by_case(results, "rows") if name == case]
        own = [(model, row) for model, row in own if row["tokens_per_second"] is not None]
        if len(results) > 1:  # models are compared by their best caches; the caches of a single model with each other
            own = [(model, _best([row for other, row in own if other == model])) for model in dict(own)]
        found.append(_verdict(case, sorted(own, key=_speed, reverse=True), results[0]["model"]))
    return found + _not_compiled(results)


def _not_compiled(results):
    """A sentence for each Transformer whose static cache was timed, but not compiled."""
    said = []
    for result in results:
        rows = result["rows"] + result["contexts"]
        made = [row for row in rows if row["cache"] == CompiledStatic.name]
        if any(row["cache"] == Static.name for row in rows) and not any(row["rounds"] for row in made):
            why = next((row["why"] for row in made), None) or "torch.compile has no compiler here"
            said.append(f"{result['model']} was not timed compiled, its quickest form on most machines: {why}.")
    return said


def break_even(results: list[dict]) -> dict:
    """For each student, the lengths from which its state is smaller and its step faster than the reference's.

    bytes: tokens from which the reference's dynamic cache is at least as large as the student's constant state.
    bytes_16_bit: the same for that cache in 16 bits, where it was measured in float32.
    tokens, low, high: see `crossing`, of the times of a step by context, each model with its best cache.
    """
    reference, *others = results
    dynamic = [row for row in reference["rows"] + reference["contexts"] if row["cache"] == Dynamic.name]
    per_token = next((row["state_bytes"] // row["prompt"] for row in dynamic if row["state_bytes"] is not None), None)
    own, dtype = _step_seconds(reference), reference["machine"]["dtype"]
    found = {}
    for result in others:
        states = [row["state_bytes"] for row in result["rows"] + result["contexts"] if row["state_bytes"] is not None]
        state = max(states) if states and result["constant_state"] else None
        mine = _step_seconds(result)
        lengths = sorted(own.keys() & mine.keys())
        fitted = crossing({length: (own[length], mine[length]) for length in lengths})
        found[result["model"]] = fitted | {
            "state_bytes": state,
            "grows": bool(states) and not result["constant_state"],
            "bytes": None if state is None or per_token is None else -(-state // per_token),
            "bytes_16_bit": None if None in (state, per_token) or dtype != "float32" else -(-2 * state // per_token),
            "dtype": dtype,
            "shortest": lengths[0] if lengths else None,
            "longest": lengths[-1] if lengths else None,
        }
    return found


def crossing(steps: dict[int, tuple[list[float], list[float]]]) -> dict:
    """From which length on a student's step is quicker, by a line through all times; `steps` has both by round.

    The reference's step takes a + b · length and the student's a constant c: their difference within a round is fitted
    by least squares, in units of both steps together at that length, as the noise of each grows with its time. Its
    interval is Student's t of the fitted line at each length (Fieller 1954), from the residuals, which also hold what
    is not straight.

    a, b, c: seconds, None where nothing was measured. low, high: between these lengths, at LEVEL, the student becomes
    quicker for good; tokens: where the line crosses zero. None where that is not within the lengths measured. fitted:
    whether there are figures enough for an interval.
    """
    found = dict.fromkeys(("a", "b", "c", "tokens", "low", "high")) | {"fitted": False}
    points = [(length, other, mine) for length, pair in steps.items() for other, mine in zip(*pair, strict=False)]
    if not points:
        return found
    lengths, other, mine = np.array(points, dtype=float).T
    typical = np.array([math.hypot(*map(statistics.median, steps[int(length)])) for length in lengths])
    columns = np.stack([np.ones_like(lengths), lengths], axis=1)[:, : min(2, len(steps))] / typical[:, None]

    def line(values):
        return np.linalg.lstsq(columns, values / typical, rcond=None)[0]

    apart, free = line(other - mine), len(points) - columns.shape[1]
    found |= dict(zip("ab", line(other).tolist(), strict=False)) | {"c": float(np.mean(mine))}
    if free < 1:
        return found
    found["fitted"] = True
    left = (other - mine) / typical - columns @ apart
    covariance = np.linalg.inv(columns.T @ columns) * (left @ left) / free
    at = np.arange(min(steps), max(steps) + 1)
    basis = np.stack([np.ones(len(at)), at], axis=1)[:, : columns.shape[1]]
    gain = basis @ apart
    spread = stats.t.ppf((1 + metrics.LEVEL) / 2, free) * np.sqrt(np.einsum("ni,ij,nj->n", basis, covariance, basis))
    for name, values in (("low", gain + spread), ("tokens", gain), ("high", gain - spread)):
        slower = np.flatnonzero(values <= 0)
        if not len(slower):
            found[name] = int(at[0])
        elif slower[-1] + 1 < len(at):
            found[name] = int(at[slower[-1] + 1])
    return found


def break_even_lines(results: list[dict]) -> list[str]:
    """The break-even lengths as a sentence for each student."""
    reference, lines = results[0]["model"], []
    for label, found in break_even(results).items():
        said = []
        if found["bytes"] is not None:
            said.append(
                f"keeps {found['state_bytes']:,} bytes for a sequence of any length, no more than {reference}'s "
                f"dynamic cache in {found['dtype']} from {found['bytes']:,} tokens on"
                + (f", in 16 bits from {found['bytes_16_bit']:,}" if found["bytes_16_bit"] is not None else "")
            )
        elif found["grows"]:
            said.append("keeps more with every token")
        if found["longest"] is not None:
            said.append(_overtakes(found, reference))
        if said:
            lines.append(f"{label}: {'; '.join(said)}.")
    return lines


def _overtakes(found, reference):
    """From which length on the step is quicker, in words."""
    shortest, longest, low, high = (found[key] for key in ("shortest", "longest", "low", "high"))
    said = f"a step becomes quicker than {reference}'s, each with its best cache, "
    if not found["fitted"]:
        return f"too few rounds and lengths were measured to say when a step becomes quicker than {reference}'s"
    if low is None:
        said += f"not within {longest:,} tokens"
    elif high is None:
        said += f"at {low:,} tokens at the earliest, and not surely within {longest:,}"
    elif high == shortest:
        said += f"at {shortest:,} tokens or fewer"
    else:
        said += f"between {'0' if low == shortest else f'{low:,}'} and {high:,} tokens"
    if found["b"] is not None:
        said += (
            f" (fitted up to {longest:,}: {reference} {1e3 * found['a']:.3g} ms and {1e6 * found['b']:.2g} ms more for "
            f"every 1,000 tokens, against {1e3 * found['c']:.3g} ms)"
        )
    return said


def machine(device: torch.device, dtype: str) -> dict:
    """What speeds depend on besides the model."""
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
    about = Path("/proc/cpuinfo")  # only on Linux
    lines = about.read_text().splitlines() if about.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _prompts(vocabulary: int, seed: int, stream: np.ndarray | None) -> Callable[[Case], Tensor]:
    """A function from a case to its prompts, (batch, prompt); all contenders read the same ones."""
    if stream is not None and (len(stream) == 0 or stream.max() >= vocabulary):
        raise ValueError(
            f"found {len(stream)} ids up to {max(stream, default=0)}; expected some, all below {vocabulary}, the "
            "smallest vocabulary of the models"
        )

    def prompts(case):
        rng = np.random.default_rng([seed, case.batch, case.prompt])
        if stream is None:
            return torch.from_numpy(rng.integers(vocabulary, size=(case.batch, case.prompt)))
        text = np.resize(stream, max(len(stream), case.prompt)).astype(np.int64)  # a short text is repeated
        starts = rng.integers(len(text) - case.prompt + 1, size=case.batch)
        return torch.from_numpy(np.stack([text[start : start + case.prompt] for start in starts]))

    return prompts


@torch.inference_mode()
def _touch(model):
    model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)


def _turns(contenders, case, ids, settings, bar):
    """Of each contender its measurements, one a round, and None; or none, and why."""
    found, why, compiled, done, rounds = [[] for _ in contenders], [None] * len(contenders), {}, 0, settings.turns
    if any(kind.compiled for _, kind in contenders):
        torch.compiler.reset()  # after eight shapes of a model it would compile no more
    while done < rounds:
        order = range(len(contenders))
        for index in order if done % 2 == 0 else reversed(order):
            model, kind = contenders[index]
            bar.set_postfix_str(f"{case}, {model.label}, {kind.name}")
            if why[index] is None:
                try:
                    contender = compiled.get(index)
                    turn, contender = _turn(kind, model.model, case, ids, settings.seconds / settings.turns, contender)
                    found[index].append(turn)
                    compiled |= {index: contender} if kind.compiled else {}
                except torch.OutOfMemoryError:
                    why[index] = "out of memory"
                except Exception as error:  # the compiler's errors have no class in common
                    if not kind.compiled:
                        raise
                    why[index] = f"does not compile ({type(error).__name__})"
                if why[index] is not None:
                    found[index].clear()
                    compiled.pop(index, None)
                    torch.cuda.empty_cache()
            bar.update()
        done += 1
        if done == 1:  # fewer rounds where prompts take long
            slowest = max((turns[0]["first"] for turns in found if turns), default=settings.seconds)
            rounds = max(1, min(rounds, int(settings.seconds / slowest)))
            bar.total -= (settings.turns - rounds) * len(contenders)
            bar.refresh()
    return list(zip(found, why, strict=True))


@torch.inference_mode()
def _turn(kind, model, case, ids, seconds, contender=None):
    """One measurement of a contender, with its weights and the growth of memory without them; and the contender."""
    before = begin_peak(model.device)
    held = 0 if contender is None else contender.kept
    contender = contender or kind(model, case)
    found = generated(contender, ids.to(model.device), seconds) | {"weights": contender.weights}
    copies = contender.weights - sum(p.nbytes for p in model.parameters())
    peak = None if before is None else max(0, peak_use(model.device) - before + held - copies)
    return found | {"peak": peak}, contender


def _result(model, settings):
    """The result of a model, still without rows."""
    return {
        "model": model.label,
        "settings": described(settings),
        "machine": machine(model.device, model.dtype),
        "constant_state": model.is_recurrent and model.config.state_bytes is not None,
        "metrics": [],
        "rows": [],
        "contexts": [],
    }


ROW = (  # the measured values of a row, None where not measured
    "prefill_seconds",
    "prompt_tokens_per_second",
    "first_token_seconds",  # from the prompt to its first new token
    "next_token_seconds",  # median over all timed steps
    "next_token_seconds_95",  # their 95th percentile
    "step_seconds",  # mean over steps, except the one after the prompt
    "step_seconds_by_round",
    "compile_seconds",  # of the first warm-up, where it compiles
    "choice_seconds",  # of the generation in the round that chooses the best cache
    "choice_step_seconds",  # of a step in that round
    "generation_seconds",  # of each round
    "tokens_per_second",  # new tokens of all sequences, over all rounds
    "tokens_per_second_low",
    "tokens_per_second_high",
    "weights_bytes",
    "state_bytes",  # of one sequence after its prompt
    "state_bytes_last",  # and after its last token
    "peak_bytes",  # growth while reading and generating, without weights
    "largest_batch",  # computed from the weights and the state after the last token
    "to_best",  # new tokens/s divided by the reference's with its best cache
    "to_dynamic",  # and with its dynamic cache
)


def _row(case, kind, turns, why, settings):
    """A row from the measurements of all rounds; the first of several only chooses. Without any it says why."""
    first, turns = turns[:1], turns[1:] or turns
    row = {"case": str(case), "batch": case.batch, "prompt": case.prompt, "new": case.new, "cache": kind.name}
    row |= {"why": why}
    row |= {"rounds": len(turns), "timed": min((len(turn["steps"]) for turn in turns), default=0)} | dict.fromkeys(ROW)
    if not turns:
        return row
    steps = [step for turn in turns for step in turn["steps"]]
    seconds = [turn["generation"] for turn in turns]
    rates = [case.batch * case.new / each for each in seconds]
    states = [turn["kept_last"] for turn in turns if turn["kept_last"] is not None]
    last = -(-states[0] // case.batch) if states else None
    peaks, weights = [turn["peak"] for turn in turns if turn["peak"] is not None], turns[0]["weights"]
    reading = first if kind.compiled else turns  # the prompts that were read once are in its cache
    prefill = statistics.median(turn["prompt"] for turn in reading)
    return row | {
        "prefill_seconds": prefill,
        "prompt_tokens_per_second": case.batch * case.prompt / prefill,
        "first_token_seconds": statistics.median(turn["first"] for turn in reading),
        "next_token_seconds": statistics.median(steps),
        "next_token_seconds_95": float(np.quantile(steps, 0.95)),
        "step_seconds": statistics.median(_after_first(turn, case) for turn in turns),
        "step_seconds_by_round": [_after_first(turn, case) for turn in turns],
        "compile_seconds": first[0]["warm_up"] if kind.compiled else None,
        "choice_seconds": first[0]["generation"],
        "choice_step_seconds": _after_first(first[0], case),
        "generation_seconds": seconds,
        "tokens_per_second": len(seconds) * case.batch * case.new / sum(seconds),
        "tokens_per_second_low": min(rates),
        "tokens_per_second_high": max(rates),
        "weights_bytes": weights,
        "state_bytes": -(-turns[0]["kept_first"] // case.batch),
        "state_bytes_last": last,
        "peak_bytes": min(peaks, default=None),  # the first turn in a process includes start-up
        "largest_batch": None if last is None else largest_batch(settings.memory, weights, last),
    }


def largest_batch(memory: float, weights: int, state: float) -> int:
    """Number of sequences whose states fit into `memory` GiB together with the weights."""
    return max(0, int((memory * 2**30 - weights) // state))


def _after_first(turn, case):
    if case.new == 1:
        return turn["generation"]
    return (turn["generation"] - turn["steps"][0]) / (case.new - 1)


def _compare(reference, rows):
    """Add the speed of each row as a multiple of the reference's."""
    speeds = {row["cache"]: row["tokens_per_second"] for row in reference if row["tokens_per_second"] is not None}
    for row in rows:
        if row["tokens_per_second"] is not None and speeds:
            row["to_best"] = row["tokens_per_second"] / _best(reference)["tokens_per_second"]
            if Dynamic.name in speeds:
                row["to_dynamic"] = row["tokens_per_second"] / speeds[Dynamic.name]


def _metrics(case, rows):
    """New tokens a second of a model's best cache; the items are rounds."""
    best = _best(rows)
    if best is None:
        return []
    seconds = best["generation_seconds"]
    tokens = [float(case.batch * case.new)] * len(seconds)
    return [Metric(f"new tokens/s at {case}", tokens, seconds, "rate", "higher", headline=True)]


def quickest_step(rows: list[dict]) -> dict | None:
    """The row of the cache with the quickest step in the round that chooses; None where nothing was measured."""
    measured = [row for row in rows if row["step_seconds"] is not None]
    return min(measured, key=lambda row: row.get("choice_step_seconds") or row["step_seconds"], default=None)


def _best(rows):
    """The row of the cache that was the quickest in the round that chooses; None where nothing was measured.

    In results of an earlier version no round chooses: there it is the quickest of all rounds.
    """
    measured = [row for row in rows if row["tokens_per_second"] is not None]
    return min(measured, key=lambda row: row.get("choice_seconds") or 1 / row["tokens_per_second"], default=None)


def _by_case(results, key):
    """(case, result, row) of all results, grouped by case."""
    cases = dict.fromkeys(row["case"] for result in results for row in result[key])
    return [(case, result, row) for case in cases for result in results for row in result[key] if row["case"] == case]


def _speed(entry):
    return entry[1]["tokens_per_second"]


def _verdict(case, ranked, reference):
    """A sentence about one case; `ranked` holds (model, row), the fastest first."""
    if not ranked:
        return f"At {case} nothing was measured: there was not enough memory."
    (model, best), own = ranked[0], dict(ranked)
    # Where the ranges over rounds overlap, no difference is claimed.
    level = [pair for pair in ranked[1:] if pair[1]["tokens_per_second_high"] >= best["tokens_per_second_low"]]
    behind = [pair for pair in ranked[1:] if pair not in level]
    said = f"At {case} {_named(ranked[0])} is "
    if level:
        rates = [f"{_rate(best, pair):.2f}" for pair in level]
        said += f"level with {_joined(map(_named, level))}: {_joined(rates)} times, in rounds that overlap"
    else:
        few = best["rounds"] < metrics.LEAST_ITEMS  # of two equals, ranges over two rounds are disjoint 1 time in 3
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
    """Seconds of a step with the best cache in each round, by context length."""
    lengths = dict.fromkeys(row["prompt"] for row in result["contexts"])
    best = [quickest_step([row for row in result["contexts"] if row["prompt"] == length]) for length in lengths]
    # Results of an earlier version have the median alone.
    return {row["prompt"]: row.get("step_seconds_by_round") or [row["step_seconds"]] for row in best if row is not None}


def _shown(value, form, scale=1):
    return "–" if value is None else f"{scale * value:{form}}"
