"""Exact decoding: long convolutions token by token, without approximation and without processing the input again.

    y_t = Σ_{s≤t} h_{t-s} u_s

The plane of pairs (s, t), s < t, is divided into tiles. After n tokens, with U the largest power of two that divides n,
the contribution of the last U inputs to the next U outputs is computed by one FFT of length 2U. A tile of size U occurs
once every 2U tokens, so L tokens cost O(L log² L). Source: arXiv:2410.12982, algorithm 1, and arXiv:2410.03766.

All inputs are kept: the outputs are exact, but the state grows. No gradients flow through the cache.
"""

import torch
from torch import Tensor

from .attention import Ring
from .convolution import BLOCK, causal_convolution, score, toeplitz_block, weighted
from .hyena import long_convolution


# Measured on one core at 512 channels: with 16 to 64 the time of a token varied by at most a quarter, at batch 1 and at
# batch 16; with 256 it was 1.5 times as long, and at batch 16 two to four times.
NEAR = 32  # recent inputs that are summed directly; the smallest tile
PIECE = 1 << 18  # most numbers in one FFT call: with more a large batch took twice as long
# Tiles store and transform `width` numbers per channel and token; keys and values are only two. Measured at 512
# channels, both took the same time over the first 1,000 tokens at width 8; tiles took 1.5 times as long over the first
# 2,000 at width 16, and about 20 times as long over 1,000 at width 64.
TILED_WIDTH = 8  # largest head width whose convolution is tiled


class ExactCacheLayer:
    """The cache of a mixer with implicit filters: its short convolution's last inputs, its windows, all long inputs."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, config):
        self.conv_state: Tensor | None = None  # (batch, tap - 1, channel of q, k, v and gates)
        self.near, self.kept = Ring(), Ring()
        self.taps: Tensor | None = None  # (filter, tokens so far or more)
        online = OnlineConvolution if config.filter_head_width <= TILED_WIDTH else OnlineProduct
        self.convolutions = [online() for _ in range(config.hyena_order)]
        self.graph = False  # whether tokens were read with gradients enabled; nothing of them is cached

    def admit(self):
        """Raise ValueError where gradients would be lost silently."""
        if self.graph or (torch.is_grad_enabled() and self.convolutions[0].read):
            raise ValueError("cache of implicit filters holds no gradients; expected torch.no_grad() throughout")
        self.graph = torch.is_grad_enabled()

    def taps_for(self, filter, length: int) -> Tensor:  # (filter, tokens so far + `length`, or more)
        """The filter's taps; after the prompt, recomputed up to the next power of two whenever more are needed."""
        total = self.convolutions[0].read + length
        if self.taps is None or self.taps.shape[1] < total:
            self.taps = filter(length if total == length else 1 << (total - 1).bit_length())
            self.taps = self.taps.T.contiguous().T  # a step reads a few lags of all filters
        return self.taps

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        held = (*self.rings, *self.convolutions)
        return self.conv_state, self.taps, *(state for each in held for state in each.states)

    @property
    def rings(self) -> list[Ring]:
        return [ring for ring in (self.near, self.kept) if ring.keys is not None]

    def select(self, rows: Tensor):
        if self.conv_state is not None:
            self.conv_state = self.conv_state.index_select(0, rows.to(self.conv_state.device))
            for each in (*self.rings, *self.convolutions):
                each.select(rows)


