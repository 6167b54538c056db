"""The least-squares residues for given poles, and the errors of the recurrence.

Poles are (filter, column) complex, closed under conjugation: a pair is in adjacent columns, the pole above the real
axis first; 0 marks an unused column. With c = R λ the taps after the first are g_t = Re Σ_m c_m λ_m^t.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from scavenger.recurrence.reduction.hankel import pieces


MAX_RADIUS = 0.9999  # largest radius of a pole: 1/e after 10⁴ tokens
MIN_RADIUS = 0.02  # a faster mode has decayed after one tap; its residue would only cancel the direct term
PADDING = 1.5  # horizons to which the target is padded with zeros, so that the fit penalises tails
DEPENDENT = 1e-11  # smallest share of a column's norm, orthogonal to earlier columns, that is not rounding error


class Fit(NamedTuple):
    amplitudes: Tensor  # (filter, column) complex: c of real poles and of the upper ones of pairs, else 0
    error: Tensor  # (filter,) relative l2 error of the taps over the horizon
    padded_error: Tensor  # (filter,) the same over the padded target, which the fit minimises


def fit(taps: Tensor, poles: Tensor) -> Fit:
    """Least squares over the taps after the first, zero past the horizon: (filter, length) and (filter, column).

    Columns are scaled to norm 1 and factorised by QR; the triangular system is solved directly, or with a truncated
    pseudo-inverse where columns are linearly dependent, as for nearly equal poles.
    """
    found = [
        _fit_piece(taps[rows], poles[rows])
        for rows in pieces(len(taps), int(80 * PADDING * taps.shape[1]) * (poles.shape[1] + 1))
    ]
    return Fit(*map(torch.cat, zip(*found, strict=True)))


def held(poles: Tensor) -> Tensor:
    """Poles within MAX_RADIUS: those outside the unit circle are reflected, those too near it moved inward."""
    most = MAX_RADIUS * (1 - 1e-14)  # margin for rounding when the absolute value is taken again
    radius = poles.abs()
    inside = torch.where(radius > 1, 1 / radius.clamp_min(1), radius).clamp_max(most)
    return torch.where(radius > most, poles * (inside / radius.clamp_min(1e-300)), poles)


def settled(poles: Tensor) -> Tensor:
    """Poles in their final form: within MAX_RADIUS, real if nearly real, 0 if below MIN_RADIUS."""
    poles = held(torch.where(poles.imag.abs() < 1e-12, poles.real + 0j, poles))
    return torch.where(poles.abs() >= MIN_RADIUS, poles, 0)


def count_states(poles: Tensor) -> Tensor:
    return (poles != 0).sum(1)


def count_modes(poles: Tensor) -> Tensor:
    return ((poles != 0) & (poles.imag >= 0)).sum(1)


def columns(poles: Tensor, count: int) -> Tensor:
    """Re λ^t of a real pole, Re λ^t and -Im λ^t of a pair, t < count: (filter, column) to (filter, count, column)."""
    powers = power_table(poles, count)
    basis = torch.where((poles.imag < 0)[:, None], powers.imag, powers.real)
    return basis * (poles != 0)[:, None]


def power_table(poles: Tensor, count: int) -> Tensor:
    """λ^t for t < count, as λ^{Ca} λ^b: (filter, column) to (filter, count, column)."""
    chunk = max(1, round(count**0.5))
    fine = poles[:, None].expand(-1, chunk, -1).cumprod(1)  # λ … λ^C
    coarse = fine[:, -1:].expand(-1, -(-count // chunk), -1).cumprod(1)  # λ^C, λ^2C …
    fine, coarse = (torch.cat([torch.ones_like(part[:, :1]), part[:, :-1]], dim=1) for part in (fine, coarse))
    return (coarse[:, :, None] * fine[:, None]).flatten(1, 2)[:, :count]


def tails(taps: Tensor, poles: Tensor, amplitudes: Tensor) -> Tensor:
    """l2 norm of the recurrence from the horizon to infinity, relative to the taps, (filter,).

    Summed term by term up to the padded length and in closed form from there: with x = c λ^t,
    Σ y² = ½ Re Σ_mn x_m x_n / (1 - λ_m λ_n) + x_m x̄_n / (1 - λ_m λ̄_n).
    """
    horizon, padded = taps.shape[1] - 1, int(PADDING * taps.shape[1]) - 1
    steps = torch.arange(horizon, padded, device=taps.device)[:, None]
    near = (amplitudes[:, None] * poles[:, None] ** steps).sum(2).real.square().sum(1)
    x = amplitudes * poles**padded
    same = x[:, :, None] * x[:, None] / (1 - poles[:, :, None] * poles[:, None])
    mixed = x[:, :, None] * x[:, None].conj() / (1 - poles[:, :, None] * poles[:, None].conj())
    far = (same + mixed).real.sum((1, 2)) / 2
    return (near + far.clamp_min(0)).sqrt() / taps.norm(dim=1).clamp_min(1e-300)


def gain_errors(taps: Tensor, poles: Tensor, amplitudes: Tensor) -> Tensor:
    """max on a grid of |E(e^{iω})|, with the target zero past the horizon and the recurrence infinite, (filter,).

    A lower estimate of the worst case over all ω: evaluated on a grid of four points per tap, on a finer grid around
    the largest value, and at the angles of the poles, where slow modes peak.
    """
    g, size = taps[:, 1:], 4 * taps.shape[1]
    grid = -2 * torch.pi / size * torch.arange(size // 2 + 1, device=taps.device, dtype=taps.dtype)
    grid = torch.polar(torch.ones_like(grid), grid).expand(len(g), -1)
    on_grid = (torch.fft.rfft(g, n=size) - _response(grid, poles, amplitudes)).abs()
    around = 2 * torch.pi / size * torch.linspace(-0.875, 0.875, 8, device=taps.device, dtype=taps.dtype)
    angles = torch.cat([poles.angle(), 2 * torch.pi / size * on_grid.argmax(1)[:, None] + around], dim=1)
    points = torch.polar(torch.ones_like(angles), -angles)
    closely = (power_table(points, g.shape[1]) * g[:, :, None]).sum(1) - _response(points, poles, amplitudes)
    return torch.cat([on_grid, closely.abs()], dim=1).amax(1)


def _response(points, poles, amplitudes):
    """Σ_t Re(c λ^t) z^t at points z of the unit circle: (filter, point)."""
    c, z, poles = amplitudes[:, None] / 2, points[:, :, None], poles[:, None]
    return (c / (1 - poles * z) + c.conj() / (1 - poles.conj() * z)).sum(2)


def _fit_piece(taps, poles):
    horizon, padded = taps.shape[1] - 1, max(int(PADDING * taps.shape[1]) - 1, poles.shape[1] + 1)
    target = pad(taps[:, 1:], (0, padded - horizon))[:, :, None]
    basis = columns(poles, padded)
    scale = basis.norm(dim=1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    basis = basis / scale
    # With the target as a last column, R contains Qᵀ target, and Q is never formed.
    triangle = torch.linalg.qr(torch.cat([basis, target], dim=2), mode="r")[1]
    triangle, projected = triangle[:, :-1, :-1], triangle[:, :-1, -1:]
    dependent = (triangle.diagonal(dim1=1, dim2=2).abs() < DEPENDENT).any(1)
    if dependent.any():
        solution = torch.empty_like(projected)
        solution[dependent] = torch.linalg.pinv(triangle[dependent], rtol=DEPENDENT) @ projected[dependent]
        sound = ~dependent
        solution[sound] = torch.linalg.solve_triangular(triangle[sound], projected[sound], upper=True)
    else:
        solution = torch.linalg.solve_triangular(triangle, projected, upper=True)
    missed = (basis @ solution - target)[:, :, 0]
    real = solution[:, :, 0] / scale[:, 0]
    # The lower column of a pair, Im λ̄^t = -Im λ^t, carries the imaginary part of the upper one's amplitude.
    lower = poles.imag < 0
    imaginary = pad((real * lower)[:, 1:], (0, 1))
    norm = taps.norm(dim=1).clamp_min(1e-300)
    return (
        torch.where(lower, 0, torch.complex(real, imaginary)),
        missed[:, :horizon].norm(dim=1) / norm,
        missed.norm(dim=1) / norm,
    )
