"""Gemma: Llama with scaled embeddings, and norms that store their distance from one."""

import dataclasses

import torch
from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding

from . import llama


def block(config):
    if config.use_bidirectional_attention:
        raise ValueError("its attention sees later tokens (use_bidirectional_attention)")
    # Gemma rounds the factor √width to the dtype of its weights.
    scale = torch.tensor(config.hidden_size**0.5, dtype=config.dtype or torch.float32, device="cpu").item()
    biased = config.attention_bias
    return llama.gated(config) | {"qkv_bias": biased, "out_bias": biased, "embedding_scale": scale}


def prepared(weights, config):
    """The norms' factors themselves, which Gemma computes in float32 too."""
    return {key: value.float() + 1 if "norm." in key else value for key, value in weights.items()}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model=GemmaForCausalLM,
    config=GemmaConfig,
    rotary=GemmaRotaryEmbedding,
    block=block,
    prepared=prepared,
)
