"""Poles and residues against systems that are known, errors against what is proven, batches against one by one."""

import importlib
import itertools
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import importing_from
from scipy import linalg

from scavenger.recipe import RecipeError, Recurrence
from scavenger.recurrence import recurrence
from scavenger.recurrence.reduction import balanced, hankel, irka, projection, workers
from scavenger.recurrence.reduction.reduced import ReducedFilter, reduce_by
from scavenger.recurrence.reduction.residues import MAX_RADIUS, count_states, fit, gain_errors, settled, tails


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
METHODS = {"balanced": balanced.reduce, "irka": irka.reduce, "projection": projection.reduce}
POLES = np.array([0.93 * np.exp(0.3j), 0.8, 0.85 * np.exp(1.2j), -0.6, 0.97 * np.exp(2.1j)])  # eight real states
RESIDUES = np.array([0.5 - 1.1j, 2.0, 0.3 + 0.2j, -0.7, -0.4 + 0.9j])


def response(poles, residues, length):
    """Σ over modes and time, one term at a time."""
    return np.array([sum((r * p**t).real for p, r in zip(poles, residues, strict=True)) for t in range(length)], float)


def random(filters, length, decay=0.0, seed=5):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(filters, length, generator=generator, dtype=torch.float64)
    return noise * torch.exp(-decay * torch.arange(length, dtype=torch.float64))


def smooth(filters, length, seed=3):
    """Sums of many modes of all speeds: compressible, and of no finite size."""
    generator = np.random.default_rng(seed)
    poles = np.exp(
        -generator.uniform(2, 60, (filters, 60)) / length + 1j * generator.uniform(0, 30, (filters, 60)) / length
    )
    residues = generator.normal(size=(filters, 60)) + 1j * generator.normal(size=(filters, 60))
    return torch.from_numpy((residues[:, :, None] * poles[:, :, None] ** np.arange(length)).sum(1).real)


def spike(length, at):
    return torch.eye(length, dtype=torch.float64)[at : at + 1]


def taps_of(found: ReducedFilter, length):
    taps = response(found.poles, found.residues, length)
    taps[0] += found.direct
    return taps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("length", "shrunk"), [(199, 0.88), (1100, 1.0)], ids=["short", "long"])
def test_a_known_system_is_found(method, length, shrunk, device):
    known = shrunk * POLES  # its slowest mode is over before the taps are
    taps = response(known, RESIDUES, length)
    taps[0] += 3
    given = torch.from_numpy(taps)[None].to(device)
    for asked in ({"tolerance": 1e-9}, {"state_size": 5}):
        (found,) = METHODS[method](given, **asked)
        assert found.real_states == 8 and found.state_size == 5 and found.relative_error < 1e-8
        here, there = np.argsort(found.poles.real), np.argsort(known.real)
        np.testing.assert_allclose(found.poles[here], known[there], rtol=1e-8)
        np.testing.assert_allclose(found.residues[here], RESIDUES[there], rtol=1e-8)
        assert found.direct == pytest.approx(3, abs=1e-8)
    assert METHODS[method](given, state_size=4)[0].relative_error > 1e-3  # it is no smaller


