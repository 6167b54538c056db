"""Modules whose numbers half precision would spoil, and the precision of float32 products on a GPU."""

import contextlib

import torch
from torch import nn


class WideModule(nn.Module):
    """A module whose parameters and buffers stay in float32 or wider whatever the model's dtype."""

    def _apply(self, fn, recurse=True):
        def keep_wide(tensor):
            moved = fn(tensor)
            half = moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(device=moved.device) if half else moved

        return super()._apply(keep_wide, recurse)


def full_float32():
    """A context in which float32 matrix products are not rounded to TF32: a filter's phases and states would drift.

    Of forward passes only, as gradients are computed outside. A compiled graph keeps the precision of its compilation.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _products("highest")


@contextlib.contextmanager
def tensor_cores():
    """Inside, a GPU rounds the factors of float32 matrix products to TF32, and is several times as fast."""
    with _products("high") if torch.cuda.is_available() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _products(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
