"""Modules whose numbers half precision would spoil."""

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
