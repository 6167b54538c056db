"""What people who know transformers by heart expect of a model, the student does."""

import copy
import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import GROUPED_SHAPES, Graphs, command, tiny_student, tiny_teacher
from datasets import Dataset
from reference import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    DynamicCache,
    LogitsProcessorList,
    StaticCache,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from scavenger import families
from scavenger.model import HyenaCache, HyenaForCausalLM


ROOT = Path(__file__).parents[1]
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, workshop):
    """A saved recurrent student that keeps attention in one layer, with a tokenizer."""
    path = tmp_path_factory.mktemp("student")
    tiny_student(modal=True, vocab_size=320, attention_layers=[1], attention_window=7).float().save_pretrained(path)
    AutoTokenizer.from_pretrained(workshop / "teacher").save_pretrained(path)
    return path


def test_a_cache_under_its_old_name():
    model = tiny_student(modal=True)
    ids = torch.arange(1, 12)[None]
    first = model(input_ids=ids[:, :7], use_cache=True)
    second = model(input_ids=ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert second.cache is first.cache and second.cache.get_seq_length() == 11
    assert_close(model(input_ids=ids, use_cache=False).logits[:, 7:], second.logits, 1e-12)


def test_a_configuration_with_the_former_key_prefill_outputs(folder, tmp_path):
    """Saved with its only value that is left: nothing is missing or unexpected, and the student generates the same."""
    shutil.copytree(folder, tmp_path / "former")
    config = json.loads((folder / "config.json").read_text())
    assert "prefill_outputs" not in config
    (tmp_path / "former/config.json").write_text(json.dumps(config | {"prefill_outputs": "recurrent"}))
    expected, ids = AutoModelForCausalLM.from_pretrained(folder), torch.randint(1, 320, (2, 9))
    former, report = AutoModelForCausalLM.from_pretrained(tmp_path / "former", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(expected(input_ids=ids).logits, former(input_ids=ids).logits)
    arguments = dict(max_new_tokens=11, **GREEDY)
    assert torch.equal(expected.generate(ids, **arguments), former.generate(ids, **arguments))


def test_pipeline_one_by_one_and_in_a_padded_batch(folder):
    prompts = ["def main(", "import os\nfor name in os.listdir(", "x"]
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    alone = [generate(prompt, max_new_tokens=9, do_sample=False)[0]["generated_text"] for prompt in prompts]
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(alone, prompts, strict=True))
    generate.tokenizer.pad_token, generate.tokenizer.padding_side = generate.tokenizer.eos_token, "left"
    together = generate(prompts, batch_size=3, max_new_tokens=9, do_sample=False)
    assert [found[0]["generated_text"] for found in together] == alone


def test_streamed_text_is_the_generated_text(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("class Reader", return_tensors="pt", return_token_type_ids=False)
    streamer = TextIteratorStreamer(tokenizer)
    arguments = dict(**inputs, max_new_tokens=11, **GREEDY)
    thread = threading.Thread(target=model.generate, kwargs=arguments | {"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 3
    assert "".join(pieces) == tokenizer.decode(model.generate(**arguments)[0])


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_sampling_does_not_depend_on_the_cache(num_return_sequences):
    model = tiny_student(modal=True, attention_layers=[1], attention_window=5)
    ids = torch.randint(1, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    found = []
    for seed, use_cache in [(0, True), (0, False), (1, True)]:
        set_seed(seed)
        found.append(
            model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=0.8,
                top_p=0.9,
                num_return_sequences=num_return_sequences,
                max_new_tokens=14,
                use_cache=use_cache,
                eos_token_id=None,
                pad_token_id=0,
            )
        )
    assert found[0].shape == (2 * num_return_sequences, 23)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_logits_processors_see_the_whole_sequence():
    model = tiny_student(modal=True)
    ids = torch.randint(1, 97, (2, 9))
    lengths = []

    def no_even_token(read, scores):
        lengths.append(read.shape[1])
        scores[:, ::2] = -torch.inf
        return scores

    arguments = dict(max_new_tokens=12, repetition_penalty=1.7, no_repeat_ngram_size=2, **GREEDY)
    found = [
        model.generate(ids, use_cache=use_cache, logits_processor=LogitsProcessorList([no_even_token]), **arguments)
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)
    assert (found[0][:, 9:] % 2 == 1).all()
    assert lengths == 2 * list(range(9, 21))


@pytest.mark.parametrize("attention_layers", [[], [1]])
def test_chat_turns_go_on_from_the_state(attention_layers):
    model = tiny_student(modal=True, attention_layers=attention_layers, attention_window=5)
    ids, mask = torch.randint(1, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    arguments = dict(max_new_tokens=6, return_dict_in_generate=True, output_logits=True, **GREEDY)
    state = None
    for turn in (3, 1, 2):
        continued = model.generate(ids, attention_mask=mask, cache=state, **arguments)
        anew = model.generate(ids, attention_mask=mask, use_cache=False, **arguments)
        assert torch.equal(continued.sequences, anew.sequences)
        assert_close(torch.stack(anew.logits), torch.stack(continued.logits), 1e-11)  # measured 2e-14
        state = continued.cache
        assert state.get_seq_length() == continued.sequences.shape[1] - 1
        ids = torch.cat([continued.sequences, torch.randint(1, 97, (2, turn))], dim=1)
        mask = torch.cat([mask, torch.ones(2, 6 + turn, dtype=torch.long)], dim=1)


def test_a_copied_state_goes_on_twice():
    model = tiny_student(modal=True, attention_layers=[0], attention_window=5)
    ids = torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        prompt = model(input_ids=ids, use_cache=True).cache
    size = prompt.nbytes
    for _ in range(2):
        longer = torch.cat([ids, torch.randint(1, 97, (2, 3))], dim=1)
        found = model.generate(longer, cache=copy.deepcopy(prompt), max_new_tokens=7, **GREEDY)
        assert torch.equal(found, model.generate(longer, max_new_tokens=7, **GREEDY))
    assert prompt.get_seq_length() == 9 and prompt.nbytes == size
    prompt.batch_repeat_interleave(3)
    longer = torch.cat([ids, torch.randint(1, 97, (2, 1))], dim=1)
    arguments = dict(num_beams=3, max_new_tokens=7, **GREEDY)
    assert torch.equal(model.generate(longer, cache=prompt, **arguments), model.generate(longer, **arguments))


def test_prompt_in_chunks_and_as_embeddings():
    model = tiny_student(modal=True, attention_layers=[1], attention_window=5)
    ids = torch.randint(1, 97, (2, 23))
    expected = model.generate(ids, max_new_tokens=8, **GREEDY)
    assert torch.equal(expected, model.generate(ids, max_new_tokens=8, prefill_chunk_size=7, **GREEDY))
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(expected[:, 23:], model.generate(inputs_embeds=embedded, max_new_tokens=8, **GREEDY))


def refused_by_generate():
    modal = tiny_student(modal=True)
    static = StaticCache(config=tiny_teacher().config, max_cache_len=31)
    return {
        "candidates from the prompt": (modal, dict(prompt_lookup_num_tokens=3), "stateful"),
        "assisted": (modal, dict(assistant_model=tiny_teacher()), "stateful"),
        "assisting": (tiny_teacher(), dict(assistant_model=modal), "cannot forget"),
        "static": (modal, dict(cache_implementation="static"), "cache_implementation is 'static'; expected None"),
        "quantized": (modal, dict(cache_implementation="quantized"), "cache_implementation is 'quantized'"),
        "a static cache": (modal, dict(cache=static), "StaticCache; expected a HyenaCache"),
        "a dynamic cache": (modal, dict(cache=DynamicCache()), "DynamicCache; expected a HyenaCache"),
        "another batch": (modal, dict(cache="two sequences"), "holds 2 sequences; expected 1"),
        "other filters": (tiny_student(), dict(cache="two sequences"), "expected one of implicit filters"),
        "no cache, chunks": (modal, dict(prefill_chunk_size=3, use_cache=False), "without a cache"),
    }


@pytest.mark.parametrize("case", refused_by_generate())
def test_what_cannot_be_done_is_refused_in_one_line(case):
    model, arguments, message = refused_by_generate()[case]
    if arguments.get("cache") == "two sequences":
        state = tiny_student(modal=True)(input_ids=torch.ones(2, 3, dtype=torch.long), use_cache=True).cache
        arguments = {"cache": state}
    with pytest.raises(ValueError, match=message) as error:
        model.generate(torch.randint(1, 97, (1, 9)), max_new_tokens=12, **GREEDY, **arguments)
    assert "\n" not in str(error.value)


def test_padding_between_turns_is_refused():
    model = tiny_student(modal=True)
    state = model(input_ids=torch.ones(2, 3, dtype=torch.long), use_cache=True).cache
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 3] = 0
    with pytest.raises(ValueError, match="expected padding on the left"):
        model(input_ids=torch.ones(2, 4, dtype=torch.long), attention_mask=mask, cache=state)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 4, 4\); expected \(2, 4 tokens or more\)"):
        model(input_ids=torch.ones(2, 4, dtype=torch.long), attention_mask=torch.ones(2, 1, 4, 4))


@pytest.mark.parametrize(
    "keyword", ["attention_masks", "past_key_value", "cu_seq_lens_q", "max_length_k", "seq_idx", "is_causal", "labelz"]
)
def test_a_keyword_that_would_be_ignored_is_refused(keyword):
    model, ids = tiny_student(), torch.randint(1, 97, (1, 9))
    for called in (model, model.model):
        expected = rf"{type(called).__name__}.forward: found the keyword {keyword}; expected one of input_ids, "
        with pytest.raises(TypeError, match=expected):
            called(ids, **{keyword: torch.ones(1, 9, dtype=torch.int)})
        called(ids, **{keyword: None})


@pytest.mark.parametrize("modal", [False, True])
def test_positions_of_packed_sequences_are_refused(modal):
    model, ids = tiny_student(modal=modal).eval(), torch.randint(1, 97, (2, 9))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        whole, masked = model(ids).logits, model(ids, attention_mask=mask).logits
        for called in (model, model.model):
            shapes = torch.arange(9).expand(3, 9), torch.arange(9).expand(3, 2, 9), torch.tensor(0), torch.zeros(2, 0)
            for wrong in (packed, packed.expand(2, 9), torch.arange(1, 10), torch.arange(8), padded, *shapes):
                with pytest.raises(ValueError, match="position_ids .* packed sequences are not kept apart"):
                    called(ids, position_ids=wrong)
        assert torch.equal(whole, model(ids, position_ids=torch.arange(9)[None]).logits)
        assert torch.equal(masked, model(ids, attention_mask=mask, position_ids=padded).logits)
        for place in range(9):  # as generation of other libraries passes them
            cache = model(ids[:, :place], use_cache=True).cache
            here, rest = torch.arange(place, 9), ids[:, place:]
            for key in ("position_ids", "cache_position"):
                with pytest.raises(ValueError, match=key):
                    model(rest, cache=copy.deepcopy(cache), **{key: here + 1})
            found = model(rest, cache=cache, position_ids=here[None], cache_position=here)
            assert_close(whole[:, place:], found.logits, 1e-11)
    with pytest.raises(ValueError, match="packed sequences"):
        model.generate(ids, position_ids=packed.expand(2, 9), max_new_tokens=3, **GREEDY)
    found = model.generate(ids, attention_mask=mask, position_ids=padded, max_new_tokens=3, **GREEDY)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, max_new_tokens=3, **GREEDY))


def test_a_mask_that_numbers_packed_sequences_is_refused():
    model, ids = tiny_student(), torch.randint(1, 97, (2, 5))
    for wrong in ([1, 1, 2, 2, 2], [0, 1, 1, 2, 2], [0, 0, 0, -1, -1], [0.5] * 5):
        for called in (model, model.model):
            with pytest.raises(ValueError, match="attention_mask has values other than 0 and 1; .* packed sequences"):
                called(ids, attention_mask=torch.tensor([wrong, [1] * 5]))
    for dtype in (torch.bool, torch.int32, torch.float32):
        assert torch.equal(model(ids, attention_mask=torch.ones(2, 5, dtype=dtype)).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 5\); expected \(2, 5 tokens or more\)"):
        model(ids, attention_mask=torch.ones(3, 5))


@pytest.mark.parametrize("form", ["collator", "column"])
def test_trainer_does_not_mix_packed_documents(tmp_path, form):
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    documents = [{"input_ids": list(range(1, n))} for n in (7, 9, 4, 8)]
    if form == "collator":
        trainer = Trainer(
            tiny_student(), arguments, train_dataset=documents, data_collator=DataCollatorWithFlattening()
        )
    else:
        ids = [1, 2, 3, 4, 5, 6, 7]
        rows = [{"input_ids": ids, "labels": ids, "position_ids": [0, 1, 2, 3, 0, 1, 2]}] * 4
        trainer = Trainer(tiny_student(), arguments, train_dataset=Dataset.from_list(rows))
    with pytest.raises(ValueError, match="packed sequences are not kept apart"):
        trainer.train()


def test_the_body_continues_from_a_cache_under_its_old_name():
    model, ids = tiny_student(modal=True).model, torch.randint(1, 97, (2, 9))
    whole = model(ids).last_hidden_state
    cache = model(ids[:, :5], use_cache=True).cache
    found = model(ids[:, 5:], past_key_values=cache).last_hidden_state
    assert_close(whole[:, 5:], found, 1e-12)


def test_return_dict_in_the_configuration():
    model, ids = tiny_student(modal=True, return_dict=False), torch.randint(1, 97, (2, 9))
    for called, name in ((model, "logits"), (model.model, "last_hidden_state")):
        found, cache = called(ids)
        assert torch.equal(found, called(ids, return_dict=True)[name]) and isinstance(cache, HyenaCache)
    assert model.generate(ids, max_new_tokens=3, **GREEDY).shape == (2, 12)


def test_hidden_states_in_the_configuration():
    model, ids = tiny_student(modal=True, output_hidden_states=True), torch.randint(1, 97, (2, 9))
    plain = tiny_student(modal=True)
    for called, other in ((model, plain), (model.model, plain.model)):
        found, expected = called(ids).hidden_states, other(ids, output_hidden_states=True).hidden_states
        assert len(found) == 4 and all(map(torch.equal, found, expected))
        assert called(ids, output_hidden_states=False).hidden_states is other(ids).hidden_states is None


@pytest.mark.parametrize("modal", [False, True])
def test_use_cache_in_the_configuration(modal):
    ids = torch.randint(1, 97, (2, 9))
    for kept in (True, False):
        model = tiny_student(modal=modal, use_cache=kept)
        for called in (model, model.model):
            assert isinstance(called(ids).cache, HyenaCache if kept else type(None))
            assert called(ids, use_cache=False).cache is None
            assert called(ids, use_cache=True).cache.get_seq_length() == 9


def test_loss_is_gpt_neox_s():
    teacher = tiny_teacher()
    model = tiny_student(attention_layers=[0, 1, 2], attention_window=63)
    model.load_state_dict(families.of("gpt_neox").student_weights(teacher, [0, 1, 2]))
    ids = torch.randint(0, 97, (3, 17))
    labels = ids.clone()
    labels[0, 3:9], labels[2, :15] = -100, -100
    for more in ({}, {"num_items_in_batch": 11}, {"num_items_in_batch": torch.tensor(23)}):
        expected, found = (m(input_ids=ids, labels=labels, **more).loss for m in (teacher, model))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    assert model(input_ids=ids, shift_labels=shifted).loss == model(input_ids=ids, labels=labels).loss
    outputs = model(input_ids=ids, labels=labels, return_dict=False)
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0], teacher(input_ids=ids, labels=labels).loss, rtol=1e-6, atol=0)
    assert torch.equal(outputs[1], model(input_ids=ids).logits)


