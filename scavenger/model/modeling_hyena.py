"""A decoder Transformer with Hyena mixers in place of attention, as a transformers model.

A student with modal filters generates with a cache of constant size; one with implicit filters caches all its inputs,
with the outputs of a parallel forward pass. Only what every transformers model imports is imported of transformers, so
that a saved student outlives its versions.
"""

import inspect
from functools import partial

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention import AttentionCacheLayer, Ring, WindowedAttention
from .capture import EAGER, CapturedStep, capturable
from .configuration_hyena import HyenaConfig
from .decoding import Decoder
from .filters import ImplicitFilter, ModalFilter
from .hyena import Features, HyenaMixer
from .modal import ChannelState, HeadState
from .norm import RMSNorm, norm
from .online import ExactCacheLayer
from .rotary import Rotary
from .token_cpp import Token, knows


# Keywords accepted beside the arguments of a forward pass; `past_key_values` is an earlier name of `cache`. A student
# has no attention matrices: `output_attentions` changes nothing.
OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict", "cache_position", "past_key_values")
LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")
EAGERLY = ("output_hidden_states", "cache_position", *LOSS)  # a step that is asked for one of them is not captured


class HyenaCacheLayer:
    """The cache of one mixer: the last inputs of its short convolution, its windows, the modal states of long ones."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self):
        self.conv_state: Tensor | None = None  # (batch, tap - 1, channel of q, k, v and gates)
        self.near, self.kept = Ring(), Ring()  # of the window beside the filters, and of the heads that keep attention
        self.modal_states: list[ChannelState | HeadState] = []  # one for each long convolution

    @property
    def begun(self) -> bool:
        """Whether a token, or padding, was read."""
        return self.conv_state is not None

    @property
    def rings(self) -> list[Ring]:
        return [ring for ring in (self.near, self.kept) if ring.keys is not None]

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        modal = (tensor for state in self.modal_states for tensor in state.tensors)
        return self.conv_state, *(tensor for ring in self.rings for tensor in ring.states), *modal

    def select(self, rows: Tensor):
        if self.conv_state is not None:
            self.conv_state = self.conv_state.index_select(0, rows.to(self.conv_state.device))
            for state in (*self.rings, *self.modal_states):
                state.select(rows)


class HyenaCache(Cache):
    """The state of a batch of sequences: of constant size with modal filters, all inputs with implicit filters."""

    def __init__(self, config: HyenaConfig):
        kept = set(config.attention_layers)
        super().__init__(
            layers=[
                AttentionCacheLayer()
                if index in kept
                else (HyenaCacheLayer() if config.filter == "modal" else ExactCacheLayer(config))
                for index in range(config.num_hidden_layers)
            ]
        )
        self.config = config
        # Tensors rather than numbers, so that one compiled step serves every length.
        self.seen: Tensor | None = None  # () tokens read, padding included
        self.real: Tensor | None = None  # (batch,) tokens read, padding not included
        self.captured: CapturedStep | Token | None = None  # reads one token without the modules
        self.eager: int | None = EAGER  # single tokens before it is made; None: it is not

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.seen is None else int(self.seen)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers

    def reset(self):
        self.__init__(self.config)

    def crop(self, tokens_to_remove: int):
        if tokens_to_remove:
            raise ValueError("a HyenaCache cannot forget its last tokens; copy the cache before reading them")

    def reorder_cache(self, beam_idx: Tensor):
        self.captured = self.eager = None  # beams move at every token: there would be as many captures
        for layer in self.layers:
            layer.select(beam_idx)
        if self.real is not None:
            self.real = self.real.index_select(0, beam_idx.to(self.real.device))

    def batch_select_indices(self, indices: Tensor):
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int):
        if self.real is not None:
            self.reorder_cache(torch.arange(len(self.real)).repeat_interleave(repeats))

    @property
    def nbytes(self) -> int:
        """Bytes held for all sequences of the batch."""
        states = [state for layer in self.layers for state in layer.states]
        return sum(state.numel() * state.element_size() for state in states if state is not None)


class MLP(nn.Module):
    """down(act(up x))"""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.act(self.up(hidden)))


class GatedMLP(MLP):
    """down(act(gate x) ⊙ up x)"""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.act(self.gate(hidden)) * self.up(hidden))


class HyenaBlock(nn.Module):
    """A mixer, then an MLP, each on a norm of the hidden state and added to it."""

    def __init__(self, config, layer_index: int):
        super().__init__()
        self.mixer_norm = norm(config, config.hidden_size)
        self.mlp_norm = norm(config, config.hidden_size)
        self.mixer = (WindowedAttention if layer_index in config.attention_layers else HyenaMixer)(config, layer_index)
        self.mlp = (GatedMLP if config.mlp == "gated" else MLP)(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache) -> Tensor:
        hidden = hidden + self.mixer(self.mixer_norm(hidden), cos, sin, mask, cache)
        return hidden + self.mlp(self.mlp_norm(hidden))


class ParallelHyenaBlock(HyenaBlock):
    """A mixer and an MLP that read the same hidden state, both added to it."""

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache) -> Tensor:
        mixed = self.mixer(self.mixer_norm(hidden), cos, sin, mask, cache)
        return mixed + self.mlp(self.mlp_norm(hidden)) + hidden


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by a number; the head that shares them does not multiply."""

    def __init__(self, rows: int, width: int, scale: float):
        super().__init__(rows, width)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


