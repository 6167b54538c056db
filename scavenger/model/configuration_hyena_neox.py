"""Configuration of a GPT-NeoX whose attention is replaced by Hyena."""

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .modal import ring_places


class HyenaNeoXConfig(PreTrainedConfig):
    """GPT-NeoX's own fields, and the mixer's.

    `attention_layers`: layers that keep the teacher's attention, each token seeing `attention_window` tokens, 0: all.
    `num_filters`: heads that share a long filter; hidden_size (one for each channel) for hyena, fewer for multihyena.
    `hyena_order`: long convolutions of a layer, one after the other. 1 gates before and after its one convolution, as
    the published code calls "order 2"; from 2 on it is the paper's full recurrence and needs one filter per channel.
    `rotary`: whether q and k of the mixers keep the teacher's rotary turn; None: wherever it stays relative, that is
    where the groups of channels that share a filter split no turned pair.
    `filter`: "implicit" before stage two, "modal" after it; then `state_sizes` has, for each layer, the complex
    modes of each filter (those of the first long convolution first).
    `context_length`: tokens of a training example, the unit of time of the implicit filters; `filter_window`: in how
    many of them the slowest of these filters falls to 1 %.
    """

    model_type = "hyena_neox"
    # By this name lm-evaluation-harness finds the length; max_position_embeddings would also cap what is generated.
    attribute_map = {"n_ctx": "context_length"}
    keys_to_ignore_at_inference = ["cache"]

    vocab_size: int = 50304
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    rotary_fraction: float = 0.25
    rotary_base: float = 10000.0
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    attention_layers: list[int] | tuple[int, ...] = ()
    attention_window: int = 256
    num_filters: int = 8
    hyena_order: int = 1
    rotary: bool | None = None
    short_filter_length: int = 3
    filter_width: int = 64
    position_features: int = 33
    sine_frequency: float = 1.0
    filter_window: float = 1.5
    context_length: int = 1024
    filter: str = "implicit"
    state_sizes: list[list[int]] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for key in ("num_attention_heads", "num_filters"):
            if self.hidden_size % getattr(self, key):
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {key} {getattr(self, key)}")
        if self.hyena_order < 1 or (self.hyena_order > 1 and self.num_filters != self.hidden_size):
            raise ValueError(
                f"hyena_order is {self.hyena_order} with num_filters {self.num_filters}; expected 1, or more with "
                f"num_filters equal to hidden_size ({self.hidden_size})"
            )
        group, head = self.hidden_size // self.num_filters, self.hidden_size // self.num_attention_heads
        turned = self.rotary_channels + self.rotary_channels % 2  # in pairs
        relative = group % head == 0 or (head % group == 0 and group >= turned)
        if self.rotary is None:
            self.rotary = relative
        elif self.rotary and not relative:
            raise ValueError(f"rotary is true; expected false: groups of {group} channels split the turned pairs")
        if self.hidden_act not in list(ACT2FN):
            raise ValueError(f"hidden_act is {self.hidden_act!r}; expected one of {', '.join(sorted(ACT2FN))}")
        if self.filter not in ("implicit", "modal"):
            raise ValueError(f"filter is {self.filter!r}; expected 'implicit' or 'modal'")
        if self.filter == "modal" and len(self.state_sizes or []) != self.num_hidden_layers:
            raise ValueError(f"state_sizes has {len(self.state_sizes or [])} layers; expected {self.num_hidden_layers}")

    @property
    def state_bytes(self) -> int | None:
        """Bytes kept between tokens for one sequence by a float32 model; None where they grow or there is no state."""
        return self.state_bytes_of(4)

    def state_bytes_of(self, itemsize: int) -> int | None:
        """`state_bytes` of a model whose numbers have `itemsize` bytes, 2 for bfloat16; its modes stay in float32."""
        if self.filter != "modal" or (self.attention_layers and not self.attention_window):
            return None
        streams = 3 + max(0, self.hyena_order - 2)
        convolution = itemsize * (self.short_filter_length - 1) * streams * self.hidden_size
        width = self.hidden_size // self.num_filters
        modes = 8 * width**2
        # Keys and values that wait, in float32, and the age of each slice of the modes, in 8.
        waiting = 8 * (self.hidden_size + 1) * ring_places(width) if width > 1 else 0
        window = self.attention_window * (2 * itemsize * self.hidden_size + 1)  # keys, values, and which are real
        return sum(
            window if layer in self.attention_layers else convolution + waiting + modes * sum(self.state_sizes[layer])
            for layer in range(self.num_hidden_layers)
        )

    @property
    def break_even_length(self) -> int | None:
        """Tokens from which on the teacher's KV cache in float32 is at least as large as this model's state."""
        return self.break_even_length_of(4)

    def break_even_length_of(self, cache_itemsize: int, itemsize: int = 4) -> int | None:
        """The same for a KV cache whose numbers have `cache_itemsize` bytes, and a model whose numbers have `itemsize`.

        The cache has 2 · layers · hidden_size numbers a token.
        """
        state = self.state_bytes_of(itemsize)
        if state is None:
            return None
        return -(-state // (2 * cache_itemsize * self.num_hidden_layers * self.hidden_size))

    @property
    def rotary_channels(self) -> int:
        return int(self.hidden_size // self.num_attention_heads * self.rotary_fraction)
