"""The modal form: a filter as a sum of complex exponentials, and the recurrence that runs it.

The one convention, used everywhere; time starts at 0, the real part is taken, there is no factor 2:

    h_t = Re Σ_m R_m λ_m^t        x_t = λ ⊙ x_{t-1} + u_t,  x_{-1} = 0        y_t = Re Σ_m R_m x_{t,m} + D u_t

Poles λ are per token, |λ| < 1. Source: arXiv:2310.18780, section 3; the matrix-valued input u = k vᵀ is that of
MultiHyena, section 4. Filters are sorted by state size into buckets, so that those of one size form dense arrays
without padding. States are real tensors, with an axis for the components of each mode: its real and imaginary part, or
the real part alone where poles and residues are real.

A state object holds the states of a batch and the constants of the modes that a step reads. `step` takes one token. For
several tokens call `settle`, `read` for the contribution of the tokens before to the outputs, and `advance`. Without
gradients a step updates its states in place; otherwise it makes new ones.
"""

from collections import Counter
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .convolution import score, toeplitz_block, weighted


CHUNK = 64  # tokens processed at once, to bound memory
# Number of slices of a head's state; each token updates one of them. More slices write less state per token but keep
# more pending keys and values. Measured on one core of a busy machine, ms per step and layer (one of six), medians of
# 12, with 1 / 8 / 16 slices: 8 filters of 64 channels and 2 modes: 15.8 / 11.0 / 8.9 at batch 64; 0.15 / 0.29 / 0.29 at
# batch 1. 4 filters of 32 channels and 4 modes: 1.50 / 1.67 / 1.63 and 0.07 / 0.22 / 0.22.
PARTS = 8


def powers(poles: Tensor, count: int) -> Tensor:
    """λ^t for t < count, (..., count), in float64: float32 powers of a pole near the unit circle drift.

    Computed by repeated doubling, λ^{n+t} = λ^n λ^t: complex multiplications cost a fraction of complex powers.
    """
    step = poles.to(torch.complex128)[..., None]
    table = torch.ones_like(step)
    while table.shape[-1] < count:
        table = torch.cat([table, table * step], dim=-1)
        step = step * step
    return table[..., :count]


