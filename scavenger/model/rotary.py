"""Rotary position embeddings as in GPT-NeoX."""

import torch
from torch import Tensor


def rotary_angles(
    positions: Tensor,  # (batch, length)
    channels: int,  # of each head that are rotated
    base: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # cos and sin, (batch, length, channels)
    """cos and sin of p / base^{2i/channels}, repeated twice: GPT-NeoX rotates channel i with channel i + channels/2."""
    wide = torch.promote_types(dtype, torch.float32)
    rate = base ** (-torch.arange(0, channels, 2, device=positions.device, dtype=wide) / max(channels, 1))
    angle = positions[..., None].to(wide) * rate
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turn(
    x: Tensor,  # (batch, length, head, channel)
    cos: Tensor,  # (batch, length, rotary channel)
    sin: Tensor,
) -> Tensor:  # as x
    """Rotary position embedding on the first channels of each head."""
    channels = cos.shape[-1]
    turned, passed = x[..., :channels], x[..., channels:]
    half = torch.cat([-turned[..., channels // 2 :], turned[..., : channels // 2]], dim=-1)
    return torch.cat([turned * cos[:, :, None] + half * sin[:, :, None], passed], dim=-1)