CASES = {
    "noise": random(2, 63),
    "decaying noise": random(3, 90, 0.06),
    "long noise": random(1, 430),
    "smooth": smooth(2, 450),
    "constant": torch.full((1, 60), 2.5, dtype=torch.float64),
    "alternating": ((-1.0) ** torch.arange(77))[None],
    "zeros": torch.zeros(2, 50),
    "spike at the start": spike(60, 0),
    "spike after the start": spike(60, 1),
    "spike in the middle": spike(60, 31),
    "spike at the end": spike(60, 59),
    "growing": torch.exp(0.08 * torch.arange(90, dtype=torch.float64))[None],
    "growing noise": random(1, 80, -0.05),
    "delayed": torch.cat([torch.zeros(1, 17, dtype=torch.float64), random(1, 60, 0.1)], dim=1),
    "one tap": random(2, 1),
    "two taps": random(2, 2),
    "three taps": random(2, 3),
    "tiny": 1e-200 * random(1, 50, 0.1),
    "huge": 1e200 * random(1, 50, 0.1),
    "none": torch.zeros(0, 7),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_every_filter_gets_a_result_that_keeps_its_word(method, case, device):
    taps = CASES[case]
    for asked, most in (({"state_size": 2}, 2), ({"tolerance": 0.05, "max_state_size": 7}, 7)):
        found = METHODS[method](taps.to(device), **asked)
        assert len(found) == len(taps)
        for own, filter in zip(taps.double().numpy(), found, strict=True):
            check(own, filter, most)
            if "tolerance" in asked and filter.relative_error > 0.05:
                assert filter.state_size > 0 or filter.floor > 0 or case.startswith("spike")


def check(taps, found, most):
    """What is said of a recurrence is measured again, tap by tap, and held against what is proven."""
    scale, length = np.abs(taps).max() or 1.0, len(taps)
    norm = np.linalg.norm(taps / scale) or 1.0
    assert found.state_size <= most
    assert found.real_states == sum(1 if pole.imag == 0 else 2 for pole in found.poles)
    assert (found.poles.imag >= 0).all() and found.largest_radius <= MAX_RADIUS < 1
    run = taps_of(found, 4 * length) / scale
    error = np.linalg.norm(run[:length] - taps / scale) / norm
    gain, gain_floor = found.gain_error / scale, found.gain_floor / scale
    assert found.relative_error == pytest.approx(error, rel=1e-6, abs=1e-10)
    assert found.floor * (1 - 1e-9) <= found.relative_error + 1e-13
    assert gain_floor * (1 - 1e-9) <= gain + 1e-13
    # What is seen of the tail is no more than there is; l2 of the error no more than its largest gain.
    assert np.linalg.norm(run[length:]) / norm <= found.tail * (1 + 1e-6) + 1e-9
    assert gain * (1 + 1e-2) >= found.relative_error * norm - 1e-9
    assert np.isfinite([*found.hankel_values, found.tail, found.gain_error, found.direct]).all()
    assert (np.diff(found.hankel_values) <= 1e-12 * scale).all()


@pytest.mark.parametrize("taps", [random(5, 81, 0.04), smooth(4, 450)], ids=["rough", "smooth"])
@pytest.mark.parametrize("state_size", [1, 3, 6])
def test_a_refinement_is_never_worse_at_the_same_size(taps, state_size, device):
    def padded_error(filter, own):
        length = len(own)
        target = np.pad(own, (0, int(1.5 * length) - length))
        return np.linalg.norm(taps_of(filter, len(target)) - target) / np.linalg.norm(own)

    errors = {}
    for name, reduce in METHODS.items():
        found = reduce(taps.to(device), state_size=state_size)
        errors[name] = np.array([padded_error(f, own) for f, own in zip(found, taps.numpy(), strict=True)])
    assert (errors["irka"] <= errors["balanced"] * (1 + 1e-9)).all()
    assert (errors["projection"] <= errors["irka"] * (1 + 1e-9)).all()
    assert errors["projection"].mean() < errors["balanced"].mean()  # and somewhere it helps


@pytest.mark.slow
def test_the_state_is_the_smallest_that_meets_the_tolerance(device):
    taps, tolerance = torch.cat([random(3, 127, 0.05), smooth(3, 127)]), 0.04
    found = balanced.reduce(taps.to(device), tolerance=tolerance)
    assert len({filter.real_states for filter in found}) > 2
    for own, filter in zip(taps, found, strict=True):
        assert filter.relative_error <= tolerance
        for states in range(filter.real_states):
            poles = reference_poles(own.numpy(), states)
            assert fit(own[None], poles[None]).error.item() > tolerance
    for reduce in (irka.reduce, projection.reduce):
        refined = reduce(taps.to(device), tolerance=tolerance)
        assert all(
            a.relative_error <= tolerance and a.real_states <= b.real_states
            for a, b in zip(refined, found, strict=True)
        )
        assert sum(a.real_states for a in refined) < sum(b.real_states for b in found)


def reference_poles(taps, states):
    """Balanced truncation of the shift register by its matrices, one filter."""
    values, vectors = linalg.eigh(linalg.hankel(taps[1:]))
    order = np.argsort(-np.abs(values))[:states]
    values, vectors = values[order], vectors[:, order]
    shifted = np.vstack([np.zeros(states), vectors[:-1]])
    root = np.sqrt(np.abs(values))
    poles = linalg.eigvals((np.sign(values) / root)[:, None] * (vectors.T @ shifted) * (values / root))
    return settled(torch.from_numpy(poles.astype(complex)))


def test_a_tolerance_out_of_reach_gives_the_most_there_may_be(device):
    taps = random(2, 200).to(device)
    for name, reduce in METHODS.items():
        for filter in reduce(taps, tolerance=1e-6, max_state_size=5):
            assert filter.real_states >= 8, name
            assert filter.floor > 1e-6  # no method could


@pytest.mark.slow
def test_together_is_as_one_by_one(device):
    taps = torch.cat([random(2, 210, 0.03), smooth(3, 210), torch.zeros(1, 210)]).to(device)
    together = irka.reduce(taps, tolerance=0.2, max_state_size=9)
    alone = [irka.reduce(own[None], tolerance=0.2, max_state_size=9)[0] for own in taps]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = irka.reduce(taps, tolerance=0.2, max_state_size=9)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(together, alone, threaded, strict=True):
        assert a.real_states == b.real_states == c.real_states
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-6, abs=1e-12)
        assert a.relative_error == pytest.approx(c.relative_error, rel=1e-6, abs=1e-12)
        assert a.hankel_values == pytest.approx(b.hankel_values, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", ["balanced", "irka", "positive"])
def test_workers_make_what_one_process_makes(method, monkeypatch):
    """To the last bit, in the same order, to several aims; whatever the threads of the caller."""
    monkeypatch.setattr(recurrence, "TOGETHER", 3)
    taps = smooth(7, 61).abs()
    settings = Recurrence(method=method, tolerance=0.1, max_state_size=5)
    wanted = [{"tolerance": 0.3}, {"state_size": 2}]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        alone = recurrence.reduce_filters(taps, settings, wanted)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    with workers.started(2) as each:
        shared = recurrence.reduce_filters(taps, settings, wanted, each)
        with pytest.raises(ValueError, match="expected real"):
            list(recurrence.parts(taps + 0j, settings, wanted, each))
    assert [len(found) for found in shared] == [7, 7]
    for one, other in zip(itertools.chain(*alone), itertools.chain(*shared), strict=True):
        for name, value in vars(one).items():
            assert np.array_equal(value, getattr(other, name)), name


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(RecipeError, match="one of 2 processes that reduce filters was ended"):
        with workers.started(2) as each:
            list(each(os._exit, [3, 3]))


CALLER = """
from scavenger.recurrence.reduction import workers

with workers.started(2) as each:
    print(*set(each(eval, 8 * ["__import__('os').getpid()"])), flush=True)
    list(each(__import__("time").sleep, 2 * [600]))
"""


def test_workers_end_with_a_caller_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", CALLER], stdout=subprocess.PIPE, text=True) as caller:
        found = [int(word) for word in caller.stdout.readline().split()]
        caller.kill()
    assert 1 <= len(found) <= 2
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in found):
        assert time.monotonic() < until, "they sleep on"
        time.sleep(0.05)


