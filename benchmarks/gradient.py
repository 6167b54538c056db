"""Gradient modal interpolation: poles and residues from a random ring, trained on the taps. For comparison.

Source: arXiv:2310.18780, section 3.2 and appendix: radii from 0.9 to 0.99, any angle, residues of variance one over
the modes, AdamW with a cosine to the end; radii are not constrained while it runs. Poles that end outside the circle
are reflected and the residues fitted again, as for every method.
"""

import torch
from torch import Tensor

from scavenger.recurrence.reduction.reduced import ReducedFilter, Targets, reduce_by
from scavenger.recurrence.reduction.residues import fit, settled


STEPS = 30_000  # as published
LEARNING_RATE = 3e-3  # published: 6e-4, for filters of a layer as they are; here each is scaled to largest tap 1


def reduce(
    taps: Tensor, *, tolerance: float | None = None, state_size: int | None = None, max_state_size: int = 64
) -> list[ReducedFilter]:
    """As balanced.reduce, by training; every mode counts as a pair, so real states are even."""
    return reduce_by(choose, taps, tolerance, state_size, max_state_size)


def choose(targets: Targets, tolerance: float | None, modes: int, steps: int = STEPS) -> Tensor:
    """Poles (filter, 2 modes), 0 where unused.

    With a tolerance, sizes double until it is met, and are then bisected.
    """
    poles = targets.taps.new_zeros(len(targets.taps), 2 * modes, dtype=torch.complex128)
    if tolerance is None:
        return trained(targets.taps, modes, steps)
    low = (targets.least(tolerance) + 1) // 2 - 1  # modes that miss
    high = torch.full_like(low, modes + 1)  # modes that meet it, once tried
    middle = (low + 1).clamp_max(modes)
    while (going := (high - low > 1) & (low < modes)).any():
        for size in middle[going].unique().tolist():
            rows = (going & (middle == size)).nonzero()[:, 0]
            if size:
                found = trained(targets.taps[rows], size, steps)
                met = fit(targets.taps[rows], found).error <= tolerance
            else:
                found, met = poles[rows, :0], torch.ones_like(rows, dtype=torch.bool)
            # Without any that meets it the largest stays.
            use = met | (high[rows] > modes)
            poles[rows[use]] = 0
            poles[rows[use], : 2 * size] = found[use]
            high[rows[met]], low[rows[~met]] = size, size
        middle = torch.where(high > modes, (2 * low).clamp(1, modes), (low + high) // 2)
    return poles


@torch.enable_grad()
def trained(taps: Tensor, modes: int, steps: int) -> Tensor:
    """Poles after training on g_t = Re Σ_m c_m λ_m^t: (filter, length) to (filter, 2 modes)."""
    g = taps[:, 1:]
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high):
        drawn = torch.rand(len(g), modes, generator=generator, dtype=g.dtype)
        return (low + (high - low) * drawn).to(g.device).requires_grad_()

    def normal():
        drawn = torch.randn(len(g), modes, generator=generator, dtype=g.dtype)
        return (drawn / modes**0.5).to(g.device).requires_grad_()

    radius, angle, real, imaginary = parameters = [uniform(0.9, 0.99), uniform(0, 2 * torch.pi), normal(), normal()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
    time = torch.arange(g.shape[1], device=g.device, dtype=g.dtype)[:, None]
    for _ in range(steps):
        decay = (time * radius.abs().clamp_min(1e-6).log()[:, None]).exp()
        phase = time * angle[:, None]
        model = (decay * (real[:, None] * phase.cos() - imaginary[:, None] * phase.sin())).sum(2)
        loss = (model - g).square().mean(1).sum()  # filters do not touch each other
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        upper = torch.polar(radius.abs(), angle)
        upper = torch.complex(upper.real, upper.imag.abs().clamp_min(1e-9))
        return settled(torch.stack([upper, upper.conj()], dim=2).flatten(1))
