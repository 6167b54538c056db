"""The modal form: a filter as a sum of complex exponentials, and the recurrence that runs it.

The one convention, used everywhere; time starts at 0, the real part is taken, there is no factor 2:

    h_t = Re Σ_m R_m λ_m^t        x_t = λ ⊙ x_{t-1} + u_t,  x_{-1} = 0        y_t = Re Σ_m R_m x_{t,m} + D u_t

Poles λ are per token, |λ| < 1. Source: arXiv:2310.18780, section 3; the matrix-valued input u = k vᵀ is that of
MultiHyena, section 4. States are real tensors, with an axis for the components of each mode: its real and imaginary
part, or the real part alone where poles and residues are real. The modes of all filters are on one axis, sorted by the
state sizes of their filters into buckets: a step takes all of them at once, and the filters of one bucket, which have
equally many modes, form dense arrays without padding.

A state object holds the states of a batch and the constants of the modes that a step reads. `step` takes one token. For
several tokens call `read` for the contribution of the tokens before to the outputs, and `advance`. Without gradients a
step updates its states in place; otherwise it makes new ones.

A state may be kept in a narrower dtype, as bfloat16: everything is computed in that of the modes, and only what is kept
for the next token is rounded.
"""

from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


CHUNK = 64  # tokens processed at once: few enough for the caches of a CPU
# The same for groups of channels, whose chunks are products in machine code between some twenty calls of torch: 256 was
# the quickest of 64 to 512, on two cores at widths of 8 to 64. On a GPU a chunk costs as many launches.
HEAD_CHUNK, GPU_CHUNK = 256, 512


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


def chunk_of(x: Tensor) -> int:
    """Tokens that `HeadState` and `modal_scan` process at once."""
    return GPU_CHUNK if x.is_cuda else HEAD_CHUNK