def test_pieces_change_nothing(monkeypatch, device):
    taps = smooth(5, 450).to(device)
    whole = projection.reduce(taps, state_size=3)
    monkeypatch.setattr(hankel, "PIECE_BYTES", 1)
    for a, b in zip(whole, projection.reduce(taps, state_size=3), strict=True):
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 60, 91])
def test_hankel_values_and_products(length, device):
    g = random(3, length)
    matrix = np.array(
        [[[row[i + j] if i + j < length else 0 for j in range(length)] for i in range(length)] for row in g.numpy()]
    )
    g = g.to(device)
    np.testing.assert_array_equal(hankel.hankel_matrix(g).cpu(), matrix)
    values, vectors = (x.cpu() for x in hankel.hankel_eigen(g, length + 2))
    sizes = np.linalg.svd(matrix)[1]
    np.testing.assert_allclose(values.abs()[:, :length], sizes, atol=1e-12)
    assert (values[:, length:] == 0).all()
    np.testing.assert_allclose(matrix @ vectors.numpy(), (vectors * values[:, None]).numpy(), atol=1e-12)
    x = random(3 * 4, length, seed=9).reshape(3, 4, length)
    np.testing.assert_allclose(hankel.hankel_product(g, x.to(device)).mT.cpu(), matrix @ x.mT.numpy(), atol=1e-12)


