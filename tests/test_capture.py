"""A step that is captured once and replayed reads the tokens that an eager step reads.

On a CPU a replay calls the step again and copies its output to where the captured one stands: what a graph does, with
the same demand that a step updates all its tensors in place.
"""

import copy
from functools import partial

import pytest
import torch
from conftest import Launches, random_ids, tiny_student
from reference import assert_close

from scavenger.model import HyenaCache, HyenaForCausalLM
from scavenger.model.capture import CapturedStep
from scavenger.model.decoding import Decoder


SHAPES = [
    {"filters": 30},
    {"filters": 5, "attention_layers": [1], "attention_window": 7},
    {"filters": 5, "window": 7, "attention_heads": [[1], [], [0, 4]], "attention_window": 11},
    {"filters": 30, "hyena_order": 2},  # a step in torch, which replaces some tensors
]


@pytest.fixture
def captures(monkeypatch):
    """Calls on a CPU are captured as on a GPU; a list that grows by one with each capture."""
    found = []

    def record(function, inputs):
        found.append(1)
        output = torch.zeros(1)

        def replay():
            monkeypatch.setattr("scavenger.model.modeling_hyena.capturable", lambda x: False)  # no graph in a graph
            output.data = function(*inputs)
            monkeypatch.setattr("scavenger.model.modeling_hyena.capturable", lambda x: not torch.is_grad_enabled())

        return replay, output

    def single_step(model, cache, *inputs):
        return CapturedStep(partial(model._advance, cache), model, cache, *inputs)

    monkeypatch.setattr("scavenger.model.token_cpp.WORK", 0)
    monkeypatch.setattr(HyenaForCausalLM, "_single_step", single_step)
    monkeypatch.setattr("scavenger.model.capture.record", record)
    monkeypatch.setattr("scavenger.model.modeling_hyena.capturable", lambda x: not torch.is_grad_enabled())
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_step_is_the_eager_one(shape, captures):
    """Of a prompt, of a second prompt that replaces the tensors of the cache, and of a copy of the cache."""
    model = tiny_student(modal=True, **shape).requires_grad_(False)
    ids = random_ids(2, 33, device="cpu")
    whole = model(input_ids=ids, use_cache=False).logits
    cache = HyenaCache(model.config)
    with torch.no_grad():
        for start, stop in [
            (0, 5),
            *((t, t + 1) for t in range(5, 14)),
            (14, 20),
            *((t, t + 1) for t in range(20, 26)),
        ]:
            found = model(input_ids=ids[:, start:stop], cache=cache).logits
            assert_close(whole[:, start:stop], found, 5e-14)
        assert len(captures) == 2 and cache.captured is not None
        twin = copy.deepcopy(cache)
        assert twin.captured is None
        for each in (cache, twin):
            for t in range(26, 30):
                assert_close(whole[:, t : t + 1], model(input_ids=ids[:, t : t + 1], cache=each).logits, 5e-14)
        assert len(captures) == 3


def test_what_is_not_captured(captures):
    """Gradients, hidden states, beams, the first tokens of a cache, and states that grow."""
    model, ids = tiny_student(modal=True), random_ids(2, 20, device="cpu")

    def steps(model, **more):
        cache = HyenaCache(model.config)
        model(input_ids=ids[:, :9], cache=cache)
        for t in range(9, 13):
            found = model(input_ids=ids[:, t : t + 1], cache=cache, **more)
        return found

    assert steps(model).logits.requires_grad and not captures
    with torch.no_grad():
        assert len(steps(model, output_hidden_states=True).hidden_states) == 4 and not captures
        steps(tiny_student(modal=True, attention_layers=[1], attention_window=0))
        steps(tiny_student())
        beams = dict(num_beams=3, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
        model.generate(ids[:, :9], **beams)
        assert not captures
        steps(model)
        assert captures


@pytest.mark.parametrize("padded", [False, True])
def test_generate_captures_once(padded, captures, monkeypatch):
    model, ids = tiny_student(modal=True, window=7), random_ids(2, 9, low=1, device="cpu")
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    words = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = model.generate(ids, **words)
    assert len(captures) == 1
    monkeypatch.setattr("scavenger.model.modeling_hyena.capturable", lambda x: False)
    assert torch.equal(found, model.generate(ids, **words))


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decoder_captures_once_and_looks_for_ends_late(shape, late, captures, monkeypatch):
    """Rows join and leave; the graph is one, and what is generated does not depend on when the host looks."""
    model = tiny_student(modal=True, **shape)
    prompts = [random_ids(n, low=1, device="cpu") for n in (5, 1, 12, 3, 8, 2, 2)]
    with monkeypatch.context() as patched:
        patched.setattr("scavenger.model.modeling_hyena.capturable", lambda x: False)
        end = Decoder(model, rows=3).generate(prompts[:1], 9, None)[0][4].item()
        expected = Decoder(model, rows=3).generate(prompts, 9, end)
    assert len({len(x) for x in expected}) > 1
    decoder = Decoder(model, rows=3)
    decoder.late = late
    for _ in range(2):
        assert [x.tolist() for x in decoder.generate(prompts, 9, end)] == [x.tolist() for x in expected]
    assert len(captures) == 1 and sorted(decoder.free) == [0, 1, 2]


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_a_step_launches_ten_kernels_a_layer_and_never_waits(shape, monkeypatch):
    """Counted with the mixer's step, one kernel, as one operation of torch."""
    calls = []
    monkeypatch.setattr("scavenger.model.token_cpp.WORK", 0)
    monkeypatch.setattr("scavenger.model.step.available", lambda: True)
    monkeypatch.setattr("scavenger.model.step.step_in_cpp", lambda y, *words: calls.append(1) or y.zero_())
    counts = []
    for layers in (3, 6):
        heads = {"attention_heads": shape["attention_heads"] * (layers // 3)} if "attention_heads" in shape else {}
        model = tiny_student(modal=True, **shape | {"num_hidden_layers": layers} | heads)
        decoder = Decoder(model, rows=3)
        calls.clear()
        with Launches() as found:
            decoder.step(torch.zeros(3, dtype=torch.long))
        assert len(calls) == layers and not found.waited
        counts.append(len(found.launched))
    assert counts[1] - counts[0] <= 3 * 10
    assert counts[0] - 3 * 10 <= 25  # embedding, angles, counters, head
