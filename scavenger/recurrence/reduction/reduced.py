"""The result of a reduction, and the code that all methods share: one recurrence with its errors for each filter.

A method only chooses the poles, and the amplitudes if they are not those of least squares.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scavenger.recurrence.reduction import hankel
from scavenger.recurrence.reduction.residues import count_modes, count_states, fit, gain_errors, tails


TOGETHER = 64  # filters searched at once, a worker's share; temporaries are split further (hankel.PIECE_BYTES)


@dataclass(frozen=True)
class ReducedFilter:
    """One filter as a recurrence: h_t ≈ Re Σ_m R_m λ_m^t + D [t = 0]."""

    poles: NDArray  # (mode,) complex; of a conjugate pair only the pole above the real axis
    residues: NDArray  # (mode,) complex
    direct: float
    real_states: int  # a complex mode counts two, a real one counts one
    relative_error: float  # l2 error of the taps over the horizon, relative to all taps
    floor: float  # proven lower bound on relative_error for as many real states
    gain_error: float  # max of |E(e^{iω})| on a grid of 4 points per tap, in the taps' units; target 0 past the horizon
    gain_floor: float  # proven lower bound on gain_error for as many real states, if stable
    tail: float  # l2 norm of the recurrence from the horizon to infinity, relative to the taps
    hankel_values: NDArray  # leading singular values of the zero-padded Hankel matrix, largest first

    @property
    def state_size(self) -> int:
        return len(self.poles)

    @property
    def largest_radius(self) -> float:
        return float(np.abs(self.poles).max(initial=0.0))


class Targets:
    """A group of filters with their error floors and the leading part of their Hankel matrices, computed on demand."""

    def __init__(self, taps: Tensor, most_states: int):
        self.taps = taps  # (filter, length)
        self.floors = hankel.tap_floors(taps)
        self._known = torch.zeros(len(taps), dtype=torch.long, device=taps.device)
        self._values = taps.new_zeros(len(taps), most_states + 1)
        self._shift = taps.new_zeros(len(taps), most_states + 1, most_states + 1)

    def least(self, tolerance: float) -> Tensor:
        """The fewest real states whose floor is within the tolerance, (filter,)."""
        return (self.floors > tolerance).sum(1)

    def leading(self, rows: Tensor, states: int) -> tuple[Tensor, Tensor]:
        """Hankel eigenvalues μ (row, states + 1), largest first, and Vᵀ Z V (row, states, states) of the eigenvectors.

        Z is the shift by one tap: (Z v)_t = v_{t-1}.
        """
        count = states + 1
        unknown = rows[self._known[rows] < count]
        # One decomposition serves all smaller sizes.
        wanted = min(self._values.shape[1], (1 << (states - 1).bit_length()) + 1 if states > 1 else 2)
        length = self.taps.shape[1] - 1
        for piece in hankel.pieces(len(unknown), 96 * length * min(length, 2 * wanted + 64)):
            values, vectors = hankel.hankel_eigen(self.taps[unknown[piece], 1:], wanted)
            self._values[unknown[piece], :wanted] = values
            self._shift[unknown[piece], :wanted, :wanted] = vectors[:, 1:].mT @ vectors[:, :-1]
            self._known[unknown[piece]] = wanted
        return self._values[rows, :count], self._shift[rows, :states, :states]


Choose = Callable[[Targets, float | None, int], Tensor]  # (targets, tolerance, most modes) -> poles (filter, 2 modes)
Refine = Callable[[Tensor, Tensor, int], Tensor]  # (taps, poles (filter, states), most modes) -> poles no worse
Start = Callable[[Targets, Tensor, int, int], Tensor]  # (targets, rows, real states, most modes) -> poles (row, states)
Solve = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # (taps, poles) -> amplitudes, relative l2 error (filter,), …


def reduce_by(
    choose: Choose,
    taps: Tensor,
    tolerance: float | None,
    state_size: int | None,
    max_state_size: int,
    solve: Solve = fit,
) -> list[ReducedFilter]:
    """Reduce each filter to a recurrence with the poles that `choose` finds and the amplitudes that `solve` gives them.

    `taps` is real, (filter, length).

    Filters are processed in groups of at most TOGETHER, on a CPU by one thread: LAPACK gains nothing from several at
    these sizes. Whatever the number of filters, a group needs a few hankel.PIECE_BYTES (or the memory of one filter)
    and TOGETHER × (2 modes + 1)² numbers, plus the recurrences.
    """
    if (tolerance is None) == (state_size is None):
        raise ValueError("reduce: found both or neither of tolerance and state_size; expected one of them")
    modes = max_state_size if state_size is None else state_size
    if modes < 1 or (tolerance is not None and not tolerance > 0):
        raise ValueError("reduce: found a tolerance or a state size of 0 or less; expected more than 0")
    if taps.ndim != 2 or not taps.shape[1] or taps.is_complex():
        raise ValueError(f"reduce: found {taps.dtype} of shape {tuple(taps.shape)}; expected real (filter, length)")
    broken = (~taps.isfinite().all(1)).nonzero()
    if len(broken):
        raise ValueError(f"reduce: the taps of filter {int(broken[0])} are not finite; expected finite numbers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        groups = taps.detach().double().split(TOGETHER)
        return [filter for group in groups for filter in _reduce_group(choose, solve, group, tolerance, modes)]
    finally:
        torch.set_num_threads(threads)


def improve(targets: Targets, poles: Tensor, refine: Refine, start: Start, tolerance: float | None) -> Tensor:
    """Refine the poles of each filter; with a tolerance, then remove states while it is still met.

    A refinement is accepted only if it lowers the error over the padded target within the limit on modes. While the
    refined poles meet the tolerance, one real state fewer is tried, from `start` at that size, until that misses the
    tolerance or the floor proves that it must.
    """
    modes = poles.shape[1] // 2
    poles = packed(poles)
    going = torch.full_like(poles[:, 0].real, tolerance is not None).bool()
    floor = targets.least(tolerance) if tolerance is not None else None

    def accept(rows, found, states):
        poles[rows] = 0
        poles[rows, :states] = found
        if tolerance is not None:
            going[rows] = fit(targets.taps[rows], found).error <= tolerance

    sizes = count_states(poles)
    for states in sizes.unique().tolist():
        rows = (sizes == states).nonzero()[:, 0]
        if states:
            accept(rows, refine(targets.taps[rows], poles[rows, :states], modes), states)
    for states in range(2 * modes - 1, 0, -1):
        if tolerance is None:
            break
        rows = (going & (count_states(poles) == states + 1) & (floor <= states)).nonzero()[:, 0]
        if len(rows):
            found = refine(targets.taps[rows], start(targets, rows, states, modes), modes)
            met = (fit(targets.taps[rows], found).error <= tolerance) & (count_modes(found) <= modes)
            accept(rows[met], found[met], states)
            going[rows[~met]] = False
    return poles


def packed(poles: Tensor) -> Tensor:
    """Move the used columns to the front, in their order, so that pairs stay together."""
    return poles.gather(1, (poles == 0).to(torch.int8).argsort(dim=1, stable=True))


@torch.no_grad()
def _reduce_group(choose, solve, taps, tolerance, modes):
    scale = taps.abs().amax(1)
    scale = torch.where(scale > 0, scale, 1)
    taps = taps / scale[:, None]
    targets = Targets(taps, 2 * modes)
    poles = choose(targets, tolerance, modes)
    poles = packed(poles)
    states = count_states(poles)
    found = [None] * len(taps)
    for count in states.unique().tolist():
        rows = (states == count).nonzero()[:, 0]
        for piece in hankel.pieces(len(rows), 16 * 10 * taps.shape[1] * (count + 1)):
            for row, reduced in zip(
                rows[piece].tolist(),
                _recurrences(solve, targets, rows[piece], poles[rows[piece], :count], scale[rows[piece]]),
                strict=True,
            ):
                found[row] = reduced
    return found


def _recurrences(solve, targets, rows, poles, scale):
    """The recurrences, with all error figures, for poles of filters that have equally many real states."""
    states, taps = poles.shape[1], targets.taps[rows]
    amplitudes, error = solve(taps, poles)[:2]
    values = targets.leading(rows, states)[0].abs()
    floors = targets.floors[rows, min(states, targets.floors.shape[1] - 1)]
    numbers = torch.stack(
        [
            error,
            floors,
            gain_errors(taps, poles, amplitudes) * scale,
            hankel.gain_floors(values)[:, states] * scale,
            tails(taps, poles, amplitudes),
        ],
        dim=1,
    ).tolist()
    values = (values * scale[:, None]).cpu().numpy()
    first = (taps[:, 0] * scale).tolist()
    residues = torch.where(poles != 0, amplitudes / torch.where(poles != 0, poles, 1), 0) * scale[:, None]
    upper = (poles.imag >= 0).cpu().numpy()
    poles, residues = poles.cpu().numpy(), residues.cpu().numpy()
    for index, (error, floor, gain_error, gain_floor, tail) in enumerate(numbers):
        own = residues[index, upper[index]]
        yield ReducedFilter(
            poles=poles[index, upper[index]],
            residues=own,
            direct=float(first[index] - own.real.sum()),  # the modes contribute Re Σ R at t = 0
            real_states=states,
            relative_error=error,
            floor=floor,
            gain_error=gain_error,
            gain_floor=gain_floor,
            tail=tail,
            hankel_values=values[index],
        )
