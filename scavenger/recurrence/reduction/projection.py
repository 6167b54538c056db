"""Variable projection: optimise the poles alone, with the least-squares residues for them at every step.

Levenberg-Marquardt on the target padded with zeros, so that no tail grows unseen past the horizon. It cannot change the
number of real poles and pairs, so it starts from irka, which can. Sources: Golub and Pereyra (1973); Kaufman (1975)
for the Jacobian.
"""

import torch
from torch import Tensor

from scavenger.recurrence.reduction import balanced, irka
from scavenger.recurrence.reduction.hankel import pieces
from scavenger.recurrence.reduction.reduced import ReducedFilter, Targets, improve, reduce_by
from scavenger.recurrence.reduction.residues import (
    MAX_RADIUS,
    MIN_RADIUS,
    PADDING,
    columns,
    count_modes,
    fit,
    power_table,
    settled,
)


STEPS = 20  # our choice
SETTLED = 1e-4  # relative gain of a step below which a filter is done
LARGEST_DAMPING = 1e4  # for columns of norm 1; at this damping steps are too short to help


def reduce(
    taps: Tensor, *, tolerance: float | None = None, state_size: int | None = None, max_state_size: int = 64
) -> list[ReducedFilter]:
    """As irka.reduce, never with a larger error over the padded target at the same size."""
    return reduce_by(choose, taps, tolerance, state_size, max_state_size)


def choose(targets: Targets, tolerance: float | None, modes: int) -> Tensor:
    """Poles (filter, 2 modes), 0 where unused."""

    def start(targets, rows, states, modes):
        return irka.refine(targets.taps[rows], balanced.truncated_poles(targets, rows, states), modes)

    return improve(targets, irka.choose(targets, tolerance, modes), refine, start, tolerance)


def refine(taps: Tensor, poles: Tensor, modes: int) -> Tensor:
    """Poles of smaller padded error, or else the given ones: (filter, length) and (filter, states) to the latter."""
    best = [
        _refine_piece(taps[rows], poles[rows], modes)
        for rows in pieces(len(taps), 96 * taps[0].numel() * poles.shape[1])
    ]
    return torch.cat(best)


def _refine_piece(taps, poles, modes):
    poles = poles.clone()
    amplitudes, _, least = fit(taps, poles)
    damping = torch.full_like(least, 1e-2)
    active = torch.arange(len(taps), device=taps.device)
    for _ in range(STEPS):
        trial = _step(taps[active], poles[active], amplitudes[active], damping[active])
        found, _, error = fit(taps[active], trial)
        better = (error < least[active]) & (count_modes(trial) <= modes)
        damping[active] = torch.where(better, damping[active] / 5, damping[active] * 4)
        slow = better & (error > (1 - SETTLED) * least[active])
        rows = active[better]
        poles[rows], amplitudes[rows], least[rows] = trial[better], found[better], error[better]
        active = active[~slow & (damping[active] < LARGEST_DAMPING)]
        if not len(active):
            break
    return poles


def _step(taps, poles, amplitudes, damping):
    """One step in u, θ with λ = exp(-exp(u) + iθ); a real pole keeps its sign and has no θ.

    With D = c t λ^t the model's derivatives are log|λ| Re D and -Im D; the Jacobian is the part of both that is
    orthogonal to the columns of the poles.
    """
    padded = max(int(PADDING * taps.shape[1]) - 1, 2 * poles.shape[1] + 1)
    basis = torch.linalg.qr(columns(poles, padded))[0]
    target = torch.nn.functional.pad(taps[:, 1:], (0, padded - taps.shape[1] + 1))[:, :, None]
    missed = target - basis @ (basis.mT @ target)
    steps = torch.arange(padded, device=taps.device)[:, None]
    derivative = amplitudes[:, None] * steps * power_table(poles, padded)
    lower = (poles.imag < 0)[:, None]
    logarithm = poles.abs().clamp_min(MIN_RADIUS).log()[:, None]
    jacobian = torch.where(lower, -derivative.imag.roll(1, dims=2), logarithm * derivative.real)
    jacobian = jacobian - basis @ (basis.mT @ jacobian)
    scale = jacobian.norm(dim=1).clamp_min(1e-300)
    jacobian = jacobian / scale[:, None]
    normal = jacobian.mT @ jacobian + damping[:, None, None] * torch.eye(poles.shape[1], device=taps.device)
    change = torch.linalg.solve_ex(normal, jacobian.mT @ missed)[0][:, :, 0] / scale
    change = change.nan_to_num(0, 0, 0).clamp(-1, 1)
    radius = (-(torch.log(-logarithm[:, 0]) + change).exp()).exp().clamp(MIN_RADIUS, MAX_RADIUS)
    angle = poles.angle()
    turned = (angle + change.roll(-1, dims=1)).abs()  # a pole that crosses the axis becomes its conjugate
    turned = torch.pi - (torch.pi - turned).abs()
    upper = torch.where(poles.imag > 0, torch.polar(radius, turned), radius * poles.real.sign() + 0j)
    return settled(torch.where(lower[:, 0], upper.roll(1, dims=1).conj(), upper))
