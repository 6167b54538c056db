"""Speed of generation: all caches generate the same, bytes are those counted by hand, verdicts follow from figures."""

import gc
import json
import math
import runpy
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_student, tiny_teacher

from scavenger.model.decoding import PackedLinear
from scavenger.report import comparison, contenders, metrics, timing
from scavenger.report.contenders import (
    Case,
    CompiledStatic,
    Decoded,
    Dynamic,
    Exact,
    ModelCalls,
    PackedDynamic,
    PackedStatic,
    ReadAgain,
    Static,
)
from scavenger.report.evaluated import Evaluated
from scavenger.report.results import Results
from scavenger.report.timing import Settings


COMMAND = Path(__file__).parents[1] / "eval/speed.py"
TOKEN = 2 * 3 * 30 * 4  # bytes of a token's keys and values in the tiny teacher's three layers of 30 channels
QUICK = Settings(cases=(Case(1, 10, 5), Case(2, 30, 9)), contexts=(20, 70), rounds=2, seconds=60.0)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Garbage is collected before each measurement, in 0.2 s or more unless what was imported is left out."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, a distilled and a recurrent student of one shape."""
    made = {"teacher": tiny_teacher(), "distilled": tiny_student(), "recurrent": tiny_student(modal=True)}
    folder = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.float().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def trio(folder):
    """The three models, and what was measured of them side by side."""
    models = [Evaluated(label, str(folder / label)) for label in ("teacher", "distilled", "recurrent")]
    return models, timing.run(models, QUICK, progress=False)


def rows_of(results, key="rows"):
    return {(result["model"], row["cache"], row["case"]): row for result in results for row in result[key]}


