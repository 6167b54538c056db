"""The student: the teacher with Hyena in the place of attention."""

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from scavenger.model import HyenaNeoXConfig, HyenaNeoXForCausalLM
from scavenger.recipe import Recipe, RecipeError


NEW_PARAMETERS = (
    "mixer.short_filter",
    "mixer.filter.",
    "mixer.gates.",
)  # all that a student has and its teacher has not


def configuration(recipe: Recipe, teacher: GPTNeoXConfig) -> HyenaNeoXConfig:
    """The teacher's shape with the recipe's mixer."""
    rope = teacher.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise RecipeError(f"teacher: its rotary embedding is of type {rope['rope_type']}; expected the default type")
    settings = recipe.student
    filters = (
        teacher.hidden_size if settings.mixer == "hyena" else settings.num_filter_heads or teacher.num_attention_heads
    )
    if teacher.hidden_size % filters:
        raise RecipeError(
            f"student.num_filter_heads: found {filters}; expected a divisor of the teacher's width "
            f"({teacher.hidden_size})"
        )
    shared = {
        key: getattr(teacher, key)
        for key in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "hidden_act",
            "initializer_range",
            "layer_norm_eps",
            "use_parallel_residual",
            "attention_bias",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
    }
    kept = sorted(set(settings.attention_layers))
    modal = {}
    if settings.filter.form == "modal":
        sizes = [settings.filter.state_size] * filters * settings.hyena_order
        modal = {
            "filter": "modal",
            "state_sizes": [[] if layer in kept else sizes for layer in range(teacher.num_hidden_layers)],
        }
    return HyenaNeoXConfig(
        **shared,
        attention_layers=kept,
        attention_window=(
            recipe.data.context_length if settings.attention_window is None else settings.attention_window
        ),
        rotary_fraction=rope["partial_rotary_factor"],
        rotary_base=rope["rope_theta"],
        num_filters=filters,
        hyena_order=settings.hyena_order,
        rotary=None if settings.rotary else False,
        short_filter_length=settings.short_filter_length,
        filter_width=settings.filter.filter_width,
        position_features=settings.filter.position_features,
        sine_frequency=settings.filter.sine_frequency,
        filter_window=settings.filter.window,
        context_length=recipe.data.context_length,
        **modal,
    )


def new(recipe: Recipe, teacher: GPTNeoXConfig) -> HyenaNeoXForCausalLM:
    """A student that knows nothing; the seed decides its weights."""
    torch.manual_seed(recipe.seed)
    return HyenaNeoXForCausalLM(configuration(recipe, teacher))


def from_teacher(recipe: Recipe, teacher: GPTNeoXForCausalLM) -> HyenaNeoXForCausalLM:
    """A student with everything of the teacher's but attention's softmax; its filters and short filters are new."""
    student = new(recipe, teacher.config)
    missing, unexpected = student.load_state_dict(copied(teacher), strict=False)
    strange = [key for key in missing if not any(name in key for name in NEW_PARAMETERS)] + unexpected
    if strange:
        raise RecipeError(
            f"teacher: found a model whose parameters do not fit ({', '.join(strange[:3])}); expected a "
            "GPT-NeoX checkpoint"
        )
    return student


def copied(teacher: GPTNeoXForCausalLM) -> dict[str, torch.Tensor]:
    """The teacher's parameters under the student's names."""
    return {key.replace(".attention.", ".mixer."): value for key, value in teacher.state_dict().items()}
