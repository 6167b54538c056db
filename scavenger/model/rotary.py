"""Rotary position embeddings, by the teacher's own frequencies."""

import torch
from torch import Tensor

from .precision import WideModule


class Rotary(WideModule):
    """cos and sin of position · frequency, each times `scaling`.

    The frequencies are a buffer that is saved with the weights and stays in float32 or wider, copied from the teacher:
    so whatever scaling transformers computed for it is the student's too. Angles are float32 for every dtype of the
    model, as in transformers.
    """

    def __init__(self, channels: int, scaling: float):
        super().__init__()
        self.scaling = scaling
        self.register_buffer("inv_freq", torch.empty(channels // 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """10000^{-2i / channels}, for a student without a teacher."""
        count = len(self.inv_freq)
        self.inv_freq.copy_(10000.0 ** (-torch.arange(count) / max(count, 1)))

    def forward(
        self,
        positions: Tensor,  # (batch, length)
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # cos and sin, (batch, length, turned pair)
        angle = positions[..., None].float() * self.inv_freq.float()
        return (angle.cos() * self.scaling).to(dtype), (angle.sin() * self.scaling).to(dtype)


def turn(
    x: Tensor,  # (batch, length, head, channel)
    cos: Tensor,  # (batch, length, pair)
    sin: Tensor,
    adjacent: bool,
) -> Tensor:  # as x
    """Turn the first channels of each head in pairs: (a, b) → (a cos - b sin, b cos + a sin).

    A pair is two adjacent channels, or else channel i and the one half of the turned channels further, as in the
    teacher. With adjacent pairs, groups of an even number of channels split none.
    """
    pairs = cos.shape[-1]
    x, others = x.split([2 * pairs, x.shape[-1] - 2 * pairs], dim=-1)
    shape, axis = ((pairs, 2), -1) if adjacent else ((2, pairs), -2)
    a, b = x.unflatten(-1, shape).unbind(axis)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=axis).flatten(-2)
    return torch.cat([turned, others], dim=-1)


def adjacent_pairs(
    weight: Tensor,  # (head · channel, …)
    head_dim: int,
    channels: int,  # of each head that are turned
) -> Tensor:  # as weight
    """The rows of q or k, whose pairs are half of the turned channels apart, in an order in which they are adjacent."""
    heads = weight.unflatten(0, (-1, head_dim))
    turned = heads[:, :channels].unflatten(1, (2, channels // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([turned, heads[:, channels:]], dim=1).flatten(0, 1)
