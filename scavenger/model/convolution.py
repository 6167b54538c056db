"""Causal convolutions: long ones by FFT, short ones tap by tap with the cache that decoding needs."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_convolution(
    u: Tensor,  # (batch, channel, length)
    taps: Tensor,  # (channel, length or more)
) -> Tensor:  # (batch, channel, length)
    """y_t = Σ_{s≤t} h_{t-s} u_s, by FFT in float32 or wider.

    The transform is as long as input and taps together, so nothing wraps round into the past.
    """
    length = u.shape[-1]
    taps = taps[..., :length]
    size = length + taps.shape[-1]
    wide = torch.promote_types(u.dtype, torch.float32)
    product = torch.fft.rfft(u.to(wide), n=size) * torch.fft.rfft(taps.to(wide), n=size)
    return torch.fft.irfft(product, n=size)[..., :length].to(u.dtype)


def short_convolution(
    x: Tensor,  # (batch, length, channel)
    weight: Tensor,  # (channel, tap): weight[:, -1] multiplies the current token
    conv_state: Tensor | None = None,  # (batch, tap - 1, channel): the tokens before x; None: zeros
) -> tuple[Tensor, Tensor]:  # (batch, length, channel), the state after x
    """y_t = Σ_j w_j x_{t-K+1+j} in each channel, for any length of x, one token and none included."""
    kept = weight.shape[1] - 1
    if conv_state is None:
        conv_state = x.new_zeros(x.shape[0], kept, x.shape[2])
    extended = torch.cat([conv_state.to(x.dtype), x], dim=1)
    length = x.shape[1]
    if length == 0:
        return x, extended
    if length == 1:  # a decoding step; a convolution call costs more than it computes
        return (extended.transpose(1, 2) * weight).sum(-1)[:, None], extended[:, 1:]
    y = F.conv1d(extended.transpose(1, 2), weight[:, None], groups=weight.shape[0]).transpose(1, 2)
    return y, extended[:, length:]


def toeplitz_block(
    taps: Tensor,  # (filter, length)
    rows: range,  # output positions
) -> Tensor:  # (filter, len(rows), rows.stop)
    """T_ts = h_{t-s} for t in `rows` and s < rows.stop, zero where s > t."""
    lags = torch.arange(rows.start, rows.stop, device=taps.device)[:, None] - torch.arange(
        rows.stop, device=taps.device
    )
    # One column of zeros in front takes every negative lag.
    return F.pad(taps, (1, 0))[:, (lags + 1).clamp(min=0)]
