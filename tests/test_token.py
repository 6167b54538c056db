"""A token through a whole student in machine code is a token through its modules, to rounding: logits and states."""

import copy
import shutil

import pytest
import torch
from conftest import GROUPED, random_ids, tiny_student
from reference import assert_close
from test_step import KNOWN
from torch import nn

from scavenger.model import HyenaCache, token_cpp
from scavenger.model.decoding import Decoder


pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

ACTIVATIONS = [
    {"hidden_act": name, **shape}
    for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "swish", "relu")
    for shape in ({"filters": 5}, {"filters": 2, **GROUPED})
]


def both(model, monkeypatch, rows=3):
    """Logits and states of a decoder in machine code, and of one in torch, whose rows join and leave."""
    prompts = [random_ids(n, device="cpu") for n in (5, 9, 2)]
    tokens = random_ids(24, rows, device="cpu")
    found = []
    for in_torch in (False, True):
        with monkeypatch.context() as patched:
            if in_torch:
                patched.setattr(token_cpp, "WORK", 0)
                patched.setattr("scavenger.model.step.available", lambda: False)
            decoder = Decoder(model, rows)
            assert (decoder.token is None) == in_torch
            decoder.add(prompts[:2])
            own = []
            for step, ids in enumerate(tokens):
                if step == 7:
                    decoder.remove([0])
                    decoder.add([prompts[2]])
                own.append(decoder.step(ids))
            own += [x for layer in decoder.cache.layers for x in layer.states if x.numel()]
            found.append([*own, decoder.cache.seen, decoder.cache.real])
    return found


