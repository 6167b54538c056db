"""Sums of positive exponentials: known ones are found, their errors are true, and so is what they say of outputs."""

import importlib
import math

import numpy as np
import pytest
import torch
from test_reduction import CASES, check, spike, taps_of

from scavenger.model.filters import ModalFilter
from scavenger.recipe import Recurrence
from scavenger.recurrence import recurrence
from scavenger.recurrence.reduction import positive
from scavenger.recurrence.reduction.reduced import ReducedFilter


KNOWN = np.array([math.exp(-1 / 3), math.exp(-1 / 40), math.exp(-1 / 300)]), np.array([1.0, 0.3, 0.02])


def sum_of(poles, coefficients, length):
    """Σ over modes, one tap at a time."""
    return np.array([sum(c * p**t for p, c in zip(poles, coefficients, strict=True)) for t in range(length)])


def mixtures(filters, length, seed=0):
    """Sums of 30 positive exponentials with decay times from a token to two lengths."""
    generator = np.random.default_rng(seed)
    times = np.exp(generator.uniform(0, math.log(2 * length), (filters, 30)))
    coefficients = np.exp(generator.normal(size=(filters, 30)))
    return torch.from_numpy((coefficients[:, :, None] * np.exp(-np.arange(length) / times[:, :, None])).sum(1))


def ratio(own, filter):
    """max |ĥ_t - h_t| / h_t, tap by tap."""
    return max(abs(a - h) / h for a, h in zip(taps_of(filter, len(own)), own, strict=True))


def modes(poles, coefficients, direct=0.0):
    """A recurrence of which nothing but the taps counts."""
    numbers = dict.fromkeys(("relative_error", "floor", "gain_error", "gain_floor", "tail"), 0.0)
    poles, residues = np.array(poles, complex), np.array(coefficients, complex)
    return ReducedFilter(poles, residues, direct, len(poles), hankel_values=np.zeros(1), **numbers)


@pytest.mark.parametrize("asked", [{"state_size": 3}, {"tolerance": 1e-8}, {"state_size": 7}])
@pytest.mark.parametrize("length", [127, 1024])
def test_a_known_sum_is_found(asked, length, device):
    own = sum_of(*KNOWN, length)
    (found,) = positive.reduce(torch.from_numpy(own)[None].to(device), **asked)
    assert found.state_size == found.real_states == 3
    assert ratio(own, found) < 1e-9
    order = np.argsort(found.poles.real)
    np.testing.assert_allclose(found.poles[order], KNOWN[0], rtol=1e-8)
    np.testing.assert_allclose(found.residues[order], KNOWN[1], rtol=1e-5)
    assert found.direct == pytest.approx(0, abs=1e-7)


def test_errors_fall_with_the_number_of_modes(device):
    t = np.arange(513)
    taps = torch.cat([mixtures(3, 513), torch.from_numpy(np.stack([(1 + t) ** -0.5, np.exp(-((t / 9) ** 0.5))]))])
    errors = []
    for size in (1, 2, 3, 4, 6):
        found = positive.reduce(taps.to(device), state_size=size)
        assert all(f.state_size <= size for f in found)
        errors.append(positive.pointwise_error(taps, found).numpy())
        for own, filter, error in zip(taps.numpy(), found, errors[-1], strict=True):
            check(own, filter, size)
            assert error == pytest.approx(ratio(own, filter), rel=1e-6)
            assert filter.relative_error <= error or error >= 0.5
    assert (np.diff(errors, axis=0) < 0).all()
    assert errors[-1].max() < 3e-3  # a hundredth and less of what one mode leaves


def test_no_other_poles_are_much_better(device):
    """200 random starts of two poles, each with its best coefficients, find no error 2 % below."""
    own = mixtures(1, 200)
    error = positive.pointwise_error(own, positive.reduce(own.to(device), state_size=2)).item()
    times = np.exp(np.random.default_rng(0).uniform(0, math.log(400), (200, 2)))
    poles = torch.from_numpy(np.exp(-1 / times)).to(device)
    taps = own.expand(200, -1).to(device)
    amplitudes, _ = positive.fit(taps, poles + 0j)
    others = [
        positive.pointwise_error(own, [modes(p, c / p, own[0, 0].item() - (c / p).sum())]).item()
        for p, c in zip(poles.cpu().numpy(), amplitudes.real.cpu().numpy(), strict=True)
    ]
    assert (amplitudes.real >= 0).all()
    assert min(others) >= error * 0.98 and min(others) < 3 * error


