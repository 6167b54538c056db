"""The kernel of a mixer's step, in Triton's interpreter on a CPU, is the step in torch: outputs and states."""

import pytest
import torch
from conftest import GROUPED, GROUPED_SHAPES, random_ids, tiny_student
from reference import assert_close
from test_window import SHAPES

from scavenger.model import HyenaCache


triton = pytest.importorskip("triton", reason="needs triton")

# One layer, as each program is interpreted operation by operation.
CASES = [
    {"filters": 30},
    {"filters": 10, "short_filter_length": 1},
    {"filters": 5, "qk_norm": True, "norm": "rms"},
    {"filters": 5, "attention_layers": [0], "attention_window": 7},
    {"filters": 6, "window": 7, **GROUPED, "share_state": False},  # each head of q has a filter and a state of its own
    *GROUPED_SHAPES[:2],
    *({**shape, "attention_heads": [[1]]} for shape in SHAPES[2:3]),
    {"filters": 5, "window": 7, "positive": True},
    {"filters": 10, "window": 3},
    {"filters": 0, "window": 7},
]
PROMPT, LENGTH = 9, 11  # after the prompt windows of 11 are not full, and of a padded row hold padding


@pytest.fixture
def in_triton(monkeypatch):
    """Steps in C++ become steps in Triton, in tiles smaller than a state, a window and a filter."""
    from scavenger.model import step_triton

    monkeypatch.setattr("scavenger.model.step.available", lambda: True)
    monkeypatch.setattr("scavenger.model.step.step_in_cpp", step_triton.step_in_triton)
    monkeypatch.setattr(step_triton, "TILE", 32)
    monkeypatch.setattr(step_triton, "RING_TILE", 4)
    monkeypatch.setattr(step_triton, "MODE_TILE", 2)


def steps(model, ids, padded):
    """Logits of the tokens after a prompt, one at a time, and all states after each."""
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    found, cache = [], HyenaCache(model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], cache=cache)
        for t in range(PROMPT, LENGTH):
            more = {"attention_mask": mask[:, : t + 1]} if padded else {}
            found.append(model(input_ids=ids[:, t : t + 1], cache=cache, **more).logits)
            found += [z.clone() for layer in cache.layers for z in layer.states if z.numel()]
            found += [ring.written.clone() for layer in cache.layers for ring in layer.rings]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shape, padded", [(shape, place % 2 == 1) for place, shape in enumerate(CASES)])
def test_the_kernel_is_torch(shape, padded, monkeypatch, request):
    model = tiny_student(modal=True, num_hidden_layers=1, **shape)
    ids = random_ids(2, LENGTH, device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr("scavenger.model.step.available", lambda: False)
        expected = steps(model, ids, padded)
    request.getfixturevalue("in_triton")
    for wanted, found in zip(expected, steps(model, ids, padded), strict=True):
        assert wanted.shape == found.shape and wanted.dtype == found.dtype
        assert_close(wanted.double(), found.double(), 3e-14)  # measured 2.6e-15 at most
