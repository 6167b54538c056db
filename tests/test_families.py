"""Every family of teachers: the student begins as its teacher, and is a whole model wherever it is loaded."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAUNCHED, command_line, random_ids, shape_of, shared, tiny_of
from reference import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from scavenger import families, student, teacher
from scavenger import recipe as recipes
from scavenger.model import HyenaForCausalLM, hyena
from scavenger.recipe import Filter, RecipeError, Student, Teacher, TeacherTraining
from scavenger.recurrence import recurrence


ALL = families.MODEL_TYPES
EVERYTHING = Student(attention_layers=(0, 1, 2), attention_window=0)  # the student is its teacher
FILTERS = Filter(filter_width=8, position_features=5)
SIZES = {"hidden_size": 48, "num_layers": 3, "num_heads": 6, "vocab_size": 300}
TRAINING = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3}


def student_of(model, **settings):
    return student.from_teacher(Student(filter=FILTERS, **settings), 63, model, 0).eval()


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_with_all_attention_is_its_teacher(family, shard, dtype, tmp_path, device):
    """Bit for bit, from files as stock transformers writes them."""
    tiny_of(family).to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    frozen = teacher.load(Teacher(path=str(tmp_path), dtype="float32"), tmp_path, device)
    made = student.from_teacher(EVERYTHING, 63, frozen, 0).eval().to(device)
    ids = random_ids(2, 51, device=device)
    assert torch.equal(logits_of(made, ids), logits_of(frozen, ids))


@pytest.mark.parametrize("family", ALL)
def test_a_student_with_all_attention_is_its_teacher_in_half_precision(family, tmp_path):
    """Bit for bit too, but for Gemma, which adds one to a norm's factor in float32 and rounds after it."""
    tiny_of(family).bfloat16().save_pretrained(tmp_path)
    frozen = teacher.load(Teacher(path=str(tmp_path), dtype="bfloat16"), tmp_path)
    made, ids = student.from_teacher(EVERYTHING, 63, frozen, 0).eval().bfloat16(), random_ids(2, 51, device="cpu")
    expected, found = logits_of(frozen, ids), logits_of(made, ids)
    assert_close(expected.double(), found.double(), 0.1 if family == "gemma" else 0)  # measured 2e-2


@pytest.mark.parametrize("family", ALL)
def test_only_filters_are_new(family):
    model = tiny_of(family)
    made = student.new(Student(filter=FILTERS), 63, model.config, 0)
    missing, unexpected = made.load_state_dict(families.of(family).student_weights(model, ()), strict=False)
    assert unexpected == []
    new = {key.split("mixer.")[1].split(".")[0] for key in missing}
    assert new == {"short_filter", "filter"}
    kept = dict(student_of(model).named_parameters())
    assert set(missing) == {key for key in kept if ".mixer.short_filter" in key or ".mixer.filter." in key}


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rotary_frequencies_are_those_of_transformers(family, scaling):
    """Whatever their scaling; the rotary module's own angles are compared, as are the logits."""
    rope = shape_of(family).rope_parameters
    model = tiny_of(family, rope_parameters=rope | scaling | {"original_max_position_embeddings": 16})
    plain = tiny_of(family)
    made, ids = student.from_teacher(EVERYTHING, 63, model, 0).eval(), random_ids(2, 51, device="cpu")
    positions = torch.arange(51)[None]
    cos, sin = model.base_model.rotary_emb(torch.zeros(1), positions)
    assert all(
        torch.equal(torch.cat([own, own], -1), other)
        for own, other in zip(made.model.rotary(positions, torch.float32), (cos, sin), strict=True)
    )
    assert torch.equal(logits_of(made, ids), logits_of(model, ids))
    assert not torch.allclose(logits_of(plain, ids), logits_of(model, ids), rtol=1e-3)


@pytest.mark.parametrize("family", ALL)
def test_a_student_from_scratch_has_its_teacher_s_frequencies(family):
    """As the baseline is made: from the configuration alone."""
    rope = shape_of(family).rope_parameters | {"rope_theta": 97.0}
    model = tiny_of(family, rope_parameters=rope)
    made = student.new(Student(filter=FILTERS), 63, model.config, 0)
    assert torch.equal(made.model.rotary.inv_freq, model.base_model.rotary_emb.inv_freq)
    assert made.model.rotary.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("family", ALL)