def test_hidden_states_are_gpt_neox_s():
    teacher = tiny_teacher()
    model = tiny_student(attention_layers=[0, 1, 2], attention_window=63)
    model.load_state_dict(families.of("gpt_neox").student_weights(teacher, [0, 1, 2]))
    ids = torch.randint(0, 97, (2, 17))
    expected, found = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (teacher, model))
    assert len(found) == len(expected) == 4
    for theirs, ours in zip(expected, found, strict=True):
        assert_close(theirs, ours, 1e-6)
    assert_close(model.lm_head(found[-1]), model(input_ids=ids).logits, 1e-14)
    assert model(input_ids=ids).hidden_states is None
    # As transformers' recurrent models: there is no attention matrix to give.
    assert "attentions" not in tiny_student(modal=True)(input_ids=ids, output_attentions=True)
    generated = tiny_student(modal=True).generate(
        ids, max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True, **GREEDY
    )
    assert [step[-1].shape for step in generated.hidden_states] == [(2, 17, 30), (2, 1, 30), (2, 1, 30)]


def test_trainer_weighs_tokens_and_not_batches(tmp_path):
    examples = [{"input_ids": ids, "labels": ids.clone()} for ids in torch.randint(1, 97, (8, 13))]
    for example, ignored in zip(examples, (0, 11, 3, 12, 7, 1, 9, 5), strict=True):
        example["labels"][:ignored] = -100
    trained = []
    for batch, accumulated in ((4, 1), (2, 2)):
        arguments = TrainingArguments(
            output_dir=tmp_path / str(batch),
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            learning_rate=0.1,
            optim="sgd",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(tiny_student(), arguments, train_dataset=examples, eval_dataset=examples)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        trained.append(trainer.model.state_dict())
    for key, before in tiny_student().state_dict().items():
        assert_close(trained[0][key], trained[1][key], 1e-9)
        assert torch.equal(before, trained[0][key]) == (key == "model.rotary.inv_freq"), key
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "2", dtype="auto")
    assert torch.equal(loaded.lm_head.weight, trained[1]["lm_head.weight"])