def test_leading_hankel_values_of_long_filters(device):
    """Where the random space takes over: never above the true ones, and the same for smooth filters."""
    for g, tolerance in ((smooth(3, 450)[:, 1:], 0.02), (random(2, 450), 0.2)):
        values, vectors = (x.cpu() for x in hankel.hankel_eigen(g.to(device), 20))
        exact = torch.linalg.svdvals(hankel.hankel_matrix(g))
        assert (values.abs() <= exact[:, :20] * (1 + 1e-12)).all()
        assert (values.abs() >= exact[:, :20] * (1 - tolerance) - 1e-12 * exact[:, :1]).all()
        np.testing.assert_allclose(vectors.mT @ vectors, np.broadcast_to(np.eye(20), (len(g), 20, 20)), atol=1e-10)


def reference_floors(g):
    """Both floors of one filter, from whole matrices and all singular values."""
    side = (len(g) + 1) // 2
    matrix = np.array([[g[i + j] for j in range(side)] for i in range(side)])
    weights = np.diag([math.sqrt(math.comb(2 * i, i) / 4**i) for i in range(side)])
    found = []
    for section, share in ((weights @ matrix @ weights, 1), (matrix, side)):
        squares = np.append(linalg.svdvals(section) ** 2, 0)
        found.append(np.sqrt(squares[::-1].cumsum()[::-1] / share / np.sum(g**2)))
    return np.maximum(*found)


@pytest.mark.parametrize(
    ("g", "tight"), [(random(2, 62), 1e-9), (random(2, 63), 1e-9), (smooth(2, 830), 0.05), (random(1, 830), 1e-9)]
)
def test_floors(g, tight, device):
    floors = hankel.relative_floors(g.to(device)).cpu().numpy()
    assert (np.diff(floors) <= 1e-12).all() and (floors[:, 0] == 1).all()
    for row, own in zip(floors, g.numpy(), strict=True):
        exact = reference_floors(own)
        assert (row[1:] <= exact[1:] * (1 + 1e-9)).all()  # proven, whatever was compressed
        assert (row[1:33] >= exact[1:33] * (1 - tight) - 1e-10).all()  # and worth something


def test_sections_are_differentiable_and_their_norms_convolve_to_ones(device):
    g = random(2, 41).to(device)
    section = hankel.weighted_section(g)
    assert section.shape == (2, 21, 21)
    np.testing.assert_allclose(section.square().sum((1, 2)).cpu(), reference_energy(g.cpu().numpy()), rtol=1e-12)
    assert torch.autograd.gradcheck(
        lambda g: torch.linalg.svdvals(hankel.weighted_section(g))[:, 5:], random(1, 15).to(device).requires_grad_()
    )


