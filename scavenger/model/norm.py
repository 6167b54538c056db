"""The norms of a block, and those of the heads of q and k."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) ⊙ w over the last axis, the root in float32 or wider."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def norm(config, width: int) -> nn.Module:
    """A norm of the teacher's kind."""
    return (RMSNorm if config.norm == "rms" else nn.LayerNorm)(width, eps=config.norm_eps)


def head_norm(config) -> nn.Module:
    """The norm of a head of q or k; the identity for a teacher without one."""
    return norm(config, config.head_dim) if config.qk_norm else nn.Identity()
