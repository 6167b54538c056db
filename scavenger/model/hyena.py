"""The Hyena mixer, which replaces attention.

    y_t = Σ_{s≤t} h^m_{t-s} (q_t · k_s) v_s        q, k, v: short convolutions of the projections

with one long filter h^m for each group m of `filter_head_width` channels. Width 1 is Hyena with one long convolution,
y = q ⊙ (h * (k ⊙ v)) (arXiv:2302.10866); a wider group is MultiHyena (arXiv:2310.18780, section 4), which with the
teacher's head width is linear attention with a learned filter of the relative position. q and k then keep the teacher's
rotary embedding: (R_t q)·(R_s k) depends only on t - s, so the recurrence needs no extra state for it.

Where several heads of q share a head of k and v, as in the teacher, they share its filter and its state.

With a window W the lags of the filters begin where the softmax attention of the last W tokens ends,

    y_t = g_t ⊙ softmax_{t-W<s≤t}(q_t · k_s) v_s + g'_t ⊙ Σ_{s≤t-W} h^m_{t-W-s} (q_t · k_s) v_s

with gates g, g' of the input, one for each head. The second sum is the plain one on keys and values W tokens late: in
decoding, what leaves the window's ring enters the modes. With `features` its scores are φ(q_t) · φ(k_s),
φ(x) = [softmax(A x), softmax(-A x)] (arXiv:2402.04347), and it is divided by the same sum with 1 in place of v_s.
Heads that keep the teacher's attention stand beside the others, in a window of their own, without filter and gate.

`hyena_order` is the number of long convolutions. From 2 on it is the full recurrence of arXiv:2302.10866, section 3,

    z^1 = v        z^{n+1}_t = x^n_t (h^n * z^n)_t        y = z^{N+1}

on single channels, with x^1 = k and x^N = q of the teacher; the gates between them are new and start at one.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .attention import Tokens, attention
from .convolution import (
    ShortConvolution,
    ToeplitzProduct,
    causal_convolution,
    outer_product_convolution,
    short_convolution,
)
from .filters import ImplicitFilter, ModalFilter, PositiveFilter
from .modal import ChannelState, HeadState, chunk_of, modal_scan
from .norm import head_norm
from .precision import full_float32
from .rotary import turn
from .step import fits, next_token, ready
from .toeplitz_cpp import takes as in_machine_code


try:
    from .toeplitz_triton import takes, toeplitz_product
    from .window_triton import near_and_far
except ImportError:  # without Triton torch computes the same

    def takes(v, width):
        return False


# Break-even points of the forms, of lengths (benchmarks/mixers.py compares them). The matrix form reads and writes
# length² / width scores per channel, the FFT form takes width · log(length) per channel and token. On a CPU they were
# equal at 256 tokens for width 8 in torch, and between 2,048 and 4,096 where the matrix form is machine code.
FFT_PAYS, CODE_FFT_PAYS = 4, 48  # length / width²
# The same with the kernels on a GPU, where the FFTs cost memory traffic and the products tensor cores: counted, not
# measured.
GPU_FFT_PAYS = 64
# The scan's cost grows with its state, that of the matrix form with the length. On a CPU, at widths of 64 to 8, they
# were equal at 700 to 2,200 tokens for one mode and 1,150 to 3,300 for three, by interpolation from 1,024 and 4,096.
SCAN_PAYS = 256  # length / (modes of a filter + 4)
# On a GPU the products of a state are in full float32: counted, not measured.
GPU_SCAN_PAYS = 24  # length / (width · modes of a filter)
# Of the gates before a sigmoid and a factor of 2: the window starts as the teacher's attention, filters at a quarter.
OPEN, AJAR = 0.0, -2.0


class HyenaMixer(nn.Module):
    def __init__(self, config, layer_index: int):
        super().__init__()
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.hyena_order = config.hyena_order
        self.rotary = config.rotary
        self.heads = _Heads(config, layer_index)
        self.window, self.kept_window = config.near_window(layer_index), config.kept_window(layer_index)
        self.q = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k = nn.Linear(width, config.key_value_width, bias=config.qkv_bias)
        self.v = nn.Linear(width, config.key_value_width, bias=config.qkv_bias)
        self.out = nn.Linear(inner, width, bias=config.out_bias)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        between = max(0, config.hyena_order - 2)
        self.gates = nn.Linear(width, between * config.filtered_width) if between else None
        self.streams = [inner, *[config.key_value_width] * 2, *[config.filtered_width] * between]
        self.short_filter = nn.Parameter(torch.zeros(sum(self.streams), config.short_filter_length))
        self.num_filters = config.filters(layer_index) // config.hyena_order
        self.filter_head_width = config.filter_head_width
        if self.num_filters:
            self.filter = _filter(config, layer_index)
            # Linear attention sums where softmax averages; training starts from the teacher's own scale.
            self.scale = self.filter_head_width**-0.5
        joined = self.num_filters and self.window
        self.join = nn.Linear(width, 2 * self.heads.filtered * self.heads.queries) if joined else None
        self.features = Features(config, self.heads) if config.features != "none" else None
        grows = self.heads.kept and not self.kept_window
        self.at_once = config.filter == "modal" and not grows and fits(config)
        self.projected_at_once: nn.Module | None = None  # all projections as one product, which a Decoder makes
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise short filters to the identity, so that the student starts from the teacher's projections."""
        with torch.no_grad():
            self.short_filter.zero_()
            self.short_filter[:, -1] = 1
            if self.gates is not None:
                self.gates.weight.zero_()
                self.gates.bias.fill_(1)
            if self.join is not None:
                self.join.weight.zero_()
                near, far = self.join.bias.chunk(2)
                near.fill_(OPEN)
                far.fill_(AJAR)

    def forward(
        self,
        hidden: Tensor,  # (batch, length, channel)
        cos: Tensor,  # (batch, length, turned pair)
        sin: Tensor,
        mask: Tensor | None = None,  # (batch, length), zero for padding
        cache=None,
    ) -> Tensor:  # (batch, length, channel)
        projected, gates = self._projections(hidden)
        if mask is not None:
            projected = projected * mask[..., None].to(projected.dtype)
        layer_cache = None if cache is None else cache.layers[self.layer_index]
        if self.at_once and projected.shape[1] == 1 and layer_cache is not None and layer_cache.begun:
            if ready(projected, layer_cache):
                return self.out(next_token(self, projected, gates, cos, sin, mask, layer_cache))
        short_filter = self.short_filter.to(projected.dtype)
        if layer_cache is None:
            x = ShortConvolution.apply(projected, short_filter)
        else:
            x, conv_state = short_convolution(projected, short_filter, layer_cache.conv_state)
        q, k, v, between = self._split(x, cos, sin)
        tokens = Tokens(k, v, None if mask is None else mask.bool())
        kept = None
        if self.heads.kept:
            of_kept, q = self.heads.parted(q, self.heads.queries)
            (own_keys, keys), (own_values, values) = self.heads.parted(k), self.heads.parted(v)
            ring = layer_cache.kept if layer_cache else None
            kept, _ = attention(of_kept, Tokens(own_keys, own_values, tokens.real), self.kept_window, ring)
            tokens = Tokens(keys, values, tokens.real)
        y = (
            self._near_and_far(gates, q, tokens, between, layer_cache)
            if self.window
            else self._far(q, tokens, between, layer_cache)
        )
        if layer_cache is not None:
            layer_cache.conv_state = conv_state
        y = y.to(hidden.dtype)
        if kept is not None:
            y = self.heads.merge(kept.to(y.dtype), y)
        return self.out(y.transpose(1, 2).flatten(2))

    @property
    def projections(self) -> list[nn.Linear]:
        """What reads the hidden state: q, k, v, the gates between long convolutions, those of window and filters."""
        return [z for z in (self.q, self.k, self.v, self.gates, self.join) if z is not None]

    def _projections(self, hidden):
        """q, k, v and the gates between, (batch, length, channel), and the gates of window and filters or None."""
        if self.projected_at_once is not None:
            every = self.projected_at_once(hidden)
        elif torch.is_grad_enabled() and all(map(_plain, self.projections)):
            weights = [projection.weight for projection in self.projections]
            every = OneProduct.apply(hidden, len(weights), *weights, *biases_of(self.projections))
        else:
            every = [projection(hidden) for projection in self.projections]
            gates = every.pop() if self.join is not None else None
            return torch.cat(every, dim=-1), gates
        if self.join is None:
            return every, None
        return every.split([sum(self.streams), self.join.out_features], dim=-1)

    def step_words(self, layer_cache, dtype: torch.dtype) -> dict:
        """The arguments of `step` (step.py) that this mixer and its cache decide."""
        state = next(iter(layer_cache.modal_states), None)
        return dict(
            taps=self.short_filter.to(dtype),
            places=self.heads.places,
            conv_state=layer_cache.conv_state,
            near=layer_cache.near.tensors,
            kept=layer_cache.kept.tensors,
            modes=[] if state is None else state.numbers,
            state=None if state is None else state.state,
            queries=self.heads.queries,
            own_state=self.heads.own_state,
            turned=self.rotary,
            adjacent=True,
            scale=self.scale if self.num_filters else 1.0,
        )

    def _split(self, x, cos, sin):
        """q, k and v (batch, head, length, channel), q and k normalised and turned; the gates between, flat."""
        queries, keys, *others = self.streams
        both, v, *between = x.split([queries + keys, *others], dim=-1)
        both, v = (z.unflatten(-1, (-1, self.head_dim)) for z in (both, v))
        heads = [queries // self.head_dim, keys // self.head_dim]
        if not isinstance(self.q_norm, nn.Identity):
            q, k = both.split(heads, dim=2)
            both = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        if self.rotary:
            both = turn(both, cos, sin, adjacent=True)
        q, k = both.to(v.dtype).split(heads, dim=2)  # under autocast norms, cos and sin are wider than the projections
        return *(z.transpose(1, 2) for z in (q, k, v)), between

    def _near_and_far(self, gates, q, tokens, between, layer_cache):
        """The gated sum of the window's attention and the filters on what left it, (batch, head, length, channel)."""
        if layer_cache is None and self._in_one_pass(tokens):
            return self._one_pass(gates, q, tokens)
        ring = layer_cache.near if layer_cache else None
        near, left = attention(q, tokens, self.window, ring)
        if not self.num_filters:
            return near
        if left is None:  # without a cache only the tokens that leave, and the queries that see them
            count = max(0, q.shape[2] - self.window)
            real = None if tokens.real is None else tokens.real[:, :count]
            left = Tokens(tokens.keys[:, :, :count], tokens.values[:, :, :count], real)
            q = q[:, :, q.shape[2] - count :]
        far = self._far(q, left, between, layer_cache)
        far = F.pad(far, (0, 0, near.shape[2] - far.shape[2], 0))
        near_gate, far_gate = (2 * torch.sigmoid(gates)).transpose(1, 2)[..., None].chunk(2, dim=1)
        return near_gate * near + far_gate * far

    def _in_one_pass(self, tokens):
        """Whether one kernel computes window and filters: on a GPU, for filters as wide as a head, without padding."""
        beyond, width = tokens.values[:, :, self.window :], self.head_dim
        if not self.num_filters or self.features is not None or self.filter_head_width < width:
            return False
        if tokens.real is not None or beyond.shape[2] == 0 or not takes(beyond, width):
            return False
        return not fft_pays(beyond, width) and not self._scan_pays(beyond.shape[2], on_gpu=True)

    def _one_pass(self, gates, q, tokens):
        q, k, v = self.heads.grouped(q, tokens.keys, tokens.values, self.num_filters)
        beyond = k.shape[2] - self.window
        if isinstance(self.filter, ImplicitFilter):
            self.filter.warn_beyond_training(beyond)
        y, *_ = near_and_far(q, k, v, self.filter(beyond), gates, self.window, self.scale)
        return self.heads.ungrouped(y)

    def _far(self, q, tokens, between, layer_cache):
        """The long filters' output for q (batch, head, length, channel) and as many tokens."""
        q, k, v = self.heads.grouped(q, tokens.keys, tokens.values, self.num_filters)
        between = [z.unflatten(-1, (self.num_filters, -1)).transpose(1, 2) for z in between]
        if self.features is None:
            q = q * self.scale
        else:
            q, k, v = self.features(q, k, v, tokens.real)
        if isinstance(self.filter, ImplicitFilter):
            self.filter.warn_beyond_training(k.shape[2] + (layer_cache.convolutions[0].read if layer_cache else 0))
        if layer_cache is None:
            y = self._parallel(q, k, v, between)
        elif isinstance(self.filter, ImplicitFilter):
            y = self._exact(q, k, v, between, layer_cache)
        else:
            y = self._recurrent(q, k, v, between, layer_cache)
        if self.features is not None:
            y = normalised(y)
        return self.heads.ungrouped(y)

    def _parallel(self, q, k, v, between):
        length = k.shape[2]
        if length == 0:
            return v.new_zeros(*q.shape[:-1], v.shape[-1])
        if self.hyena_order == 1:
            if self.filter_head_width > 1 and self._scan_pays(k.shape[2], k.is_cuda):
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

    def _scan_pays(self, length, on_gpu):
        if not isinstance(self.filter, ModalFilter):
            return False
        modes = sum(self.filter.state_sizes) / self.num_filters
        if on_gpu:
            return length > GPU_SCAN_PAYS * self.filter_head_width * modes
        return length > SCAN_PAYS * (modes + 4)

    def _scan(self, q, k, v):
        wide = self.filter.dtype
        with torch.autocast(q.device.type, enabled=False), full_float32():
            taps, (modes,) = self.filter(min(k.shape[2], chunk_of(k)), parts=1)
            state = HeadState(modes, len(q), k.shape[-1], v.shape[-1])
            return modal_scan(*(z.to(wide) for z in (q, k, v)), taps, state, long_convolution)

    def _recurrent(self, q, k, v, between, layer_cache):
        """The same outputs as _parallel, from states of constant size in `layer_cache`; float32 or wider."""
        wide, length, first = self.filter.dtype, k.shape[2], not layer_cache.modal_states
        q, k, v, *between = (z.to(wide) for z in (q, k, v, *between))
        if first:
            layer_cache.modal_states = self._no_tokens(len(q), k.shape[-1], v.shape[-1])
        if length == 0:
            return v.new_zeros(*q.shape[:-1], v.shape[-1])
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

    def _no_tokens(self, batch, key_width, value_width):
        _, parts = self.filter(1, parts=self.hyena_order)
        if self.filter_head_width == 1:
            return [ChannelState(modes, batch) for modes in parts]
        return [HeadState(modes, batch, key_width, value_width) for modes in parts]

    def _piece(self, q, k, v, taps, state, first):
        if self.filter_head_width > 1 and self._scan_pays(k.shape[2], k.is_cuda):
            return modal_scan(q, k, v, taps, state, long_convolution)
        y = long_convolution(q, k, v, taps)
        if not first:
            y = y + state.read(q)
        state.advance(k, v)
        return y


class _Heads:
    """Which heads of a layer keep attention, and how the channels of the others are grouped to filters."""

    def __init__(self, config, layer_index):
        heads = config.num_key_value_heads
        self.queries = config.num_attention_heads // heads  # heads of q for each of k and v
        self.kept = config.kept_heads(layer_index)
        self.filtered = heads - len(self.kept)  # of k and v
        self.own_state = not config.share_state  # k and v are repeated, for a state of each head of q
        self.groups = self.filtered * (self.queries if self.own_state else 1)  # heads that filters run over
        others = [head for head in range(heads) if head not in self.kept]
        # For each head of k and v its place among those that keep attention, or -1 - its place among the others.
        self.places = [self.kept.index(h) if h in self.kept else -1 - others.index(h) for h in range(heads)]
        self.runs = []  # (kept?, first head of k and v, last + 1), in order
        for head in range(heads):
            if self.runs and self.runs[-1][0] == (head in self.kept):
                self.runs[-1] = (*self.runs[-1][:2], head + 1)
            else:
                self.runs.append((head in self.kept, head, head + 1))

    def parted(self, x, queries=1):
        """The heads that keep attention and the others, of x (batch, head, …)."""
        kinds = {True: [], False: []}
        parts = x.split([queries * (b - a) for _, a, b in self.runs], dim=1)
        for (kept, _, _), part in zip(self.runs, parts, strict=True):
            kinds[kept].append(part)
        return [torch.cat(own, dim=1) if len(own) > 1 else own[0] for own in kinds.values()]

    def merge(self, kept, others):
        """All heads of q in order again."""
        rest = {True: kept, False: others}
        parts = []
        for own, a, b in self.runs:
            part, rest[own] = rest[own].split([self.queries * (b - a), rest[own].shape[1] - self.queries * (b - a)], 1)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def grouped(self, q, k, v, filters):
        """q (batch, filter, query, length, width), and k, v the same without the queries that share them."""
        if self.own_state:
            k, v = (z.repeat_interleave(self.queries, dim=1) for z in (k, v))
        q = q.unflatten(1, (self.groups, -1)).transpose(1, 2)  # (batch, query, head, length, channel)
        q, k, v = (self._regrouped(z, filters) for z in (q, k, v))
        return q.transpose(1, 2), k, v

    def _regrouped(self, x, count):
        """(…, head, length, channel) to (…, `count` groups of channels, length, width)."""
        if x.shape[-3] == count:
            return x
        return x.transpose(-3, -2).flatten(-2).unflatten(-1, (count, -1)).transpose(-3, -2)

    def ungrouped(self, y):
        """(batch, filter, query, length, width) as (batch, head of q, length, channel)."""
        return self._regrouped(y.transpose(1, 2), self.groups).transpose(1, 2).flatten(1, 2)


class Features(nn.Module):
    """φ(x) = [softmax(A x), softmax(-A x)] for q and k, with a matrix A for each head, at first the identity.

    Source: arXiv:2402.04347 (Hedgehog). v gets a last channel of ones, whose sum is the normaliser.
    """

    def __init__(self, config, heads):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(heads.filtered * heads.queries, config.head_dim, config.head_dim))
        self.k = nn.Parameter(torch.zeros(heads.groups, config.head_dim, config.head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        for matrix in (self.q, self.k):
            matrix.copy_(torch.eye(matrix.shape[-1], device=matrix.device).expand_as(matrix))

    def forward(self, q, k, v, real):
        """q (batch, filter, query, length, width), k and v (batch, filter, length, width), real (batch, length)."""
        q = _two_softmaxes(q @ self.q.unflatten(0, (k.shape[1], -1)).to(q.dtype))
        k = _two_softmaxes(k @ self.k.to(k.dtype))
        if real is None:
            ones = torch.ones_like(v[..., :1])
        else:  # padding, and empty places of a ring, have the features of a zero key otherwise
            ones = real[:, None, :, None].to(v.dtype).expand_as(v[..., :1])
            k = k * ones
        return q, k, torch.cat([v, ones], dim=-1)


def _two_softmaxes(x):
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)


def normalised(y: Tensor) -> Tensor:  # (…, width + 1) -> (…, width)
    """The sums of values divided by the sum of weights, their last channel; zero where nothing was summed."""
    weight = y[..., -1:]
    return y[..., :-1] / torch.where(weight == 0, 1.0, weight)


def _plain(linear):
    """Whether a projection is its weight and bias, without an adapter or hooks (ZeRO-3 gathers parameters in hooks)."""
    hooks = linear._forward_pre_hooks, linear._forward_hooks, linear._backward_pre_hooks, linear._backward_hooks
    own = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and "forward" not in vars(linear)
    return own and not any(hooks)


def biases_of(linears: list[nn.Linear]) -> list[Tensor]:
    """Zeros for a layer without a bias; nothing if none has one."""
    if all(linear.bias is None for linear in linears):
        return []
    return [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias for x in linears]


class OneProduct(torch.autograd.Function):
    """Linear layers of the same input as one, whose output is theirs one after the other.

    `parameters` are `count` weights and as many biases or none. They are kept for the gradient, and no copy: where FSDP
    shards parameters again after a layer, copies would keep them whole.
    """

    @staticmethod
    def forward(ctx, hidden, count, *parameters):
        weights, biases = parameters[:count], parameters[count:]
        y = F.linear(hidden, torch.cat(weights), torch.cat(biases) if biases else None)
        ctx.biased = bool(biases)
        ctx.save_for_backward(hidden.to(y.dtype), *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        hidden, *weights = ctx.saved_tensors
        rows, sizes, to_hidden = dy.flatten(0, -2), [len(weight) for weight in weights], None
        if ctx.needs_input_grad[0]:
            to_hidden = dy @ torch.cat(weights).to(dy.dtype)
        to_weights = (rows.mT @ hidden.flatten(0, -2)).split(sizes)
        to_biases = rows.sum(0).split(sizes) if ctx.biased else []
        return to_hidden, None, *to_weights, *to_biases


def _filter(config, layer_index):
    if config.filter == "modal":
        return (PositiveFilter if config.positive else ModalFilter)(config.state_sizes[layer_index])
    return ImplicitFilter(
        config.filters(layer_index) // config.hyena_order,
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
    v: Tensor,  # (batch, filter, length, value width)
    taps: Tensor,  # (filter, length or more)
) -> Tensor:  # (batch, filter, query, length, value width)
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s in the exact form that is fastest for this shape."""
    width = k.shape[-1]
    if width == 1:
        return q * causal_convolution((k * v)[..., 0], taps)[:, :, None, :, None]
    if fft_pays(v, width):
        return outer_product_convolution(q, k, v, taps)
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast features are wider
    return toeplitz_product(q, k, v, taps) if takes(v, width) else ToeplitzProduct.apply(q, k, v, taps.to(v.dtype))


def fft_pays(v: Tensor, width: int) -> bool:
    """Whether FFTs are quicker than a matrix form, for v (…, length, value width) and k of this width."""
    least = GPU_FFT_PAYS if takes(v, width) else CODE_FFT_PAYS if in_machine_code(v, width) else FFT_PAYS
    return v.shape[-2] > least * width * v.shape[-1]