@pytest.mark.parametrize("modal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_filters_stay_wide_through_every_round_trip(tmp_path, dtype, modal):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    model = tiny_student(modal=modal, attention_layers=[1]).to(wide)
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype)
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype="auto")
    cast = copy.deepcopy(model).to(dtype).to("cpu")
    for made in (loaded, again, AutoModelForCausalLM.from_pretrained(tmp_path / "second", torch_dtype=dtype), cast):
        assert made.lm_head.weight.dtype == made.model.layers[0].mixer.out.weight.dtype == dtype
        for layer in (0, 2):
            expected = model.model.layers[layer].mixer.filter.state_dict()
            for key, value in made.model.layers[layer].mixer.filter.state_dict().items():
                assert value.dtype == wide and torch.equal(value, expected[key]), key
    ids = torch.randint(0, 97, (2, 23))
    narrow = again(input_ids=ids).logits
    assert narrow.dtype == dtype
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 0.2}.get(dtype, 1e-14)  # measured 2e-3, 2e-2 and 1e-16
    assert_close(model(input_ids=ids).logits, narrow.to(wide), tolerance)


@pytest.mark.parametrize("shape", [{}, GROUPED_SHAPES[1]])  # with scaled embeddings and a bias of the head
@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_grows_and_shrinks(tmp_path, tied, shape):
    model = tiny_student(modal=True, tie_word_embeddings=tied, **shape)
    model.tie_weights()
    ids = torch.randint(0, 89, (2, 17))
    before = model(input_ids=ids).logits
    for size in (131, 89):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        found = model(input_ids=ids, labels=ids)
        assert found.logits.shape == (2, 17, size) and found.loss.isfinite()
        assert_close(before[..., :89], found.logits[..., :89], 1e-13)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert (loaded.lm_head.weight is loaded.model.embed.weight) == tied
    assert_close(loaded(input_ids=ids).logits, found.logits, 1e-14)
    numbers = 89 * 30 if tied else 2 * 89 * 30
    numbers += 89 if loaded.config.head_bias else 0
    for module in (model.model.layers, model.model.norm):
        numbers += sum(parameter.numel() for parameter in module.parameters())
    assert loaded.num_parameters() == numbers
    assert loaded.get_memory_footprint() == 8 * (numbers + loaded.config.rotary_channels // 2)


@pytest.mark.parametrize("modal", [False, True])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(modal, monkeypatch):
    plain = tiny_student(modal=modal, attention_layers=[1], attention_window=7).train()
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable()
    calls = []
    forward = torch.nn.LayerNorm.forward
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", lambda self, x: calls.append(self) or forward(self, x))
    ids = torch.randint(0, 97, (2, 23))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    counts, losses = [], []
    for made, use_cache in ((plain, False), (model, None), (model, True)):
        made.zero_grad()
        calls.clear()
        outputs = made(input_ids=ids, attention_mask=mask, labels=ids, use_cache=use_cache)
        assert outputs.cache is None
        outputs.loss.backward()
        counts.append(len(calls))
        losses.append(outputs.loss)
        for (name, expected), found in zip(plain.named_parameters(), made.parameters(), strict=True):
            assert_close(expected.grad, found.grad, 1e-12)
            assert expected.grad.abs().max() > 0, name
    assert counts == [7, 13, 13]  # two norms of each of three layers again, the last one not
    assert losses[0] == losses[1] == losses[2]
    if modal:
        state = plain.eval()(input_ids=ids, use_cache=True).cache
        with pytest.raises(ValueError, match="gradient checkpointing"):
            model(input_ids=ids, cache=state)


@pytest.mark.parametrize(
    "shape",
    [
        {"filters": 5, "num_hidden_layers": 2, "attention_layers": [1], "attention_window": 7},
        {"filters": 30, "num_hidden_layers": 1},
        {**GROUPED_SHAPES[1], "num_hidden_layers": 1},
    ],
)
@pytest.mark.parametrize("modal", [False, True])
def test_compiled_forward_and_gradients(modal, shape):
    model = tiny_student(modal=modal, **shape)
    ids = torch.randint(0, 97, (2, 23))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    losses, gradients = [], []
    torch._dynamo.reset()
    for made in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        outputs = made(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        outputs.loss.backward()
        losses.append(outputs.logits)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_close(*losses, 1e-13)
    for expected, found in zip(*gradients, strict=True):
        assert_close(expected, found, 1e-12)


@pytest.mark.parametrize(
    "shape, padded",
    [
        ({"filters": 5, "state_sizes": [[2, 1, 2, 4, 1], [4, 2, 2, 1, 4]]}, False),
        ({"filters": 30}, False),
        ({"filters": 5, "attention_layers": [1], "attention_window": 7}, False),
        ({"filters": 5, "attention_layers": [1], "attention_window": 7}, True),
    ],
)
def test_every_step_runs_one_compiled_graph(shape, padded):
    model = tiny_student(modal=True, num_hidden_layers=2, **shape)
    ids = torch.randint(1, 97, (2, 31))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    whole = model(input_ids=ids, attention_mask=mask if padded else None, use_cache=False).logits
    torch._dynamo.reset()
    graphs = Graphs()
    step = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :11], attention_mask=mask[:, :11] if padded else None).cache
        for place in range(11, 31):
            seen = mask[:, : place + 1].contiguous() if padded else None
            outputs = step(input_ids=ids[:, place : place + 1], attention_mask=seen, cache=cache)
            assert_close(whole[:, place : place + 1], outputs.logits, 1e-11)
    # A mask grows with each step: one graph for the first length, and from the second step on one for all lengths.
    assert graphs.count == (2 if padded else 1)


