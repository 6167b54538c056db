"""Configuration of a decoder Transformer whose attention is replaced by Hyena."""

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


class HyenaConfig(PreTrainedConfig):
    """The shape of the blocks, which is the teacher's, and of the mixers.

    `num_key_value_heads`: heads of k and v; each serves a group of num_attention_heads / num_key_value_heads heads of
    q. `norm`: "layer" or "rms"; `qk_norm` adds one for each head of q and k. `mlp`: "plain", down(act(up x)), or
    "gated", down(act(gate x) ⊙ up x). `parallel_residual`: the mixer and the MLP read the same hidden state. The first
    `rotary_channels` of each head are turned, by frequencies that are saved with the weights; cos and sin are
    multiplied by `rotary_scaling`. Embeddings are multiplied by `embedding_scale`.

    `attention_layers`: layers that keep the teacher's attention, each token seeing `attention_window` tokens, 0: all;
    and no more than the teacher itself sees in that layer, by `sliding_windows` (one for each layer, 0: all).
    `attention_heads`: for each layer the single heads of k and v that keep it, with their heads of q, likewise.
    `window`: tokens that every other head sees by softmax attention beside its long filter, whose lags begin there.
    `num_filters`: groups of channels that share a long filter: one for each channel for hyena, fewer for multihyena; as
    many as a layer without kept heads has. 0: none, the window is all there is.
    `features`: "hedgehog": the filter's scores are products of non-negative features of q and k, and are normalised.
    `share_state`: the heads of q in a group share the filters and the states of their head of k and v; otherwise k and
    v are repeated, and each head of q has its own.
    `hyena_order`: long convolutions of a layer, one after the other. 1 gates before and after its one convolution, as
    the published code calls "order 2"; from 2 on it is the paper's full recurrence and needs one filter per channel.
    `rotary`: whether q and k of the mixers are turned; None: wherever the groups of channels split no turned pair.
    `filter`: "implicit" before stage two, "modal" after it; then `state_sizes` has, for each layer, the complex
    modes of each filter (those of the first long convolution first). `positive`: modal filters are sums of real
    exponentials with coefficients above zero.
    `context_length`: tokens of a training example, the unit of time of the implicit filters; `filter_window`: in how
    many of them the slowest of these filters falls to 1 %.
    """

    model_type = "hyena"
    # By this name lm-evaluation-harness finds the length; max_position_embeddings would also cap what is generated.
    attribute_map = {"n_ctx": "context_length"}
    keys_to_ignore_at_inference = ["cache"]

    vocab_size: int = 50304
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    norm: str = "layer"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    mlp: str = "plain"
    parallel_residual: bool = True
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    rotary_channels: int | None = None
    rotary_scaling: float = 1.0
    embedding_scale: float = 1.0
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    attention_layers: list[int] | tuple[int, ...] = ()
    attention_window: int = 256
    attention_heads: list[list[int]] | None = None
    sliding_windows: list[int] | None = None
    window: int = 0
    features: str = "none"
    num_filters: int = 8
    share_state: bool = True
    hyena_order: int = 1
    rotary: bool | None = None
    short_filter_length: int = 3
    filter_width: int = 64
    position_features: int = 33
    sine_frequency: float = 1.0
    filter_window: float = 1.5
    context_length: int = 1024
    filter: str = "implicit"
    positive: bool = False
    state_sizes: list[list[int]] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; expected head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.rotary_channels is None:
            self.rotary_channels = self.head_dim
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.rotary_channels % 2 or self.rotary_channels > self.head_dim:
            raise ValueError(
                f"rotary_channels is {self.rotary_channels}; expected an even number up to head_dim ({self.head_dim})"
            )
        if self.num_filters == 0 and not (self.window and self.filter == "modal"):
            raise ValueError("num_filters is 0; expected a window and modal filters beside it, or a number of filters")
        if self.num_filters and self.filtered_width % self.num_filters:
            raise ValueError(
                f"the {self.filtered_width} channels of the heads are not a multiple of num_filters {self.num_filters}"
            )
        if self.hyena_order < 1 or (self.hyena_order > 1 and self.filter_head_width > 1):
            raise ValueError(
                f"hyena_order is {self.hyena_order} with num_filters {self.num_filters}; expected 1, or more with "
                f"one filter for each channel ({self.filtered_width})"
            )
        step = self.filter_head_width or self.head_dim
        relative = not any(map(self._splits_pair, range(0, self.filtered_width, step)))
        if self.rotary is None:
            self.rotary = relative
        elif self.rotary and not relative:
            raise ValueError(
                f"rotary is true; expected false: groups of {self.filter_head_width} channels split the turned pairs"
            )
        self._check_heads(relative)
        if not set(self.attention_layers) <= set(range(self.num_hidden_layers)):
            raise ValueError(
                f"attention_layers is {list(self.attention_layers)}; expected some of 0 to {self.num_hidden_layers - 1}"
            )
        for name, allowed in (
            ("hidden_act", sorted(ACT2FN)),
            ("filter", ["implicit", "modal"]),
            ("norm", ["layer", "rms"]),
            ("mlp", ["plain", "gated"]),
            ("features", ["none", "hedgehog"]),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        if self.filter == "modal" and len(self.state_sizes or []) != self.num_hidden_layers:
            raise ValueError(f"state_sizes has {len(self.state_sizes or [])} layers; expected {self.num_hidden_layers}")

    def _check_heads(self, relative):
        """ValueError where a window, kept heads or features do not go with the filters."""
        heads = self.attention_heads or []
        if heads and (
            len(heads) != self.num_hidden_layers
            or any(not set(own) < set(range(self.num_key_value_heads)) for own in heads)
            or any(own and layer in self.attention_layers for layer, own in enumerate(heads))
        ):
            raise ValueError(
                f"attention_heads is {heads}; expected for each of {self.num_hidden_layers} layers some, not all, of "
                f"the heads 0 to {self.num_key_value_heads - 1}, and none in a layer of attention_layers"
            )
        if not 0 <= self.window < self.context_length:
            raise ValueError(f"window is {self.window}; expected 0 to context_length - 1 ({self.context_length - 1})")
        beside = self.window > 0 or any(heads)
        if beside and self.hyena_order > 1:
            raise ValueError(f"hyena_order is {self.hyena_order}; expected 1 beside a window or kept heads")
        if beside and self.num_filters and self.head_dim % self.filter_head_width:
            raise ValueError(
                f"num_filters is {self.num_filters}; expected groups of channels within a head of {self.head_dim} "
                "beside a window or kept heads"
            )
        if beside and not (relative and self.rotary):
            raise ValueError(
                "a window and kept heads take the teacher's rotary turn of q and k, which the filters share; expected "
                "rotary, and filters over groups of channels that split no turned pair"
            )
        if self.features != "none" and (self.num_filters != self.filtered_heads or not self.positive):
            raise ValueError(
                f"features is {self.features!r}; expected none, or positive filters, one for each of "
                f"{self.filtered_heads} heads"
            )
        if self.positive and self.filter != "modal":
            raise ValueError(f"positive is true and filter is {self.filter!r}; expected 'modal'")

    def _splits_pair(self, channel):
        """Whether a group that begins at this channel begins with the second of a turned pair."""
        return channel % self.head_dim < self.rotary_channels and channel % self.head_dim % 2 == 1

    @property
    def key_value_width(self) -> int:
        """Channels of k, and of v."""
        return self.num_key_value_heads * self.head_dim

    @property
    def filtered_heads(self) -> int:
        """Heads that long filters run over."""
        return self.num_key_value_heads if self.share_state else self.num_attention_heads

    @property
    def filtered_width(self) -> int:
        """Channels that long filters run over."""
        return self.filtered_heads * self.head_dim

    @property
    def filter_head_width(self) -> int:
        """Channels that share a long filter; 0 where there is none."""
        return self.filtered_width // self.num_filters if self.num_filters else 0

    @property
    def horizon(self) -> int:
        """Lags of a long filter within a context."""
        return self.context_length - self.window

    @property
    def key_features(self) -> int:
        """Numbers that a filter's state holds for a key."""
        return self.filter_head_width if self.features == "none" else 2 * self.filter_head_width

    @property
    def value_features(self) -> int:
        """Numbers that a filter's state holds for a value: with a normaliser, one more than channels."""
        return self.filter_head_width + (self.features != "none")

    def kept_heads(self, layer: int) -> list[int]:
        """Heads of k and v that keep the teacher's attention in a layer that replaces the others."""
        return sorted(self.attention_heads[layer]) if self.attention_heads else []

    def filters(self, layer: int) -> int:
        """Long filters of a layer."""
        if layer in self.attention_layers:
            return 0
        heads = self.num_key_value_heads
        return self.num_filters * (heads - len(self.kept_heads(layer))) // heads * self.hyena_order

    def kept_window(self, layer: int) -> int:
        """Tokens that each token sees in a layer or head that keeps attention, 0: all before it."""
        return self._capped(self.attention_window, layer)

    def near_window(self, layer: int) -> int:
        """Tokens that each token sees by softmax beside the long filters of a layer."""
        return self._capped(self.window, layer) if self.window else 0

    def _capped(self, window, layer):
        sliding = self.sliding_windows[layer] if self.sliding_windows else 0
        return min(filter(None, (window, sliding)), default=0)

    @property
    def keeps_attention(self) -> bool:
        """Whether a layer or a head keeps the teacher's attention."""
        return bool(self.attention_layers or any(self.attention_heads or []))

    @property
    def widest_window(self) -> int | None:
        """The largest window of softmax attention anywhere, 0: all tokens; None where there is none."""
        layers = range(self.num_hidden_layers)
        keeping = [layer for layer in layers if layer in self.attention_layers or self.kept_heads(layer)]
        windows = [self.kept_window(layer) for layer in keeping]
        if 0 in windows:
            return 0
        windows += [self.near_window(layer) for layer in layers if self.window and layer not in self.attention_layers]
        return max(windows, default=None)

    @property
    def state_grows(self) -> bool:
        """Whether a layer or a head keeps attention to all tokens."""
        return self.widest_window == 0

    @property
    def state_bytes(self) -> int | None:
        """Bytes kept between tokens for one sequence by a float32 model; None where they grow or there is no state."""
        return self.state_bytes_of(4)

    def state_bytes_of(self, itemsize: int, mode_itemsize: int = 4) -> int | None:
        """`state_bytes` of a model whose numbers have `itemsize` bytes, 2 for bfloat16, and its modes others."""
        parts = self._state_parts(itemsize, mode_itemsize)
        return None if parts is None else sum(parts[:2])

    def moved_bytes_of(self, itemsize: int, mode_itemsize: int = 4) -> int | None:
        """Bytes of a sequence's state that a step reads and writes: all but windows both ways, of a window one token.

        As long as a step is bound by memory, it is as long as attention's over a KV cache of as many bytes.
        """
        parts = self._state_parts(itemsize, mode_itemsize)
        if parts is None:
            return None
        both_ways, windows, one_token = parts
        return 2 * both_ways + windows + one_token

    def _state_parts(self, itemsize, mode_itemsize):
        """Bytes of modes and short convolutions, of all windows, and of one token in each; None where they grow."""
        if self.filter != "modal" or self.state_grows:
            return None
        streams = (
            self.num_attention_heads * self.head_dim
            + 2 * self.key_value_width
            + max(0, self.hyena_order - 2) * self.filtered_width
        )
        both_ways = windows = one_token = 0
        for layer in range(self.num_hidden_layers):
            heads = self.num_key_value_heads
            kept = heads if layer in self.attention_layers else len(self.kept_heads(layer))
            rings = [(kept, self.kept_window(layer))]
            if layer not in self.attention_layers:
                rings.append((heads - kept, self.near_window(layer)))
                both_ways += itemsize * (self.short_filter_length - 1) * streams
                if self.filters(layer):
                    both_ways += self.mode_bytes(self.positive, mode_itemsize) * sum(self.state_sizes[layer])
            for own, window in rings:
                # Keys, values, and whether a token is real.
                each = 2 * itemsize * own * self.head_dim + 1 if own and window else 0
                windows, one_token = windows + window * each, one_token + each
        return both_ways, windows, one_token

    def mode_bytes(self, positive: bool, itemsize: int = 4) -> int:
        """Bytes of one mode: a complex one has two numbers for each of a positive one's."""
        return (1 if positive else 2) * itemsize * self.key_features * self.value_features

    @property
    def break_even_length(self) -> int | None:
        """Tokens from which on the teacher's KV cache in float32 is at least as large as this model's state."""
        return self.break_even_length_of(4)

    def break_even_length_of(self, cache_itemsize: int, itemsize: int = 4) -> int | None:
        """The same for a KV cache whose numbers have `cache_itemsize` bytes, and a model whose numbers have `itemsize`.

        The cache has 2 · layers · key_value_width numbers a token.
        """
        return self._cached_tokens(self.state_bytes_of(itemsize), cache_itemsize)

    def moved_break_even_length_of(self, cache_itemsize: int, itemsize: int = 4, mode_itemsize: int = 4) -> int | None:
        """Tokens from which on attention reads as many bytes of that cache in a step as this model moves of its state.

        With as much memory traffic for the weights, a step of both then takes as long wherever memory bounds it.
        """
        return self._cached_tokens(self.moved_bytes_of(itemsize, mode_itemsize), cache_itemsize)

    def _cached_tokens(self, size, itemsize):
        return None if size is None else -(-size // (2 * itemsize * self.num_hidden_layers * self.key_value_width))