class Layout:
    """Filters sorted by state size; `buckets` lists (number of filters, state size)."""

    def __init__(self, state_sizes: list[int], device: torch.device):
        starts = [0, *accumulate(state_sizes)]
        filters = sorted(range(len(state_sizes)), key=lambda index: state_sizes[index])
        self.buckets = [(count, size) for size, count in sorted(Counter(state_sizes).items())]
        self.counts = [count * size for count, size in self.buckets]  # modes
        with torch.inference_mode(False):  # usable in a backward pass too
            self.filters = torch.tensor(filters, device=device)
            self.back = self.filters.argsort()
            modes = [mode for index in filters for mode in range(starts[index], starts[index + 1])]
            self.modes = torch.tensor(modes, dtype=torch.long, device=device)
            owners = [index for index in filters for _ in range(state_sizes[index])]
            self.owners = torch.tensor(owners, dtype=torch.long, device=device)
            self.sizes = torch.tensor(state_sizes, dtype=torch.long, device=device)
            sorted_sizes = self.sizes[self.filters]
            self.first = (sorted_sizes.cumsum(0) - sorted_sizes)[self.back]  # place of each filter's first mode

    def split(self, x: Tensor, dim: int) -> list[Tensor]:
        """Split x into the filters of each bucket."""
        if len(self.buckets) == 1:
            return [x]
        return list(x.index_select(dim, self.filters).split([count for count, _ in self.buckets], dim))

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """Concatenate the buckets and restore the order of the filters."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim).index_select(dim, self.back)

    def spread(self, x: Tensor) -> Tensor:
        """(batch, filter, …) as (batch, mode, …): each mode gets what its filter has."""
        return x if self.buckets == [(x.shape[1], 1)] else x.index_select(1, self.owners)

    def bucketed(self, x: Tensor, dim: int) -> list[Tensor]:
        """Split an axis of modes into the buckets, each with an axis of filters and one of the modes of a filter."""
        return [
            part.unflatten(dim, bucket) for part, bucket in zip(x.split(self.counts, dim), self.buckets, strict=True)
        ]


class Modes(NamedTuple):
    """The modes of several filters on one flat axis, filter by filter."""

    poles: Tensor  # (mode,) complex
    residues: Tensor  # (mode,) complex
    direct: Tensor  # (filter,) D
    layout: Layout
    real: bool = False  # whether all poles and residues are real: states then have one component instead of two

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Poles and residues in the order of the layout."""
        return self.poles.index_select(0, self.layout.modes), self.residues.index_select(0, self.layout.modes)

    def numbers(self) -> list[Tensor]:
        """What machine code reads: poles and residues, each (component, mode), direct, places of modes, their number.

        Components are real and imaginary part, or the real part alone where all are real.
        """
        components = [
            torch.stack([x.real] if self.real else [x.real, x.imag]).to(self.direct.dtype) for x in self.sorted()
        ]
        return [*components, self.direct, self.layout.first, self.layout.sizes]

    def buckets(self) -> list[tuple[Tensor, Tensor]]:  # poles and residues, (filter of the bucket, mode of the filter)
        return list(zip(*(self.layout.bucketed(x, 0) for x in self.sorted()), strict=True))

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
        self.numbers = modes.numbers()  # real numbers: a compiled step uses no complex ones
        components = 1 if self.real else 2
        # (batch, component, mode)
        self.state = writable(modes.direct.new_zeros(batch, components, len(modes.poles)))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.state]

    @property
    def parts(self) -> list[Tensor]:
        """The state of each bucket, (batch, component, filter, mode), in the dtype of the modes."""
        return self.layout.bucketed(self.state.to(self.direct.dtype), 2)

    def select(self, rows: Tensor):
        self.state = writable(self.state.index_select(0, rows.to(self.state.device)))

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token: q is (batch, filter, query, 1), k and v (batch, filter, 1, 1); returns as q."""
        u = k * v
        added = self.layout.spread(u[..., 0, 0])
        poles, residues, *_ = self.numbers
        self.state, new = _turned(self.state, 1, poles, added)
        re, *im = new.unbind(1)
        read = residues[0] * re
        if im:
            read = torch.addcmul(read, residues[1], im[0], value=-1)
        sums = self.layout.join([part.sum(-1) for part in self.layout.bucketed(read, 1)], 1)
        return q * (sums[..., None, None] + self.direct[:, None, None] * u)

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
        length, found = u.shape[-1], []
        u = F.pad(u, (-length % CHUNK, 0)).movedim(0, 1).unflatten(-1, (-1, CHUNK))  # (filter, batch, chunk, token)
        for (poles, _), part, own in zip(self.modes, self.parts, self.layout.split(u, 0), strict=True):
            table = powers(poles, CHUNK + 1)
            near = table[..., :CHUNK].flip(-1).mT.to(poles.dtype)
            sums = own.flatten(1, 2) @ torch.cat([near.real, near.imag], dim=-1)  # (filter, batch · chunk, 2 mode)
            sums = torch.complex(*sums.unflatten(1, own.shape[1:3]).chunk(2, dim=-1))
            strides = powers(table[..., -1], own.shape[2]).flip(-1).mT.to(poles.dtype)  # (filter, chunk, mode)
            x = (sums * strides[:, None]).sum(2).movedim(0, 1)
            x = x + self._complex(part) * _power(poles, length)
            found.append(torch.stack([x.real] if self.real else [x.real, x.imag], dim=1).flatten(2))
        self.state = writable(torch.cat(found, dim=2).to(self.state.dtype))

    def _complex(self, part):
        re, *im = part.unbind(1)
        return torch.complex(re, *(im or [torch.zeros_like(re)]))


class HeadState:
    """The modes of filters on groups of channels: X ← λ X + k vᵀ, y = Re Σ_m R_m qᵀ X_m + D (q · k) v."""

    def __init__(self, modes: Modes, batch: int, width: int, value_width: int | None = None):
        value_width = width if value_width is None else value_width  # that of q and k is `width`
        self.layout, self.direct, self.modes, self.real = modes.layout, modes.direct, modes.buckets(), modes.real
        self.numbers = modes.numbers()
        poles, residues = modes.sorted()
        # The read-out as one matrix: Re R x = Re R · Re x - Im R · Im x.
        own = F.one_hot(self.layout.owners, len(modes.direct)).to(modes.direct.dtype)  # (mode, filter)
        read_out = own.T[..., None] * self._numbers(residues.conj(), poles.dtype)
        self.read_out = read_out.flatten(1)  # (filter, mode · component)
        components = 1 if self.real else 2
        # (batch, mode, component, channel of k, channel of v)
        self.state = writable(modes.direct.new_zeros(batch, len(poles), components, width, value_width))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.state]

    @property
    def parts(self) -> list[Tensor]:
        """The state of each bucket, (batch, filter, mode, component, channel of k, channel of v), as the modes."""
        return self.layout.bucketed(self.state.to(self.direct.dtype), 1)

    def select(self, rows: Tensor):
        self.state = writable(self.state.index_select(0, rows.to(self.state.device)))

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token: q (batch, filter, query, width), k and v (batch, filter, 1, width); returns sums of v, as q."""
        added = self.layout.spread(k).mT * self.layout.spread(v)
        self.state, new = _turned(self.state, 2, self.numbers[0][..., None, None], added)
        reads = self.layout.spread(q)[:, :, None] @ new  # (batch, mode, component, query, channel)
        y = self.read_out @ reads.flatten(3).flatten(1, 2)
        return y.unflatten(2, reads.shape[3:]) + self.direct[:, None, None] * (q @ k.mT) * v

    def read(self, q: Tensor) -> Tensor:  # (batch, filter, query, length, width), from the token after the state's on
        """Re Σ_m R_m λ^{t+1} q_tᵀ X_m."""
        found, tables = [], []
        for poles, residues in self.modes:
            table = residues[..., None] * powers(poles, q.shape[3] + 1)[..., 1:]
            tables.append(self._numbers(table.conj().mT, poles.dtype))  # (filter, token, mode, component)
        parts = [part.flatten(2, 4) for part in self.parts]
        for start in range(0, q.shape[3], chunk_of(q)):
            chunk = slice(start, start + chunk_of(q))
            reads = []
            for own, table, part in zip(self.layout.split(q[:, :, :, chunk], 1), tables, parts, strict=True):
                spread = own[..., None, None, :] * table[:, None, chunk, ..., None]
                reads.append((spread.flatten(4).flatten(2, 3) @ part).unflatten(2, own.shape[2:4]))
            found.append(self.layout.join(reads, 1))
        return torch.cat(found, dim=3)

    def advance(self, k: Tensor, v: Tensor):  # (batch, filter, length, width)
        """X ← λ^L X + Σ_t λ^{L-1-t} k_t v_tᵀ, chunk by chunk."""
        # Each (filter, power, mode, component).
        size = min(chunk_of(k), k.shape[2])
        tables = [self._numbers(powers(poles, size + 1).mT, poles.dtype) for poles, _ in self.modes]
        parts = self.parts
        for keys, values in zip(k.split(size, 2), v.split(size, 2), strict=True):
            length = keys.shape[2]
            own = zip(self.layout.split(keys, 1), self.layout.split(values, 1), tables, strict=True)
            for index, (key, value, table) in enumerate(own):
                added = _outer(key, value, table[:, :length].flip(1))
                parts[index] = _add_turned(added, parts[index], table[:, length])
        self.state = writable(torch.cat([part.flatten(1, 2) for part in parts], dim=1).to(self.state.dtype))

    def _numbers(self, x, dtype):
        """Complex numbers as real ones, with a last axis of components."""
        x = x.to(dtype).resolve_conj()
        return x.real[..., None].contiguous() if self.real else torch.view_as_real(x.contiguous())


