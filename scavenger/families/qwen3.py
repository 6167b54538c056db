"""Qwen 3: Llama with a norm of each head of q and k, and heads that need not add up to the width."""

import dataclasses

from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from . import llama, qwen2


NAMES = llama.NAMES | {
    "model.layers.{}.self_attn.q_norm": "model.layers.{}.mixer.q_norm",
    "model.layers.{}.self_attn.k_norm": "model.layers.{}.mixer.k_norm",
}


def block(config):
    biased = config.attention_bias
    return llama.gated(config) | {
        "qkv_bias": biased,
        "out_bias": biased,
        "qk_norm": True,
        "sliding_windows": qwen2.sliding_windows(config),
    }


FAMILY = dataclasses.replace(
    llama.FAMILY, model=Qwen3ForCausalLM, config=Qwen3Config, rotary=Qwen3RotaryEmbedding, names=NAMES, block=block
)
