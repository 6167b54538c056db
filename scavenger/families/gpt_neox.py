"""GPT-NeoX and Pythia: LayerNorm, a plain MLP beside the attention, and q, k and v of a head in one matrix."""

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

from .family import Family


NAMES = {
    "gpt_neox.embed_in": "model.embed",
    "gpt_neox.final_layer_norm": "model.norm",
    "lm_head": "lm_head",
    "gpt_neox.layers.{}.input_layernorm": "model.layers.{}.mixer_norm",
    "gpt_neox.layers.{}.post_attention_layernorm": "model.layers.{}.mlp_norm",
    "gpt_neox.layers.{}.attention.q": "model.layers.{}.mixer.q",
    "gpt_neox.layers.{}.attention.k": "model.layers.{}.mixer.k",
    "gpt_neox.layers.{}.attention.v": "model.layers.{}.mixer.v",
    "gpt_neox.layers.{}.attention.dense": "model.layers.{}.mixer.out",
    "gpt_neox.layers.{}.mlp.dense_h_to_4h": "model.layers.{}.mlp.up",
    "gpt_neox.layers.{}.mlp.dense_4h_to_h": "model.layers.{}.mlp.down",
}


def block(config):
    return {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "norm": "layer",
        "norm_eps": config.layer_norm_eps,
        "mlp": "plain",
        "parallel_residual": config.use_parallel_residual,
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "mlp_bias": True,
    }


def trained(train):
    """Pythia's architecture: rotary on a quarter of each head, parallel residual."""
    return {"intermediate_size": 4 * train.hidden_size, "use_parallel_residual": True}


def prepared(weights, config):
    """q, k and v apart: the fused rows are those of head 0's q, k and v, then those of head 1, and so on."""
    found = {}
    for key, value in weights.items():
        if ".query_key_value." in key:
            heads = value.unflatten(0, (config.num_attention_heads, 3, -1))
            for name, part in zip("qkv", heads.unbind(1), strict=True):
                found[key.replace("query_key_value", name)] = part.flatten(0, 1)
        else:
            found[key] = value
    return found


FAMILY = Family(
    model=GPTNeoXForCausalLM,
    config=GPTNeoXConfig,
    rotary=GPTNeoXRotaryEmbedding,
    attention="attention",
    names=NAMES,
    block=block,
    trained=trained,
    prepared=prepared,
)
