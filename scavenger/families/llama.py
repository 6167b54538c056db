"""Llama: RMSNorm, a gated MLP after the attention, and heads of k and v that several heads of q share."""

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .family import Family


NAMES = {
    "model.embed_tokens": "model.embed",
    "model.norm": "model.norm",
    "lm_head": "lm_head",
    "model.layers.{}.input_layernorm": "model.layers.{}.mixer_norm",
    "model.layers.{}.post_attention_layernorm": "model.layers.{}.mlp_norm",
    "model.layers.{}.self_attn.q_proj": "model.layers.{}.mixer.q",
    "model.layers.{}.self_attn.k_proj": "model.layers.{}.mixer.k",
    "model.layers.{}.self_attn.v_proj": "model.layers.{}.mixer.v",
    "model.layers.{}.self_attn.o_proj": "model.layers.{}.mixer.out",
    "model.layers.{}.mlp.gate_proj": "model.layers.{}.mlp.gate",
    "model.layers.{}.mlp.up_proj": "model.layers.{}.mlp.up",
    "model.layers.{}.mlp.down_proj": "model.layers.{}.mlp.down",
}


def block(config):
    return gated(config) | {
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def gated(config):
    """What is Llama's in its relatives too, which have none of its options for biases."""
    return {
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "norm": "rms",
        "norm_eps": config.rms_norm_eps,
        "mlp": "gated",
        "parallel_residual": False,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
    }


def trained(train):
    """A gated MLP with about as many parameters as a plain one of four times the width."""
    return {
        "intermediate_size": 8 * -(-train.hidden_size // 3),
        "num_key_value_heads": train.num_key_value_heads or train.num_heads,
        "head_dim": train.hidden_size // train.num_heads,
    }


FAMILY = Family(
    model=LlamaForCausalLM,
    config=LlamaConfig,
    rotary=LlamaRotaryEmbedding,
    attention="self_attn",
    names=NAMES,
    block=block,
    trained=trained,
)
