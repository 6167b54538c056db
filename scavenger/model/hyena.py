"""The Hyena mixer: what stands in the place of attention.

    y_t = Σ_{s≤t} h^m_{t-s} (q_t · k_s) v_s        q, k, v: short convolutions of the projections

with one long filter h^m for each group m of `filter_head_width` channels. Width 1 is Hyena with one long convolution,
y = q ⊙ (h * (k ⊙ v)) (arXiv:2302.10866); a wider group is MultiHyena (arXiv:2310.18780, section 4), which with the
teacher's head width is linear attention with a learned filter of the relative position. q and k then keep the teacher's
rotary turn: (R_t q)·(R_s k) depends on t - s alone, so the recurrence needs no other state for it.

`hyena_order` counts the long convolutions. From two on it is the full recurrence of arXiv:2302.10866, section 3,

    z^1 = v        z^{n+1}_t = x^n_t (h^n * z^n)_t        y = z^{N+1}

on single channels, with x^1 = k and x^N = q of the teacher; the gates between them are new and start at one.
"""

import torch
from torch import Tensor, nn

from .convolution import ToeplitzProduct, causal_convolution, outer_product_convolution, short_convolution
from .filters import ImplicitFilter, ModalFilter
from .modal import CHUNK, modal_scan, modal_step
from .rotary import turn


# Where the forms take about equally long on a CPU (benchmarks/mixers.py has them side by side). The matrices read and
# write length² / width scores for each channel, the transforms take width · log(length) for each channel and token:
# at width 8 they were even at 256 tokens, at width 16 beyond 1,024; at 32 and 64 that is extrapolated to be so.
FFT_PAYS = 4  # length / width²
# The scan pays for its state, width · modes for each channel and token, where the matrices pay for the length.
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
        if config.filter == "modal":
            self.filter = ModalFilter(config.state_sizes[layer_index])
        else:
            self.filter = ImplicitFilter(
                config.num_filters,
                config.hyena_order,
                config.filter_width,
                config.position_features,
                config.sine_frequency,
                config.context_length,
            )
        # Linear attention adds up what softmax averages; the teacher's own scale is where it starts.
        self.scale = self.filter_head_width**-0.5
        self.reset_parameters()

    def reset_parameters(self):
        """Short filters that pass their input on: the student starts from the teacher's own projections."""
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
        if layer_cache is None:
            y = self._parallel(q, k, v, between)
        else:
            y, recurrent_state = self._recurrent(q, k, v, between, layer_cache.recurrent_state)
            layer_cache.conv_state, layer_cache.recurrent_state = conv_state, recurrent_state
        return self.dense(y.transpose(1, 2).flatten(2).to(hidden.dtype))

    def _by_stream(self, projected):
        """GPT-NeoX keeps q, k, v of a head side by side; here all q channels, then all k, then all v."""
        heads = projected.unflatten(-1, (self.num_heads, 3, -1))
        return heads.transpose(-2, -3).flatten(-3)

    def _split(self, x, cos, sin):
        """q, k, v and the gates between, each (batch, filter, length, filter_head_width); rotary turns q and k."""
        q, k, v, *between = x.split(self.dense.in_features, dim=-1)
        if self.rotary:
            # Under autocast cos and sin are wider than what the projections gave.
            q, k = (turn(z.unflatten(-1, (self.num_heads, -1)), cos, sin).flatten(-2).to(v.dtype) for z in (q, k))
        q, k, v, *between = (z.unflatten(-1, (self.num_filters, -1)).transpose(1, 2) for z in (q, k, v, *between))
        return q * self.scale, k, v, between

    def _parallel(self, q, k, v, between):
        length = q.shape[2]
        if length == 0:
            return v
        if self.hyena_order == 1:
            if self.filter_head_width > 1 and self._scan_pays(length):
                return self._recurrent(q, k, v, between, None)[0].to(v.dtype)
            return long_convolution(q, k, v, self.filter(length))
        for gate, taps in zip([k, *between, q], self.filter(length).chunk(self.hyena_order), strict=True):
            v = gate * causal_convolution(v[..., 0], taps)[..., None]
        return v

    def _scan_pays(self, length):
        if not isinstance(self.filter, ModalFilter):
            return False
        return length * self.num_filters > SCAN_PAYS * self.filter_head_width * len(self.filter.pole)

    def _recurrent(self, q, k, v, between, state):
        """The same outputs from a state of constant size, and that state; float32 or wider."""
        wide = self.filter.pole.dtype
        q, k, v, *between = (z.to(wide) for z in (q, k, v, *between))
        if state is None:
            size = len(self.filter.pole), self.filter_head_width, self.filter_head_width
            state = self.filter.poles.new_zeros(q.shape[0], *size)
        with torch.autocast(q.device.type, enabled=False):
            if self.hyena_order == 1:
                return self._advance(q, k, v, self.filter.modes(), state)
            states, start = [], 0
            for part, gate in enumerate([k, *between, q]):
                modes = self.filter.modes(part, self.hyena_order)
                own = state[:, start : start + len(modes.poles)]
                v, own = self._advance(gate, torch.ones_like(v), v, modes, own)
                start += len(modes.poles)
                states.append(own)
            return v, torch.cat(states, dim=1)

    @staticmethod
    def _advance(q, k, v, modes, state):
        if q.shape[2] == 1:
            y, state = modal_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], modes, state)
            return y[:, :, None], state
        return modal_scan(q, k, v, modes.taps(max(1, min(q.shape[2], CHUNK))), modes, state)


def long_convolution(
    q: Tensor,  # (batch, filter, length, width)
    k: Tensor,  # (batch, filter, length, width)
    v: Tensor,  # (batch, filter, length, width)
    taps: Tensor,  # (filter, length or more)
) -> Tensor:  # (batch, filter, length, width)
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s in the exact form that is quickest at this shape."""
    length, width = q.shape[2:]
    if width == 1:
        return q * causal_convolution((k * v)[..., 0], taps)[..., None]
    if length > FFT_PAYS * width**2:
        return outer_product_convolution(q, k, v, taps)
    return ToeplitzProduct.apply(q, k, v, taps.to(q.dtype))