@pytest.mark.parametrize("shape", [*KNOWN, *ACTIVATIONS])
def test_a_token_in_machine_code_is_one_in_torch(shape, monkeypatch):
    model = tiny_student(modal=True, **shape)
    for x in model.parameters():  # norms and biases too
        x.data += 0.05 * torch.randn_like(x)
    for found, expected in zip(*both(model, monkeypatch), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert_close(expected.double(), found.double(), 5e-14)  # measured 5e-15 at most


@pytest.mark.parametrize("rows", [4, 5])
@pytest.mark.parametrize("shape", [{"filters": 5, "window": 7}, {"filters": 2, **GROUPED, "parallel_residual": False}])
def test_rows_share_what_is_loaded(shape, rows, monkeypatch, three_threads):
    """Two rows and four outputs at a time, and what is left of both."""
    for odd in ({}, {"vocab_size": 98, "intermediate_size": 47}):
        model = tiny_student(modal=True, **shape | odd)
        for found, expected in zip(*both(model, monkeypatch, rows), strict=True):
            assert_close(expected.double(), found.double(), 5e-14)


@pytest.mark.parametrize("shape", [KNOWN[1], {"filters": 2, **GROUPED}])
def test_in_float32_on_several_threads(shape, monkeypatch, three_threads):
    found, expected = both(tiny_student(modal=True, **shape).float(), monkeypatch)
    for x, y in zip(found, expected, strict=True):
        assert_close(y.double(), x.double(), 1e-5)  # measured 1e-6 at most


def test_what_stays_in_torch(monkeypatch):
    """Much work, half precision, an activation or mixers that the source does not know."""
    model = tiny_student(modal=True)
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    with monkeypatch.context() as patched:
        patched.setattr(token_cpp, "WORK", 4 * weights / model.config.num_hidden_layers)
        assert Decoder(model, rows=4).token is not None
        assert Decoder(model, rows=5).token is None
    assert Decoder(tiny_student(modal=True).bfloat16(), rows=1).token is None
    for changes in ({"hidden_act": "mish"}, {"filters": 30, "hyena_order": 2}):
        assert Decoder(tiny_student(modal=True, **changes), rows=1).token is None


def test_words_beyond_the_vocabulary_are_refused_before_a_state_moves():
    model = tiny_student(modal=True)
    decoder, twin = Decoder(model, rows=2), Decoder(model, rows=2)
    for wrong in (model.config.vocab_size, -1):
        with pytest.raises(IndexError, match=f"expected 0 to {model.config.vocab_size - 1}"):
            decoder.step(torch.tensor([3, wrong]))
    assert torch.equal(decoder.step(torch.tensor([3, 4], dtype=torch.int32)), twin.step(torch.tensor([3, 4])))


@pytest.mark.parametrize("shape", [{"filters": 5, "window": 7}, {"filters": 2, **GROUPED}])
def test_the_weights_are_those_of_its_creation(shape):
    """Parameters that are given other memory leave the decoder its own; what was theirs is written over here."""
    model = tiny_student(modal=True, **shape)
    decoder, twin = Decoder(model, rows=2), Decoder(tiny_student(modal=True, **shape), rows=2)
    twin.model.load_state_dict(model.state_dict())
    model.half()
    scribbled = [torch.full((n,), 7.0, dtype=torch.float64) for n in range(1, 3000, 7)]
    for ids in random_ids(3, 2, device="cpu"):
        assert torch.equal(decoder.step(ids), twin.step(ids))
    assert scribbled


@pytest.fixture
def tokens(monkeypatch):
    """A list that grows by one with each token in machine code."""
    calls, once = [], token_cpp.Token.__call__
    monkeypatch.setattr(token_cpp.Token, "__call__", lambda self, ids: calls.append(len(ids)) or once(self, ids))
    return calls


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("shape", [{"filters": 5, "window": 7}, {"filters": 2, **GROUPED}, {"filters": 30}])
def test_a_model_reads_single_tokens_in_machine_code(shape, inference, tokens):
    """After the first ones; also where a longer text comes between, and in a copy of the cache."""
    model = tiny_student(modal=True, **shape)
    ids = random_ids(2, 33, device="cpu")
    cache = HyenaCache(model.config)
    with torch.inference_mode() if inference else torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits

        def read(start, stop, cache):
            found = model(input_ids=ids[:, start:stop], cache=cache).logits
            assert_close(whole[:, start:stop], found, 5e-14)

        read(0, 5, cache)
        for t in range(5, 14):
            read(t, t + 1, cache)
        assert len(tokens) == 7  # without the first two
        read(14, 20, cache)
        for t in range(20, 26):
            read(t, t + 1, cache)
        assert len(tokens) == 13 and cache.get_seq_length() == 26
        twin = copy.deepcopy(cache)
        for each in (twin, cache):
            for t in range(26, 30):
                read(t, t + 1, each)
        assert len(tokens) == 21


@pytest.mark.parametrize("padded", [False, True])
def test_generate_is_that_of_the_modules(padded, tokens, monkeypatch):
    model, ids = tiny_student(modal=True, window=7), random_ids(3, 9, low=1, device="cpu")
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    words = dict(attention_mask=mask, max_new_tokens=12, pad_token_id=0, eos_token_id=None)
    for more in ({"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 3, "do_sample": False}):
        found = []
        for work in (token_cpp.WORK, 0):
            monkeypatch.setattr(token_cpp, "WORK", work)
            before = len(tokens)
            torch.manual_seed(4)
            found.append(model.generate(ids, **words, **more))
            assert (len(tokens) > before) == (work > 0 and "num_beams" not in more)
        assert torch.equal(*found)


def test_a_row_without_a_token_is_read_by_the_modules(tokens):
    model, ids = tiny_student(modal=True), random_ids(2, 12, device="cpu")
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache = HyenaCache(model.config)
    with torch.no_grad():
        for t in range(12):
            found = model(input_ids=ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache).logits
            assert_close(whole[:, t : t + 1][mask[:, t] > 0], found[mask[:, t] > 0], 5e-14)
    assert len(tokens) == 1  # of the three with a token in both rows, two come before


class Adapted(nn.Linear):
    """A layer whose weight is not all that it computes."""

    def forward(self, x):
        return 2 * super().forward(x)


def adapted(model):
    for parent, name in [(layer.mixer, "q") for layer in model.model.layers] + [(model.model.layers[0].mlp, "up")]:
        old = getattr(parent, name)
        new = Adapted(old.in_features, old.out_features, bias=old.bias is not None, dtype=old.weight.dtype)
        new.load_state_dict(old.state_dict())
        setattr(parent, name, new)


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, words, output: 2 * output)


def replaced(model):
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda hidden: 2 * forward(hidden)


@pytest.mark.parametrize("change", [adapted, hooked, replaced])
@pytest.mark.parametrize("rows", [2, 5])
def test_changed_parts_are_asked_what_they_compute(change, rows, tokens):
    model = tiny_student(modal=True, window=7)
    ids = random_ids(rows, 12, device="cpu")
    before = model(input_ids=ids, use_cache=False).logits
    change(model)
    whole = model(input_ids=ids, use_cache=False).logits
    assert (whole - before).norm() > 1e-4 * before.norm()
    cache, decoder = HyenaCache(model.config), Decoder(model, rows)
    with torch.no_grad():
        for t in range(12):
            expected = whole[:, t]
            assert_close(expected, decoder.step(ids[:, t]), 5e-14)
            assert_close(expected, model(input_ids=ids[:, t : t + 1], cache=cache).logits[:, 0], 5e-14)
    assert not tokens


def test_weights_that_move_are_found_again(tokens):
    model, ids = tiny_student(modal=True), random_ids(1, 12, device="cpu")
    cache = HyenaCache(model.config)
    with torch.no_grad():
        for t in range(6):
            model(input_ids=ids[:, t : t + 1], cache=cache)
        for weight in model.parameters():
            weight.data = weight.data.clone()
            weight.data.mul_(1.1)
        twin = copy.deepcopy(cache)
        twin.eager = None
        assert_close(
            model(input_ids=ids[:, 6:7], cache=twin).logits, model(input_ids=ids[:, 6:7], cache=cache).logits, 5e-14
        )
    assert len(tokens) == 4