def modal_scan(
    q: Tensor,  # (batch, filter, query, length, width)
    k: Tensor,  # (batch, filter, length, width)
    v: Tensor,  # (batch, filter, length, width)
    taps: Tensor,  # (filter, min(length, chunk_of(q)) or more)
    state: HeadState,
    product: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],  # hyena.long_convolution
) -> Tensor:  # (batch, filter, query, length, width)
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s, by the taps within chunks and by the state across chunks."""
    outputs, size = [], chunk_of(q)
    for a, b, c in zip(q.split(size, 3), k.split(size, 2), v.split(size, 2), strict=True):
        outputs.append(product(a, b, c, taps) + state.read(a))
        state.advance(b, c)
    return torch.cat(outputs, dim=3)


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


def _turned(state, dim, pole, added):
    """λ x + added for a state with an axis `dim` of components: as it is kept, in place if allowed, and unrounded."""
    in_place = may_overwrite([state])
    if state.dtype != added.dtype:
        _, new = _turned(state.to(added.dtype), dim, pole, added)
        return (state.copy_(new) if in_place else new.to(state.dtype)), new
    a, *b = pole
    if state.shape[dim] == 1:
        x = state.select(dim, 0)
        new = torch.addcmul(added, a, x)
        if in_place:
            x.copy_(new)
            return state, state
        new = new.unsqueeze(dim)
        return new, new
    re, im = state.unbind(dim)
    new_re = torch.addcmul(torch.addcmul(added, a, re), b[0], im, value=-1)
    if in_place:
        im.mul_(a).addcmul_(b[0], re)
        re.copy_(new_re)
        return state, state
    new = torch.stack([new_re, torch.addcmul(a * im, b[0], re)], dim=dim)
    return new, new


def _outer(k, v, weights):
    """Σ_t w_t k_t v_tᵀ of k (batch, filter, token, row) and v (batch, filter, token, width).

    The weights are (filter, token, mode, component); the result is (batch, filter, mode, component, row, width).
    """
    spread = k[..., None, None, :] * weights[..., None]
    return (spread.flatten(3).mT @ v).unflatten(2, spread.shape[3:])


def _add_turned(added, x, factor):
    """added + factor · x, in place: (batch, filter, mode, component, row, width), factor (filter, mode, component)."""
    factor = factor[..., None, None]
    if x.shape[3] == 1:
        return added.addcmul_(x, factor)
    (re, im), (a, b) = x.unbind(3), factor.unbind(2)
    added.select(3, 0).addcmul_(re, a).addcmul_(im, b, value=-1)
    added.select(3, 1).addcmul_(im, a).addcmul_(re, b)
    return added


def _power(poles, exponent):
    """λ^n, computed in float64."""
    return (poles.to(torch.complex128) ** exponent).to(poles.dtype)
