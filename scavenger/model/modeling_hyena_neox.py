"""GPT-NeoX with a Hyena mixer where attention was, at home in transformers.

Parameter names are GPT-NeoX's, with `mixer` for `attention`. A student whose filters are modal generates with a cache
of constant size; one whose filters are implicit has no state yet and reads its whole input at each token.
"""

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention import AttentionCacheLayer, WindowedAttention
from .configuration_hyena_neox import HyenaNeoXConfig
from .filters import ImplicitFilter
from .hyena import HyenaMixer
from .rotary import rotary_angles


class HyenaCacheLayer:
    """What one mixer remembers: the last inputs of its short convolution, and its modes."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self):
        self.conv_state: Tensor | None = None  # (batch, tap - 1, 3 channel)
        self.recurrent_state: Tensor | None = None  # (batch, mode, width, width) complex

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        return self.conv_state, self.recurrent_state

    def select(self, rows: Tensor):
        if self.conv_state is not None:
            self.conv_state = self.conv_state.index_select(0, rows.to(self.conv_state.device))
            self.recurrent_state = self.recurrent_state.index_select(0, rows.to(self.recurrent_state.device))


class HyenaCache(Cache):
    """The state of a sequence, of a size that does not depend on how much was read."""

    def __init__(self, config: HyenaNeoXConfig):
        kept = set(config.attention_layers)
        super().__init__(
            layers=[
                AttentionCacheLayer() if index in kept else HyenaCacheLayer()
                for index in range(config.num_hidden_layers)
            ]
        )
        self.config = config
        self.seen = 0  # tokens read, padding included
        self.padding: Tensor | None = None  # (batch,) tokens of left padding among them

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def reset(self):
        self.__init__(self.config)

    def reorder_cache(self, beam_idx: Tensor):
        for layer in self.layers:
            layer.select(beam_idx)
        if self.padding is not None:
            self.padding = self.padding.index_select(0, beam_idx.to(self.padding.device))

    def batch_select_indices(self, indices: Tensor):
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int):
        if self.padding is not None:
            self.reorder_cache(torch.arange(len(self.padding)).repeat_interleave(repeats))

    @property
    def nbytes(self) -> int:
        """Bytes held for all sequences of the batch."""
        states = [state for layer in self.layers for state in layer.states]
        return sum(state.numel() * state.element_size() for state in states if state is not None)


class HyenaNeoXMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(hidden)))


class HyenaNeoXLayer(nn.Module):
    def __init__(self, config, layer_index: int):
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = (WindowedAttention if layer_index in config.attention_layers else HyenaMixer)(config, layer_index)
        self.mlp = HyenaNeoXMLP(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache) -> Tensor:
        mixed = self.mixer(self.input_layernorm(hidden), cos, sin, mask, cache)
        if self.use_parallel_residual:
            return mixed + self.mlp(self.post_attention_layernorm(hidden)) + hidden
        hidden = hidden + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class HyenaNeoXPreTrainedModel(PreTrainedModel):
    config_class = HyenaNeoXConfig
    base_model_prefix = "gpt_neox"
    _no_split_modules = ["HyenaNeoXLayer"]
    # Loading in half precision must leave poles and residues alone.
    _keep_in_fp32_modules_strict = ["mixer.filter"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (HyenaMixer, ImplicitFilter, nn.LayerNorm)):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class HyenaNeoXModel(HyenaNeoXPreTrainedModel):
    def __init__(self, config: HyenaNeoXConfig):
        super().__init__(config)
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HyenaNeoXLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_in

    def set_input_embeddings(self, value):
        self.embed_in = value

    def forward(
        self,
        input_ids: Tensor | None = None,  # (batch, length)
        attention_mask: Tensor | None = None,  # (batch, seen + length): zeros on the left are padding
        inputs_embeds: Tensor | None = None,  # (batch, length, channel), instead of input_ids
        past_key_values: HyenaCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        hidden = self.embed_in(input_ids) if inputs_embeds is None else inputs_embeds
        recurrent = self.config.filter == "modal"
        use_cache = recurrent and (self.config.use_cache if use_cache is None else use_cache)
        cache = past_key_values if isinstance(past_key_values, HyenaCache) else None
        if cache is None and past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}; expected a HyenaCache")
        if cache is not None and not recurrent:
            raise ValueError("a student with implicit filters has no state; expected past_key_values=None")
        if use_cache and cache is None:
            cache = HyenaCache(self.config)
        mask, cos, sin = self.mask_and_angles(hidden, attention_mask, cache)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, mask, cache)
        if cache is not None:
            cache.seen += hidden.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.final_layer_norm(hidden), past_key_values=cache)

    def mask_and_angles(self, hidden: Tensor, attention_mask: Tensor | None = None, cache: HyenaCache | None = None):
        """The mask over these tokens (None: no padding), and the cos and sin that turn q and k at their positions.

        A row's positions are counted from its first real token: only differences count, but small numbers are exact.
        """
        batch, length = hidden.shape[:2]
        seen = 0 if cache is None else cache.seen
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, -length:] if length else attention_mask[:, :0]
        if cache is None:
            padding = hidden.new_zeros(batch, dtype=torch.long) if mask is None else (mask == 0).sum(1)
        else:
            if cache.padding is None:
                cache.padding = torch.zeros(batch, dtype=torch.long, device=hidden.device)
            if mask is not None:
                if length and bool((mask[:, :-1] > mask[:, 1:]).any()):
                    raise ValueError(
                        "attention_mask pads on the right; expected padding on the left where a cache is used"
                    )
                cache.padding = cache.padding + (mask == 0).sum(1)
            padding = cache.padding
        places = torch.arange(seen, seen + length, device=hidden.device)
        positions = places[None] - padding[:, None]
        cos, sin = rotary_angles(positions, self.config.rotary_channels, self.config.rotary_base, hidden.dtype)
        return None if mask is None or bool(mask.all()) else mask, cos, sin


class HyenaNeoXForCausalLM(HyenaNeoXPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "gpt_neox.embed_in.weight"}

    def __init__(self, config: HyenaNeoXConfig):
        super().__init__(config)
        self.gpt_neox = HyenaNeoXModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a HyenaCache

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        # Without a state the whole input is read at each token, whatever `use_cache` says.
        if self.config.filter != "modal":
            next_sequence_length = None
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: HyenaCache | None = None,
        labels: Tensor | None = None,  # (batch, length), shifted here as everywhere in transformers
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        outputs = self.gpt_neox(input_ids, attention_mask, inputs_embeds, past_key_values, use_cache)
        hidden = outputs.last_hidden_state
        kept = (
            slice(-logits_to_keep, None)
            if isinstance(logits_to_keep, int) and logits_to_keep
            else (slice(None) if isinstance(logits_to_keep, int) else logits_to_keep)
        )
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