class Layout:
    """Filters sorted by state size; `buckets` lists (number of filters, state size)."""

    def __init__(self, state_sizes: list[int], device: torch.device):
        starts = [0, *accumulate(state_sizes)]
        filters = sorted(range(len(state_sizes)), key=lambda index: state_sizes[index])
        self.buckets = [(count, size) for size, count in sorted(Counter(state_sizes).items())]
        with torch.inference_mode(False):  # usable in a backward pass too
            self.filters = torch.tensor(filters, device=device)
            self.back = self.filters.argsort()
            modes = [mode for index in filters for mode in range(starts[index], starts[index + 1])]
            self.modes = torch.tensor(modes, dtype=torch.long, device=device)

    def split(self, x: Tensor, dim: int) -> list[Tensor]:
        """Split x into the filters of each bucket."""
        if len(self.buckets) == 1:
            return [x]
        return list(x.index_select(dim, self.filters).split([count for count, _ in self.buckets], dim))

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """Concatenate the buckets and restore the order of the filters."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim).index_select(dim, self.back)


class Modes(NamedTuple):
    """The modes of several filters on one flat axis, filter by filter."""

    poles: Tensor  # (mode,) complex
    residues: Tensor  # (mode,) complex
    direct: Tensor  # (filter,) D
    layout: Layout
    real: bool = False  # whether all poles and residues are real: states then have one component instead of two

    def buckets(self) -> list[tuple[Tensor, Tensor]]:  # poles and residues, (filter of the bucket, mode of the filter)
        counts = [count * size for count, size in self.layout.buckets]
        poles, residues = (x.index_select(0, self.layout.modes).split(counts) for x in (self.poles, self.residues))
        return [
            (p.view(shape), r.view(shape)) for p, r, shape in zip(poles, residues, self.layout.buckets, strict=True)
        ]

    def taps(self, length: int) -> Tensor:  # (filter, length) real
        """h_t = Re Σ_m R_m λ_m^t + D [t = 0] of each filter, as products λ^{Ca+b} = λ^{Ca} λ^b."""
        found = []
        for poles, residues in self.buckets():
            near, last = powers(poles, CHUNK + 1).split([CHUNK, 1], dim=-1)
            far = residues[..., None] * powers(last[..., 0], -(-length // CHUNK))
            h = torch.cat([far.real, -far.imag], dim=1).mT @ torch.cat([near.real, near.imag], dim=1)
            found.append(h.flatten(1)[:, :length].to(self.direct.dtype))
        taps = self.layout.join(found, 0)
        return torch.cat([taps[:, :1] + self.direct[:, None], taps[:, 1:]], dim=1)


class ChannelState:
    """The modes of filters on single channels: x ← λ x + k v, y = q (Re Σ_m R_m x_m + D k v)."""

    def __init__(self, modes: Modes, batch: int):
        self.layout, self.direct, self.modes, self.real = modes.layout, modes.direct, modes.buckets(), modes.real
        # Re λ, Im λ, Re R and Im R of each bucket: a compiled step uses no complex numbers.
        self.numbers = [[x for z in own for x in (z.real.contiguous(), z.imag.contiguous())] for own in self.modes]
        components = 1 if self.real else 2
        self.parts = [writable(modes.direct.new_zeros(batch, components, *poles.shape)) for poles, _ in self.modes]

    @property
    def tensors(self) -> list[Tensor]:  # each (batch, component, filter, mode)
        return self.parts

    def select(self, rows: Tensor):
        self.parts = [writable(part.index_select(0, rows.to(part.device))) for part in self.parts]

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token: q is (batch, filter, query, 1), k and v (batch, filter, 1, 1); returns as q."""
        u = k * v
        in_place, reads = may_overwrite(self.tensors), []
        for index, own in enumerate(self.layout.split(u[..., 0], 1)):
            a, b, c, d = self.numbers[index]
            if self.real:
                re = torch.addcmul(own, a, self.parts[index][:, 0])
                if in_place:
                    self.parts[index][:, 0] = re
                else:
                    self.parts[index] = re[:, None]
                reads.append((c * re).sum(-1))
                continue
            re, im = self.parts[index].unbind(1)
            new_re = torch.addcmul(torch.addcmul(own, a, re), b, im, value=-1)
            if in_place:
                im.mul_(a).addcmul_(b, re)
                re.copy_(new_re)
            else:
                re, im = new_re, torch.addcmul(a * im, b, re)
                self.parts[index] = torch.stack([re, im], dim=1)
            reads.append((c * re).addcmul(d, im, value=-1).sum(-1))
        return q * (self.layout.join(reads, 1)[..., None, None] + self.direct[:, None, None] * u)

    def settle(self):
        """Nothing to do: each step updates the whole state."""

    def read(self, q: Tensor) -> Tensor:  # (batch, filter, query, length, 1), from the token after the state's on
        """q_t Re Σ_m R_m λ^{t+1} x_m, as products λ^{Ca+b+1} = λ^{Ca} λ^{b+1}."""
        found, length = [], q.shape[3]
        for (poles, residues), part in zip(self.modes, self.parts, strict=True):
            table = powers(poles, CHUNK + 1)
            strides = powers(table[..., -1], -(-length // CHUNK)).to(poles.dtype)
            near = (residues[..., None] * table[..., 1:]).to(poles.dtype)
            x = self._complex(part).movedim(0, 1)  # (filter, batch, mode)
            far = (x[:, :, None] * strides.mT[:, None]).flatten(1, 2)  # (filter, batch · chunk, mode)
            y = torch.cat([far.real, -far.imag], dim=-1) @ torch.cat([near.real, near.imag], dim=1)
            found.append(y.unflatten(1, (len(part), -1)).flatten(2)[..., :length].movedim(0, 1))
        return q * self.layout.join(found, 1)[:, :, None, :, None]

    def advance(self, k: Tensor, v: Tensor):  # (batch, filter, length, 1)
        """x ← λ^L x + Σ_t λ^{L-1-t} k_t v_t: real matrix products within chunks, then a sum over chunks."""
        u = (k * v)[..., 0]
        length = u.shape[-1]
        u = F.pad(u, (-length % CHUNK, 0)).movedim(0, 1).unflatten(-1, (-1, CHUNK))  # (filter, batch, chunk, token)
        for index, own in enumerate(self.layout.split(u, 0)):
            poles, part = self.modes[index][0], self.parts[index]
            table = powers(poles, CHUNK + 1)
            near = table[..., :CHUNK].flip(-1).mT.to(poles.dtype)
            sums = own.flatten(1, 2) @ torch.cat([near.real, near.imag], dim=-1)  # (filter, batch · chunk, 2 mode)
            sums = torch.complex(*sums.unflatten(1, own.shape[1:3]).chunk(2, dim=-1))
            strides = powers(table[..., -1], own.shape[2]).flip(-1).mT.to(poles.dtype)  # (filter, chunk, mode)
            x = (sums * strides[:, None]).sum(2).movedim(0, 1)
            x = x + self._complex(part) * _power(poles, length)
            self.parts[index] = writable(torch.stack([x.real] if self.real else [x.real, x.imag], dim=1))

    def _complex(self, part):
        re, *im = part.unbind(1)
        return torch.complex(re, *(im or [torch.zeros_like(re)]))


class HeadState:
    """The modes of filters on groups of channels: X ← λ X + k vᵀ, y = Re Σ_m R_m qᵀ X_m + D (q · k) v.

    In a large batch the time of a step is that of reading and writing this state. So the last `places` keys and values
    are pending in a ring buffer. The rows of X (channels of k) are cut into as many slices, and each token settles one
    slice: it applies the pending updates to the slice and zeroes the slice's channels in the pending keys. A slice of
    `age` n, the tokens since it was settled, is read as λ^n X; the pending keys add the rest through the filter's taps:

        y = Re Σ_m R_m λ^{age} qᵀ X_m + Σ_p h_{t-p} (q · k_p) v_p        X ← λ^{age} X + Σ_p λ^{t-p} k_p v_pᵀ
    """

    def __init__(self, modes: Modes, batch: int, width: int, value_width: int | None = None):
        value_width = width if value_width is None else value_width  # that of q and k is `width`
        self.layout, self.real = modes.layout, modes.real
        self.places = ring_places(width)
        zeros = modes.direct.new_zeros
        self.taps = modes.taps(self.places).T.contiguous()  # (place, filter)
        self.modes, self.decays, self.reads, self.parts = modes.buckets(), [], [], []
        for poles, residues in self.modes:
            table = powers(poles, self.places + 1).movedim(-1, 0)  # (power, filter, mode)
            self.decays.append(self._numbers(table, poles.dtype))
            # Re R x = Re R · Re x - Im R · Im x
            self.reads.append(self._numbers((residues * table).conj(), poles.dtype))
            shape = *poles.shape, 1 if self.real else 2, width // self.places, value_width
            self.parts.append(writable(zeros(batch, shape[0], self.places, *shape[1:])))
        self.values = writable(zeros(batch, len(modes.direct), self.places, value_width))
        self.keys = writable(self._sliced(zeros(batch, len(modes.direct), self.places, width)))
        self.ages = torch.zeros(batch, self.places, dtype=torch.long, device=self.keys.device)
        self.place = self.ages.new_zeros(1)  # of the next token in the ring, the same for all rows

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.parts, self.keys, self.values, self.ages]

    def select(self, rows: Tensor):
        rows = rows.to(self.keys.device)
        self.parts = [writable(part.index_select(0, rows)) for part in self.parts]
        kept = (self.keys, self.values, self.ages)
        self.keys, self.values, self.ages = (writable(x.index_select(0, rows)) for x in kept)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token: q (batch, filter, query, width), k and v (batch, filter, 1, width); returns sums of v, as q."""
        write = torch.Tensor.index_copy_ if may_overwrite(self.tensors) else torch.Tensor.index_copy
        self.keys = write(self.keys, 2, self.place, self._sliced(k))
        self.values = write(self.values, 2, self.place, v)
        self.ages = self.ages + 1
        y = ((q @ self.keys.flatten(3).mT) * self.taps[self._behind()].T[:, None]) @ self.values
        y = y + self._read(q, [reads[self.ages].movedim(2, 1)[:, :, None] for reads in self.reads])
        self._settle(self.place, self._behind(), write)
        self.place = (self.place + 1) % self.places
        return y

    def read(self, q: Tensor) -> Tensor:  # (batch, filter, query, length, width), from the token after the state's on
        """Re Σ_m R_m λ^{t+1} q_tᵀ X_m of a settled state."""
        found, weights = [], []
        for poles, residues in self.modes:
            table = residues[..., None] * powers(poles, q.shape[3] + 1)[..., 1:]
            # (filter, token, 1, mode, component)
            weights.append(self._numbers(table.conj().mT, poles.dtype)[:, :, None])
        for start in range(0, q.shape[3], CHUNK):
            chunk = slice(start, start + CHUNK)
            own = q[:, :, :, chunk]
            read = self._read(
                own.flatten(2, 3), [weight[:, chunk].repeat(1, q.shape[2], 1, 1, 1) for weight in weights]
            )
            found.append(read.unflatten(2, own.shape[2:4]))
        return torch.cat(found, dim=3)

    def advance(self, k: Tensor, v: Tensor):  # (batch, filter, length, width)
        """X ← λ^L X + Σ_t λ^{L-1-t} k_t v_tᵀ of a settled state, chunk by chunk."""
        # Each (filter, power, mode, component).
        tables = [self._numbers(powers(poles, CHUNK + 1).mT, poles.dtype) for poles, _ in self.modes]
        for own, other in zip(k.split(CHUNK, 2), v.split(CHUNK, 2), strict=True):
            length = own.shape[2]
            keys, values = (self.layout.split(x, 1) for x in (self._sliced(own), other))
            for index, table in enumerate(tables):
                added = _outer(keys[index], values[index], table[:, :length].flip(1))
                self.parts[index] = _add_turned(added, self.parts[index], table[None, :, None, length])
        self.parts = [writable(part) for part in self.parts]

    def settle(self):
        """Apply all pending updates, so that every slice is up to date."""
        every = torch.arange(self.places, device=self.place.device)
        self._settle(every, (self.place - 1 - every) % self.places, torch.Tensor.index_copy)
        self.parts, self.keys = [writable(part) for part in self.parts], writable(self.keys)

    def _settle(self, slices, behind, write):
        """X ← λ^{age} X + Σ_p λ^{behind_p} k_p v_pᵀ in these slices; zeroes their channels in the pending keys."""
        waiting = self.keys.index_select(3, slices)
        keys = self.layout.split(waiting, 1)
        values = self.layout.split(self.values, 1)
        ages = self.ages.index_select(1, slices)
        for index, (part, decays) in enumerate(zip(self.parts, self.decays, strict=True)):
            added = _outer(keys[index], values[index], decays[behind].movedim(0, 1))
            new = _add_turned(added, part.index_select(2, slices), decays[ages].movedim(2, 1))
            self.parts[index] = write(part, 2, slices, new)
        self.keys = write(self.keys, 3, slices, torch.zeros_like(waiting))
        self.ages = self.ages.index_fill(1, slices, 0)

    def _read(self, q, weights):
        """Σ weights · qᵀ X, for weights (batch or 1, filter, token, slice or 1, mode, component) of each bucket."""
        found = []
        for own, weight, part in zip(self.layout.split(self._sliced(q), 1), weights, self.parts, strict=True):
            spread = (own[..., None, None, :] * weight[..., None]).flatten(3)
            found.append(spread @ part.flatten(2, 5))
        return self.layout.join(found, 1)

    def _behind(self):
        """For each place of the ring, the tokens written since then; 0 for the newest."""
        return (self.place - torch.arange(self.places, device=self.place.device)) % self.places

    def _sliced(self, x):
        return x.unflatten(-1, (self.places, -1))  # (batch, filter, token, slice, channel of the slice)

    def _numbers(self, x, dtype):
        """Complex numbers as real ones, with a last axis of components."""
        x = x.to(dtype).resolve_conj()
        return x.real[..., None].contiguous() if self.real else torch.view_as_real(x.contiguous())


def modal_scan(
    q: Tensor,  # (batch, filter, query, length, width)
    k: Tensor,  # (batch, filter, length, width)
    v: Tensor,  # (batch, filter, length, width)
    taps: Tensor,  # (filter, min(length, CHUNK) or more)
    state: HeadState,
) -> Tensor:  # (batch, filter, query, length, width)
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s, by the taps within chunks and by the state, settled, across chunks."""
    outputs = []
    for a, b, c in zip(q.split(CHUNK, 3), k.split(CHUNK, 2), v.split(CHUNK, 2), strict=True):
        within = weighted(score(a, b) * toeplitz_block(taps, slice(0, a.shape[3]))[:, None], c)
        outputs.append(within + state.read(a))
        state.advance(b, c)
    return torch.cat(outputs, dim=3)


def ring_places(width: int) -> int:
    """Places in the ring of a HeadState, also its number of slices: the largest divisor of `width` up to PARTS."""
    return max(count for count in range(1, PARTS + 1) if width % count == 0)


def may_overwrite(states: list[Tensor]) -> bool:
    """Whether a step may write to the states in place: no gradient is recorded here, and none flows through them."""
    return not (torch.is_grad_enabled() or any(state.requires_grad for state in states))


def writable(state: Tensor) -> Tensor:
    """The state as a tensor that a step may write to in place, inside and outside inference mode.

    Called where states are made and not in the step: TorchDynamo breaks the graph at a question about inference mode.
    """
    if torch.compiler.is_compiling() or not state.is_inference():
        return state
    with torch.inference_mode(False), torch.no_grad():
        return state.clone()


def _outer(k, v, weights):
    """Σ_t w_t k_t v_tᵀ of k (batch, filter, token, slice, row) and v (batch, filter, token, width).

    The weights are (filter, token, mode, component); the result is (batch, filter, slice, mode, component, row, width),
    as states are.
    """
    spread = k[..., None, None, :] * weights[:, :, None, :, :, None]
    return (spread.flatten(3).mT @ v).unflatten(2, spread.shape[3:])


def _add_turned(added, x, factor):
    """added + factor · x, in place.

    x is (batch, filter, slice, mode, component, row, width), the factor (batch or 1, filter, slice or 1, mode,
    component).
    """
    factor = factor[..., None, None]
    if x.shape[4] == 1:
        return added.addcmul_(x, factor)
    (re, im), (a, b) = x.unbind(4), factor.unbind(4)
    added.select(4, 0).addcmul_(re, a).addcmul_(im, b, value=-1)
    added.select(4, 1).addcmul_(im, a).addcmul_(re, b)
    return added


def _power(poles, exponent):
    """λ^n, computed in float64."""
    return (poles.to(torch.complex128) ** exponent).to(poles.dtype)
