"""A layer that keeps the teacher's attention, in a sliding window, so that its state is as constant as the others'.

Parameters are the teacher's own. Each token attends to itself and the `attention_window - 1` tokens before it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .rotary import turn


class WindowedAttention(nn.Module):
    def __init__(self, config, layer_index: int):
        super().__init__()
        width = config.hidden_size
        self.layer_index = layer_index
        self.num_heads = config.num_attention_heads
        self.window = config.attention_window
        self.query_key_value = nn.Linear(width, 3 * width, bias=config.attention_bias)
        self.dense = nn.Linear(width, width, bias=config.attention_bias)

    def forward(
        self,
        hidden: Tensor,  # (batch, length, channel)
        cos: Tensor,  # (batch, length, rotary channel)
        sin: Tensor,
        mask: Tensor | None = None,  # (batch, length), zero for padding
        cache=None,
    ) -> Tensor:  # (batch, length, channel)
        q, k, v = self.query_key_value(hidden).unflatten(-1, (self.num_heads, -1)).chunk(3, dim=-1)
        q, k, v = (z.transpose(1, 2) for z in (turn(q, cos, sin), turn(k, cos, sin), v))
        real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        if cache is not None:
            k, v, real = cache.layers[self.layer_index].extend(k, v, real, self.window - 1)
        length, keys = q.shape[2], k.shape[2]
        behind = torch.arange(keys - length, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
        seen = (behind >= 0) & (behind < self.window)
        # A padding token sees itself, or its softmax would be over nothing.
        allowed = (seen & real[:, None, :]) | (behind == 0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
        return self.dense(y.transpose(1, 2).flatten(2))


class AttentionCacheLayer:
    """Keys, values and which of them are real, of the last tokens that fit the window."""

    is_compileable = False
    is_croppable = False
    is_sliding = True

    def __init__(self):
        self.keys: Tensor | None = None  # (batch, head, at most window - 1, channel)
        self.values: Tensor | None = None
        self.real: Tensor | None = None  # (batch, at most window - 1)

    def extend(self, k: Tensor, v: Tensor, real: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        """The kept tokens and the new ones; the last `kept` of them are kept for the next call."""
        if self.keys is not None:
            k, v = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
            real = torch.cat([self.real, real], dim=1)
        start = max(0, k.shape[2] - kept)
        self.keys, self.values, self.real = k[:, :, start:].clone(), v[:, :, start:].clone(), real[:, start:].clone()
        return k, v, real

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        return self.keys, self.values, self.real

    def select(self, rows: Tensor):
        if self.keys is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values, self.real = (state.index_select(0, rows) for state in self.states)
