"""The kernel of a mixer's step, in Triton's interpreter on a CPU, is the step in torch: outputs and states."""

import pytest
import torch
from conftest import GROUPED, GROUPED_SHAPES, compiled, random_ids, tiny_student
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

    monkeypatch.setattr("scavenger.model.token_cpp.WORK", 0)
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


# Heads of 64 channels: filters of a head with windows and queries that share their keys; filters of one channel.
COMPILED = [
    {"QUERIES": 4, "GROUPS": 1, "PART": 64, "NEAR": 64, "KEPT": 256, "OTHERS": 7},
    {"QUERIES": 1, "GROUPS": 64, "PART": 1, "NEAR": 0, "KEPT": 0, "OTHERS": 8, "STATE": "*bf16"},
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", COMPILED)
def test_the_kernel_compiles_without_a_gpu(shape):
    """Into machine code that shares no more memory than any multiprocessor has."""
    from scavenger.model import step_triton

    shape = dict(shape)
    state = shape.pop("STATE", "*fp32")
    rows, width = shape["QUERIES"], 64
    constants = shape | {
        **{"HEADS": 8, "WIDTH": width, "TAPS": 4, "PAIRS": 8, "ADJACENT": True, "OWN": False, "MODES": 128},
        **{"COMPONENTS": 2, "SCALE": 0.125, "EPS": 1e-5, "DOUBLE": False, "ROWS": rows, "CHANNELS": width},
        **{"COLUMNS": width, "TILE_ROWS": step_triton.TILE // (rows * width)},
        **{"RING_TILE": step_triton.RING_TILE, "MODE_TILE": step_triton.MODE_TILE, "real": None},
    }
    halves = ["y", "projected", "cos", "sin", "taps", "q_norm", "k_norm", "conv_state"]
    pointers = {"state": state, **dict.fromkeys(["poles", "residues", "direct"], "*fp32")}
    pointers |= {"places": "*i64", "first": "*i64", "size": "*i64", "ticket": "*i32"}
    for window, name in (("NEAR", "near"), ("KEPT", "kept")):
        if shape[window]:
            halves += [f"{name}_keys", f"{name}_values"]
            pointers |= {f"{name}_real": "*i1", f"{name}_written": "*i64"}
        else:
            constants |= {f"{name}_{part}": None for part in ("keys", "values", "real", "written")}
    if shape["NEAR"]:
        halves.append("gates")
    else:
        constants["gates"] = None
    pointers |= dict.fromkeys(halves, "*bf16")
    (shared,) = compiled(step_triton, [("_step", pointers, constants, {"num_warps": 8})], 90)
    assert shared <= 48 * 2**10