class HyenaPreTrainedModel(PreTrainedModel):
    config_class = HyenaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyenaBlock", "ParallelHyenaBlock"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True  # in the layers that keep attention
    _is_stateful = True  # no decoding method that removes tokens from the cache
    # Loading in half precision must leave poles, residues and frequencies alone.
    _keep_in_fp32_modules_strict = ["mixer.filter", "rotary"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (Features, HyenaMixer, ImplicitFilter, ModalFilter, Rotary, RMSNorm, nn.LayerNorm)):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class HyenaModel(HyenaPreTrainedModel):
    def __init__(self, config: HyenaConfig):
        super().__init__(config)
        scaled = config.embedding_scale != 1
        self.embed = (
            ScaledEmbedding(config.vocab_size, config.hidden_size, config.embedding_scale)
            if scaled
            else nn.Embedding(config.vocab_size, config.hidden_size)
        )
        self.rotary = Rotary(config.rotary_channels, config.rotary_scaling)
        block = ParallelHyenaBlock if config.parallel_residual else HyenaBlock
        self.layers = nn.ModuleList(block(config, index) for index in range(config.num_hidden_layers))
        self.norm = norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def forward(
        self,
        input_ids: Tensor | None = None,  # (batch, length)
        attention_mask: Tensor | None = None,  # (batch, seen + length): zeros on the left are padding
        inputs_embeds: Tensor | None = None,  # (batch, length, channel), instead of input_ids
        cache: HyenaCache | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,  # (batch, length), only checked: positions are counted here
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        refuse_unknown(self, kwargs, OUTPUTS)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        cache = kwargs.get("past_key_values") if cache is None else cache
        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is None and not checkpointed and (self.config.use_cache if use_cache is None else use_cache):
            cache = HyenaCache(self.config)
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is not None:
            self.check_cache(cache, len(hidden))
        check_cache_position(kwargs.get("cache_position"), hidden.shape[1], cache)
        mask, cos, sin = self.mask_and_angles(hidden, attention_mask, cache, position_ids)
        depths = () if asked(self, kwargs, "output_hidden_states") else None
        for layer in self.layers:
            if depths is not None:
                depths += (hidden,)
            arguments = hidden, cos, sin, mask, cache
            hidden = self._gradient_checkpointing_func(layer, *arguments) if checkpointed else layer(*arguments)
        if cache is not None:
            cache.seen = cache.seen + hidden.shape[1]
            cache.real = cache.real + (hidden.shape[1] if mask is None else (mask != 0).sum(1))
        hidden = self.norm(hidden)
        if depths is not None:
            depths += (hidden,)  # the last after the norm, as everywhere in transformers
        found = BaseModelOutputWithPast(last_hidden_state=hidden, cache=cache, hidden_states=depths)
        return found if asked(self, kwargs, "return_dict") else found.to_tuple()

    def check_cache(self, cache: HyenaCache, batch: int):
        if not isinstance(cache, HyenaCache):
            raise ValueError(f"cache is a {type(cache).__name__}; expected a HyenaCache")
        if cache.config.filter != self.config.filter:
            raise ValueError(f"cache is of {cache.config.filter} filters; expected one of {self.config.filter} filters")
        if self.gradient_checkpointing and self.training:
            raise ValueError("cache would be read twice by gradient checkpointing; expected None")
        if cache.real is not None and len(cache.real) != batch:
            raise ValueError(f"cache holds {len(cache.real)} sequences; expected {batch}, as many as the input")

    def mask_and_angles(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        cache: HyenaCache | None = None,
        position_ids: Tensor | None = None,
    ):
        """The mask of these tokens (None: no padding), and the rotary cos and sin at their positions.

        Positions count from a row's first real token: only differences matter, but small numbers are exact.
        """
        batch, length = hidden.shape[:2]
        if cache is not None and cache.seen is None:
            cache.seen = torch.zeros((), dtype=torch.long, device=hidden.device)
            cache.real = cache.seen.expand(batch)
        mask = None
        if attention_mask is not None:
            if attention_mask.ndim != 2 or len(attention_mask) not in (1, batch) or attention_mask.shape[1] < length:
                shape = tuple(attention_mask.shape)
                raise ValueError(f"attention_mask has shape {shape}; expected ({batch}, {length} tokens or more)")
            mask = attention_mask[:, attention_mask.shape[1] - length :]
            # No device synchronisation in a decoding step, where it costs more than the step, nor while compiling.
            if length > 1 and not torch.compiler.is_compiling():
                if bool(((mask != 0) & (mask != 1)).any()):
                    raise ValueError(
                        "attention_mask has values other than 0 and 1; expected 1 for tokens and 0 for padding: packed "
                        "sequences are not kept apart"
                    )
                if bool(mask.all()):
                    mask = None
        if mask is None:
            positions = torch.arange(length, device=hidden.device).expand(batch, length)
        else:
            positions = (mask != 0).cumsum(1) - 1
            if cache is not None and length > 1:
                real = torch.cat([cache.real[:, None] > 0, mask != 0], dim=1)
                if bool((real[:, :-1] > real[:, 1:]).any()):
                    raise ValueError(
                        "attention_mask pads on the right; expected padding on the left where a cache is used"
                    )
        if cache is not None:
            positions = positions + cache.real[:, None]
        if position_ids is not None:
            check_position_ids(position_ids, positions, mask)
        return mask, *self.rotary(positions, hidden.dtype)


def asked(model: PreTrainedModel, given: dict, key: str) -> bool:
    """A choice of outputs: the caller's, or else that of the configuration."""
    return getattr(model.config, key) if given.get(key) is None else given[key]


def refuse_unknown(model: PreTrainedModel, given: dict, known: tuple[str, ...]):
    """Raise TypeError for a keyword that the forward pass would ignore; None asks for nothing."""
    unknown = [key for key, value in given.items() if key not in known and value is not None]
    if unknown:
        named = [key for key in inspect.signature(model.forward).parameters if key != "kwargs"]
        raise TypeError(
            f"{type(model).__name__}.forward: found the keyword {unknown[0]}; expected one of {', '.join(named)}, "
            f"{', '.join(known)}"
        )


def check_position_ids(position_ids: Tensor, positions: Tensor, mask: Tensor | None):
    """Raise ValueError where they are not `positions`, (batch, length): the mixers would mix packed sequences."""
    batch, length = positions.shape
    fits = tuple(position_ids.shape) in ((length,), (1, length), (batch, length))
    if not fits or not bool(((position_ids == positions) | (False if mask is None else mask == 0)).all()):
        raise ValueError(
            "position_ids do not count the tokens of each row from 0, or on from the cache; expected a row for each "
            "sequence: packed sequences are not kept apart"
        )


def check_cache_position(cache_position: Tensor | None, length: int, cache: HyenaCache | None):
    """Raise ValueError where the tokens are not the next ones after those in the cache."""
    if cache_position is not None:
        seen = 0 if cache is None else cache.get_seq_length()
        if cache_position.tolist() != list(range(seen, seen + length)):
            raise ValueError(
                f"cache_position is not {seen} to {seen + length - 1}; expected the positions after the cached tokens"
            )


class HyenaForCausalLM(HyenaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}

    def __init__(self, config: HyenaConfig):
        super().__init__(config)
        self.model = HyenaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def batch_decoder(self, rows: int, state_dtype: torch.dtype | None = None) -> Decoder:
        """Continuous batching with `rows` sequences at a time; only with modal filters."""
        return Decoder(self, rows, state_dtype)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward creates a HyenaCache

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def _may_be_captured(self, ids, mask, cache):
        """Whether this call reads one more token of each sequence, on one device, into states of constant size."""
        return (
            isinstance(cache, HyenaCache)
            and cache.eager is not None
            and cache.real is not None
            and ids is not None
            and ids.shape == (len(cache.real), 1)
            and capturable(ids)
            and self.config.filter == "modal"
            and not self.config.state_grows
            and not asked(self, {}, "output_hidden_states")
            and len(set((getattr(self, "hf_device_map", None) or {"": 0}).values())) == 1
            and (mask is None or ids.is_cuda or bool(mask[:, -1].all()))
        )

    def _captured(self, cache, ids, mask):
        """The logits of one more token without the modules; None where they are to read it, as the first tokens."""
        inputs = [ids] if mask is None or not ids.is_cuda else [ids, mask[:, -1:]]
        if cache.captured is None or not cache.captured.serves(self, *inputs):
            if cache.eager:
                cache.eager -= 1
                return None
            with torch.inference_mode(False), torch.no_grad():
                cache.captured = self._single_step(cache, *inputs)
            if cache.captured is None:
                cache.eager = None
                return None
        return cache.captured(*inputs)

    def _single_step(self, cache, ids, *mask):
        """A captured graph on a GPU, machine code on a CPU; None where neither is known."""
        if ids.is_cuda:
            return CapturedStep(partial(self._advance, cache), self, cache, ids, *mask)
        return Token(self, cache) if knows(self, cache) else None

    def _advance(self, cache, ids, mask=None):
        return self.lm_head(self.model(ids, attention_mask=mask, cache=cache).last_hidden_state)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        """Always a HyenaCache, the only kind that fits."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; expected None, for a HyenaCache"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if generation_config.use_cache is not False:
            model_kwargs.setdefault("cache", HyenaCache(self.config))

    def _prepare_position_ids_for_generation(self, *args):
        return None  # forward counts them

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, cache=None, inputs_embeds=None, past_key_values=None, **kwargs
    ):
        cache = past_key_values if cache is None else cache
        if cache is not None:
            self.model.check_cache(cache, len(input_ids))
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, cache=cache, inputs_embeds=inputs_embeds, **kwargs
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: HyenaCache | None = None,
        labels: Tensor | None = None,  # (batch, length), shifted by the loss as in all of transformers
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        refuse_unknown(self, kwargs, OUTPUTS + LOSS)
        cache = kwargs.get("past_key_values") if cache is None else cache
        asks_more = any(x is not None for x in (inputs_embeds, labels, position_ids, *map(kwargs.get, EAGERLY)))
        if not asks_more and self._may_be_captured(input_ids, attention_mask, cache):
            logits = self._captured(cache, input_ids, attention_mask)
            if logits is not None:
                found = CausalLMOutputWithPast(logits=logits, cache=cache)
                return found if asked(self, kwargs, "return_dict") else found.to_tuple()
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            position_ids=position_ids,
            **{key: value for key, value in kwargs.items() if key not in LOSS} | {"return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            given = {key: kwargs[key] for key in LOSS if kwargs.get(key) is not None}
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **given)
        found = CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )
        return found if asked(self, kwargs, "return_dict") else found.to_tuple()