def test_a_tolerance_holds_at_every_tap(device):
    taps = mixtures(6, 300, seed=1)
    found = positive.reduce(taps.to(device), tolerance=0.02)
    fewer = positive.reduce(taps.to(device), state_size=min(f.state_size for f in found) - 1)
    for own, filter, small in zip(taps.numpy(), found, fewer, strict=True):
        assert ratio(own, filter) <= 0.02 * (1 + 1e-9) and filter.relative_error <= 0.02
        assert ratio(own, small) > 0.02


@pytest.mark.parametrize("case", CASES)
def test_any_filter_gets_a_non_negative_sum_that_keeps_its_word(case, device):
    taps = CASES[case]
    for asked, most in (({"state_size": 2}, 2), ({"tolerance": 0.05, "max_state_size": 7}, 7)):
        found = positive.reduce(taps.to(device), **asked)
        assert len(found) == len(taps) == len(positive.pointwise_error(taps, found))
        for own, filter in zip(taps.double().numpy(), found, strict=True):
            check(own, filter, most)
            assert filter.real_states == filter.state_size
            assert (filter.residues.real >= 0).all() and (filter.residues.imag == 0).all()
            assert (filter.poles.real > 0).all() and (filter.poles.imag == 0).all()


def test_a_filter_that_is_not_positive_gets_the_best_fit_in_l2(device):
    """No non-negative sum of the poles' exponentials is nearer, as the slopes of the squared error say."""
    t = torch.arange(150, dtype=torch.float64)
    taps = torch.stack([torch.exp(-t / 20) + 0.3 * torch.cos(t), torch.where(t < 60, torch.exp(-t / 50), 0)])
    for own, filter in zip(taps.numpy(), positive.reduce(taps.to(device), state_size=3), strict=True):
        assert 0.1 < filter.relative_error < 0.8 and filter.state_size > 0
        missed = (own - taps_of(filter, 150))[1:]
        slopes = filter.poles.real[:, None] ** np.arange(1, 150) @ missed
        assert np.abs(slopes).max() < 1e-8  # each is in use


def test_filters_too_fast_for_their_last_taps(device):
    """Their taps end in numbers that are 0 in float32, or 0 altogether."""
    t = torch.arange(1024, dtype=torch.float64)
    taps = torch.stack([torch.exp(-2 * t), torch.exp(-t / 4) + torch.exp(-t / 2)]).float()
    assert (taps[:, -1] == 0).all()
    found = positive.reduce(taps.to(device), state_size=2)
    assert [f.state_size for f in found] == [1, 2]
    assert positive.pointwise_error(taps, found).max() < 1e-2  # float32 rounds the smallest taps coarsely
    t = t.numpy()
    for own, poles in zip(found, ([math.exp(-2)], [math.exp(-1 / 2), math.exp(-1 / 4)]), strict=True):
        np.testing.assert_allclose(np.sort(own.poles.real), poles, rtol=1e-3)


def test_without_any_solution_the_filter_keeps_its_first_tap(monkeypatch):
    def endless(*_, **__):
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr(positive, "nnls", endless)
    (found,) = positive.reduce(mixtures(1, 60), state_size=2)
    assert found.state_size == 0 and found.direct == mixtures(1, 60)[0, 0] and found.relative_error < 1


def mixed(taps, kappa, v):
    """Σ_s w_s v_s with w_s = h_s κ_s / Σ h κ."""
    weights = taps * kappa
    return weights @ v / weights.sum()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_outputs_of_a_normalised_mixer_move_by_no_more_than_the_bound(size):
    taps = mixtures(3, 90, seed=2)
    found = positive.reduce(taps, state_size=size)
    bounds = positive.output_bound(positive.pointwise_error(taps, found)).numpy()
    generator, shares = np.random.default_rng(size), []
    for own, filter, bound in zip(taps.numpy(), found, bounds, strict=True):
        reduced = taps_of(filter, 90)
        error = reduced / own - 1
        for draw in range(600):
            kappa = generator.exponential(size=90) * (generator.uniform(size=90) < generator.uniform(0.05, 1))
            v = generator.normal(size=(90, 7))
            if draw % 3 == 0:  # in favour of the two lags whose errors are furthest apart
                kappa[:], v[:, 1:] = 1e-9, 0
                for lag, sign in ((error.argmax(), 1), (error.argmin(), -1)):
                    kappa[lag], v[lag, 0] = generator.uniform(0.9, 1.1) / own[lag], 5 * sign
            elif not kappa.any():
                continue
            moved = np.linalg.norm(mixed(reduced, kappa, v) - mixed(own, kappa, v))
            shares.append(moved / (bound * np.linalg.norm(v, axis=1).max()))
    assert max(shares) <= 1 + 1e-9
    assert max(shares) > 0.3  # the adversary above comes within a factor


