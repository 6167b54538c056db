"""The modal form: a filter as a sum of complex exponentials, and the recurrence that runs it.

The one convention, used everywhere; time starts at 0, the real part is taken, there is no factor 2:

    h_t = Re Σ_m R_m λ_m^t        x_t = λ ⊙ x_{t-1} + u_t,  x_{-1} = 0        y_t = Re Σ_m R_m x_{t,m} + D u_t

Poles λ are per token, |λ| < 1. The modes of all filters of a layer lie in one flat axis; `mode_filter` says which
filter a mode belongs to, so filters of different state sizes share one recurrence and nothing is padded.
Source: arXiv:2310.18780, section 3; the matrix-valued input u = k vᵀ is that of MultiHyena, section 4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .convolution import toeplitz_block


CHUNK = 64  # tokens of a prompt that are taken in one step; bounds what is in memory at once


def powers(poles: Tensor, count: int) -> Tensor:
    """λ_m^t for t < count, (mode, count); taken in float64: a float32 power of a pole near the circle drifts.

    λ^{Ca+b} = (λ^C)^a λ^b: multiplications cost a third to a fifth of what powers do.
    """
    wide = poles.to(torch.complex128)[:, None]
    steps = torch.arange(min(count, CHUNK), device=poles.device)
    strides = CHUNK * torch.arange(-(-count // CHUNK), device=poles.device)
    return ((wide**strides)[:, :, None] * (wide**steps)[:, None]).flatten(1)[:, :count].to(poles.dtype)


class Modes(NamedTuple):
    """The modes of some filters, in one flat axis."""

    poles: Tensor  # (mode,) complex
    residues: Tensor  # (mode,) complex
    mode_filter: Tensor  # (mode,) which filter each mode belongs to
    direct: Tensor  # (filter,) D

    def taps(self, length: int) -> Tensor:  # (filter, length) real
        """h_t = Re Σ_m R_m λ_m^t + D [t = 0] of each filter."""
        terms = (self.residues[:, None] * powers(self.poles, length)).real
        taps = terms.new_zeros(len(self.direct), length).index_add(0, self.mode_filter, terms)
        return torch.cat([taps[:, :1] + self.direct[:, None], taps[:, 1:]], dim=1)


def modal_scan(
    q: Tensor,  # (batch, filter, length, width)
    k: Tensor,  # (batch, filter, length, width)
    v: Tensor,  # (batch, filter, length, width)
    taps: Tensor,  # (filter, min(length, CHUNK) or more), direct term included at t = 0
    modes: Modes,
    recurrent_state: Tensor,  # (batch, mode, width, width) complex: Σ_s λ^{t-s} k_s v_sᵀ up to the token before q, k, v
) -> tuple[Tensor, Tensor]:  # (batch, filter, length, width), the state after the last token
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s and the state, chunk by chunk.

    Inside a chunk the filter's taps are used, across chunks the state:
    y_t += Re Σ_m R_m λ_m^{t+1} q_tᵀ x_m,  x ← λ^C x + Σ_j λ^{C-1-j} k_j v_jᵀ.
    """
    outputs = []
    decay = powers(modes.poles, min(q.shape[2], CHUNK) + 1)
    for start in range(0, q.shape[2], CHUNK):
        chunk = slice(start, start + CHUNK)
        y, recurrent_state = _chunk(q[:, :, chunk], k[:, :, chunk], v[:, :, chunk], taps, modes, decay, recurrent_state)
        outputs.append(y)
    return torch.cat(outputs, dim=2) if outputs else v, recurrent_state


def modal_step(
    q: Tensor,  # (batch, filter, width)
    k: Tensor,  # (batch, filter, width)
    v: Tensor,  # (batch, filter, width)
    modes: Modes,
    recurrent_state: Tensor,  # (batch, mode, width, width) complex, up to the token before
) -> tuple[Tensor, Tensor]:  # (batch, filter, width), the state after this token
    """One token of modal_scan: x ← λ x + k vᵀ, y = Re Σ_m R_m qᵀ x_m + D (q · k) v."""
    poles, residues, mode_filter, direct = modes
    outer = (k[..., :, None] * v[..., None, :])[:, mode_filter]
    state = torch.addcmul(outer.to(poles.dtype), recurrent_state, poles[:, None, None])
    parts = torch.view_as_real(state).flatten(-2)
    read = torch.view_as_complex((q[:, mode_filter, None, :] @ parts).unflatten(-1, (-1, 2)))[:, :, 0]
    y = direct[:, None] * (q * k).sum(-1, keepdim=True) * v
    return y.index_add(1, mode_filter, (read * residues[:, None]).real), state


def _chunk(q, k, v, taps, modes, decay, state):
    _, residues, mode_filter, _ = modes
    length = q.shape[2]
    decay = decay[:, : length + 1]  # λ^0 … λ^length
    within = (q @ k.transpose(-1, -2)) * toeplitz_block(taps, slice(0, length)) @ v
    # A complex state times a real matrix is a real product over the state's two parts side by side.
    read = torch.view_as_complex(
        (q[:, mode_filter] @ torch.view_as_real(state).flatten(-2)).unflatten(-1, (-1, 2)).contiguous()
    )
    read = (read * (residues[:, None] * decay[:, 1:])[:, :, None]).real
    y = within.index_add(1, mode_filter, read)
    weighted = v[:, mode_filter] * decay[:, :length].flip(-1)[:, :, None]  # λ^{C-1-j} v_j
    added = torch.view_as_complex(
        (k[:, mode_filter].transpose(-1, -2) @ torch.view_as_real(weighted).flatten(-2))
        .unflatten(-1, (-1, 2))
        .contiguous()
    )
    return y, state * decay[:, length, None, None] + added