def test_lora_on_the_projections(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = tiny_student(modal=True, attention_layers=[1], attention_window=7)
    ids = torch.randint(1, 97, (2, 23))
    before = base(input_ids=ids).logits
    config = LoraConfig(r=3, lora_alpha=30, target_modules=["q", "v", "out"], task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3 * 3 * 2 and all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    model.eval()
    adapted = model(input_ids=ids).logits
    generated = model.generate(input_ids=ids, max_new_tokens=9, **GREEDY)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(adapted, loaded(input_ids=ids).logits, 1e-6)  # the adapter is loaded in float32
    merged = model.merge_and_unload()
    assert type(merged) is HyenaForCausalLM
    assert_close(adapted, merged(input_ids=ids).logits, 1e-12)
    assert torch.equal(generated, merged.generate(ids, max_new_tokens=9, **GREEDY))
    assert (before - adapted).abs().max() > 1e-3


@pytest.mark.parametrize("arguments", [{"device_map": "cpu"}, {"device_map": "auto"}, {"attn_implementation": "eager"}])
def test_loading_arguments_change_nothing(folder, arguments):
    ids = torch.randint(1, 97, (2, 23))
    expected = AutoModelForCausalLM.from_pretrained(folder)
    assert expected.config._attn_implementation == "sdpa"
    found = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    assert_close(expected(input_ids=ids).logits, found(input_ids=ids.to(found.device)).logits.cpu(), 1e-5)


def test_flash_attention_is_refused(folder):
    with pytest.raises((ValueError, ImportError), match="(?i)flash.?attention"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="flash_attention_2")


def test_layers_are_kept_whole_when_a_model_is_spread_over_devices():
    from accelerate import infer_auto_device_map

    model = tiny_student(modal=True, attention_layers=[1])
    size = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    places = infer_auto_device_map(model, {0: 3 * size, "cpu": 100 * size}, model._no_split_modules)
    assert {0, "cpu"} == set(places.values())
    assert all(name.count(".") <= 2 for name in places), places


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two passages and a line that is too short for one; shorter than the tiny student's context."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("for i in a: b c d e f g h x y z\n\nshort\n\nif k in w: m n o p q r s t u v\n")
    return path


def test_harness_command(folder, workshop, text):
    tasks = "text_perplexity,text_last_word"
    done = command("eval/harness.py", folder, workshop / "teacher", "--tasks", tasks, "--text", text, "--split", "all")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["model"] for row in rows] == [str(folder), str(workshop / "teacher")]
    found = {name: row["value"] for name, row in rows[0]["metrics"].items()}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses, right = [], []
    for context, word in (("for i in a: b c d e f g h x y", " z"), ("if k in w: m n o p q r s t u", " v")):
        before, ids = (tokenizer(part, return_tensors="pt")["input_ids"] for part in (context, context + word))
        labels = ids.clone()
        labels[:, : before.shape[1]] = -100
        outputs = model(input_ids=ids, labels=labels)
        losses.append(outputs.loss.item() * (ids.shape[1] - before.shape[1]))
        right.append(torch.equal(outputs.logits[:, before.shape[1] - 1 : -1].argmax(-1), ids[:, before.shape[1] :]))
    assert found["text_last_word perplexity"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)
    assert found["text_last_word acc"] == sum(right) / 2
