"""A layer that keeps the teacher's attention, in a sliding window, so that its state has constant size too.

Parameters are the teacher's. Each token attends to itself and the `window - 1` tokens before it; with a window of 0, to
all tokens before it, and the state grows with every token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modal import may_overwrite, writable
from .norm import head_norm
from .rotary import turn


BLOCK = 512  # most queries per attention mask, so that memory is linear in the length


class WindowedAttention(nn.Module):
    def __init__(self, config, layer_index: int):
        super().__init__()
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.queries = config.num_attention_heads // config.num_key_value_heads  # heads of q for each of k and v
        self.window = config.window(layer_index)
        self.q = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k = nn.Linear(width, config.key_value_width, bias=config.qkv_bias)
        self.v = nn.Linear(width, config.key_value_width, bias=config.qkv_bias)
        self.out = nn.Linear(inner, width, bias=config.out_bias)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)

    def forward(
        self,
        hidden: Tensor,  # (batch, length, channel)
        cos: Tensor,  # (batch, length, turned pair)
        sin: Tensor,
        mask: Tensor | None = None,  # (batch, length), zero for padding
        cache=None,
    ) -> Tensor:  # (batch, length, channel)
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in (self.q(hidden), self.k(hidden), self.v(hidden)))
        q, k = (turn(z, cos, sin, adjacent=False) for z in (self.q_norm(q), self.k_norm(k)))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        if cache is None:
            y = self._parallel(q, k, v, real, padded=mask is not None)
        elif self.window and q.shape[2] == 1:
            k, v, allowed = cache.layers[self.layer_index].step(k, v, real, self.window)
            grouped = q.unflatten(1, (-1, self.queries)).flatten(2, 3)  # one token's queries as rows of their k and v
            y = F.scaled_dot_product_attention(grouped, k.to(q.dtype), v.to(q.dtype), attn_mask=allowed[:, None])
            y = y.flatten(1, 2)[:, :, None]
        else:
            k, v, real = cache.layers[self.layer_index].extend(k, v, real, self.window)
            y = self._parallel(q, k, v, real, padded=True)  # perhaps: the cache may hold padding
        return self.out(y.transpose(1, 2).flatten(2))

    def _parallel(self, q, k, v, real, padded):
        """Attention over several tokens, block by block; the queries are the last `length` of the `keys` tokens."""
        length, keys = q.shape[2], k.shape[2]
        if not padded and (self.window == 0 or self.window >= length):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.queries > 1)
        if self.queries > 1:  # with a mask, kernels take as many heads of k and v as of q
            k, v = (z.repeat_interleave(self.queries, dim=1) for z in (k, v))
        window = self.window or max(keys, 1)
        outputs = []
        for start in range(0, length, min(window, BLOCK)):
            stop = min(start + min(window, BLOCK), length)
            places = torch.arange(keys - length + start, keys - length + stop, device=q.device)
            seen = slice(max(0, keys - length + start + 1 - window), keys - length + stop)
            behind = places[:, None] - torch.arange(seen.start, seen.stop, device=q.device)
            # A padding token attends to itself: a softmax over nothing would be NaN.
            allowed = ((behind >= 0) & (behind < window) & real[:, None, seen]) | (behind == 0)
            outputs.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:stop], k[:, :, seen], v[:, :, seen], attn_mask=allowed[:, None]
                )
            )
        return torch.cat(outputs, dim=2) if outputs else q


class AttentionCacheLayer:
    """A ring buffer of the last `window` tokens: keys, values and which are real. Token n is at place n mod window.

    Keys already have their rotary embedding, so their order in the ring does not matter to a step.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = True

    def __init__(self):
        self.keys: Tensor | None = None  # (batch, head, window, channel)
        self.values: Tensor | None = None
        self.real: Tensor | None = None  # (batch, window)
        self.written: Tensor | None = None  # () tokens so far; a tensor, so that a compiled step serves every position

    def step(self, k: Tensor, v: Tensor, real: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Overwrite the oldest token; returns the ring's keys, values and attention mask (batch, 1, window)."""
        self._begin(k, v, real, window)
        place = (self.written % window)[None]
        write = Tensor.index_copy_ if may_overwrite([self.keys, self.values, self.real]) else Tensor.index_copy
        self.keys = write(self.keys, 2, place, k.to(self.keys.dtype))
        self.values = write(self.values, 2, place, v.to(self.values.dtype))
        self.real = write(self.real, 1, place, real)
        self.written = self.written + 1
        itself = torch.arange(window, device=k.device) == place
        return self.keys, self.values, (self.real | itself)[:, None]

    def extend(self, k: Tensor, v: Tensor, real: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Append tokens, keeping the last `window`; returns the old ring, oldest token first, and the new tokens.

        With a window of 0 there is no ring: all tokens are kept, in order.
        """
        self._begin(k, v, real, window)
        if window == 0:
            self.keys, self.values = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
            self.real = torch.cat([self.real, real], dim=1)
            return self.states
        order = (self.written + torch.arange(window, device=k.device)) % window
        k, v = torch.cat([self.keys[:, :, order], k], dim=2), torch.cat([self.values[:, :, order], v], dim=2)
        real = torch.cat([self.real[:, order], real], dim=1)
        self.written = self.written + k.shape[2] - window
        places = (torch.arange(window, device=k.device) - self.written) % window
        self.keys = writable(k[:, :, -window:][:, :, places])
        self.values = writable(v[:, :, -window:][:, :, places])
        self.real = writable(real[:, -window:][:, places])
        return k, v, real

    def _begin(self, k, v, real, window):
        if self.keys is None:
            self.keys, self.values = (writable(z.new_zeros(*z.shape[:2], window, z.shape[3])) for z in (k, v))
            self.real = writable(real.new_zeros(len(real), window))
            self.written = torch.zeros((), dtype=torch.long, device=k.device)

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        return self.keys, self.values, self.real

    def select(self, rows: Tensor):
        if self.keys is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values, self.real = (writable(state.index_select(0, rows)) for state in self.states)
