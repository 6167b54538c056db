"""Balanced truncation of a finite filter: one eigendecomposition gives the poles of every smaller recurrence.

A shift register of the last inputs realises the filter exactly. Its balanced realisation, truncated to d states, gives
the poles; the residues are then fitted by least squares. Sources: Moore (1981) for the truncation, Kung (1978) for the
Hankel form.
"""

import torch
from torch import Tensor

from scavenger.recurrence.reduction.reduced import ReducedFilter, Targets, reduce_by
from scavenger.recurrence.reduction.residues import count_modes, fit, settled


FIRST = 32  # real states of the first eigendecomposition; doubled for the filters that need more
RIPPLE = 1.5  # if the error near the largest size exceeds this many tolerances, smaller ones are not tried (our choice)
NULL = 1e-14  # relative to the largest; smaller Hankel values are rounding errors


def reduce(
    taps: Tensor, *, tolerance: float | None = None, state_size: int | None = None, max_state_size: int = 64
) -> list[ReducedFilter]:
    """Reduce each filter to a recurrence, by `tolerance` or by `state_size`; `taps` is real, (filter, length).

    With a tolerance: the fewest real states whose measured relative l2 error is within it, in at most `max_state_size`
    modes; if none reach it, the most accurate recurrence found within that limit. With a state size: at most that many
    complex modes.
    """
    return reduce_by(choose, taps, tolerance, state_size, max_state_size)


def choose(targets: Targets, tolerance: float | None, modes: int) -> Tensor:
    """Poles (filter, 2 modes), 0 where unused."""
    poles = targets.taps.new_zeros(len(targets.taps), 2 * modes, dtype=torch.complex128)
    pending = torch.arange(len(poles), device=poles.device)
    if tolerance is not None:
        least = targets.least(tolerance)
        pending, top, bottom = pending[least > 0], min(FIRST, 2 * modes), 0
        while len(pending):
            rows = pending[least[pending] <= top]
            # With nearly as many states as taps the error rises again.
            near = torch.zeros_like(rows, dtype=torch.bool)
            for states in (top, 3 * top // 4 or 1, top // 2 or 1):
                left = ~near
                near[left] = _attempt(targets, rows[left], states)[1] <= RIPPLE * tolerance
            rows = rows[near]
            # Upward from the proven minimum, so that the first size that meets the tolerance is the smallest.
            for states in range(bottom + 1, top + 1):
                trying = rows[least[rows] <= states]
                found, error = _attempt(targets, trying, states)
                met = (error <= tolerance) & (count_modes(found) <= modes)
                poles[trying[met], :states] = found[met]
                rows = rows[~torch.isin(rows, trying[met])]
                pending = pending[~torch.isin(pending, trying[met])]
            if top == 2 * modes:
                break
            bottom, top = top, min(2 * top, 2 * modes)
    poles[pending] = _most_accurate(targets, pending, modes)
    return poles


def _most_accurate(targets, rows, modes):
    """Poles (row, 2 modes) of the most real states that fit into `modes` modes, or of fewer if more accurate."""
    poles = targets.taps.new_zeros(len(rows), 2 * modes, dtype=torch.complex128)
    going = torch.arange(len(rows), device=rows.device)
    for states in range(2 * modes, 0, -1):
        if not len(going):
            break
        found = truncated_poles(targets, rows[going], states)
        fitting = count_modes(found) <= modes
        poles[going[fitting], :states] = found[fitting]
        going = going[~fitting]
    # With nearly as many states as taps the error rises with more states: try an eighth fewer while that helps.
    least = fit(targets.taps[rows], poles).error
    idle = torch.zeros_like(rows)
    states = min(2 * modes, targets.taps.shape[1])
    while (states := states * 7 // 8) and len(going := (idle < 2).nonzero()[:, 0]):
        found, error = _attempt(targets, rows[going], states)
        better = (error < least[going]) & (count_modes(found) <= modes)
        poles[going[better]] = torch.nn.functional.pad(found[better], (0, 2 * modes - states))
        least[going[better]] = error[better]
        idle[going] = torch.where(better, 0, idle[going] + 1)
    return poles


def truncated_poles(targets: Targets, rows: Tensor, states: int) -> Tensor:
    """Poles of the balanced truncation of these filters to `states` real states, (filter, states).

    With H = V M Vᵀ, M = diag(μ), S = sign(M) and Z the shift by one tap, A = S |M|^{-1/2} (Vᵀ Z V) M |M|^{-1/2}; the
    truncation is the leading block of A.
    """
    values, shift = targets.leading(rows, states)
    values = values[:, :states]
    size = values.abs()
    sound = size > NULL * size[:, :1]
    root = torch.where(sound, size, 1).sqrt()
    a = (values.sign() / root)[:, :, None] * shift * (values / root)[:, None]
    a = a * (sound[:, :, None] & sound[:, None])
    return settled(eigenvalues(a))


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of real matrices, pairs in adjacent columns; on the CPU, which is faster for many small matrices."""
    return torch.linalg.eigvals(matrix.cpu()).to(matrix.device)


def _attempt(targets, rows, states):
    found = truncated_poles(targets, rows, states)
    return found, fit(targets.taps[rows], found).error
