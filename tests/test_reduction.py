"""Poles and residues against systems that are known, and errors against what is proven."""

import numpy as np
import pytest

from scavenger.reduction.balanced import fit_residues, reduce, truncated_poles
from scavenger.reduction.hankel import gain_floors, hankel_eigen, relative_floors


POLES = np.array([0.93 * np.exp(0.3j), 0.8, 0.85 * np.exp(1.2j), -0.6])  # six real states
RESIDUES = np.array([0.5 - 1.1j, 2.0, 0.3 + 0.2j, -0.7])


def impulse_response(poles=POLES, residues=RESIDUES, length=401):
    return (residues[:, None] * poles[:, None] ** np.arange(length)).sum(0).real


def rough(length=127, decay=0.03, seed=5):
    return np.random.default_rng(seed).normal(size=length) * np.exp(-decay * np.arange(length))


def test_a_known_system_is_found():
    taps = impulse_response()
    taps[0] += 3
    found = reduce(taps, 1e-10, 9)
    order = np.argsort(found.poles.real), np.argsort(POLES.real)
    assert found.real_states == 6 and found.state_size == 4
    np.testing.assert_allclose(np.sort_complex(found.poles), np.sort_complex(POLES), rtol=1e-9)
    np.testing.assert_allclose(found.residues[order[0]], RESIDUES[order[1]], rtol=1e-8)
    np.testing.assert_allclose(found.direct, 3, rtol=1e-9)


def test_hankel_values_and_their_order():
    g = rough()[1:]
    values, vectors = hankel_eigen(g)
    matrix = np.array([[g[i + j] if i + j < len(g) else 0 for j in range(len(g))] for i in range(len(g))])
    np.testing.assert_allclose(np.abs(values), np.linalg.svd(matrix)[1], atol=1e-14)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=1e-12)


@pytest.mark.parametrize(
    "taps", [rough(), rough(90, 0.1), impulse_response(length=150)], ids=["rough", "short", "system"]
)
def test_no_reduction_beats_its_floor_and_all_are_stable(taps):
    previous = np.inf
    floors = relative_floors(taps[1:])
    assert (np.diff(floors) <= 1e-15).all() and floors[0] <= 1
    for modes in (1, 2, 4, 8, 16):
        found = reduce(taps, 1e-7, modes)
        assert found.state_size <= modes
        assert found.relative_error >= found.floor * (1 - 1e-9)
        assert found.relative_error <= previous
        assert np.abs(found.poles).max() < 1
        previous = found.relative_error


def test_floor_holds_for_poles_that_were_fitted_another_way():
    """Least squares on random stable poles may not beat the floor either."""
    taps, generator = rough(64, 0.02), np.random.default_rng(0)
    floors = relative_floors(taps[1:]) * np.linalg.norm(taps[1:]) / np.linalg.norm(taps)
    for modes in (1, 3, 6):
        for _ in range(50):
            poles = generator.uniform(0.3, 0.99, modes) * np.exp(1j * generator.uniform(0, np.pi, modes))
            assert fit_residues(taps, poles)[1][0] >= floors[2 * modes]


def test_worst_case_gain_lies_between_the_bounds():
    """σ_{d+1} ≤ ‖E‖_∞ for any stable recurrence; ≤ 2 Σ_{k>d} σ_k for balanced truncation with its own residues."""
    taps = impulse_response()
    values, vectors = hankel_eigen(taps[1:])
    for states in (2, 3, 4):
        poles = truncated_poles(values, vectors, states)
        residues, _ = fit_residues(taps, poles)
        error = impulse_response(poles, residues, 4000) - np.pad(taps, (0, 4000 - len(taps)))
        gain = np.abs(np.fft.fft(error[1:])).max()
        real_states = np.where(poles.imag == 0, 1, 2).sum()
        assert gain >= gain_floors(values)[real_states] * (1 - 1e-9)


def test_residues_are_the_best_for_their_poles():
    taps, poles = rough(), POLES
    residues, (error, _) = fit_residues(taps, poles)
    generator = np.random.default_rng(1)

    def padded_error(residues):
        model = impulse_response(poles, residues, int(1.5 * len(taps)))
        return np.linalg.norm(model[1:] - np.pad(taps, (0, len(model) - len(taps)))[1:])

    best = padded_error(residues)
    for _ in range(20):
        assert padded_error(residues + 1e-3 * generator.normal(size=4) * np.where(POLES.imag == 0, 1, 1 + 1j)) > best


def test_the_state_is_the_smallest_that_meets_the_tolerance():
    taps = rough(127, 0.05)
    found = reduce(taps, 0.05, 63)
    assert found.relative_error <= 0.05
    values, vectors = hankel_eigen(taps[1:])
    for states in range(1, found.real_states):
        poles = truncated_poles(values, vectors, states)
        if len(poles) < found.state_size:
            assert fit_residues(taps, poles)[1][0] > 0.05


def test_a_delay_has_no_slow_pole_and_is_no_crash():
    for taps in (np.eye(1, 8, 1)[0], np.eye(1, 64, 1)[0], 0.01 ** np.arange(64) * np.where(np.arange(64) == 0, 0.1, 1)):
        found = reduce(taps, 1e-3, 8)
        assert found.state_size == 0 and found.direct == taps[0]
        assert found.relative_error == pytest.approx(np.linalg.norm(taps[1:]) / np.linalg.norm(taps))


def test_tails_are_held_down():
    found = reduce(rough(127, 0.01), 1e-2, 20)
    far = impulse_response(found.poles, found.residues, 20_000)[127:]
    assert np.linalg.norm(far) < 0.5 * np.linalg.norm(rough(127, 0.01))


@pytest.mark.parametrize("taps", [np.zeros(50), np.eye(1, 50)[0]], ids=["silent", "one tap"])
def test_filters_that_need_no_state(taps):
    found = reduce(taps, 1e-3, 8)
    assert found.state_size == 0 and found.direct == taps[0] and found.relative_error == 0