class OnlineConvolution:
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s by tiles over u_s = k_s v_sᵀ, for any number of new tokens."""

    def __init__(self):
        # (batch, `read` or more, filter, width²): u, followed by its contributions to later outputs
        self.line: Tensor | None = None
        self.read = 0
        self.tiled = 0  # number of inputs whose tiles have been computed

    def advance(
        self,
        q: Tensor,  # (batch, filter, query, length, width)
        k: Tensor,  # (batch, filter, length, width): after those already read
        v: Tensor,  # (batch, filter, length, width)
        taps: Tensor,  # (filter, all tokens including these); after the first call a power of two, or more
    ) -> Tensor:  # (batch, filter, query, length, width)
        u = (k[..., :, None] * v[..., None, :]).flatten(-2).transpose(1, 2)
        if self.read == 0:
            self.line, self.read = u.contiguous(), u.shape[1]
            return long_convolution(q, k, v, taps)
        convolved = self._convolve(u, taps).transpose(1, 2).unflatten(-1, (-1, q.shape[-1]))
        return (q[..., None] * convolved[:, :, None]).sum(-2)

    def _convolve(self, u, taps):
        outputs = [u[:, :0]]
        while u.shape[1]:
            # The tiles contain all inputs before `near` for the outputs up to the end of the tile that ends at `near`.
            near = self.read - self.read % NEAR
            self._tile(near, taps)
            length = min(u.shape[1], near + (near & -near) - self.read) if near else u.shape[1]
            outputs.append(self._block(u[:, :length], near, taps))
            u = u[:, length:]
        return torch.cat(outputs, dim=1)

    def _tile(self, count, taps):
        """Compute the tiles of the first `count` inputs that reach later outputs: one per binary digit 1 of `count`."""
        end = 0
        for size in _powers_of_two(count if count > self.tiled else 0):
            end += size
            if end > self.tiled:
                self.line = _writable(self.line, 1, end + size)
                inputs, sums = self.line[:, end - size : end], self.line[:, self.read : end + size]
                spectrum = torch.fft.rfft(taps[:, None, : 2 * size])
                rows = max(1, PIECE // (2 * size * self.line.shape[2:].numel()))
                for first in range(0, len(self.line), rows):
                    part = slice(first, first + rows)
                    sums[part] += tile(inputs[part].movedim(1, -1), spectrum).movedim(-1, 1)[:, self.read - end :]
        self.tiled = max(count, self.tiled)

    def _block(self, u, near, taps):
        """The next outputs: the sums from the tiles plus the contributions of the inputs from `near` on."""
        stop = self.read + u.shape[1]
        self.line = _writable(self.line, 1, max(stop, NEAR))
        sums = self.line[:, self.read : stop].clone()
        self.line[:, self.read : stop] = u
        inputs = self.line[:, near:stop]
        if u.shape[1] == 1:
            y = sums.add_((inputs * taps[:, : stop - near].T.flip(0)[..., None]).sum(1, keepdim=True))
        else:
            y = causal_convolution(inputs.movedim(1, -1), taps[:, None]).movedim(-1, 1)[:, self.read - near :] + sums
        self.read = stop
        return y

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        return (self.line,)

    def select(self, rows: Tensor):
        if self.line is not None:
            self.line = self.line.index_select(0, rows.to(self.line.device))


def tile(
    u: Tensor,  # (…, size)
    spectrum: Tensor,  # (…, size + 1) complex: of the first 2 · size taps
) -> Tensor:  # (…, size)
    """Σ_s h_{size+t-s} u_s for t < size: the contribution of `size` inputs to the next `size` outputs.

    The FFT is only as long as the taps: just the outputs that are discarded wrap around.
    """
    size = u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, n=2 * size) * spectrum, n=2 * size)[..., size:]


class OnlineProduct:
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s by a product with all keys and values, for any number of new tokens."""

    def __init__(self):
        self.keys: Tensor | None = None  # (batch, filter, `read` or more, width)
        self.values: Tensor | None = None
        self.read = 0

    def advance(
        self,
        q: Tensor,  # (batch, filter, query, length, width)
        k: Tensor,  # (batch, filter, length, width): after those already read
        v: Tensor,  # (batch, filter, length, width)
        taps: Tensor,  # (filter, all tokens including these, or more)
    ) -> Tensor:  # (batch, filter, query, length, width)
        start, self.read = self.read, self.read + q.shape[3]
        if start == 0:
            self.keys, self.values = k.contiguous(), v.contiguous()
            return long_convolution(q, k, v, taps)
        room = 1 << (self.read - 1).bit_length()
        self.keys, self.values = (_writable(states, 2, room) for states in self.states)
        self.keys[:, :, start : self.read], self.values[:, :, start : self.read] = k, v
        outputs = [q[:, :, :, :0]]
        for first in range(start, self.read, BLOCK):
            rows = slice(first, min(first + BLOCK, self.read))
            keys, values = (states[:, :, : rows.stop] for states in self.states)
            scores = score(q[:, :, :, first - start : rows.stop - start], keys)
            outputs.append(weighted(scores.mul_(toeplitz_block(taps, rows)[:, None]), values))
        return torch.cat(outputs, dim=3)

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        return self.keys, self.values

    def select(self, rows: Tensor):
        if self.keys is not None:
            self.keys, self.values = (states.index_select(0, rows.to(states.device)) for states in self.states)


def _writable(states, dim, length):
    """The states, zero-padded to at least `length` tokens if shorter, in a tensor that can be written in place."""
    held = states.shape[dim]
    if held >= length and (torch.is_inference_mode_enabled() or not states.is_inference()):
        return states
    shape = list(states.shape)
    shape[dim] = max(held, length)
    grown = states.new_zeros(shape)
    grown.narrow(dim, 0, held).copy_(states)
    return grown


def _powers_of_two(number):
    """The powers of two that sum to `number`, largest first."""
    return [1 << place for place in reversed(range(number.bit_length())) if number >> place & 1]