@pytest.mark.parametrize("error", [1e-3, 0.1, 0.4])
def test_the_bound_is_attained_within_a_factor_of_two(error):
    """Two tokens of opposite values, one weighted too much and one too little, at the worst shares of the weight."""
    taps, reduced = np.array([1.0, 1.0]), np.array([1 + error, 1 - error])
    v = np.array([[1.0], [-1.0]])
    shares = np.linspace(0, 1, 20_001)[1:-1]
    moved = max(
        abs(mixed(reduced, np.array([p, 1 - p]), v) - mixed(taps, np.array([p, 1 - p]), v)).item() for p in shares
    )
    assert moved == pytest.approx(2 * error / (1 + math.sqrt(1 - error**2)), rel=1e-6)
    assert moved == pytest.approx(positive.output_bound(torch.tensor([error])).item(), rel=1e-6)


def test_two_averages_never_differ_by_more_than_two():
    found = positive.output_bound(torch.tensor([0.0, 0.6, 1.0, 7.0, math.inf]))
    assert found.tolist() == pytest.approx([0, 1.2 / 1.8, 2, 2, 2])


def test_pointwise_errors_beyond_the_horizon():
    poles, coefficients = np.array([0.5, 0.9, 0.99]), np.array([2.0, 0.5, 0.1])
    length, far = 40, sum_of(poles, coefficients, 3000)
    taps = torch.from_numpy(far[:length])[None]

    def errors(reduced):
        within = positive.pointwise_error(taps, [reduced]).item()
        return within, positive.pointwise_error(taps, [reduced], [(poles, coefficients)]).item()

    assert max(errors(modes(poles, coefficients))) < 1e-12
    # The slowest poles are equal: what is said holds at each of many later taps, and is met as they go on.
    kept = modes([0.89, 0.99], [0.6, 0.104], direct=2.6 - 0.704)
    within, everywhere = errors(kept)
    later = np.abs(taps_of(kept, 3000) / far - 1)
    assert within == pytest.approx(later[:length].max()) and within <= everywhere < 1
    assert later.max() <= everywhere * (1 + 1e-9) and later[-1] == pytest.approx(0.04)
    # A faster one ends at nothing, a slower one outgrows the filter.
    within, everywhere = errors(modes([0.5, 0.9, 0.9899], coefficients))
    assert within < 0.01 and 1 <= everywhere < 2.1
    within, everywhere = errors(modes([0.5, 0.9, 0.9901], coefficients))
    assert within < 0.01 and everywhere == math.inf
    nothing = np.zeros(0)
    assert positive.pointwise_error(0 * taps, [modes([], [])], [(nothing, nothing)]).item() == 0
    assert positive.pointwise_error(-taps, [modes(poles, -coefficients)]).item() == math.inf
    assert positive.pointwise_error(spike(40, 3), [modes([], [])]).item() == 1


def test_it_is_found_by_name_and_a_modal_filter_keeps_its_own_modes():
    settings = Recurrence(method="positive", tolerance=1e-3)
    assert importlib.import_module(f"scavenger.recurrence.reduction.{settings.method}").reduce is positive.reduce
    filter = ModalFilter([2, 3]).double()
    with torch.no_grad():
        filter.pole.zero_()[:, 0] = torch.tensor([0.5, 0.97, 0.3, 0.9, 0.99])
        filter.residue.zero_()[:, 0] = torch.tensor([1.0, 0.2, 2.0, 0.3, 0.1])
    taps = filter(120).detach()
    (found,) = recurrence.reduce_filters(taps, settings, recurrence.aims(settings))
    assert [f.state_size for f in found] == [2, 3]
    for own, kept in zip(found, recurrence.with_own_modes(filter, found), strict=True):
        assert kept.relative_error == 0 and kept.real_states == kept.state_size == own.state_size
        np.testing.assert_allclose(np.sort(kept.poles), np.sort(own.poles), rtol=1e-2)
        assert set(kept.poles) <= set(filter.poles.tolist())
