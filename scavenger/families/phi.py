"""Phi 1 and 2: LayerNorm, one for attention and MLP together, which stand side by side; biases everywhere."""

from transformers import PhiConfig, PhiForCausalLM
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from .family import Family


NAMES = {
    "model.embed_tokens": "model.embed",
    "model.final_layernorm": "model.norm",
    "lm_head": "lm_head",
    # The student has a norm before each: both begin as the teacher's one.
    "model.layers.{}.input_layernorm": ("model.layers.{}.mixer_norm", "model.layers.{}.mlp_norm"),
    "model.layers.{}.self_attn.q_proj": "model.layers.{}.mixer.q",
    "model.layers.{}.self_attn.k_proj": "model.layers.{}.mixer.k",
    "model.layers.{}.self_attn.v_proj": "model.layers.{}.mixer.v",
    "model.layers.{}.self_attn.dense": "model.layers.{}.mixer.out",
    "model.layers.{}.self_attn.q_layernorm": "model.layers.{}.mixer.q_norm",
    "model.layers.{}.self_attn.k_layernorm": "model.layers.{}.mixer.k_norm",
    "model.layers.{}.mlp.fc1": "model.layers.{}.mlp.up",
    "model.layers.{}.mlp.fc2": "model.layers.{}.mlp.down",
}


def block(config):
    return {
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "norm": "layer",
        "norm_eps": config.layer_norm_eps,
        "qk_norm": config.qk_layernorm,
        "mlp": "plain",
        "parallel_residual": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "head_bias": True,
    }


def trained(train):
    return {
        "intermediate_size": 4 * train.hidden_size,
        "num_key_value_heads": train.num_key_value_heads or train.num_heads,
    }


FAMILY = Family(
    model=PhiForCausalLM,
    config=PhiConfig,
    rotary=PhiRotaryEmbedding,
    attention="self_attn",
    names=NAMES,
    block=block,
    trained=trained,
)
