"""The student has everything of its teacher's but the softmax, and its saved folder stands on its own."""

import json

import pytest
import torch
from conftest import tiny_student, tiny_teacher
from reference import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from scavenger import families, student, teacher
from scavenger.model import HyenaConfig, HyenaForCausalLM
from scavenger.recipe import Student


LENGTH = 63  # tokens of a context


@pytest.mark.parametrize(
    "lacking",
    [
        {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
        {"prompt_lookup_num_tokens": 3},
        {"use_mtp": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"continuous_batching_config": {"block_size": 32}},
    ],
    ids=lambda lacking: next(iter(lacking)),
)
def test_the_teacher_s_generation_is_one_that_the_student_can_do(tmp_path, lacking):
    model, ids = tiny_student(modal=True), torch.ones(1, 5, dtype=torch.long)
    kept = {"eos_token_id": [96, 95], "pad_token_id": 0, "temperature": 0.7, "max_new_tokens": 3}
    model.generation_config = student.generation(GenerationConfig(**kept, **lacking))
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found.items() >= kept.items() and next(iter(lacking)) not in found
    model.generate(ids)


@pytest.mark.parametrize("mixer", ["hyena", "multihyena"])
def test_only_filters_and_short_filters_are_new(mixer):
    model = tiny_teacher()
    made = student.from_teacher(Student(mixer=mixer), LENGTH, model, seed=0)
    theirs = families.of("gpt_neox").student_weights(model, [])
    new = set(made.state_dict()) - set(theirs)
    filter_parts = [
        "direct",
        "frequency",
        "head.weight",
        *(f"inner.{i}.{part}" for i in range(3) for part in ("weight", "bias")),
    ]
    assert new == {
        f"model.layers.{layer}.mixer.{name}"
        for layer in range(3)
        for name in ["short_filter", *(f"filter.{part}" for part in filter_parts)]
    }
    assert set(theirs) <= set(made.state_dict())
    for key, value in theirs.items():
        assert torch.equal(made.state_dict()[key], value.float()), key
    assert made.config.num_filters == (30 if mixer == "hyena" else 5)
    assert made.config.rotary == (mixer == "multihyena")


@pytest.mark.parametrize("parallel_residual", [True, False])
def test_a_student_that_keeps_all_attention_is_the_teacher(parallel_residual):
    model = tiny_teacher(use_parallel_residual=parallel_residual)
    config = student.configuration(Student(), LENGTH, model.config)
    config.attention_layers, config.attention_window = [0, 1, 2], 23
    made = HyenaForCausalLM(config).double()
    made.load_state_dict(families.of("gpt_neox").student_weights(model, [0, 1, 2]))
    ids = torch.randint(0, 97, (2, 23))
    assert_close(model(input_ids=ids).logits, made(input_ids=ids).logits, 1e-6)  # the teacher's angles are float32


def test_attention_is_what_goes_in_and_out_of_it():
    model = tiny_teacher()
    ids = torch.randint(0, 97, (2, 23))
    logits = model(input_ids=ids, output_hidden_states=True).logits  # transformers hooks itself in for that

    def hooks(model):
        return sum(len(module._forward_hooks) for module in model.modules())

    before = hooks(model)
    inputs, outputs = teacher.attention(model, ids, [0, 1, 2])
    assert list(inputs) == list(outputs) == [0, 1, 2]
    assert {x.shape for x in [*inputs.values(), *outputs.values()]} == {(2, 23, 30)}
    last = model.gpt_neox.layers[-1]
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-2]  # what goes into the last block
    assert torch.equal(last.input_layernorm(hidden), inputs[2])
    block = hidden + outputs[2] + last.mlp(last.post_attention_layernorm(hidden))
    assert_close(logits, model.lm_head(model.gpt_neox.final_layer_norm(block)), 1e-14)
    (only,) = teacher.attention(model, ids, [1])[1].items()
    assert only[0] == 1 and torch.equal(only[1], outputs[1])
    read, blocks = teacher.hidden_states(model, ids, blocks=True)
    assert torch.equal(model.lm_head(read), logits) and torch.equal(blocks[1], hidden)
    assert_close(blocks[2], block, 1e-14)
    assert hooks(model) == before, "ours are gone"


