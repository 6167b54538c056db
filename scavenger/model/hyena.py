"""The Hyena mixer, which replaces attention.

    y_t = Σ_{s≤t} h^m_{t-s} (q_t · k_s) v_s        q, k, v: short convolutions of the projections

with one long filter h^m for each group m of `filter_head_width` channels. Width 1 is Hyena with one long convolution,
y = q ⊙ (h * (k ⊙ v)) (arXiv:2302.10866); a wider group is MultiHyena (arXiv:2310.18780, section 4), which with the
teacher's head width is linear attention with a learned filter of the relative position. q and k then keep the teacher's
rotary embedding: (R_t q)·(R_s k) depends only on t - s, so the recurrence needs no extra state for it.

Where several heads of q share a head of k and v, as in the teacher, they share its filter and its state.

`hyena_order` is the number of long convolutions. From 2 on it is the full recurrence of arXiv:2302.10866, section 3,

    z^1 = v        z^{n+1}_t = x^n_t (h^n * z^n)_t        y = z^{N+1}

on single channels, with x^1 = k and x^N = q of the teacher; the gates between them are new and start at one.
"""

import torch
from torch import Tensor, nn

from .convolution import ToeplitzProduct, causal_convolution, outer_product_convolution, short_convolution
from .filters import ImplicitFilter, ModalFilter
from .modal import CHUNK, ChannelState, HeadState, modal_scan
from .norm import head_norm
from .rotary import turn


# Break-even points of the forms on a CPU (benchmarks/mixers.py compares them). The matrix form reads and writes
# length² / width scores per channel, the FFT form takes width · log(length) per channel and token: they were equal at
# 256 tokens for width 8 and beyond 1,024 for width 16; widths 32 and 64 are extrapolated.
FFT_PAYS = 4  # length / width²
# The scan's cost grows with its state, width · modes per channel and token, that of the matrix form with the length.
SCAN_PAYS = 8  # length / (width · modes of a filter)


