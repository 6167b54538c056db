"""Iterative rational Krylov (IRKA): move the poles until the recurrence interpolates the filter at their mirror images.

There the transfer functions and their first derivatives agree, the first-order condition for the smallest l2 error over
the infinite horizon. It starts from balanced truncation and, unlike gradient descent on poles, turns real poles into
pairs and back. Source: Gugercin, Antoulas and Beattie (2008); the projections are in Hankel form, so that no
state-space matrix of the filter is needed.
"""

import torch
from torch import Tensor

from scavenger.recurrence.reduction import balanced
from scavenger.recurrence.reduction.hankel import hankel_product, pieces
from scavenger.recurrence.reduction.reduced import ReducedFilter, Targets, improve, reduce_by
from scavenger.recurrence.reduction.residues import columns, count_modes, fit, held, settled


STEPS = 12  # our choice
SETTLED = 1e-3  # a step with a smaller relative gain counts as one without gain
PATIENCE = 3  # consecutive steps without gain after which a filter is done; the error is not monotone


def reduce(
    taps: Tensor, *, tolerance: float | None = None, state_size: int | None = None, max_state_size: int = 64
) -> list[ReducedFilter]:
    """As balanced.reduce, never with a larger error over the padded target at the same size."""
    return reduce_by(choose, taps, tolerance, state_size, max_state_size)


def choose(targets: Targets, tolerance: float | None, modes: int) -> Tensor:
    """Poles (filter, 2 modes), 0 where unused."""

    def start(targets, rows, states, modes):
        return balanced.truncated_poles(targets, rows, states)

    return improve(targets, balanced.choose(targets, tolerance, modes), refine, start, tolerance)


def refine(taps: Tensor, poles: Tensor, modes: int) -> Tensor:
    """The poles of smallest padded error among the given ones and those of STEPS steps that fit into `modes` modes.

    (filter, length) and (filter, states) to (filter, states).
    """
    best = [
        _refine_piece(taps[rows], poles[rows], modes)
        for rows in pieces(len(taps), 64 * taps[0].numel() * poles.shape[1])
    ]
    return torch.cat(best)


def _refine_piece(taps, poles, modes):
    best, least = poles.clone(), fit(taps, poles).padded_error
    idle = torch.zeros_like(least, dtype=torch.long)
    active = torch.arange(len(taps), device=taps.device)
    for _ in range(STEPS):
        poles = _step(taps[active, 1:], poles)
        found = settled(poles)
        error = fit(taps[active], found).padded_error
        better = (error < least[active]) & (count_modes(found) <= modes)
        gained = better & (error < (1 - SETTLED) * least[active])
        best[active[better]], least[active[better]] = found[better], error[better]
        idle[active] = torch.where(gained, 0, idle[active] + 1)
        going = idle[active] < PATIENCE
        active, poles = active[going], poles[going]
        if not len(active):
            break
    return best


def _step(g, poles):
    """New poles: eigenvalues of (Vᵀ H V)⁻¹ Vᵀ H Z V, where V spans the powers of the old ones and Z is the shift."""
    basis = torch.linalg.qr(columns(poles, g.shape[1]))[0]
    product = hankel_product(g, basis.mT).mT
    matrix = torch.linalg.solve_ex(basis.mT @ product, basis[:, :-1].mT @ product[:, 1:])[0]
    sound = matrix.isfinite().all(2).all(1)
    return torch.where(sound[:, None], held(balanced.eigenvalues(torch.where(sound[:, None, None], matrix, 0))), poles)
