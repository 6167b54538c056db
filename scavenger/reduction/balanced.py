"""Balanced truncation of a finite filter: one eigendecomposition gives the poles of every smaller recurrence.

The shift register that holds the last inputs realises the filter exactly. Its balanced realisation, cut to d states,
has the poles below; the residues are then the best there are for those poles, by least squares. Sources: Moore (1981)
for the truncation, Kung (1978) for the Hankel form.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from scavenger.reduction.hankel import gain_floors, hankel_eigen, relative_floors


MAX_RADIUS = 0.9999  # e-folds after 10⁴ tokens; truncation is stable by theory, this only guards rounding
MIN_RADIUS = 0.02  # a faster mode is gone after the first tap, and its residue would only cancel the direct term
RIPPLE = 8  # real states; our choice: a least-squares fit is cheap, and a smaller state is for good
PADDING = 1.5  # the target goes on as zeros to this many horizons, so that tails are held down too


@dataclass(frozen=True)
class ReducedFilter:
    """One filter as a recurrence: h_t ≈ Re Σ_m R_m λ_m^t + D [t = 0]."""

    poles: NDArray  # (mode,) complex; of a conjugate pair the one above the axis
    residues: NDArray  # (mode,) complex
    direct: float
    real_states: int  # a complex mode counts two, a real one counts one
    relative_error: float  # l2 error of the taps over the horizon, relative to all taps
    floor: float  # proven relative l2 error of any recurrence with as many real states
    tail: float  # l2 norm of the recurrence past the horizon, over half a horizon, relative to the taps
    hankel_values: NDArray  # singular values, largest first
    gain_floor: float  # proven worst-case gain error at as many real states, in the units of the taps

    @property
    def state_size(self) -> int:
        return len(self.poles)


def reduce(taps: NDArray, tolerance: float, max_state_size: int) -> ReducedFilter:
    """The recurrence with the fewest modes whose relative l2 error over the taps is at most `tolerance`.

    `taps` is (length,) real. Where `max_state_size` modes do not reach the tolerance, the most accurate within them:
    the caller compares `relative_error`, and `floor` says whether any method could.
    """
    taps = np.asarray(taps, dtype=np.float64)
    norm = np.linalg.norm(taps)
    g = taps[1:]
    stateless = _stateless(taps)
    # A filter that is nothing beyond its first tap needs no state.
    if stateless.relative_error <= tolerance:
        return stateless
    values, vectors = hankel_eigen(g)
    # Floors are for g; an error relative to all taps is smaller by this share.
    share = np.linalg.norm(g) / norm
    floors = relative_floors(g) * share
    limit = int(min(2 * max_state_size, np.sum(np.abs(values) > 1e-14 * abs(values[0])), len(g) - 1))
    tried = {}

    def attempt(states):
        """Poles, residues and errors at so many real states; None where they make more modes than allowed."""
        if states not in tried:
            poles = truncated_poles(values, vectors, states)
            tried[states] = (poles, *fit_residues(taps, poles)) if 0 < len(poles) <= max_state_size else None
        return tried[states]

    def reaches(states):
        found = attempt(states)
        return found is not None and found[2][0] <= tolerance

    # The error falls with the states but for ripples, so bisect between what is proven out of reach and the limit.
    low, high = min(int(np.searchsorted(-floors, -tolerance)), limit) - 1, limit
    if reaches(low + 1):  # the proven least, as for a filter that is a small system
        high = low + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    # Then look below for a ripple's lucky side, until RIPPLE sizes in a row find nothing.
    failures, states = 0, high
    while states > 0 and (failures < RIPPLE or not any(tried.values())):
        failures = 0 if reaches(states) else failures + 1
        states -= 1
    within = [found for found in tried.values() if found is not None]
    if not within:  # every pole is faster than MIN_RADIUS, as for a delay
        return stateless
    met = [found for found in within if found[2][0] <= tolerance]
    best = (
        min(met, key=lambda found: (len(found[0]), found[2][0])) if met else min(within, key=lambda found: found[2][0])
    )
    poles, residues, (error, tail) = best
    real_states = int(np.sum(np.where(poles.imag == 0, 1, 2)))
    # Modes alone leave Re Σ R at t = 0; the direct term makes the first tap exact.
    direct = float(taps[0] - residues.real.sum())
    return ReducedFilter(
        poles,
        residues,
        direct,
        real_states,
        error,
        float(floors[min(real_states, len(floors) - 1)]),
        tail,
        np.abs(values),
        float(gain_floors(values)[real_states]),
    )


def _stateless(taps):
    """The filter as its first tap alone."""
    norm = np.linalg.norm(taps)
    error = float(np.linalg.norm(taps[1:]) / norm) if norm else 0.0
    none = np.zeros(0, complex)
    return ReducedFilter(none, none, float(taps[0]), 0, error, error, 0.0, np.zeros(1), 0.0)


def truncated_poles(values: NDArray, vectors: NDArray, states: int) -> NDArray:
    """Poles of the balanced truncation to `states` real states; of each conjugate pair the upper one.

    With H = V diag(μ) Vᵀ and Z the shift by one tap, A = |M|^{-1/2} S (Vᵀ Z V) M |M|^{-1/2}, S the signs of μ = M.
    """
    kept, basis = values[:states], vectors[:, :states]
    shifted = np.zeros_like(basis)
    shifted[:-1] = basis[1:]
    root = np.sqrt(np.abs(kept))
    a = (np.sign(kept) / root)[:, None] * (basis.T @ shifted) * (kept / root)
    poles = linalg.eigvals(a)
    poles = np.where(np.abs(poles) > MAX_RADIUS, poles * (MAX_RADIUS / np.maximum(np.abs(poles), 1e-300)), poles)
    poles = poles[(poles.imag >= 0) & (np.abs(poles) >= MIN_RADIUS)]
    return np.where(np.abs(poles.imag) < 1e-12, poles.real + 0j, poles)


def fit_residues(taps: NDArray, poles: NDArray) -> tuple[NDArray, tuple[float, float]]:
    """Residues by least squares on taps 1, 2, …, zero past the horizon; and the relative l2 error on and past it.

    The first tap is left to the direct term.
    """
    length, padded = len(taps), int(PADDING * len(taps))
    target = np.zeros(padded - 1)
    target[: length - 1] = taps[1:]
    powers = poles[:, None] ** np.arange(1, padded)  # (mode, time)
    complex_modes = poles.imag != 0
    basis = np.concatenate([powers.real, -powers[complex_modes].imag]).T
    scale = np.linalg.norm(basis, axis=0)
    solution = linalg.lstsq(basis / scale, target, check_finite=True)[0] / scale
    residues = solution[: len(poles)].astype(complex)
    residues[complex_modes] += 1j * solution[len(poles) :]
    difference = basis @ solution - target
    norm = np.linalg.norm(taps)
    return residues, (
        float(np.linalg.norm(difference[: length - 1]) / norm),
        float(np.linalg.norm(difference[length - 1 :]) / norm),
    )