@pytest.mark.parametrize("kind", [PackedStatic, PackedDynamic])
def test_a_packed_contender_has_packed_weights(kind, monkeypatch):
    """In the layout of oneDNN instead of the model's own, so that they count once."""
    monkeypatch.setattr("scavenger.model.decoding.PACKING_PAYS", 0)
    monkeypatch.setattr("scavenger.model.token_cpp.WORK", 0)  # machine code reads the model's own
    model = tiny_teacher().float()
    plain, made = Static(model, Case(3, 17, 5)), kind(model, Case(3, 17, 5))
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    packed = [m for m in made.step_model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == len(linears)
    assert made.weights == plain.weights
    both = Decoded(tiny_student(modal=True).float(), Case(9, 17, 5))  # holds the student and its decoder's copies
    assert both.weights > sum(p.nbytes for p in both.model.parameters())


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (tiny_teacher, (Dynamic, Static)),
        (tiny_student, (Exact, ReadAgain)),
        (lambda: tiny_student(30), (Exact, ReadAgain)),
        (lambda: tiny_student(modal=True), (ModelCalls, Decoded)),
        (lambda: tiny_student(30, modal=True, attention_layers=[1], attention_window=7), (ModelCalls, Decoded)),
        (lambda: tiny_student(modal=True, attention_layers=[1], attention_window=0), (ModelCalls,)),
    ],
)
@torch.inference_mode()
def test_every_cache_generates_what_the_model_does(make, kinds):
    model, new = make(), 23
    ids = torch.randint(1, 97, (3, 17))
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)[:, 17:]
    again = ids
    for _ in range(new):
        again = torch.cat([again, model(input_ids=again, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(again[:, 17:], expected)
    for kind in kinds:
        contender = kind(model, Case(3, 17, new))
        contender.step(contender.read(ids[:, :2]).argmax(-1))  # must leave no trace
        tokens = [contender.read(ids).argmax(-1)]
        for _ in range(new - 1):
            tokens.append(contender.step(tokens[-1]).argmax(-1))
        assert torch.equal(torch.stack(tokens, dim=1), expected), kind.name
        found = contenders.generated(contender, ids, math.inf)
        assert found["tokens"][:-1] == expected[0].tolist() and len(found["steps"]) == new


def test_all_contenders_of_a_model(trio):
    models, results = trio
    assert [timing.kinds(model) for model in models] == [
        [Dynamic, Static, PackedStatic],
        [Exact],
        [ModelCalls, Decoded],
    ]
    assert [result["model"] for result in results] == ["teacher", "distilled", "recurrent"]
    for result, model in zip(results, models, strict=True):
        names = [kind.name for kind in timing.kinds(model)]
        assert [(row["case"], row["cache"]) for row in result["rows"]] == [
            (case, name) for case in ("1x10+5", "2x30+9") for name in names
        ]
        assert [(row["prompt"], row["cache"]) for row in result["contexts"]] == [
            (length, name) for length in (20, 70) for name in names
        ]
        for row in result["rows"] + result["contexts"]:
            lists = ("generation_seconds", "step_seconds_by_round")
            left = (*lists, "compile_seconds")
            figures = [value for key, value in row.items() if key in timing.ROW and key not in left]
            assert all(0 <= figure < math.inf for figure in figures), row
            assert row["compile_seconds"] is None and row["why"] is None
            assert (
                row["rounds"] == len(row["generation_seconds"]) == len(row["step_seconds_by_round"]) == 2
                and row["timed"] == row["new"]
            )
            assert row["tokens_per_second_low"] <= row["tokens_per_second"] <= row["tokens_per_second_high"]
            assert row["first_token_seconds"] >= row["prefill_seconds"]
        for metric, row in zip(result["metrics"], ("1x10+5", "2x30+9"), strict=True):
            assert metric["name"] == f"new tokens/s at {row}" and metric["better"] == "higher"
            best = min((own for own in result["rows"] if own["case"] == row), key=lambda own: own["choice_seconds"])
            assert metric["denominators"] == pytest.approx(best["generation_seconds"], rel=1e-6)
            assert metric["numerators"] == 2 * [best["batch"] * best["new"]]
    json.dumps(results, allow_nan=False)


def test_bytes_are_those_of_keys_values_modes_and_inputs(trio):
    models, results = trio
    rows = rows_of(results) | rows_of(results, "contexts")
    for case in ("1x10+5", "2x30+9", "1x20+32", "1x70+32"):
        dynamic, static = (rows["teacher", kind.name, case] for kind in (Dynamic, Static))
        assert dynamic["state_bytes"] == TOKEN * dynamic["prompt"]
        whole = TOKEN * (dynamic["prompt"] + dynamic["new"])
        assert dynamic["state_bytes_last"] == static["state_bytes"] == static["state_bytes_last"] == whole
        for kind in (ModelCalls, Decoded):
            row = rows["recurrent", kind.name, case]
            assert row["state_bytes"] == row["state_bytes_last"] == models[2].config.state_bytes
    # A token of a prompt adds, in each of three layers, outer products of five heads of six channels, and taps.
    exact = [rows["distilled", "exact", f"1x{length}+32"] for length in (20, 70)]
    assert exact[1]["state_bytes"] - exact[0]["state_bytes"] == 50 * 3 * (30 * 6 + 5) * 4
    assert exact[0]["state_bytes_last"] > exact[0]["state_bytes"]


def test_results_are_their_models_in_any_order(trio, tmp_path):
    models, _ = trio
    settings = Settings(cases=(Case(1, 5, 4),), contexts=(), rounds=1)
    for order in (models, [models[0], models[2], models[1]]):
        found = timing.kept(order, settings, Results(tmp_path))
        assert [(result["model"], result["path"]) for result in found] == [(m.label, m.path) for m in order]


def marked(speeds, rounds, draws=2000):
    """The share of draws in which a student is marked as different, by the ratio of its speed to the teacher's.

    Each draw has three caches of the teacher and two of the student, with independent noise of 15 % a round.
    """
    rng, case, apart = np.random.default_rng(11), Case(1, 10, 5), 0
    for _ in range(draws):
        own = []
        for speed, caches in zip(speeds, (3, 2), strict=True):
            seconds = np.exp(0.15 * rng.normal(size=(caches, rounds + 1))) / speed
            rows = [
                {
                    "rounds": rounds,
                    "choice_seconds": first,
                    "generation_seconds": rest,
                    "tokens_per_second": 1 / sum(rest),
                }
                for first, *rest in seconds.tolist()
            ]
            own += timing._metrics(case, rows)
        apart += metrics.separates(metrics.difference(own[1], own[0]), own[1])
    return apart / draws


def test_equal_speeds_are_seldom_marked_and_different_ones_found():
    """The best cache is chosen in a round that is not compared: at a level of 95 % equals are marked 5 times in 100."""
    assert 0.04 <= marked((1.0, 1.0), 5) <= 0.06
    assert marked((1.0, 1.0), 10) <= 0.06
    assert marked((1.0, 1.3), 5, 300) > 0.5 and marked((1.0, 0.7), 10, 300) > 0.95


def test_speeds_are_compared_by_their_ratio():
    mine, other = (
        metrics.Metric("new tokens/s", [60.0] * 5, seconds, "rate", "higher")
        for seconds in ([2.0, 2.2, 1.8, 2.1, 1.9], [4.0, 4.4, 3.6, 4.2, 3.8])
    )
    found = metrics.difference(mine, other)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2)), "paired: what slows a round slows both"
    assert metrics.separates(found, mine) and metrics.show(found, "rate", signed=True, ratio=True).startswith("× 2.000")
    row = {
        "unit": "rate",
        "exponential": False,
        "differences": {"a": {"value": -9.0, "low": None, "high": None, "items": 1}},
    }
    assert comparison.shown_difference(row, "a") == "-9.0", "of an earlier version"
    assert comparison.shown_difference(row | {"ratio": True}, "a") == "× -9.000"


def test_the_round_that_chooses_is_in_no_other_figure():
    """Of two caches the first is quick in the first round alone: it is the one that is shown and compared."""
    turns = [
        {"prompt": 1.0, "first": 1.0, "steps": [0.1] * 5, "kept_first": 8, "kept_last": 8, "weights": 1, "peak": None}
        | {"warm_up": 5.0}
    ]
    quick, steady = (
        timing._row(
            Case(1, 10, 5), kind, [turns[0] | {"generation": seconds} for seconds in generation], None, Settings()
        )
        for kind, generation in ((Dynamic, [1.0, 3.0, 3.0]), (Static, [2.0, 2.0, 2.0]))
    )
    assert quick["rounds"] == 2 and quick["choice_seconds"] == 1 and quick["tokens_per_second"] == pytest.approx(5 / 3)
    (metric,) = timing._metrics(Case(1, 10, 5), [steady, quick])
    assert metric.denominators == [3.0, 3.0]
    alone = timing._row(Case(1, 10, 5), Dynamic, [turns[0] | {"generation": 4.0}], None, Settings())
    assert alone["rounds"] == 1 and alone["generation_seconds"] == [4.0], "one round does both"
    steps = [
        dict(rest, step_seconds=after, choice_step_seconds=first)
        for rest, after, first in ((quick, 3, 1), (steady, 2, 2))
    ]
    assert timing.quickest_step(steps)["step_seconds"] == 3 and timing.quickest_step([]) is None
    assert timing.quickest_step([{"step_seconds": 3}, {"step_seconds": 2}])["step_seconds"] == 2, (
        "of an earlier version"
    )


def test_largest_batch(trio):
    _, results = trio
    assert timing.largest_batch(1.0, 2**29, 1000) == 2**29 // 1000
    assert timing.largest_batch(0.25, 2**29, 1000) == 0
    teacher = rows_of(results)["teacher", Dynamic.name, "1x10+5"]
    assert teacher["largest_batch"] == (16 * 2**30 - teacher["weights_bytes"]) // (15 * TOKEN)
    weights = sum(p.nbytes for p in trio[0][0].model.parameters())
    assert teacher["weights_bytes"] == weights
    assert rows_of(results)["recurrent", Decoded.name, "1x10+5"]["weights_bytes"] > weights, "packed copies"


def test_break_even_of_measured_bytes_is_the_configurations(trio):
    models, results = trio
    found = timing.break_even(results)
    config = models[2].config
    assert found["recurrent"]["bytes"] == config.break_even_length > 1
    assert found["recurrent"]["state_bytes"] == config.state_bytes
    assert found["distilled"]["bytes"] is None and found["distilled"]["state_bytes"] is None
    assert found["recurrent"]["longest"] == 70
    lines = timing.break_even_lines(results)
    assert lines[0].startswith("distilled: keeps more with every token")
    float32, half = config.break_even_length, config.break_even_length_of(2)
    assert f"teacher's dynamic cache in float32 from {float32:,} tokens on, in 16 bits from {half:,}" in lines[1]


def made(model, speeds, contexts, constant=True, state=1000, cache="Decoder", dtype="float32"):
    """A result by hand; speeds: {case: (low, median, high)}, contexts: {length: seconds of a step}."""
    empty = dict.fromkeys(timing.ROW) | {"rounds": 5, "timed": 9, "cache": cache}
    keys = ("tokens_per_second_low", "tokens_per_second", "tokens_per_second_high")
    return {
        "model": model,
        "settings": {"memory_gib": 16.0},
        "machine": {"dtype": dtype},
        "constant_state": constant,
        "rows": [
            empty | {"case": case, "prompt": 10, "state_bytes": state} | dict(zip(keys, own, strict=True))
            for case, own in speeds.items()
        ],
        "contexts": [
            empty | {"case": f"1x{length}+32", "prompt": length, "step_seconds": step}
            for length, step in contexts.items()
        ],
    }


def test_verdicts():
    never = (None, None, None)
    static = dict(cache="static cache")
    teacher = made(
        "teacher", {"wins": (9, 10, 11), "level": (9, 10, 11), "loses": (9, 10, 11), "none": never}, {}, **static
    )
    student = made("recurrent", {"wins": (7, 8, 8.5), "level": (8, 9, 9.5), "loses": (20, 25, 30), "none": never}, {})
    other = made("distilled", {"wins": (3, 4, 5), "level": never, "loses": (3, 4, 5), "none": never}, {}, cache="exact")
    without = " was not timed compiled, its quickest form on most machines: torch.compile has no compiler here."
    assert timing.verdicts([teacher, student, other]) == [
        "At wins teacher (static cache) is the quickest, 10.0 new tokens/s: 1.25 times recurrent (Decoder) "
        "and 2.50 times distilled (exact). teacher wins.",
        "At level teacher (static cache) is level with recurrent (Decoder): 1.11 times, in rounds that overlap.",
        "At loses recurrent (Decoder) is the quickest, 25.0 new tokens/s: 2.50 times teacher (static cache) "
        "and 6.25 times distilled (exact). teacher is 2.50 times distilled (exact).",
        "At none nothing was measured: there was not enough memory.",
        f"teacher{without}",
    ]
    dynamic = made("teacher", {"wins": (4, 5, 6)}, {}, cache="dynamic cache")
    teacher["rows"] = [teacher["rows"][0], *dynamic["rows"]]
    assert timing.verdicts([teacher]) == [
        "At wins teacher (static cache) is the quickest, 10.0 new tokens/s: 2.00 times teacher (dynamic cache).",
        f"teacher{without}",
    ]
    assert "1.25 times recurrent" in timing.verdicts([teacher, student])[0], "the better cache counts"
    teacher["rows"][0]["rounds"] = 1
    assert ", in 1 round: 1.25 times recurrent" in timing.verdicts([teacher, student])[0]


def test_break_even_of_bytes():
    teacher = made("teacher", {"c": (1, 1, 1)}, {64: 2.0}, constant=False, state=640, cache="dynamic cache")

    def against(**changes):
        return timing.break_even([teacher, made("student", {"c": (1, 1, 1)}, {}, **changes)])["student"]

    assert against(state=1281)["bytes"] == 21 and against(state=1280)["bytes"] == 20  # 64 bytes a token
    assert against(constant=False)["bytes"] is None
    student = made("student", {"c": (1, 1, 1)}, {64: 3.0})
    (line,) = timing.break_even_lines([teacher, student])
    assert line.startswith("student: keeps 1,000 bytes for a sequence of any length")
    assert "dynamic cache in float32 from 16 tokens on, in 16 bits from 32" in line
    halves = made("teacher", {"c": (1, 1, 1)}, {}, constant=False, state=320, cache="dynamic cache", dtype="bfloat16")
    (line,) = timing.break_even_lines([halves, student])
    assert "dynamic cache in bfloat16 from 32 tokens on" in line and "16 bits" not in line


LENGTHS = (256, 512, 1024, 2048, 4096)


def steps(teacher, student, lengths=LENGTHS, rounds=5, noise=0.0, seed=0):
    """Times by hand: the teacher's are a + b · length, the student's a constant, with noise in proportion."""
    rng = np.random.default_rng(seed)
    return {
        length: tuple(
            [value * math.exp(noise * rng.normal()) for _ in range(rounds)]
            for value in (teacher[0] + teacher[1] * length, student)
        )
        for length in lengths
    }


def test_crossing_of_lines_is_found():
    found = timing.crossing(steps((1e-3, 1e-6), 2.5e-3))
    assert found["low"] == found["tokens"] == found["high"] == 1501, "the first length at which it is quicker"
    assert (found["a"], found["b"], found["c"]) == pytest.approx((1e-3, 1e-6, 2.5e-3))
    assert timing.crossing(steps((1e-3, 1e-6), 0.9e-3))["high"] == 256, "quicker at once"
    never = timing.crossing(steps((1e-3, 1e-6), 6e-3, noise=0.01))
    assert never["low"] is None and never["tokens"] is None and never["high"] is None and never["fitted"]
    assert timing.crossing({}) == dict.fromkeys(("a", "b", "c", "tokens", "low", "high")) | {"fitted": False}
    alone = timing.crossing(steps((1e-3, 1e-6), 1e-3, lengths=(512,), noise=0.01))
    assert alone["b"] is None and alone["high"] == 512
    assert not timing.crossing(steps((1e-3, 1e-6), 1e-3, lengths=(512, 1024), rounds=1))["fitted"]


def test_crossing_has_its_interval_as_often_as_it_says():
    """Of 400 draws with noise of 10 %, about 95 in 100 intervals have the true length; where it is, is found."""
    draws = [timing.crossing(steps((1e-3, 1e-6), 2.5e-3, noise=0.1, seed=seed)) for seed in range(400)]
    hit = [found["low"] is not None and found["low"] <= 1501 <= (found["high"] or math.inf) for found in draws]
    assert 0.92 <= np.mean(hit) <= 0.98
    assert np.median([found["tokens"] for found in draws]) == pytest.approx(1501, rel=0.05)


def test_crossing_in_words():
    def line(teacher, student, **more):
        of_teacher, of_student = (made(name, {}, {}, state=None) for name in ("teacher", "student"))
        for length, both in steps(teacher, student, **more).items():
            for result, own in zip((of_teacher, of_student), both, strict=True):
                (row,) = made("", {}, {length: statistics.median(own)}, state=None)["contexts"]
                result["contexts"].append(row | {"step_seconds_by_round": own})
        (said,) = timing.break_even_lines([of_teacher, of_student])
        return said

    apart = "student: a step becomes quicker than teacher's, each with its best cache, "
    assert line((1e-3, 1e-6), 2.5e-3) == (
        f"{apart}between 1,501 and 1,501 tokens (fitted up to 4,096: teacher 1 ms and 1 ms more for every 1,000 "
        "tokens, against 2.5 ms)."
    )
    assert line((1e-3, 1e-6), 6e-3).startswith(f"{apart}not within 4,096 tokens (")
    assert line((1e-3, 1e-6), 1e-3).startswith(f"{apart}at 256 tokens or fewer (")
    assert line((1e-3, 1e-6), 4.5e-3, noise=0.3).startswith(f"{apart}at ")
    assert "not surely within 4,096" in line((1e-3, 1e-6), 4.5e-3, noise=0.3)
    assert line((1e-3, 1e-6), 1.25e-3, noise=0.2).startswith(f"{apart}between 0 and ")
    assert line((1e-3, 1e-6), 1e-3, rounds=1, lengths=(7, 9)).startswith("student: too few rounds and lengths")


def test_the_best_cache_at_each_length_is_fitted():
    teacher = made("teacher", {}, {64: 2.0, 128: 2.5}, constant=False, state=640, cache="dynamic cache")
    teacher["contexts"] += made("teacher", {}, {64: 1.0, 128: 2.6}, cache="static cache")["contexts"]
    assert timing._step_seconds(teacher) == {64: [1.0], 128: [2.5]}, "by medians, in results of an earlier version"


def test_what_was_not_measured_is_a_dash(trio, monkeypatch):
    models, _ = trio
    whole = ModelCalls.read

    def full(self, ids):
        if ids.shape[1] > 2:
            raise torch.OutOfMemoryError("no room")
        return whole(self, ids)

    monkeypatch.setattr(ModelCalls, "read", full)
    monkeypatch.setattr(timing, "begin_peak", lambda device: None)
    settings = Settings(cases=(Case(2, 10, 5),), contexts=(), rounds=1)
    results = timing.run([models[0], models[2]], settings, progress=False)
    row = rows_of(results)["recurrent", ModelCalls.name, "2x10+5"]
    assert row["rounds"] == row["timed"] == 0 and all(row[key] is None for key in timing.ROW)
    header, cells = timing.table(results)
    assert len(header) == len(cells[0]) and "out of memory" in cells[3]
    assert cells[3].count("–") == len(header) - 4 and cells[0][header.index("peak MiB")] == "–"
    assert timing.context_table(results)[1] == [] and timing.break_even(results)["recurrent"]["tokens"] is None
    assert len(timing.verdicts(results)) == 2


@torch.inference_mode()
def test_a_part_stands_for_the_rest_within_the_seconds(monkeypatch):
    """With a clock that a step moves by a second: of even contenders three runs are timed, of exact ones the first."""
    ids = torch.randint(1, 97, (2, 9))
    teacher, student = Dynamic(tiny_teacher(), Case(2, 9, 60)), Exact(tiny_student(), Case(2, 9, 60))
    clock = [0.0]
    monkeypatch.setattr(contenders, "now", lambda device: clock[0])
    for contender in (teacher, student):
        whole = contender.step
        monkeypatch.setattr(
            contender, "step", lambda tokens, whole=whole: clock.__setitem__(0, clock[0] + 1) or whole(tokens)
        )
    found = contenders.generated(teacher, ids, 12)
    assert len(found["steps"]) == 12 and found["generation"] == 60, "one second each"
    assert found["kept_last"] == 2 * 2 * 3 * 30 * 8 * (9 + 60) and len(found["tokens"]) == 5
    found = contenders.generated(student, ids, 40)
    assert len(found["steps"]) == 40 and found["generation"] == 60 and found["kept_last"] is None
    assert len(contenders.generated(student, ids, 1)["steps"]) == contenders.LEAST
    row = timing._row(Case(2, 9, 60), Exact, [found | {"prompt": 1.0, "weights": 10, "peak": None}], None, Settings())
    assert row["timed"] == 40 and row["state_bytes_last"] is None and row["largest_batch"] is None


def test_what_is_compiled_is_compiled_once_for_a_case(trio, monkeypatch):
    """One object for all rounds, its seconds apart; what does not compile is a row that says so, and no more."""
    models, _ = trio
    made = []

    def compile(model, **settings):
        made.append(settings)
        return model

    monkeypatch.setattr(contenders, "compiles", lambda: True)
    monkeypatch.setattr(torch, "compile", compile)
    settings = Settings(cases=(Case(1, 10, 5),), contexts=(9,), rounds=2)
    (result,) = timing.run(models[:1], settings, progress=False)
    assert made == 2 * [{"options": {"freezing": True}}], "a case and a context"
    rows = rows_of([result]) | rows_of([result], "contexts")
    for case in ("1x10+5", "1x9+32"):
        row = rows["teacher", CompiledStatic.name, case]
        assert row["compile_seconds"] > 0 and row["rounds"] == 2
        assert row["state_bytes"] == rows["teacher", Static.name, case]["state_bytes"]
        assert row["peak_bytes"] >= 0
    header, cells = timing.table([result])
    at = header.index("compile s")
    assert [line[at] for line in cells[:3]] == ["–"] * 3 and cells[3][at] != "–"
    assert not any("not timed compiled" in said for said in timing.verdicts([result]))

    def broken(model, **settings):
        raise AssertionError("a graph that cannot be")

    monkeypatch.setattr(torch, "compile", broken)
    (result,) = timing.run(models[:1], settings, progress=False)
    row = rows_of([result])["teacher", CompiledStatic.name, "1x10+5"]
    assert row["rounds"] == 0 and "does not compile (AssertionError)" in timing.table([result])[1][3]
    assert timing.verdicts([result])[-1].endswith("on most machines: does not compile (AssertionError).")


@torch.inference_mode()
def test_prompts_that_are_in_the_cache_are_not_read_again(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    model, read = tiny_teacher(), []
    ids, other = torch.randint(1, 97, (2, 3, 17))
    plain, kept = (kind(model, Case(3, 17, 9)) for kind in (Static, CompiledStatic))
    whole = kept._next
    monkeypatch.setattr(kept, "_next", lambda own, ids: read.append(ids.shape[1]) or whole(own, ids))
    for prompts in (ids, ids, other, ids):
        found = [contenders.generated(contender, prompts, math.inf) for contender in (plain, kept)]
        assert found[0]["tokens"] == found[1]["tokens"] and found[0]["kept_last"] == found[1]["kept_last"]
    assert [length for length in read if length > 1] == [2, 17, 17, 17], "a warm-up, and each change of prompts"


@pytest.mark.slow
@torch.inference_mode()
def test_a_compiled_static_cache_generates_the_same():
    model, ids = tiny_teacher().float(), torch.randint(1, 97, (3, 17))
    found = [contenders.generated(kind(model, Case(3, 17, 9)), ids, math.inf) for kind in (Static, CompiledStatic)]
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[1]["warm_up"] > 10 * sum(found[1]["steps"]), "compilation is in no step"


@pytest.mark.parametrize(
    ("environment", "there", "expected"),
    [
        ({}, ["g++"], True),
        ({}, ["gcc"], False),
        ({"CXX": "clang++"}, ["g++"], False),
        ({"CXX": "mine"}, ["mine"], True),
        ({"TORCH_COMPILE_DISABLE": "1"}, ["g++"], False),
    ],
)
def test_where_compilation_is_possible(without_compiler, environment, there, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(contenders.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.delenv("CXX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert without_compiler() == expected


def test_dtypes(trio, tmp_path, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert timing.dtypes(cpu) == ["float32"] and timing.dtypes(cuda) == ["float32", "bfloat16"]
    assert timing.dtypes(cuda, "bfloat16") == ["bfloat16"] and timing.dtypes(cpu, "float16") == ["float16"]
    model = trio[0][2].in_dtype("bfloat16")
    assert model.model.dtype == torch.bfloat16 and model.weights != trio[0][2].weights
    assert model.model.model.layers[0].mixer.filter.poles.dtype == torch.complex64
    loaded = Evaluated("mine", model.path, loader=lambda: tiny_teacher().float()).in_dtype("bfloat16")
    assert loaded.model.dtype == torch.bfloat16


def test_prompts_are_pieces_of_the_stream(trio):
    models, _ = trio
    stream = np.arange(300, dtype=np.uint16)
    prompts = timing._prompts(320, 5, stream)
    ids = prompts(Case(4, 21, 1))
    assert ids.shape == (4, 21) and torch.equal(ids, prompts(Case(4, 21, 7)))
    assert torch.equal(ids - ids[:, :1], torch.arange(21).expand(4, 21)) and len(set(ids[:, 0].tolist())) > 1
    assert prompts(Case(1, 700, 1)).shape == (1, 700)
    with pytest.raises(ValueError, match="found 300 ids up to 299; expected some, all below 200"):
        timing._prompts(200, 5, stream)
    settings = Settings(cases=(), contexts=(9,), rounds=1)
    assert timing.run(models[:1], settings, stream[:97], progress=False)[0]["metrics"] == []


def test_state_that_grows_has_no_decoder(tmp_path):
    model = tiny_student(modal=True, attention_layers=[1], attention_window=0).float()
    model.save_pretrained(tmp_path)
    grown = Evaluated("grown", str(tmp_path))
    assert timing.kinds(grown) == [ModelCalls]
    found = timing.run([grown], Settings(cases=(Case(1, 9, 40),), contexts=(), rounds=1, seconds=1e-9), progress=False)
    (row,) = found[0]["rows"]
    assert row["timed"] == 6 and row["state_bytes_last"] - row["state_bytes"] == 40 * (2 * 30 * 4 + 1)
    assert not found[0]["constant_state"] and row["to_best"] == 1 and row["to_dynamic"] is None


def test_command_times_each_dtype(folder, monkeypatch, capsys):
    monkeypatch.setattr(timing, "dtypes", lambda device: ["float32", "bfloat16"])
    words = [f"{name}={folder / name}" for name in ("teacher", "recurrent")]
    assert runpy.run_path(str(COMMAND))["main"]([*words, "--cases", "1x10+3", "--contexts", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    names = [f"{name}, {dtype}" for dtype in ("float32", "bfloat16") for name in ("teacher", "recurrent")]
    assert [result["model"] for result in found] == names
    assert [result["machine"]["dtype"] for result in found] == 2 * ["float32"] + 2 * ["bfloat16"]
    (whole,), (half,) = (
        [row["state_bytes"] for row in found[at]["rows"] if row["cache"] == Dynamic.name] for at in (0, 2)
    )
    assert whole == 2 * half and "in float32 and bfloat16, 1 rounds" in printed


def test_command(folder, tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(COMMAND))["main"]
    words = [f"teacher={folder / 'teacher'}", f"recurrent={folder / 'recurrent'}", "--cases", "1x10+3", "3x12+2"]
    words += ["--contexts", "9", "--rounds", "2", "--threads", "1", "--results", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        assert main(words) == 0
        printed = capsys.readouterr().out
        monkeypatch.setattr(timing, "run", None)
        assert main(words) == 0, "kept, not measured again"
    finally:
        torch.set_num_threads(threads)
    found = json.loads(printed.splitlines()[-1])
    assert [result["model"] for result in found] == ["teacher", "recurrent"]
    assert found[0]["metrics"]["new tokens/s at 3x12+2"]["items"] == 2 and found[0]["machine"]["threads"] == 1
    for said in ("5 rows in each of 2 cases", "batch in 16 GiB, computed", "At 1x10+3 ", "recurrent: keeps"):
        assert said in printed
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cases", "2x1+3"], "--cases: found 2x1+3; expected BATCHxPROMPT+NEW"),
        (["--rounds", "0"], "found 0 rounds; expected 1 or more"),
        (["--memory", "-1"], "found memory -1.0; expected a number above 0"),
        (["--contexts", "1"], "found a context of 1 tokens; expected 2 or more"),
        (["--threads", "0"], "--threads: found 0; expected 1 or more"),
        (["--cases", "--contexts"], "found no cases and no contexts"),
        ([], "nowhere: cannot be loaded"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    assert runpy.run_path(str(COMMAND))["main"](["nowhere", *words]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"speed: error: {said}") and shown.count("\n") == 1