def test_frequencies_that_change_with_the_length_are_refused(family):
    rope = shape_of(family).rope_parameters
    config = shape_of(family, rope_parameters=rope | {"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(RecipeError, match="teacher: its rotary embedding is of type dynamic.*expected"):
        student.configuration(Student(), 63, config)


@pytest.mark.parametrize("family", [name for name in ALL if hasattr(shape_of(name), "sliding_window")])
def test_sliding_windows(family):
    """Kept attention sees no more than the teacher's. With a mask, kernels sum in other orders: measured 1e-6."""
    changes = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
    model = tiny_of(family, **{key: value for key, value in changes.items() if hasattr(shape_of(family), key)})
    made, ids = student.from_teacher(EVERYTHING, 63, model, 0).eval(), random_ids(2, 51, device="cpu")
    windows = [made.config.kept_window(layer) for layer in range(3)]
    assert 7 in windows and set(windows) <= {0, 7}
    assert_close(logits_of(model, ids), logits_of(made, ids), 2e-5)
    assert not torch.allclose(logits_of(tiny_of(family), ids), logits_of(made, ids), rtol=1e-3)
    narrow = student.from_teacher(dataclasses.replace(EVERYTHING, attention_window=5), 63, model, 0)
    assert [narrow.config.kept_window(layer) for layer in range(3)] == [5, 5, 5]


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize(
    "settings",
    [{}, {"share_state": False}, {"mixer": "hyena"}, {"mixer": "hyena", "share_state": False}, {"heads_apart": True}],
    ids=str,
)
def test_every_form_gives_the_same(family, settings, monkeypatch):
    """FFT = Toeplitz = prefill and steps, before stage two; after it also the scan and the recurrence."""
    model = tiny_of(family).double()
    settings = dict(settings)
    if settings.pop("heads_apart", False):  # filters that split a head, between its turned pairs
        block = families.of(family).block(model.config)
        settings = {"num_filter_heads": block["num_key_value_heads"] * block["head_dim"] // 2}
    made = student_of(model, **settings, attention_layers=(1,), attention_window=9).double()
    with torch.no_grad():
        for layer in (0, 2):
            made.model.layers[layer].mixer.short_filter.add_(0.1 * torch.randn(3))
    modal = recurrence.recurrent_student(made, reduced(made)).double()
    ids = random_ids(2, 37, low=1, device="cpu")
    for own in (made, modal):
        found = []
        for fft, scan in ((-1, torch.inf), (torch.inf, torch.inf), (torch.inf, -1)):
            monkeypatch.setattr(hyena, "FFT_PAYS", fft)
            monkeypatch.setattr(hyena, "CODE_FFT_PAYS", fft)
            monkeypatch.setattr(hyena, "SCAN_PAYS", scan)
            found.append(logits_of(own, ids))
        with torch.no_grad():
            read = own(input_ids=ids[:, :20], use_cache=True)
            pieces = [read.logits, own(input_ids=ids[:, 20:29], cache=read.cache).logits]
            pieces += [own(input_ids=ids[:, t : t + 1], cache=read.cache).logits for t in range(29, 37)]
        found.append(torch.cat(pieces, 1))
        for other in found[1:]:
            assert_close(found[0], other, 1e-11)  # measured 1e-12


def reduced(made):
    """Modal filters of three modes for each filter of a student."""
    from scavenger.recipe import Recurrence

    with torch.no_grad():
        taps = [
            mixer.filter.double()(63) if hasattr(mixer := layer.mixer, "filter") else None
            for layer in made.model.layers
        ]
    aim = [{"state_size": 3}]
    return [[] if h is None else recurrence.reduce_filters(h, Recurrence(tolerance=0.5), aim)[0] for h in taps]


@pytest.mark.parametrize("family", ALL)
def test_the_state_is_shared_by_a_group(family):
    """Filters and modes are one for each head of k and v, or one for each head of q; the cache holds what is said."""
    model = tiny_of(family)
    block = families.of(family).block(model.config)
    heads, shared_heads = model.config.num_attention_heads, block["num_key_value_heads"]
    sizes = {}
    for share_state, count in ((True, shared_heads), (False, heads)):
        made = student_of(model, share_state=share_state)
        assert made.config.num_filters == count
        modal = recurrence.recurrent_student(made, reduced(made))
        with torch.no_grad():
            cache = modal(input_ids=random_ids(1, 9, device="cpu"), use_cache=True).cache
        sizes[share_state] = modal.config.state_bytes
        assert cache.nbytes == sizes[share_state]
    assert (sizes[True] < sizes[False]) == (shared_heads < heads)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_a_run_of_each(family, workshop, tmp_path):
    """The plan, and both steps of the transfer, as a recipe has them."""
    shutil.copytree(workshop / "teacher", tmp_path / "teacher")
    tiny_of(family, vocab_size=320).save_pretrained(tmp_path / "teacher")
    words = [workshop / "recipe.yaml", f"run_dir={tmp_path}/run", f"teacher.path={tmp_path}/teacher"]
    words += ["transfer.activations.steps=1", "transfer.logits.steps=1", "student.attention_layers=[1]"]
    words += ["baseline=null", "recurrence=null", "report=null"]
    planned = command_line(*words, "--plan")
    assert planned.returncode == 0 and f": {family}, " in planned.stdout, planned.stderr
    assert command_line(*words).returncode == 0
    made = student.load(tmp_path / "run/transfer")
    assert made.config.model_type == "hyena" and list(made.config.attention_layers) == [1]


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("rotary", [True, False])
def test_training_under_autocast(family, rotary):
    """Norms and rotary angles are float32 there, values are not."""
    made = student_of(tiny_of(family), rotary=rotary, attention_layers=(1,)).train()
    ids = random_ids(2, 19, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        loss = made(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("family", ALL)
def test_greedy_text_is_the_teacher_s(family):
    model = tiny_of(family)
    made, ids = student.from_teacher(EVERYTHING, 63, model, 0).eval(), random_ids(2, 11, low=1, device="cpu")
    settings = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(made.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_what_people_do_with_a_model(family):
    """Left padding, beams, streaming, more tokens, LoRA."""
    from peft import LoraConfig, get_peft_model

    made = student_of(tiny_of(family), attention_layers=(1,), attention_window=9)
    made = recurrence.recurrent_student(made, reduced(made))
    made.generation_config = GenerationConfig(pad_token_id=0, do_sample=False, max_new_tokens=9)
    ids = random_ids(1, 12, low=1, device="cpu")
    alone = made.generate(ids, eos_token_id=None)[:, 12:]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    both = torch.cat([padded, random_ids(1, 17, low=1, device="cpu")])
    mask = torch.ones_like(both)
    mask[0, :5] = 0
    assert torch.equal(made.generate(both, attention_mask=mask, eos_token_id=None)[:1, 17:], alone)
    beams = made.generate(ids, num_beams=3, num_return_sequences=3, eos_token_id=None)
    scores = [
        float(logits_of(made, row[None])[0, 11:-1].log_softmax(-1).gather(1, row[12:, None]).sum()) for row in beams
    ]
    assert scores == sorted(scores, reverse=True) and len(set(map(tuple, beams.tolist()))) == 3
    streamed = []

    class Streamer:
        def put(self, value):
            streamed.extend(value.flatten().tolist())

        def end(self):
            pass

    made.generate(ids, streamer=Streamer(), eos_token_id=None)
    assert streamed == ids[0].tolist() + alone[0].tolist()
    before = logits_of(made, ids)
    made.resize_token_embeddings(101)
    assert made.get_input_embeddings().weight.shape[0] == 101
    assert_close(before, logits_of(made, ids)[..., :97], 1e-6)
    adapted = get_peft_model(made, LoraConfig(r=2, target_modules=["q", "v", "out"], task_type="CAUSAL_LM"))
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_stock_lm_eval(family, workshop):
    """Log-likelihoods of requests of different lengths, by lm-evaluation-harness' own class."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    made = student_of(tiny_of(family, vocab_size=320), attention_layers=(1,), attention_window=9)
    tokenizer = AutoTokenizer.from_pretrained(workshop / "teacher")
    texts = [("import", " os\n"), ("def main(argv):\n    return", " argv[1:] + [0]"), ("x =", " 1")]
    asked = [Instance("loglikelihood", {}, text, index) for index, text in enumerate(texts)]
    found = HFLM(pretrained=made, tokenizer=tokenizer, batch_size=3).loglikelihood(asked, disable_tqdm=True)
    for (context, more), (value, _) in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(context + more)["input_ids"]])
        begin = len(tokenizer(context)["input_ids"])
        log_p = logits_of(made, ids)[0, begin - 1 : -1].log_softmax(-1)
        assert value == pytest.approx(log_p.gather(1, ids[0, begin:, None]).sum().item(), rel=1e-4)


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """A saved student of each family, and its logits in a process that has no scavenger."""

    def make(folder):
        ids = torch.arange(1, 22)[None]
        for family in ALL:
            made = student_of(tiny_of(family), attention_layers=(1,), attention_window=9)
            made = recurrence.recurrent_student(made, reduced(made))
            made.save_pretrained(folder / family)
            torch.save(logits_of(made, ids), folder / family / "logits.pt")
        code = f"""
import sys, torch
sys.modules["scavenger"] = None
from transformers import AutoModelForCausalLM
for family in {ALL!r}:
    folder = {str(folder)!r} + "/" + family
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(1, 22)[None], use_cache=False).logits, folder + "/elsewhere.pt")
"""
        environment = {key: value for key, value in LAUNCHED.items() if key != "PYTHONPATH"}
        environment["HF_HOME"] = str(folder / "home")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr

    return shared(tmp_path_factory, "elsewhere", make)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_a_student_loads_where_scavenger_is_not(family, elsewhere):
    here, there = (torch.load(elsewhere / family / f"{name}.pt") for name in ("logits", "elsewhere"))
    assert torch.equal(here, there)
    assert isinstance(AutoModelForCausalLM.from_pretrained(elsewhere / family), HyenaForCausalLM)


def test_what_travels_imports_no_private_helper():
    allowed = {
        "transformers": None,
        "transformers.activations": {"ACT2FN"},
        "transformers.cache_utils": {"Cache"},
        "transformers.modeling_outputs": {"BaseModelOutputWithPast", "CausalLMOutputWithPast"},
        "transformers.utils": {"logging"},
    }
    for path in Path(hyena.__file__).parent.glob("*.py"):
        for module, names in re.findall(r"^from (transformers[\w.]*) import (\([^)]*\)|.*)", path.read_text(), re.M):
            used = set(re.findall(r"\w+", names))
            assert module in allowed and (allowed[module] is None or used <= allowed[module]), (path, module, used)


def test_a_family_is_named_in_its_own_files_only():
    root = Path(__file__).parents[1]
    named = re.compile(r"gpt[-_ ]?neox(?!\w)|gptneox|\b(llama|mistral|qwen|gemma|phi)[ -]?\d?\b", re.I)
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for folder in ("scavenger", "eval", "benchmarks")
        for path in (root / folder).rglob("*.py")
        if path.parent.name != "families"
        for line in path.read_text().splitlines()
        if named.search(line)
    ]
    assert found == []


def test_heads_of_k_and_v_where_the_family_has_none():
    with pytest.raises(RecipeError, match="num_key_value_heads: found 3; expected nothing"):
        teacher.shape(TeacherTraining(family="gpt_neox", num_key_value_heads=3, **SIZES, **TRAINING), 63, 97)


def test_heads_whose_turned_part_is_odd():
    """Phi turns half of each head, GPT-NeoX a quarter."""
    for family, heads in (("phi", 8), ("gpt_neox", 24)):
        train = TeacherTraining(family=family, **SIZES | {"num_heads": heads}, **TRAINING)
        with pytest.raises(RecipeError, match=f"num_heads: found {heads}; expected fewer: rotary positions turn"):
            teacher.shape(train, 63, 97)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma"])
def test_options_that_are_llama_s_alone_are_not_believed(family):
    """A config.json may say them; transformers passes over them."""
    model = tiny_of(family)
    model.config.mlp_bias = True
    made, ids = student.from_teacher(EVERYTHING, 63, model, 0).eval(), random_ids(1, 9, device="cpu")
    assert torch.equal(logits_of(made, ids), logits_of(model, ids))


def test_layers_that_the_teacher_does_not_have(workshop, monkeypatch):
    """Known only once the teacher is loaded, where it is on the Hub."""
    monkeypatch.setattr(recipes, "teacher_layers", lambda recipe: None)
    for override, said in (
        (
            "student.attention_layers=[3]",
            r"student.attention_layers: found \[3\]; expected some, not all, of .* 0 to 2",
        ),
        ("student.attention_layers=[0, 1, 2]", "student.attention_layers: .* expected some, not all"),
        (
            "transfer.activations={steps: 2, batch_size: 4, learning_rate: 1e-2, schedule: progressive}",
            "at least one step",
        ),
    ):
        done = command_line(workshop / "recipe.yaml", override, "--plan")
        assert done.returncode == 2 and re.search(f"^scavenger: error: .*{said}", done.stderr, re.M), done.stderr
