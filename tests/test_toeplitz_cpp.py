"""A Toeplitz product in machine code is the one in torch, to rounding, with its gradients."""

import shutil

import pytest
import torch
from conftest import normal
from reference import assert_close

from scavenger.model import toeplitz_cpp
from scavenger.model.convolution import ToeplitzProduct


def product(monkeypatch, in_torch, q, k, v, taps, slope):
    """A Toeplitz product and its gradients."""
    with monkeypatch.context() as patched:
        if in_torch:
            patched.setattr(toeplitz_cpp, "compiled", lambda: None)
        y = ToeplitzProduct.apply(q, k, v, taps)
        return [y, *torch.autograd.grad(y, (q, k, v, taps), slope)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 5e-6)])  # measured 6e-16, 5e-7
@pytest.mark.parametrize(
    "queries, length, width, value_width",
    [(1, 1, 3, 3), (2, 31, 5, 6), (1, 32, 8, 8), (3, 33, 8, 9), (1, 65, 1, 17), (2, 216, 16, 8), (1, 130, 64, 64)],
)
def test_a_toeplitz_product_is_torchs(queries, length, width, value_width, dtype, tolerance, threads, monkeypatch):
    """Lengths below, at and across tiles, inputs that lie in memory as a mixer's do, and more taps than lags."""
    widths, both = [width, value_width], width + value_width
    q, slope = normal(2, length, 3, queries, both, device="cpu").to(dtype).movedim(1, -2).split(widths, -1)
    k, v = normal(2, length, 3, both, device="cpu").to(dtype).movedim(1, -2).split(widths, -1)
    q, k, v = (z.detach().requires_grad_() for z in (q, k, v))
    taps = normal(3, length + 4, device="cpu").to(dtype).requires_grad_()
    calls, call = [], toeplitz_cpp._call
    monkeypatch.setattr(toeplitz_cpp, "_call", lambda *x, **more: calls.append(x[0]) or call(*x, **more))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        machine = product(monkeypatch, False, q, k, v, taps, slope)
        assert calls == ["forward", "backward"]
        in_torch = product(monkeypatch, True, q, k, v, taps, slope)
        assert calls == ["forward", "backward"]
    finally:
        torch.set_num_threads(before)
    for expected, found in zip(in_torch, machine, strict=True):
        assert expected.dtype == found.dtype
        assert_close(expected.double(), found.double(), tolerance)


def test_a_toeplitz_product_in_half_precision_stays_in_torch(monkeypatch):
    monkeypatch.setattr(toeplitz_cpp, "_call", lambda *x, **more: pytest.fail("called"))
    q, k, taps = (normal(*shape, device="cpu").bfloat16() for shape in ((2, 3, 1, 9, 5), (2, 3, 9, 5), (3, 9)))
    assert ToeplitzProduct.apply(q, k, k, taps).dtype == torch.bfloat16
