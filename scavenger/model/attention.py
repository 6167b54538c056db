"""Softmax attention over a window: in layers and heads that keep the teacher's, and beside long filters.

Each token attends to itself and the `window - 1` tokens before it; with a window of 0, to all tokens before it, and the
state grows with every token.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modal import may_overwrite, writable
from .norm import head_norm
from .rotary import turn
from .step import fits, next_token, ready


try:
    from .toeplitz_triton import takes
    from .window_triton import near_and_far
except ImportError:  # without Triton torch's attention computes the same

    def takes(v, width):
        return False


# Queries of one attention mask: as many as the window, so that half of a block's scores count, but no fewer than make a
# call worth while, and no more than keep memory linear in the length.
BLOCKS = (128, 512)


class WindowedAttention(nn.Module):
    """A layer that keeps the teacher's attention; its parameters are the teacher's."""

    def __init__(self, config, layer_index: int):
        super().__init__()
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.window = config.kept_window(layer_index)
        self.q = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k = nn.Linear(width, config.key_value_width, bias=config.qkv_bias)
        self.v = nn.Linear(width, config.key_value_width, bias=config.qkv_bias)
        self.out = nn.Linear(inner, width, bias=config.out_bias)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        self.at_once = self.window > 0 and fits(config)

    def forward(
        self,
        hidden: Tensor,  # (batch, length, channel)
        cos: Tensor,  # (batch, length, turned pair)
        sin: Tensor,
        mask: Tensor | None = None,  # (batch, length), zero for padding
        cache=None,
    ) -> Tensor:  # (batch, length, channel)
        projected = self.q(hidden), self.k(hidden), self.v(hidden)
        layer_cache = None if cache is None else cache.layers[self.layer_index]
        if self.at_once and hidden.shape[1] == 1 and layer_cache is not None and layer_cache.begun:
            if ready(projected[0], layer_cache):
                return self.out(next_token(self, torch.cat(projected, dim=-1), None, cos, sin, mask, layer_cache))
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in projected)
        q, k = (turn(z, cos, sin, adjacent=False) for z in (self.q_norm(q), self.k_norm(k)))
        tokens = Tokens(k.transpose(1, 2), v.transpose(1, 2), None if mask is None else mask.bool())
        ring = None if layer_cache is None else layer_cache.ring
        y, _ = attention(q.transpose(1, 2), tokens, self.window, ring)
        return self.out(y.transpose(1, 2).flatten(2))

    def step_words(self, layer_cache, dtype: torch.dtype) -> dict:
        """The arguments of `step` (step.py) that this layer and its cache decide."""
        return dict(
            taps=None,
            places=list(range(self.k.out_features // self.head_dim)),
            conv_state=None,
            near=[],
            kept=layer_cache.ring.tensors,
            modes=[],
            state=None,
            queries=self.q.out_features // self.k.out_features,
            own_state=False,
            turned=True,
            adjacent=False,
            scale=1.0,
        )


class Tokens(NamedTuple):
    """Keys and values of consecutive tokens."""

    keys: Tensor  # (batch, head, token, channel)
    values: Tensor  # (batch, head, token, channel)
    real: Tensor | None  # (batch, token), false for padding; None: there is none


def attention(
    q: Tensor,  # (batch, head, length, channel); each head of k and v serves as many consecutive heads of q
    tokens: Tokens,  # of the same length
    window: int,
    ring: "Ring | None" = None,  # the tokens before
) -> tuple[Tensor, Tokens | None]:  # (batch, head, length, channel); the tokens that left the ring, as many as came in
    """Softmax attention over the last `window` tokens, 0: all of them; with a ring, also over the tokens in it."""
    if ring is None:
        return _blocks(q, tokens, window), None
    tokens = tokens._replace(real=_all_real(tokens) if tokens.real is None else tokens.real)
    if window and q.shape[2] == 1:
        seen, left = ring.step(tokens, window)
        k, v = seen.keys.to(q.dtype), seen.values.to(q.dtype)
        grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # one token's queries as rows of their k and v
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen.real[:, None, None])
        return y.flatten(1, 2)[:, :, None], left
    seen, left = ring.extend(tokens, window)
    return _blocks(q, seen, window), left


def _all_real(tokens):
    return tokens.keys.new_ones(len(tokens.keys), tokens.keys.shape[2], dtype=torch.bool)


def _blocks(q, tokens, window):
    """Attention over several tokens, block by block; the queries are the last `length` of the tokens."""
    k, v, real = tokens
    length, keys = q.shape[2], k.shape[2]
    queries = q.shape[1] // k.shape[1]
    if real is None and keys == length and (window == 0 or window >= length):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=queries > 1)
    if real is None and keys == length and takes(v, q.shape[3]):
        q, k = q.to(v.dtype).unflatten(1, (-1, queries)), k.to(v.dtype)  # under autocast both may be wider
        y, *_ = near_and_far(q, k, v, None, None, window, q.shape[-1] ** -0.5)
        return y.flatten(1, 2)
    if queries > 1:  # with a mask, kernels take as many heads of k and v as of q
        k, v = (z.repeat_interleave(queries, dim=1) for z in (k, v))
    window = window or max(keys, 1)
    size = min(max(window, BLOCKS[0]), BLOCKS[1])
    outputs = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        places = torch.arange(keys - length + start, keys - length + stop, device=q.device)
        seen = slice(max(0, keys - length + start + 1 - window), keys - length + stop)
        behind = places[:, None] - torch.arange(seen.start, seen.stop, device=q.device)
        allowed = (behind >= 0) & (behind < window)
        if real is not None:
            # A padding token attends to itself: a softmax over nothing would be NaN.
            allowed = ((allowed & real[:, None, seen]) | (behind == 0))[:, None]
        outputs.append(
            F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, seen], v[:, :, seen], attn_mask=allowed)
        )
    return torch.cat(outputs, dim=2) if outputs else q


class Ring:
    """A ring buffer of the last `window` tokens: keys, values and which are real. Token n is at place n mod window.

    Keys already have their rotary embedding, so their order in the ring does not matter to a step.
    """

    def __init__(self):
        self.keys: Tensor | None = None  # (batch, head, window, channel)
        self.values: Tensor | None = None
        self.real: Tensor | None = None  # (batch, window)
        self.written: Tensor | None = None  # () tokens so far; a tensor, so that a compiled step serves every position

    def step(self, new: Tokens, window: int) -> tuple[Tokens, Tokens]:
        """Put one token in the place of the oldest; returns the ring, the new token counted as real, and that one."""
        self._begin(new, window)
        place = (self.written % window)[None]
        left = Tokens(self.keys.index_select(2, place), self.values.index_select(2, place), self.real[:, place])
        write = Tensor.index_copy_ if may_overwrite([self.keys, self.values, self.real]) else Tensor.index_copy
        self.keys = write(self.keys, 2, place, new.keys.to(self.keys.dtype))
        self.values = write(self.values, 2, place, new.values.to(self.values.dtype))
        self.real = write(self.real, 1, place, new.real)
        self.written = self.written + 1
        itself = torch.arange(window, device=place.device) == place
        return Tokens(self.keys, self.values, self.real | itself), left

    def extend(self, new: Tokens, window: int) -> tuple[Tokens, Tokens | None]:
        """Append tokens, keeping the last `window`; returns the old ring, oldest token first, with the new tokens, and
        those that left it: as many as came in, at first empty places.

        With a window of 0 there is no ring: all tokens are kept, in order, and none leaves.
        """
        self._begin(new, window)
        if window == 0:
            held = zip(self.states, new, strict=True)
            self.keys, self.values, self.real = (
                torch.cat(pair, dim=dim) for pair, dim in zip(held, (2, 2, 1), strict=True)
            )
            return Tokens(*self.states), None
        order = (self.written + torch.arange(window, device=new.keys.device)) % window
        seen = Tokens(
            torch.cat([self.keys[:, :, order], new.keys], dim=2),
            torch.cat([self.values[:, :, order], new.values], dim=2),
            torch.cat([self.real[:, order], new.real], dim=1),
        )
        length = new.keys.shape[2]
        self.written = self.written + length
        places = (torch.arange(window, device=order.device) - self.written) % window
        self.keys = writable(seen.keys[:, :, length:][:, :, places])
        self.values = writable(seen.values[:, :, length:][:, :, places])
        self.real = writable(seen.real[:, length:][:, places])
        return seen, Tokens(seen.keys[:, :, :length], seen.values[:, :, :length], seen.real[:, :length])

    def turn_to(self, written: Tensor):
        """Move the tokens to the places that they have in a ring to which so many tokens were written."""
        shift = int(written - self.written)
        self.keys, self.values = self.keys.roll(shift, 2), self.values.roll(shift, 2)
        self.real = self.real.roll(shift, 1)

    def _begin(self, new, window):
        if self.keys is None:
            self.keys, self.values = (
                writable(z.new_zeros(*z.shape[:2], window, z.shape[3])) for z in (new.keys, new.values)
            )
            self.real = writable(new.real.new_zeros(len(new.real), window))
            self.written = torch.zeros((), dtype=torch.long, device=new.keys.device)

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        return self.keys, self.values, self.real

    @property
    def tensors(self) -> list[Tensor]:
        """What a step reads and writes; nothing before the first token."""
        return [] if self.keys is None else [self.keys, self.values, self.real, self.written]

    def select(self, rows: Tensor):
        if self.keys is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values, self.real = (writable(state.index_select(0, rows)) for state in self.states)


class AttentionCacheLayer:
    """The cache of a layer that keeps attention."""

    is_compileable = False
    is_croppable = False
    is_sliding = True

    def __init__(self):
        self.ring = Ring()

    @property
    def begun(self) -> bool:
        """Whether a token, or padding, was read."""
        return self.ring.keys is not None

    @property
    def rings(self) -> list[Ring]:
        return [self.ring]

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        return self.ring.states

    def select(self, rows: Tensor):
        self.ring.select(rows)