class HyenaMixer(nn.Module):
    def __init__(self, config, layer_index: int):
        super().__init__()
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.num_filters = config.num_filters
        self.filter_head_width = config.filter_head_width
        self.filtered_heads = config.filtered_heads
        self.hyena_order = config.hyena_order
        self.rotary = config.rotary
        self.q = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k = nn.Linear(width, config.key_value_width, bias=config.qkv_bias)
        self.v = nn.Linear(width, config.key_value_width, bias=config.qkv_bias)
        self.out = nn.Linear(inner, width, bias=config.out_bias)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        between = max(0, config.hyena_order - 2)
        self.gates = nn.Linear(width, between * config.filtered_width) if between else None
        self.streams = [inner, *[config.key_value_width] * 2, *[config.filtered_width] * between]
        self.short_filter = nn.Parameter(torch.zeros(sum(self.streams), config.short_filter_length))
        self.filter = ModalFilter(config.state_sizes[layer_index]) if config.filter == "modal" else _implicit(config)
        # Linear attention sums where softmax averages; training starts from the teacher's own scale.
        self.scale = self.filter_head_width**-0.5
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise short filters to the identity, so that the student starts from the teacher's projections."""
        with torch.no_grad():
            self.short_filter.zero_()
            self.short_filter[:, -1] = 1
            if self.gates is not None:
                self.gates.weight.zero_()
                self.gates.bias.fill_(1)

    def forward(
        self,
        hidden: Tensor,  # (batch, length, channel)
        cos: Tensor,  # (batch, length, turned pair)
        sin: Tensor,
        mask: Tensor | None = None,  # (batch, length), zero for padding
        cache=None,
    ) -> Tensor:  # (batch, length, channel)
        projected = [self.q(hidden), self.k(hidden), self.v(hidden)]
        if self.gates is not None:
            projected.append(self.gates(hidden))
        projected = torch.cat(projected, dim=-1)
        if mask is not None:
            projected = projected * mask[..., None].to(projected.dtype)
        layer_cache = None if cache is None else cache.layers[self.layer_index]
        x, conv_state = short_convolution(
            projected, self.short_filter.to(projected.dtype), layer_cache.conv_state if layer_cache else None
        )
        q, k, v, between = self._split(x, cos, sin)
        if isinstance(self.filter, ImplicitFilter):
            self.filter.warn_beyond_training(k.shape[2] + (layer_cache.convolutions[0].read if layer_cache else 0))
        if layer_cache is None:
            y = self._parallel(q, k, v, between)
        elif isinstance(self.filter, ImplicitFilter):
            y = self._exact(q, k, v, between, layer_cache)
            layer_cache.conv_state = conv_state
        else:
            y = self._recurrent(q, k, v, between, layer_cache)
            layer_cache.conv_state = conv_state
        return self.out(self._join(y).to(hidden.dtype))

    def _split(self, x, cos, sin):
        """q (batch, filter, query, length, width), k, v and the gates between the same without the queries.

        The queries are the heads of q that share a head of k and v. q and k are normalised and turned.
        """
        q, k, v, *between = x.split(self.streams, dim=-1)
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = (turn(z, cos, sin, adjacent=True) for z in (q, k))
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms, cos and sin are wider than the projections
        if k.shape[2] < self.filtered_heads:
            k, v = (z.repeat_interleave(self.filtered_heads // z.shape[2], dim=2) for z in (k, v))
        q = q.unflatten(2, (self.filtered_heads, -1)).transpose(2, 3).flatten(3).unflatten(3, (self.num_filters, -1))
        k, v = k.flatten(2), v.flatten(2)
        k, v, *between = (z.unflatten(-1, (self.num_filters, -1)).transpose(1, 2) for z in (k, v, *between))
        return q.permute(0, 3, 2, 1, 4) * self.scale, k, v, between

    def _join(self, y):
        """The outputs (batch, filter, query, length, width) as (batch, length, channel), in the order of q's heads."""
        heads = y.permute(0, 3, 2, 1, 4).flatten(3).unflatten(3, (self.filtered_heads, -1))
        return heads.transpose(2, 3).flatten(2)

    def _parallel(self, q, k, v, between):
        length = k.shape[2]
        if length == 0:
            return q
        if self.hyena_order == 1:
            if self.filter_head_width > 1 and self._scan_pays(length):
                return self._scan(q, k, v).to(v.dtype)
            return long_convolution(q, k, v, self.filter(length))
        *inner, last = self.filter(length).chunk(self.hyena_order)
        for gate, taps in zip([k, *between], inner, strict=True):
            v = gate * causal_convolution(v[..., 0], taps)[..., None]
        return q * causal_convolution(v[..., 0], last)[:, :, None, :, None]

    def _exact(self, q, k, v, between, layer_cache):
        """The same outputs as _parallel, from all inputs so far in `layer_cache`; float32 or wider."""
        layer_cache.admit()
        if torch.is_grad_enabled():
            return self._parallel(q, k, v, between)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v, *between = (z.to(wide) for z in (q, k, v, *between))
        with torch.autocast(q.device.type, enabled=False):
            taps = layer_cache.taps_for(self.filter, k.shape[2])
            for (after, before), own, part in zip(
                self._steps(q, k, v, between), layer_cache.convolutions, taps.chunk(self.hyena_order), strict=True
            ):
                y = own.advance(after, before, v, part)
                v = y[:, :, 0]
            return y

    def _steps(self, q, k, v, between):
        """For each long convolution what stands after and before it, as q and k: the gates of a full recurrence."""
        if self.hyena_order == 1:
            return [(q, k)]
        return [(gate[:, :, None], torch.ones_like(v)) for gate in (k, *between)] + [(q, torch.ones_like(v))]

    def _scan_pays(self, length):
        if not isinstance(self.filter, ModalFilter):
            return False
        return length * self.num_filters > SCAN_PAYS * self.filter_head_width * len(self.filter.pole)

    def _scan(self, q, k, v):
        wide = self.filter.pole.dtype
        with torch.autocast(q.device.type, enabled=False):
            taps, (modes,) = self.filter(min(k.shape[2], CHUNK), parts=1)
            state = HeadState(modes, len(q), self.filter_head_width)
            return modal_scan(*(z.to(wide) for z in (q, k, v)), taps, state)

    def _recurrent(self, q, k, v, between, layer_cache):
        """The same outputs as _parallel, from states of constant size in `layer_cache`; float32 or wider."""
        wide, length, first = self.filter.pole.dtype, k.shape[2], not layer_cache.modal_states
        q, k, v, *between = (z.to(wide) for z in (q, k, v, *between))
        if first:
            layer_cache.modal_states = self._no_tokens(len(q))
        if length == 0:
            return q
        steps = self._steps(q, k, v, between)
        with torch.autocast(q.device.type, enabled=False):
            if length == 1:
                for (after, before), state in zip(steps, layer_cache.modal_states, strict=True):
                    y = state.step(after[:, :, :, 0], before, v)
                    v = y[:, :, :1]
                return y[:, :, :, None]
            taps = self.filter(length).chunk(self.hyena_order)
            for (after, before), h, state in zip(steps, taps, layer_cache.modal_states, strict=True):
                y = self._piece(after, before, v, h, state, first)
                v = y[:, :, 0]
            return y

    def _no_tokens(self, batch):
        _, parts = self.filter(1, parts=self.hyena_order)
        if self.filter_head_width == 1:
            return [ChannelState(modes, batch) for modes in parts]
        return [HeadState(modes, batch, self.filter_head_width) for modes in parts]

    def _piece(self, q, k, v, taps, state, first):
        state.settle()
        if self.filter_head_width > 1 and self._scan_pays(k.shape[2]):
            return modal_scan(q, k, v, taps, state)
        y = long_convolution(q, k, v, taps)
        if not first:
            y = y + state.read(q)
        state.advance(k, v)
        return y


def _implicit(config):
    return ImplicitFilter(
        config.num_filters,
        config.hyena_order,
        config.filter_width,
        config.position_features,
        config.sine_frequency,
        config.context_length,
        config.filter_window,
    )


def long_convolution(
    q: Tensor,  # (batch, filter, query, length, width)
    k: Tensor,  # (batch, filter, length, width)
    v: Tensor,  # (batch, filter, length, width)
    taps: Tensor,  # (filter, length or more)
) -> Tensor:  # (batch, filter, query, length, width)
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s in the exact form that is fastest for this shape."""
    length, width = k.shape[2:]
    if width == 1:
        return q * causal_convolution((k * v)[..., 0], taps)[:, :, None, :, None]
    if length > FFT_PAYS * width**2:
        return outer_product_convolution(q, k, v, taps)
    return ToeplitzProduct.apply(q, k, v, taps.to(q.dtype))