def reference_energy(g):
    """Σ_t g_t² Σ_{i+j=t} w_i² w_j², the inner sum being 1 up to the middle."""
    side = (g.shape[1] + 1) // 2
    squares = [math.comb(2 * i, i) / 4**i for i in range(side)]
    inner = np.convolve(squares, squares)
    np.testing.assert_allclose(inner[:side], 1)
    return (g[:, : 2 * side - 1] ** 2 * inner).sum(1)


def test_floors_hold_for_poles_that_were_fitted_another_way(device):
    """Least squares on random stable poles may not beat them either."""
    taps, generator = random(1, 64, 0.02).to(device), np.random.default_rng(0)
    share = taps[:, 1:].norm() / taps.norm()
    floors = hankel.relative_floors(taps[:, 1:])[0] * share
    values = hankel.hankel_eigen(taps[:, 1:], 20)[0]
    for modes in (1, 3, 6):
        upper = generator.uniform(0.3, 0.99, (50, modes)) * np.exp(1j * generator.uniform(0.01, 3.1, (50, modes)))
        poles = torch.from_numpy(np.stack([upper, upper.conj()], axis=2).reshape(50, 2 * modes)).to(device)
        found = fit(taps.expand(50, -1), poles)
        assert (found.error >= floors[2 * modes]).all()
        assert (
            gain_errors(taps.expand(50, -1), poles, found.amplitudes) >= hankel.gain_floors(values)[0, 2 * modes]
        ).all()


def test_gain_on_the_grid_is_a_lower_estimate_of_the_worst_case(device):
    """On a grid of 2²⁰ points the largest gain is no smaller, and hardly larger."""
    for filter, own in zip(
        balanced.reduce(random(8, 81, 0.05).to(device), state_size=4), random(8, 81, 0.05), strict=True
    ):
        error = taps_of(filter, 1 << 15) - np.pad(own.numpy(), (0, (1 << 15) - len(own)))
        worst = np.abs(np.fft.rfft(error, n=1 << 20)).max()
        assert worst * (1 - 1e-2) <= filter.gain_error <= worst * (1 + 1e-9)


@pytest.mark.parametrize("taps", [random(3, 81, 0.05), smooth(3, 120)], ids=["rough", "smooth"])
def test_gain_lies_between_the_bounds(taps, device):
    """σ_{d+1} ≤ ‖E‖_∞ for any stable recurrence, and near it, as for balanced truncation at most 2 Σ_{k>d} σ_k."""
    for filter, own in zip(balanced.reduce(taps.to(device), state_size=4), taps.numpy(), strict=True):
        error = taps_of(filter, 1 << 15) - np.pad(own, (0, (1 << 15) - len(own)))
        gain = np.abs(np.fft.rfft(error)).max()
        assert filter.gain_error == pytest.approx(gain, rel=2e-3)  # another grid
        sizes = linalg.svdvals(linalg.hankel(own[1:]))
        assert filter.gain_floor == pytest.approx(sizes[filter.real_states], rel=1e-9)
        assert filter.gain_floor <= gain <= 2 * 1.5 * sizes[filter.real_states :].sum()  # residues are refitted in l2


def test_tails_are_counted_to_infinity_and_held_down(device):
    poles = torch.tensor([[0.999 + 0j, 0.99j, -0.99j, -0.9 + 0j]], dtype=torch.complex128, device=device)
    taps = random(1, 40).to(device)
    found = fit(taps, poles)
    upper, residues = (x[0, [0, 1, 3]].cpu().numpy() for x in (poles, found.amplitudes / poles))
    far = np.linalg.norm(response(upper, residues, 20_000)[40:]) / taps.norm().item()
    assert tails(taps, poles, found.amplitudes).item() == pytest.approx(far, rel=1e-6)
    for reduce in METHODS.values():
        found = reduce(random(3, 127, 0.01).to(device), tolerance=1e-2, max_state_size=20)
        assert all(filter.tail < 0.5 for filter in found)