@pytest.mark.slow
@pytest.mark.parametrize("attention_layers", [[], [0]])
def test_generate_greedy_is_the_parallel_model(attention_layers):
    for modal in (True, False):
        model = tiny_student(modal=modal, attention_layers=attention_layers, attention_window=5)
        ids = torch.randint(1, 97, (2, 7))
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=25,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        for _ in range(25):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(found, ids)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_prompts(length):
    model = tiny_student(modal=True)
    ids = torch.randint(1, 97, (2, length))
    arguments = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments))


@pytest.mark.slow
@pytest.mark.parametrize("attention_layers", [[], [1]])
def test_beams_and_padded_batches(attention_layers):
    model = tiny_student(modal=True, attention_layers=attention_layers, attention_window=5)
    ids = torch.randint(1, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    arguments = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    for beams in (1, 3):
        found = model.generate(ids, attention_mask=mask, num_beams=beams, **arguments)
        alone = model.generate(ids[:1, 4:], attention_mask=mask[:1, 4:], num_beams=beams, **arguments)
        assert torch.equal(found[:1, 9:], alone[:, 5:])
        assert torch.equal(
            found, model.generate(ids, attention_mask=mask, num_beams=beams, use_cache=False, **arguments)
        )
    assert model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=3,
        do_sample=True,
        num_return_sequences=3,
        pad_token_id=0,
        eos_token_id=None,
    ).shape == (6, 12)


def test_labels_are_shifted_as_everywhere():
    model = tiny_student()
    ids = torch.randint(0, 97, (2, 23))
    out = model(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, check_dtype=False, rtol=1e-6, atol=0)
    embedded = model(inputs_embeds=model.model.embed(ids)).logits
    assert torch.equal(out.logits, embedded)


@pytest.mark.parametrize("modal", [False, True])
def test_saved_and_loaded(tmp_path, modal):
    model = tiny_student(modal=modal).float()
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (2, 23))
    assert torch.equal(
        model(input_ids=ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits
    )
    assert isinstance(AutoConfig.from_pretrained(tmp_path), HyenaConfig)
    assert (
        json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
        == "modeling_hyena.HyenaForCausalLM"
    )
    half = HyenaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for layer in half.model.layers for p in layer.mixer.filter.parameters()} == {torch.float32}
    assert half(input_ids=ids).logits.dtype == torch.bfloat16


def test_impossible_configurations():
    with pytest.raises(ValueError, match="num_filters 7"):
        HyenaConfig(hidden_size=30, num_attention_heads=5, num_filters=7)
    for changes, message in (
        ({"num_attention_heads": 7}, "hidden_size 512 is not a multiple of num_attention_heads 7; expected head_dim"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ({"rotary_channels": 7}, r"rotary_channels is 7; expected an even number up to head_dim \(64\)"),
        ({"rotary_channels": 66}, r"rotary_channels is 66; expected an even number up to head_dim \(64\)"),
        ({"num_key_value_heads": 2, "num_filters": 256}, "the 128 channels of the heads are not a multiple"),
        ({"num_key_value_heads": 2, "num_filters": 64, "hyena_order": 2}, r"one filter for each channel \(128\)"),
        ({"norm": "batch"}, "norm is 'batch'; expected one of layer, rms"),
        ({"mlp": "wide"}, "mlp is 'wide'; expected one of plain, gated"),
    ):
        with pytest.raises(ValueError, match=message):
            HyenaConfig(**changes)
    assert HyenaConfig(num_key_value_heads=2, num_filters=256, share_state=False).filter_head_width == 2
    with pytest.raises(ValueError, match="state_sizes has 0 layers"):
        HyenaConfig(filter="modal")
    for wrong in ("geluu", None, ["gelu"]):
        with pytest.raises(ValueError, match=r"hidden_act is .*; expected one of gelu, "):
            HyenaConfig(hidden_act=wrong)
