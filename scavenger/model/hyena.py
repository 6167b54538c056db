"""The Hyena mixer, which replaces attention.

    y_t = Σ_{s≤t} h^m_{t-s} (q_t · k_s) v_s        q, k, v: short convolutions of the projections

with one long filter h^m for each group m of `filter_head_width` channels. Width 1 is Hyena with one long convolution,
y = q ⊙ (h * (k ⊙ v)) (arXiv:2302.10866); a wider group is MultiHyena (arXiv:2310.18780, section 4), which with the
teacher's head width is linear attention with a learned filter of the relative position. q and k then keep the teacher's
rotary embedding: (R_t q)·(R_s k) depends only on t - s, so the recurrence needs no extra state for it.

`hyena_order` is the number of long convolutions. From 2 on it is the full recurrence of arXiv:2302.10866, section 3,

    z^1 = v        z^{n+1}_t = x^n_t (h^n * z^n)_t        y = z^{N+1}

on single channels, with x^1 = k and x^N = q of the teacher; the gates between them are new and start at one.
"""

import torch
from torch import Tensor, nn

from .convolution import ToeplitzProduct, causal_convolution, outer_product_convolution, short_convolution
from .filters import ImplicitFilter, ModalFilter
from .modal import CHUNK, ChannelState, HeadState, modal_scan
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
        width = config.hidden_size
        self.layer_index = layer_index
        self.num_heads = config.num_attention_heads
        self.num_filters = config.num_filters
        self.filter_head_width = width // config.num_filters
        self.hyena_order = config.hyena_order
        self.rotary = config.rotary
        self.query_key_value = nn.Linear(width, 3 * width, bias=config.attention_bias)
        between = max(0, config.hyena_order - 2)
        self.gates = nn.Linear(width, between * width) if between else None
        self.dense = nn.Linear(width, width, bias=config.attention_bias)
        self.short_filter = nn.Parameter(torch.zeros((3 + between) * width, config.short_filter_length))
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
        cos: Tensor,  # (batch, length, rotary channel)
        sin: Tensor,
        mask: Tensor | None = None,  # (batch, length), zero for padding
        cache=None,
    ) -> Tensor:  # (batch, length, channel)
        projected = self._by_stream(self.query_key_value(hidden))
        if self.gates is not None:
            projected = torch.cat([projected, self.gates(hidden)], dim=-1)
        if mask is not None:
            projected = projected * mask[..., None].to(projected.dtype)
        layer_cache = None if cache is None else cache.layers[self.layer_index]
        x, conv_state = short_convolution(
            projected, self.short_filter.to(projected.dtype), layer_cache.conv_state if layer_cache else None
        )
        q, k, v, between = self._split(x, cos, sin)
        if isinstance(self.filter, ImplicitFilter):
            self.filter.warn_beyond_training(q.shape[2] + (layer_cache.convolutions[0].read if layer_cache else 0))
        if layer_cache is None:
            y = self._parallel(q, k, v, between)
        elif isinstance(self.filter, ImplicitFilter):
            y = self._exact(q, k, v, between, layer_cache)
            layer_cache.conv_state = conv_state
        else:
            y = self._recurrent(q, k, v, between, layer_cache)
            layer_cache.conv_state = conv_state
        return self.dense(y.transpose(1, 2).flatten(2).to(hidden.dtype))

    def _by_stream(self, projected):
        """Reorder GPT-NeoX's q, k, v of each head to all q channels, then all k, then all v."""
        heads = projected.unflatten(-1, (self.num_heads, 3, -1))
        return heads.transpose(-2, -3).flatten(-3)

    def _split(self, x, cos, sin):
        """q, k, v and the gates between, each (batch, filter, length, filter_head_width); q and k are rotated."""
        q, k, v, *between = x.split(self.dense.in_features, dim=-1)
        if self.rotary:
            # Under autocast cos and sin are wider than the outputs of the projections.
            q, k = (turn(z.unflatten(-1, (self.num_heads, -1)), cos, sin).flatten(-2).to(v.dtype) for z in (q, k))
        q, k, v, *between = (z.unflatten(-1, (self.num_filters, -1)).transpose(1, 2) for z in (q, k, v, *between))
        return q * self.scale, k, v, between

    def _parallel(self, q, k, v, between):
        length = q.shape[2]
        if length == 0:
            return v
        if self.hyena_order == 1:
            if self.filter_head_width > 1 and self._scan_pays(length):
                return self._scan(q, k, v).to(v.dtype)
            return long_convolution(q, k, v, self.filter(length))
        for gate, taps in zip([k, *between, q], self.filter(length).chunk(self.hyena_order), strict=True):
            v = gate * causal_convolution(v[..., 0], taps)[..., None]
        return v

    def _exact(self, q, k, v, between, layer_cache):
        """The same outputs as _parallel, from all inputs so far in `layer_cache`; float32 or wider."""
        layer_cache.admit()
        if torch.is_grad_enabled():
            return self._parallel(q, k, v, between)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v, *between = (z.to(wide) for z in (q, k, v, *between))
        with torch.autocast(q.device.type, enabled=False):
            taps = layer_cache.taps_for(self.filter, q.shape[2])
            if self.hyena_order == 1:
                return layer_cache.convolutions[0].advance(q, k, v, taps)
            for gate, own, part in zip(
                [k, *between, q], layer_cache.convolutions, taps.chunk(self.hyena_order), strict=True
            ):
                v = own.advance(gate, torch.ones_like(v), v, part)
            return v

    def _scan_pays(self, length):
        if not isinstance(self.filter, ModalFilter):
            return False
        return length * self.num_filters > SCAN_PAYS * self.filter_head_width * len(self.filter.pole)

    def _scan(self, q, k, v):
        wide = self.filter.pole.dtype
        with torch.autocast(q.device.type, enabled=False):
            taps, (modes,) = self.filter(min(q.shape[2], CHUNK), parts=1)
            state = HeadState(modes, len(q), self.filter_head_width)
            return modal_scan(*(z.to(wide) for z in (q, k, v)), taps, state)

    def _recurrent(self, q, k, v, between, layer_cache):
        """The same outputs as _parallel, from states of constant size in `layer_cache`; float32 or wider."""
        wide, length, first = self.filter.pole.dtype, q.shape[2], not layer_cache.modal_states
        q, k, v, *between = (z.to(wide) for z in (q, k, v, *between))
        if first:
            layer_cache.modal_states = self._no_tokens(len(q))
        if length == 0:
            return v
        convolutions = [(q, k)] if self.hyena_order == 1 else [(gate, torch.ones_like(v)) for gate in (k, *between, q)]
        with torch.autocast(q.device.type, enabled=False):
            if length == 1:
                for (q, k), state in zip(convolutions, layer_cache.modal_states, strict=True):
                    v = state.step(q, k, v)
                return v
            taps = self.filter(length).chunk(self.hyena_order)
            for (q, k), h, state in zip(convolutions, taps, layer_cache.modal_states, strict=True):
                v = self._piece(q, k, v, h, state, first)
            return v

    def _no_tokens(self, batch):
        _, parts = self.filter(1, parts=self.hyena_order)
        if self.filter_head_width == 1:
            return [ChannelState(modes, batch) for modes in parts]
        return [HeadState(modes, batch, self.filter_head_width) for modes in parts]

    def _piece(self, q, k, v, taps, state, first):
        state.settle()
        if self.filter_head_width > 1 and self._scan_pays(q.shape[2]):
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
    q: Tensor,  # (batch, filter, length, width)
    k: Tensor,  # (batch, filter, length, width)
    v: Tensor,  # (batch, filter, length, width)
    taps: Tensor,  # (filter, length or more)
) -> Tensor:  # (batch, filter, length, width)
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s in the exact form that is fastest for this shape."""
    length, width = q.shape[2:]
    if width == 1:
        return q * causal_convolution((k * v)[..., 0], taps)[..., None]
    if length > FFT_PAYS * width**2:
        return outer_product_convolution(q, k, v, taps)
    return ToeplitzProduct.apply(q, k, v, taps.to(q.dtype))
