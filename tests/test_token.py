"""A token through a whole student in machine code is a token through its modules, to rounding: logits and states."""

import shutil

import pytest
import torch
from conftest import GROUPED, random_ids, tiny_student
from reference import assert_close
from test_step import KNOWN

from scavenger.model import token_cpp
from scavenger.model.decoding import Decoder


pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

ACTIVATIONS = [
    {"hidden_act": name, **shape}
    for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "swish", "relu")
    for shape in ({"filters": 5}, {"filters": 2, **GROUPED})
]


def both(model, monkeypatch):
    """Logits and states of a decoder in machine code, and of one in torch, whose rows join and leave."""
    prompts = [random_ids(n, device="cpu") for n in (5, 9, 2)]
    tokens = random_ids(24, 3, device="cpu")
    found = []
    for in_torch in (False, True):
        with monkeypatch.context() as patched:
            if in_torch:
                patched.setattr(token_cpp, "ROWS", 0)
                patched.setattr("scavenger.model.step.available", lambda: False)
            decoder = Decoder(model, rows=3)
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


@pytest.mark.parametrize("shape", [KNOWN[1], {"filters": 2, **GROUPED}])
def test_in_float32_on_several_threads(shape, monkeypatch, three_threads):
    found, expected = both(tiny_student(modal=True, **shape).float(), monkeypatch)
    for x, y in zip(found, expected, strict=True):
        assert_close(y.double(), x.double(), 1e-5)  # measured 1e-6 at most


def test_what_stays_in_torch():
    """Many rows, half precision, an activation or mixers that the source does not know."""
    model = tiny_student(modal=True)
    assert Decoder(model, rows=token_cpp.ROWS).token is not None
    assert Decoder(model, rows=token_cpp.ROWS + 1).token is None
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
