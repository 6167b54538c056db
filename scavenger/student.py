"""The student: the teacher with Hyena mixers instead of attention."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from scavenger import families, loading
from scavenger.model import HyenaConfig, HyenaForCausalLM
from scavenger.recipe import RecipeError, Student
from scavenger.run import checkpoint


NEW_PARAMETERS = (
    "mixer.short_filter",
    "mixer.filter.",
    "mixer.gates.",
    "mixer.join.",
    "mixer.features.",
)  # what a student has beyond its teacher's parameters
EARLIER = "hyena_neox"  # the model type of students before they could have teachers of any family
# Of a generation configuration: caches of keys and values, decoding methods that shorten them, attention matrices.
TEACHER_ONLY = (
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "continuous_batching_config",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "speculation_type",
    "use_mtp",
    "penalty_alpha",
    "output_attentions",
)


def configuration(settings: Student, context_length: int, teacher: PreTrainedConfig) -> HyenaConfig:
    """The teacher's shape with the recipe's mixer; RecipeError where the mixer does not fit the teacher."""
    family = families.of(teacher.model_type)
    try:
        frequencies, scaling = family.frequencies(teacher)
        block = family.block(teacher)
    except ValueError as error:
        raise RecipeError(f"teacher: {error}; expected a teacher without it") from None
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
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
    }
    heads = block["num_key_value_heads"] if settings.share_state else teacher.num_attention_heads
    width = heads * block["head_dim"]
    filters = {"hyena": width, "multihyena": settings.num_filter_heads or heads, "window": 0}[settings.mixer]
    if filters and width % filters:
        raise RecipeError(
            f"student.num_filter_heads: found {filters}; expected a divisor of the {width} channels of {heads} heads"
        )
    layers = sorted(set(settings.attention_layers))
    kept = _kept_heads(settings, teacher.num_hidden_layers, block["num_key_value_heads"])
    modal = {}
    if filters == 0 or settings.filter.form != "implicit":
        total = block["num_key_value_heads"]
        counts = [
            0 if layer in layers else filters * settings.hyena_order * (total - len(own)) // total
            for layer, own in enumerate(kept)
        ]
        modal = {
            "filter": "modal",
            "positive": settings.filter.form == "positive" and filters > 0,
            "state_sizes": [[settings.filter.state_size] * count for count in counts],
        }
    return HyenaConfig(
        **shared,
        **block,
        rotary_channels=2 * len(frequencies),
        rotary_scaling=scaling,
        attention_layers=layers,
        attention_heads=kept if any(kept) else None,
        attention_window=context_length if settings.attention_window is None else settings.attention_window,
        window=settings.window,
        features=settings.features,
        num_filters=filters,
        share_state=settings.share_state,
        hyena_order=settings.hyena_order,
        rotary=None if settings.rotary else False,
        short_filter_length=settings.short_filter_length,
        filter_width=settings.filter.filter_width,
        position_features=settings.filter.position_features,
        sine_frequency=settings.filter.sine_frequency,
        filter_window=settings.filter.window,
        context_length=context_length,
        **modal,
    )


def _kept_heads(settings, layers, heads):
    """The heads of k and v that keep attention, for each layer."""
    kept = [sorted(head for own, head in settings.kept_heads if own == layer) for layer in range(layers)]
    strange = [f"L{layer}H{head}" for layer, head in settings.kept_heads if head >= heads]
    if strange:
        raise RecipeError(
            f"student.attention_heads: found {', '.join(strange)}; expected heads of k and v from 0 to {heads - 1}"
        )
    whole = [layer for layer, own in enumerate(kept) if len(own) == heads]
    if whole:
        raise RecipeError(
            f"student.attention_heads: found all heads of layer {whole[0]}; expected that layer in attention_layers"
        )
    return kept


def new(settings: Student, context_length: int, teacher: PreTrainedConfig, seed: int) -> HyenaForCausalLM:
    """An untrained student with its teacher's rotary frequencies; the seed decides its weights."""
    torch.manual_seed(seed)
    student = HyenaForCausalLM(configuration(settings, context_length, teacher))
    student.model.rotary.inv_freq.copy_(families.of(teacher.model_type).frequencies(teacher)[0])
    return student


def from_teacher(settings: Student, context_length: int, teacher: PreTrainedModel, seed: int) -> HyenaForCausalLM:
    """A student with all weights of its teacher; only long filters and short filters are new."""
    student = new(settings, context_length, teacher.config, seed)
    try:
        weights = families.of(teacher.config.model_type).student_weights(teacher, student.config.attention_layers)
    except KeyError as error:
        raise RecipeError(f"teacher: has the parameter {error}; expected only those of its family") from None
    missing, unexpected = student.load_state_dict(weights, strict=False)
    strange = [key for key in missing if not any(name in key for name in NEW_PARAMETERS)] + unexpected
    if strange:
        raise RecipeError(
            f"teacher: found a model whose parameters do not fit ({', '.join(strange[:3])}); expected those of a "
            f"{teacher.config.model_type}"
        )
    student.generation_config = generation(teacher.generation_config)
    return student


def load(folder: Path) -> HyenaForCausalLM:
    """The student of a folder in float32 and evaluation mode; RecipeError unless the folder has all of it."""
    require_current(folder)
    return loading.model(HyenaForCausalLM, folder, dtype=torch.float32, use_safetensors=True).eval()


def require_current(folder: Path):
    """Raise RecipeError unless the folder holds a student of this version."""
    try:
        kind = checkpoint.read_json(folder / "config.json").get("model_type")
    except (OSError, ValueError, AttributeError):
        raise RecipeError(f"{folder / 'config.json'}: cannot be read; expected a student's configuration") from None
    if kind == EARLIER:
        raise RecipeError(
            f"{folder}: is a student of an earlier version ({EARLIER}); expected one of this version "
            f"({HyenaConfig.model_type}): go on with the version that made it, or make it anew in a new run_dir; "
            "evaluations take it with --trust-remote-code"
        )
    if kind != HyenaConfig.model_type:
        raise RecipeError(f"{folder}: is a {kind}; expected a student ({HyenaConfig.model_type})")


def generation(teacher: GenerationConfig) -> GenerationConfig:
    """The teacher's ends and sampling, without the fields that a student has nothing for."""
    facts = teacher.to_dict()
    made = GenerationConfig.from_dict({key: value for key, value in facts.items() if key not in TEACHER_ONLY})
    # save_pretrained refuses a configuration with temperature but no do_sample, as many published ones are, unless this
    # hash says that it is as it was loaded.
    made._original_object_hash = hash(made)
    return made