def test_residues_are_the_best_for_their_poles(device):
    taps, generator = random(1, 75, 0.02), np.random.default_rng(1)
    poles = torch.tensor([[0.93 + 0.2j, 0.93 - 0.2j, 0.8 + 0j, -0.6 + 0j]], dtype=torch.complex128, device=device)
    found = fit(taps.to(device), poles)
    upper, residues = (x[0, [0, 2, 3]].cpu().numpy() for x in (poles, found.amplitudes / poles))
    target = np.pad(taps[0].numpy(), (0, 112 - 75))[1:]

    def missed(residues):
        return np.linalg.norm(response(upper, residues, 112)[1:] - target) / taps.norm().item()

    assert missed(residues) == pytest.approx(found.padded_error.item(), rel=1e-9)
    for _ in range(20):
        change = 1e-3 * generator.normal(size=3) * np.array([1 + 1j, 1, 1])
        assert missed(residues + change) > missed(residues)


def test_equal_and_unused_poles_give_no_nan(device):
    taps = random(2, 60, 0.05).to(device)
    pair = [0.9 + 0.1j, 0.9 - 0.1j]
    doubled = [[*pair, *pair, 0, 0.7], [*pair, 0.5, 0.5 + 1e-15, 0, 0]]
    single = [[*pair, 0.7], [*pair, 0.5]]
    doubled, single = (torch.tensor(poles, dtype=torch.complex128, device=device) for poles in (doubled, single))
    assert count_states(doubled).tolist() == [5, 4]
    found, expected = fit(taps, doubled), fit(taps, single)
    assert found.amplitudes.isfinite().all()
    torch.testing.assert_close(found.padded_error, expected.padded_error, rtol=1e-9, atol=0)


@pytest.mark.parametrize("length", [2, 8, 64])
def test_a_delay_has_no_slow_pole(length, device):
    (found,) = balanced.reduce(spike(length, 1).to(device), tolerance=1e-3, max_state_size=8)
    assert found.state_size == 0 and found.direct == 0 and found.relative_error == 1


@pytest.fixture
def gradient():
    """The published method, which only the benchmark has."""
    with importing_from(BENCHMARKS):
        yield importlib.import_module("gradient")


def test_gradient_beats_no_floor_and_learns(gradient, device):
    taps = smooth(2, 60)
    moved = taps.to(device)
    start, end = (reduce_by(partial(gradient.choose, steps=n), moved, None, 2, 64) for n in (1, 300))
    for own, before, after in zip(taps.numpy(), start, end, strict=True):
        check(own, after, 2)
        assert after.relative_error < before.relative_error
    met = reduce_by(partial(gradient.choose, steps=100), moved, 0.5, None, 8)
    for own, filter in zip(taps.numpy(), met, strict=True):
        check(own, filter, 8)
        assert filter.relative_error <= 0.5


def test_what_cannot_be_reduced_is_refused_in_a_line(gradient, monkeypatch):
    monkeypatch.setattr(gradient, "STEPS", 1)
    broken = random(3, 20)
    broken[1, 7] = math.nan
    for reduce in (*METHODS.values(), gradient.reduce):
        with pytest.raises(ValueError, match="taps of filter 1 are not finite"):
            reduce(broken, state_size=2)
        for asked in ({}, {"tolerance": 0.1, "state_size": 2}, {"tolerance": 0.0}, {"state_size": 0}):
            with pytest.raises(ValueError, match=r"expected \S+ .*$") as refusal:
                reduce(random(1, 20), **asked)
            assert "\n" not in str(refusal.value)
        for shape in ((20,), (2, 0)):
            with pytest.raises(ValueError, match="expected real"):
                reduce(torch.zeros(shape), state_size=2)
