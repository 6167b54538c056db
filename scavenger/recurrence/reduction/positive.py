"""Sums of real exponentials with non-negative coefficients, for positive filters: h_t ≈ Σ_m c_m ρ_m^t, 0 < ρ_m < 1.

Non-negative least squares with poles that move: the pole of a logarithmic grid of decay times that helps most is added,
as in the active-set method, then all poles are refined, with the best non-negative coefficients for them at every step,
and poles whose coefficient is 0 are dropped. What counts is max_t |ĥ_t - h_t| / h_t, which bounds the output of a
normalised mixer (`output_bound`): taps are weighted by 1 / h_t, and more where the error is largest, until the maximum
falls no further. Sources: Lawson and Hanson (1974) for the active set; Golub and Pereyra (1973) and Kaufman (1975) for
the steps; Lawson (1961) for the weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from scavenger.recurrence.reduction.hankel import pieces
from scavenger.recurrence.reduction.reduced import ReducedFilter, Targets, reduce_by
from scavenger.recurrence.reduction.residues import MAX_RADIUS, MIN_RADIUS, power_table


# A pole is refined as its rate, log(-log ρ): equal steps of it are equal ratios of decay times. A rate of infinity is
# that of the pole 0, which marks an unused column. The slowest has a margin for rounding.
SLOWEST, FASTEST = (float(np.log(-np.log(radius))) for radius in (MAX_RADIUS * (1 - 1e-14), MIN_RADIUS))
GRID = 50  # rates from which a new pole is taken, to be refined; 100 changed no error by more than 1 % (measured)
SAMPLES = 256  # most taps that a positive filter is fitted on: all at first, then in steps of about 3 % of the lag
TINY = torch.finfo(torch.float32).tiny  # share of the largest tap; students in float32 hardly see smaller ones
STEPS = 15  # of Levenberg-Marquardt after a pole is added; 40 lowered errors of 7 poles by 9 %, of 4 not (measured)
ROUNDS = 12  # of new weights while poles move; 20 lowered errors by 2 % or less on average (measured)
STEPS_IN_ROUND = 2
FIXED_ROUNDS = 20  # of new weights for fixed poles; 40 lowered no error by more than 1 % (measured)
VOID = 0.5  # ε from which the bound of the output, above a quarter of its range, is worth less than a good fit in l2
PATIENCE = 3  # poles added without gain after which a filter is done
SETTLED = 1e-3  # relative gain below which a pole counts as one without
ROUNDING = 1e-13  # an error or gain below it is a rounding error


def reduce(
    taps: Tensor, *, tolerance: float | None = None, state_size: int | None = None, max_state_size: int = 64
) -> list[ReducedFilter]:
    """Reduce each filter to real poles and non-negative residues; `taps` is real, (filter, length).

    With a tolerance: the first size whose relative error at every tap is within it, in at most `max_state_size` modes,
    and then so is its l2 error; if none is, the most accurate within that limit. With a state size: the most accurate
    of at most that many modes. The first tap is exact, by the direct term. A filter that is not positive, or whose
    relative error exceeds VOID as well, gets the best fit in l2 instead, with the tolerance on its l2 error.
    """
    return reduce_by(choose, taps, tolerance, state_size, max_state_size, fit)


def pointwise_error(
    taps: Tensor, reduced: list[ReducedFilter], exact: Sequence[tuple[NDArray, NDArray]] | None = None
) -> Tensor:
    """ε = max_t |ĥ_t - h_t| / h_t of each filter over the horizon, or over all lags if `exact` is given, (filter,).

    `taps` is (filter, length). A tap below TINY of the largest is compared with that share; ε is infinite for a filter
    with a negative tap. `exact` has for each filter the poles ρ_i > 0 and coefficients c_i > 0 of h_t = Σ_i c_i ρ_i^t.
    With ρ_1 its slowest pole, h_t ≥ c_1 ρ_1^t, so with ĥ_t - h_t = Σ_m e_m λ_m^t, equal poles taken together,
    |ĥ_t - h_t| / h_t ≤ Σ_m |e_m| / c_1 (|λ_m| / ρ_1)^t. If no |λ_m| exceeds ρ_1 this falls with t, so that its value
    at the horizon holds beyond; otherwise ε is infinite. It is below 1 only if the slowest poles are equal.
    """
    taps = taps.detach().double().cpu()
    if not reduced:
        return taps.new_zeros(0)
    poles = pad_sequence([torch.from_numpy(f.poles) for f in reduced], batch_first=True)
    residues = pad_sequence([torch.from_numpy(f.residues) for f in reduced], batch_first=True)
    error = taps.new_zeros(len(taps))
    for rows in pieces(len(taps), 64 * taps.shape[1] * (poles.shape[1] + 1)):
        made = (residues[rows, None] * power_table(poles[rows], taps.shape[1])).real.sum(2)
        made[:, 0] += torch.tensor([f.direct for f in reduced[rows]], dtype=made.dtype)
        error[rows] = _largest_ratio(taps[rows], made)
    if exact is not None:
        beyond = [_beyond(taps.shape[1], *modes, f) for modes, f in zip(exact, reduced, strict=True)]
        error = torch.maximum(error, torch.tensor(beyond, dtype=error.dtype))
    return error


def output_bound(error: Tensor) -> Tensor:
    """2ε / (1 + √(1 - ε²)), 2 for ε ≥ 1: the most that ε moves a normalised mixer's output, in units of max_s ‖v_s‖.

    The output is y = Σ_s w_s v_s, w_s = h_{t-s} κ_s / Σ h κ, for any κ ≥ 0 and v: ‖ŷ - y‖ ≤ Σ_s |ŵ_s - w_s| max ‖v_s‖.
    With a_s = ĥ / h in [1 - ε, 1 + ε] and mean Σ_s w_s a_s = 1 + d, ŵ_s = w_s a_s / (1 + d). For a given mean,
    Σ_s |ŵ_s - w_s| is largest with all a_s at the ends, (ε² - d²) / (ε (1 + d)), and then for d = √(1 - ε²) - 1. Two
    tokens attain it; two averages never differ by more than 2.
    """
    error = torch.as_tensor(error, dtype=torch.float64).clamp(max=1)
    return 2 * error / (1 + torch.sqrt(1 - error**2))


def choose(targets: Targets, tolerance: float | None, modes: int) -> Tensor:
    """Poles (filter, modes), 0 where unused."""
    taps, aim = targets.taps, tolerance or 0.0
    poles = taps.new_zeros(len(taps), modes)

    def search(rows, relative):
        poles[rows], error = _grown(taps[rows], relative, aim, modes)
        return error

    _by_kind(taps, modes, search, max(aim, VOID))
    return poles + 0j


def fit(taps: Tensor, poles: Tensor) -> tuple[Tensor, Tensor]:
    """The best non-negative amplitudes c = R ρ for real poles, (filter, column), and the relative l2 errors, (filter,).

    Those of the smallest ε, or of the smallest l2 error where that is not below VOID or the filter is not positive.
    """
    poles = poles.real
    amplitudes = torch.zeros_like(poles)

    def solve(rows, relative):
        amplitudes[rows] = _amplitudes(_sampled(taps[rows], relative), poles[rows])
        return _error(taps[rows], relative, poles[rows], amplitudes[rows])

    _by_kind(taps, poles.shape[1], solve, VOID)
    return amplitudes + 0j, _error(taps, False, poles, amplitudes)


def _by_kind(taps, columns, solve, most):
    """Call `solve(rows, relative)`, first for positive filters, then for all others and those whose error is too large.

    A tap of 0 counts as positive where the one before it is too small to tell from 0.
    """
    g = taps[:, 1:]
    before = torch.cat([torch.full_like(g[:, :1], torch.inf), g[:, :-1]], dim=1)
    relative = ((g > 0) | ((g == 0) & (before < TINY))).all(1)
    for kind, samples in (True, min(SAMPLES, g.shape[1])), (False, g.shape[1]):
        rows = (relative == kind).nonzero()[:, 0]
        if not samples or not columns or not len(rows):
            continue
        for piece in pieces(len(rows), 8 * samples * (GRID + 8 * columns)):
            error = solve(rows[piece], kind)
            if kind:
                relative[rows[piece]] = error <= most


class Samples(NamedTuple):
    """Taps after the first that filters are fitted on, each divided by its scale: h_t itself, or the norm of the taps.

    A positive filter's error is smooth on a logarithmic axis of lags, so that a few hundred taps stand for all.
    """

    steps: Tensor  # (sample,), 0 for the tap after the first
    logarithms: Tensor  # (filter, sample) of the scales
    target: Tensor  # (filter, sample)
    relative: bool  # whether the scale is the tap

    def of(self, rows: Tensor) -> "Samples":
        return self._replace(logarithms=self.logarithms[rows], target=self.target[rows])

    def columns(self, rates: Tensor) -> Tensor:
        """ρ^t over the scale, (filter, sample, column); 0 in unused columns."""
        powers = (-self.steps[:, None] * rates.exp()[:, None] - self.logarithms[:, :, None]).exp()
        return torch.where(rates.isfinite()[:, None], powers, 0)


def _sampled(taps, relative):
    g = taps[:, 1:]
    steps = torch.arange(g.shape[1], device=g.device)
    if relative:
        lags = np.unique(np.geomspace(1, g.shape[1], SAMPLES).round().astype(int))
        steps = torch.from_numpy(lags - 1).to(g.device)
        scale = g[:, steps].clamp_min(TINY)
    else:
        scale = g.norm(dim=1, keepdim=True).clamp_min(1e-300).expand_as(g)
    return Samples(steps.to(g.dtype), scale.log(), g[:, steps] / scale, relative)


def _grown(taps, relative, tolerance, modes):
    """Poles (filter, modes) of the first size within the tolerance, or else of the most accurate one, and the error."""
    samples = _sampled(taps, relative)
    grid = torch.linspace(SLOWEST, FASTEST, GRID, dtype=taps.dtype, device=taps.device)
    columns = _unit(samples.columns(grid.expand(len(taps), -1)))[0]
    poles = taps.new_zeros(len(taps), modes)
    least = _error(taps, relative, poles[:, :0], poles[:, :0])
    lowest = samples.target.norm(dim=1)  # of the error of least squares, which falls even where a maximum does not
    idle = torch.zeros_like(least, dtype=torch.long)
    active = torch.arange(len(taps), device=taps.device)
    rates = live = poles[:, :0]
    missed = samples.target
    while True:
        gains, new = (columns[active].mT @ missed[:, :, None])[:, :, 0].max(1)
        going = (least[active] > max(tolerance, ROUNDING)) & (idle[active] < PATIENCE)
        going &= (gains > ROUNDING) & (live.sum(1) < modes)
        active, new, rates, live = active[going], new[going], rates[going], live[going]
        if not len(active):
            return poles, least
        own = samples.of(active)
        weights = torch.ones_like(own.target)
        rates, amplitudes, missed = _refined(own, _with_another(rates, live, grid[new]), weights, STEPS)
        live = amplitudes > 0
        found = _sharpened(own, rates) if relative else torch.where(live, rates, torch.inf)
        found = (-found.exp()).exp()
        error = _error(taps[active], relative, found, _amplitudes(own, found))
        better = error < least[active]
        squares = missed.norm(dim=1)
        idle[active] = torch.where(squares < (1 - SETTLED) * lowest[active], 0, idle[active] + 1)
        lowest[active] = torch.minimum(lowest[active], squares)
        least[active[better]] = error[better]
        poles[active[better]] = torch.nn.functional.pad(found[better], (0, modes - found.shape[1]))


def _with_another(rates, live, new):
    """The rates of the poles in use, in their order, and a new one after them: (filter, most in use + 1)."""
    count = live.long().sum(1)
    kept = rates.gather(1, (live == 0).to(torch.int8).argsort(dim=1, stable=True))
    kept = torch.nn.functional.pad(kept, (0, 1))[:, : int(count.max()) + 1]
    # Columns past the new pole repeat it: non-negative least squares leaves them unused.
    unused = torch.arange(kept.shape[1], device=rates.device) >= count[:, None]
    return torch.where(unused, new[:, None], kept)


def _refined(samples, rates, weights, steps):
    """Rates, their amplitudes and the missed target after steps of Levenberg-Marquardt on the rates alone.

    The Jacobian is the part of the terms' derivatives that is orthogonal to the terms in use.
    """
    amplitudes, missed, terms = _solved(samples, rates, weights)
    error = (weights * missed).norm(dim=1)
    damping = torch.full_like(error, 1e-2)
    for _ in range(steps):
        basis = torch.linalg.qr(terms)[0]
        derivative = -terms * samples.steps[:, None] * rates.exp()[:, None]
        jacobian, scale = _unit(derivative - basis @ (basis.mT @ derivative))
        slope = (jacobian.mT @ (weights * missed)[:, :, None])[:, :, 0]
        free = (amplitudes > 0) & ~((rates <= SLOWEST) & (slope < 0)) & ~((rates >= FASTEST) & (slope > 0))
        jacobian, slope = jacobian * free[:, None], slope * free
        normal = jacobian.mT @ jacobian + damping[:, None, None] * torch.eye(rates.shape[1], device=rates.device)
        change = torch.linalg.solve_ex(normal, slope[:, :, None])[0][:, :, 0] / scale[:, 0]
        trial = (rates + change.nan_to_num(0, 0, 0).clamp(-1, 1) * free).clamp(SLOWEST, FASTEST)
        found = _solved(samples, trial, weights)
        tried = (weights * found[1]).norm(dim=1)
        better = tried < error
        damping = torch.where(better, damping / 5, damping * 4)
        error = torch.where(better, tried, error)
        rates, amplitudes, missed, terms = (
            torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)
            for new, old in zip((trial, *found), (rates, amplitudes, missed, terms), strict=True)
        )
    return rates, amplitudes, missed


def _sharpened(samples, rates):
    """Rates of the smallest largest error, infinite if unused; rounds of new weights lead there from least squares."""
    weights = torch.ones_like(samples.target)
    best, least = rates, torch.full_like(rates[:, 0], torch.inf)
    for steps in [0] + ROUNDS * [STEPS_IN_ROUND]:
        rates, amplitudes, missed = _refined(samples, rates, weights, steps)
        best, least = _better(best, least, torch.where(amplitudes > 0, rates, torch.inf), missed)
        weights = _reweighted(weights, missed)
    return best


def _amplitudes(samples, poles):
    """Non-negative amplitudes of real poles, (filter, column): of least squares, or of the smallest largest error."""
    rates = (-poles.log()).log()
    weights = torch.ones_like(samples.target)
    best, least = torch.zeros_like(poles), torch.full_like(samples.target[:, 0], torch.inf)
    for _ in range(FIXED_ROUNDS if samples.relative else 1):
        amplitudes, missed, _ = _solved(samples, rates, weights)
        best, least = _better(best, least, amplitudes, missed)
        weights = _reweighted(weights, missed)
    return best


def _better(best, least, found, missed):
    """Whichever of the two misses less at most, and that error."""
    largest = missed.abs().amax(1)
    return torch.where((largest < least)[:, None], found, best), torch.minimum(largest, least)


def _solved(samples, rates, weights):
    """Non-negative least squares: amplitudes (filter, column), the missed target, and the weighted terms of the sum."""
    columns, norms = _unit(samples.columns(rates) * weights[:, :, None])
    target = weights * samples.target
    # A triangle has the same solution and few rows.
    triangles = torch.linalg.qr(torch.cat([columns, target[:, :, None]], dim=2), mode="r")[1].cpu().numpy()
    coefficients = torch.from_numpy(np.stack([_nonnegative(triangle) for triangle in triangles])).to(columns)
    terms = columns * coefficients[:, None]
    return coefficients / norms[:, 0], (target - terms.sum(2)) / weights, terms


def _nonnegative(triangle):
    """Coefficients of the columns of a triangle for its last one; all 0 if rounding errors keep the search going."""
    try:
        return nnls(triangle[:, :-1], triangle[:, -1], maxiter=100 * triangle.shape[1])[0]
    except RuntimeError:
        return np.zeros(triangle.shape[1] - 1)


def _reweighted(weights, missed):
    """Larger weights where more is missed; the share of 2 % keeps a tap that is met exactly from being forgotten."""
    share = missed.abs() / missed.abs().amax(1, keepdim=True).clamp_min(1e-300)
    weights = weights * (0.02 + share).sqrt()
    return weights / weights.square().mean(1, keepdim=True).sqrt()


def _unit(columns):
    """The columns with norm 1, and their norms."""
    norms = columns.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return columns / norms, norms


def _taps_after_first(taps, poles, amplitudes):
    return (amplitudes[:, None] * power_table(poles, taps.shape[1] - 1)).sum(2)


def _error(taps, relative, poles, amplitudes):
    """The error that counts: the largest ratio to a tap, or l2 relative to all taps, (filter,)."""
    made = torch.cat([taps[:, :1], _taps_after_first(taps, poles, amplitudes)], dim=1)
    if relative:
        return _largest_ratio(taps, made)
    return (made - taps).norm(dim=1) / taps.norm(dim=1).clamp_min(1e-300)


def _largest_ratio(taps, made):
    floor = (TINY * taps.amax(1, keepdim=True)).clamp_min(1e-300)
    ratio = (made - taps).abs() / torch.maximum(taps, floor)
    return torch.where((taps < 0).any(1), torch.inf, ratio.amax(1))


def _beyond(horizon, poles, coefficients, reduced):
    """The bound of pointwise_error on the lags from the horizon on."""
    rest = dict(zip(reduced.poles.tolist(), reduced.residues.tolist(), strict=True))
    for pole, coefficient in zip(poles.tolist(), coefficients.tolist(), strict=True):
        rest[pole] = rest.get(pole, 0) - coefficient
    slowest, least = max(zip(poles.tolist(), coefficients.tolist(), strict=True), default=(0.0, 0.0))
    left = {abs(pole): abs(e) for pole, e in rest.items() if e != 0}
    if max(left, default=0.0) > slowest:
        return float("inf")
    return sum(e / least * (radius / slowest) ** horizon for radius, e in left.items())
