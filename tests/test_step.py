"""A mixer's step as machine code is its step in torch, to rounding: outputs and states."""

import shutil
import sys

import pytest
import torch
from conftest import GROUPED, GROUPED_SHAPES, random_ids, tiny_student
from reference import assert_close
from test_window import MODAL_SHAPES, SHAPES

from scavenger.model import HyenaCache, machine_code, step, step_cpp


NARROW = [
    {"filters": 30},
    {"filters": 5},
    {"filters": 10, "short_filter_length": 1},
    {"filters": 5, "qk_norm": True, "norm": "rms"},
    {"filters": 5, "attention_layers": [1], "attention_window": 7},
    {"filters": 12, **GROUPED, "share_state": False},  # each head of q has filters and states of its own, two
]
UNKNOWN = [
    {"filters": 30, "hyena_order": 2},
    {"filters": 3, "rotary": False},  # groups wider than a head
    {"filters": 5, "window": 7, "positive": True, "features": "hedgehog"},
    {"filters": 5, "qk_norm": True},  # by LayerNorm
]
KNOWN = [
    shape
    for shape in [*NARROW, *GROUPED_SHAPES, *SHAPES, *MODAL_SHAPES]
    if "features" not in shape and shape.get("hyena_order", 1) == 1 and shape.get("attention_window") != 0
]

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def counted(monkeypatch):
    """A list that grows by one with each step in machine code."""
    calls, once = [], step.step
    monkeypatch.setattr("scavenger.model.token_cpp.WORK", 0)  # mixers, not whole tokens
    monkeypatch.setattr(step, "step", lambda *words, **more: calls.append(1) or once(*words, **more))
    return calls


PROMPT, LENGTH = 6, 31  # windows are not full after the prompt, and of a padded row hold padding


def both(model, monkeypatch, padded=False):
    """Logits of the tokens after a prompt, one at a time, and the states after 2 and after all: machine code, torch."""
    ids, mask = random_ids(2, LENGTH, device="cpu"), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    found = []
    for in_torch in (False, True):
        with monkeypatch.context() as patched, torch.no_grad():
            if in_torch:
                patched.setattr(step, "available", lambda: False)
            seen = mask if padded else torch.ones_like(mask)
            cache = HyenaCache(model.config)
            model(input_ids=ids[:, :PROMPT], attention_mask=seen[:, :PROMPT], cache=cache)
            logits, states = [], []
            for t in range(PROMPT, LENGTH):
                logits.append(model(input_ids=ids[:, t : t + 1], attention_mask=seen[:, : t + 1], cache=cache).logits)
                if t in (PROMPT + 1, LENGTH - 1):
                    states += [z.clone() for layer in cache.layers for z in layer.states if z.numel()]
                    states += [ring.written.clone() for layer in cache.layers for ring in layer.rings]
        found.append([torch.cat(logits, 1), *states])
    return found


@needs_a_compiler
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", KNOWN)
def test_machine_code_is_torch(shape, padded, monkeypatch, counted):
    model = tiny_student(modal=True, **shape)
    machine, torch_ = both(model, monkeypatch, padded)
    assert len(counted) == (LENGTH - PROMPT) * model.config.num_hidden_layers
    for expected, found in zip(torch_, machine, strict=True):
        assert expected.shape == found.shape and expected.dtype == found.dtype
        assert_close(expected.double(), found.double(), 5e-14)  # measured 5e-15 at most


@needs_a_compiler
@pytest.mark.parametrize("shape", [{"filters": 5}, SHAPES[2]])
def test_machine_code_in_float32_and_on_several_threads(shape, monkeypatch, counted, three_threads):
    monkeypatch.setattr(step_cpp, "PARALLEL", 0)
    machine, torch_ = both(tiny_student(modal=True, **shape).float(), monkeypatch)
    assert counted
    for expected, found in zip(torch_, machine, strict=True):
        assert_close(expected.double(), found.double(), 1e-5)  # measured 1e-6 at most


@needs_a_compiler
def test_one_mask_for_all_rows(monkeypatch, counted):
    model, ids = tiny_student(modal=True, window=7), random_ids(3, 9, device="cpu")
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1:]
        cache = model(input_ids=ids[:, :8], use_cache=True).cache
        assert_close(whole, model(input_ids=ids[:, 8:], attention_mask=torch.ones(1, 9), cache=cache).logits, 5e-14)
        assert counted
        cache.layers[0].near.keys = cache.layers[0].near.keys[:2].clone()
        with pytest.raises(ValueError, match="rows beside 3 of q, k and v; expected as many"):
            model(input_ids=ids[:, 8:], cache=cache)


@pytest.mark.parametrize("shape", UNKNOWN)
def test_what_the_source_does_not_know_stays_in_torch(shape, monkeypatch, counted):
    machine, torch_ = both(tiny_student(modal=True, **shape), monkeypatch)
    assert not counted and torch.equal(machine[0], torch_[0])


def test_a_step_with_gradients_stays_in_torch(counted):
    model, ids = tiny_student(modal=True), random_ids(2, 9, device="cpu")
    cache = model(input_ids=ids[:, :8], use_cache=True).cache
    loss = model(input_ids=ids[:, 8:], cache=cache).logits.square().sum()
    loss.backward()
    assert not counted and model.model.layers[0].mixer.filter.pole.grad.abs().max() > 0


@pytest.mark.parametrize("compiler", ["no-such-compiler", sys.executable])
def test_without_a_compiler_a_student_generates_in_torch(compiler, monkeypatch, counted, tmp_path, caplog):
    """None is there, or it refuses the source."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine_code.library.cache_clear()
    try:
        decoder = tiny_student(modal=True).batch_decoder(rows=1)
        assert decoder.generate([torch.tensor([3])], 2)[0].shape == (2,)
    finally:
        machine_code.library.cache_clear()
    assert not counted and not list(tmp_path.rglob("*.so"))
    assert ("did not compile" in caplog.text) == (compiler == sys.executable)
