"""Qwen 2 and 2.5: Llama with biases of q, k and v, and a sliding window in some layers."""

import dataclasses

from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from . import llama


def block(config):
    return llama.gated(config) | {"qkv_bias": True, "sliding_windows": sliding_windows(config)}


def sliding_windows(config):
    """The window of each layer, 0: all tokens."""
    return [config.sliding_window if kind == "sliding_attention" else 0 for kind in config.layer_types]


FAMILY = dataclasses.replace(
    llama.FAMILY, model=Qwen2ForCausalLM, config=Qwen2Config, rotary=Qwen2RotaryEmbedding, block=block
)
