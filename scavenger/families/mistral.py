"""Mistral: Llama whose attention may see a sliding window only."""

import dataclasses

from transformers import MistralConfig, MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from . import llama


def block(config):
    return llama.gated(config) | {"sliding_windows": [config.sliding_window or 0] * config.num_hidden_layers}


FAMILY = dataclasses.replace(
    llama.FAMILY, model=MistralForCausalLM, config=MistralConfig, rotary=MistralRotaryEmbedding, block=block
)
