"""The Hyena mixer: what stands in the place of attention.

    y_t = Σ_{s≤t} h^m_{t-s} (q_t · k_s) v_s        q, k, v: short convolutions of the projections

with one long filter h^m for each group m of `filter_head_width` channels. Width 1 is Hyena with one long convolution,
y = q ⊙ (h * (k ⊙ v)) (arXiv:2302.10866); a wider group is MultiHyena (arXiv:2310.18780, section 4), which with the
teacher's head width is linear attention with a learned filter of the relative position. q and k then keep the teacher's
rotary turn: (R_t q)·(R_s k) depends on t - s alone, so the recurrence needs no other state for it.
"""

import torch
from torch import Tensor, nn

from .convolution import causal_convolution, short_convolution, toeplitz_block
from .filters import ImplicitFilter, ModalFilter
from .modal import CHUNK, modal_scan, modal_step
from .rotary import turn


BLOCK = 512  # query positions of one Toeplitz block, so that no length² matrix is held for all of a long input


class HyenaMixer(nn.Module):
    def __init__(self, config, layer_index: int):
        super().__init__()
        width = config.hidden_size
        self.layer_index = layer_index
        self.num_heads = config.num_attention_heads
        self.num_filters = config.num_filters
        self.filter_head_width = width // config.num_filters
        self.rotary = config.rotary
        self.query_key_value = nn.Linear(width, 3 * width, bias=config.attention_bias)
        self.dense = nn.Linear(width, width, bias=config.attention_bias)
        self.short_filter = nn.Parameter(torch.zeros(3 * width, config.short_filter_length))
        if config.filter == "modal":
            self.filter = ModalFilter(config.state_sizes[layer_index])
        else:
            self.filter = ImplicitFilter(
                config.num_filters,
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

    def forward(
        self,
        hidden: Tensor,  # (batch, length, channel)
        cos: Tensor,  # (batch, length, rotary channel)
        sin: Tensor,
        mask: Tensor | None = None,  # (batch, length), zero for padding
        cache=None,
    ) -> Tensor:  # (batch, length, channel)
        projected = self.query_key_value(hidden)
        if mask is not None:
            projected = projected * mask[..., None].to(projected.dtype)
        layer_cache = None if cache is None else cache.layers[self.layer_index]
        x, conv_state = short_convolution(
            self._by_stream(projected),
            self.short_filter.to(projected.dtype),
            layer_cache.conv_state if layer_cache else None,
        )
        q, k, v = self._split(x, cos, sin)
        if layer_cache is None:
            y = self._parallel(q, k, v)
        else:
            y, recurrent_state = self._recurrent(q, k, v, layer_cache.recurrent_state)
            layer_cache.conv_state, layer_cache.recurrent_state = conv_state, recurrent_state
        return self.dense(y.transpose(1, 2).flatten(2).to(hidden.dtype))

    def _by_stream(self, projected):
        """GPT-NeoX keeps q, k, v of a head side by side; here all q channels, then all k, then all v."""
        heads = projected.unflatten(-1, (self.num_heads, 3, -1))
        return heads.transpose(-2, -3).flatten(-3)

    def _split(self, x, cos, sin):
        """q, k, v, each (batch, filter, length, filter_head_width); rotary turns the teacher's heads."""
        q, k, v = x.chunk(3, dim=-1)
        if self.rotary:
            q, k = (turn(z.unflatten(-1, (self.num_heads, -1)), cos, sin).flatten(-2) for z in (q, k))
        q, k, v = (z.unflatten(-1, (self.num_filters, -1)).transpose(1, 2) for z in (q, k, v))
        return q * self.scale, k, v

    def _parallel(self, q, k, v):
        length = q.shape[2]
        taps = self.filter(length)
        if self.filter_head_width == 1:
            return q * causal_convolution((k * v)[..., 0], taps)[..., None]
        taps = taps.to(q.dtype)
        blocks = []
        for start in range(0, length, BLOCK):
            rows = range(start, min(start + BLOCK, length))
            scores = q[:, :, start : rows.stop] @ k[:, :, : rows.stop].transpose(-1, -2)
            blocks.append((scores * toeplitz_block(taps, rows)) @ v[:, :, : rows.stop])
        return torch.cat(blocks, dim=2) if blocks else v

    def _recurrent(self, q, k, v, state):
        """The same outputs from a state of constant size, and that state; float32 or wider."""
        filter = self.filter
        q, k, v = (z.to(filter.pole.dtype) for z in (q, k, v))
        poles, residues = filter.poles, filter.residues
        if state is None:
            state = poles.new_zeros(q.shape[0], len(poles), self.filter_head_width, self.filter_head_width)
        modes = (poles, residues, filter.mode_filter, state)
        if q.shape[2] == 1:
            y, state = modal_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], filter.direct, *modes)
            return y[:, :, None], state
        return modal_scan(q, k, v, filter(max(1, min(q.shape[2], CHUNK))), *modes)
