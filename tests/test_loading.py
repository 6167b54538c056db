"""Only whole checkpoints and tokenizers of use are used; whatever else is found ends in one line before any work."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, command, command_line
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from scavenger import data, loading, plan
from scavenger.report.text import Text
from scavenger.run import checkpoint


FILES_OF_A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHORT = ["transfer.activations.steps=1", "transfer.logits.steps=1", "baseline=null", "recurrence=null", "report=null"]
WEIGHT = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"


@pytest.fixture
def teacher(workshop, tmp_path):
    """A copy of the workshop's teacher, to be damaged."""
    return Path(shutil.copytree(workshop / "teacher", tmp_path / "teacher"))


def run(workshop, teacher, *words):
    """A short run of the recipe with this teacher: what it returned, and its folder."""
    folder = teacher.parent / "run"
    with mock.patch.object(plan, "timed", lambda *words: (1.0, 1.0, None)):
        return command_line(
            workshop / "recipe.yaml", f"run_dir={folder}", f"teacher.path={teacher}", *SHORT, *words
        ), folder


def is_one_line(done, *parts):
    """Exit code 2 and one line that has these parts; what comes before it on stderr are bars of progress."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert ": error: " in last, done.stderr
    for part in parts:
        assert part in last, last


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    """`change(weights)` on the tensors of a checkpoint's file."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def no_tokenizer(folder):
    for name in FILES_OF_A_TOKENIZER:
        (folder / name).unlink(missing_ok=True)


def tokenizer_of_few_letters(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    tokenizer["model"]["vocab"] = {"<|endoftext|>": 0, "a": 1, "b": 2}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def body_alone(folder):
    GPTNeoXForCausalLM.from_pretrained(folder).gpt_neox.save_pretrained(folder)


def one_shard_gone(folder):
    GPTNeoXForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def of_one_layer_more(folder):
    change_json(folder / "config.json", num_hidden_layers=2)


def of_one_layer_less(folder):
    change_json(folder / "config.json", num_hidden_layers=4)


def another_shape(folder):
    change_weights(folder, lambda weights: weights.update({WEIGHT: weights[WEIGHT][:, 1:].clone()}))


def names(folder):
    """A teacher's or a student's own name of the weight that is damaged."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return {"gpt_neox": WEIGHT, "hyena": "model.layers.1.mlp.up.weight"}[kind]


def a_foreign_name(folder):
    change_weights(folder, lambda weights: weights.update({"other": torch.ones(3)}))


def a_lost_name(folder):
    change_weights(folder, lambda weights: weights.pop(WEIGHT))


def not_a_number(folder):
    change_weights(folder, lambda weights: weights[WEIGHT].__setitem__((3, 4), torch.nan))


def infinite(folder):
    change_weights(folder, lambda weights: weights[names(folder)].__setitem__((3, 4), -torch.inf))


def a_pointer(name):
    def pointer(folder):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")

    pointer.__name__ = f"a_pointer_for_{name}"
    return pointer


def of_sentencepiece(folder):
    no_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2")


def an_adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))


DAMAGED = [
    (no_tokenizer, "expected the same text"),
    (tokenizer_of_few_letters, "expected the same text"),
    (of_sentencepiece, "expected sentencepiece or tiktoken to be installed"),
    (body_alone, "the checkpoint lacks lm_head.weight; expected exactly the weights of a GPTNeoXForCausalLM"),
    (one_shard_gone, "cannot be loaded"),
    (of_one_layer_more, "unknown to its config.json, gpt_neox.layers.2.attention.dense.bias and 11 more"),
    (of_one_layer_less, "the checkpoint lacks gpt_neox.layers.3.attention.dense.bias and 11 more"),
    (another_shape, f"in another shape than its config.json says, {WEIGHT}"),
    (a_foreign_name, "unknown to its config.json, other"),
    (a_lost_name, f"the checkpoint lacks {WEIGHT}"),
    (not_a_number, f"{WEIGHT} has 1 of 1,320 values that are NaN or infinite"),
    (infinite, f"{WEIGHT} has 1 of 1,320 values that are NaN or infinite"),
    (a_pointer("model.safetensors"), "model.safetensors is a Git LFS pointer, not the file itself"),
    (a_pointer("tokenizer.json"), "tokenizer.json is a Git LFS pointer"),
    (an_adapter, "found a PEFT adapter (adapter_config.json) beside the weights"),
    (lambda folder: change_json(folder / "config.json", vocab_size=300), "300 embedding rows"),
    (lambda folder: change_json(folder / "config.json", hidden_act="swosh"), "has hidden_act swosh"),
    (lambda folder: change_json(folder / "config.json", hidden_size="wide"), "field 'hidden_size'"),
    (
        lambda folder: change_json(folder / "config.json", model_type="bert"),
        "(model_type bert); expected a checkpoint of one of the families",
    ),
    (lambda folder: change_json(folder / "config.json", attn_implementation="flash_attention_2"), "FlashAttention2"),
    (
        lambda folder: change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "has quantised weights",
    ),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGED)
def test_a_teacher_that_is_not_whole(workshop, teacher, damage, said):
    damage(teacher)
    done, folder = run(workshop, teacher)
    is_one_line(done, str(teacher), said)
    assert not (folder / "data").exists() and not (folder / "data.partial").exists(), "nothing was tokenised"


@pytest.mark.parametrize(("damage", "said"), DAMAGED[:15])
def test_no_evaluation_of_it_either(teacher, damage, said):
    damage(teacher)
    text = teacher.parent / "text.txt"
    text.write_text("Ordinary text of several lines.\n" * 40)
    done = command("eval/perplexity.py", teacher, "--text", text, "--split", "all", "--longest", 32)
    is_one_line(done, str(teacher), said)


@pytest.mark.parametrize("damage", [a_foreign_name, infinite, a_pointer("model.safetensors"), an_adapter])
def test_a_student_that_is_not_whole(own_run, damage, monkeypatch):
    """Nor is it made a recurrence of, pushed or resumed from."""
    student = own_run / "transfer"
    damage(student)
    words = ["transfer", "expected"]
    is_one_line(command_line("recur", student, "--to", own_run / "new"), *words)
    assert not (own_run / "new").exists()
    for made in ("recurrence", "report"):
        shutil.rmtree(own_run / made)
    is_one_line(command_line(own_run / "recipe.yaml"), *words)
    (own_run / "recipe.yaml").write_text((own_run / "recipe.yaml").read_text().replace("recurrence:", "#recurrence:"))
    shutil.copytree(own_run / "transfer", own_run / "recurrence")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    is_one_line(command_line("push", own_run, "--to", "somebody/model"), str(own_run / "recurrence"), "expected")


def test_older_checkpoints_have_tables_that_no_model_reads(teacher):
    """The causal mask and the rotary frequencies, in Pythia's own files."""
    for name in ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"):
        change_weights(teacher, lambda w, name=name: w.update({f"gpt_neox.layers.0.{name}": torch.ones(2)}))
    assert isinstance(loading.model(AutoModelForCausalLM, teacher), GPTNeoXForCausalLM)


def test_settings_of_the_checkpoint_that_change_nothing(workshop, teacher):
    change_json(teacher / "config.json", return_dict=False, attn_implementation="eager", torch_dtype="float32")
    done, folder = run(workshop, teacher)
    assert done.returncode == 0 and (folder / "transfer").is_dir(), done.stderr


def test_nothing_asks_on_the_terminal(teacher, monkeypatch):
    """Code of a checkpoint runs by a flag only; without it the refusal is a line."""
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("it asked"))
    (teacher / "own.py").write_text("raise SystemExit('ran')\n")
    change_json(teacher / "config.json", model_type="of_their_own", auto_map={"AutoConfig": "own.OwnConfig"})
    text = teacher.parent / "text.txt"
    text.write_text("Ordinary text of several lines.\n" * 40)
    words = ["eval/perplexity.py", teacher, "--text", text, "--split", "all"]
    is_one_line(command(*words), "trust_remote_code")
    assert "ran" in str(command(*words, "--trust-remote-code").returncode)


OWN_TOKENIZER = """
from transformers import PreTrainedTokenizer


class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {}

    def __init__(self, **options):
        super().__init__(**{"eos_token": "<|endoftext|>"} | options)

    vocab_size = 128

    def get_vocab(self):
        return {chr(number): number for number in range(128)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return min(ord(token), 127)

    def _convert_id_to_token(self, number):
        return chr(number)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def save_vocabulary(self, folder, filename_prefix=None):
        return ()
"""


def test_a_tokenizer_with_code_of_its_own(workshop, teacher):
    """One setting of the recipe serves the whole run, report included; every other command has a flag."""
    no_tokenizer(teacher)
    (teacher / "own_tokenizer.py").write_text(OWN_TOKENIZER)
    auto = {"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]}
    facts = {"tokenizer_class": "OwnTokenizer", "auto_map": auto, "eos_token": "<|endoftext|>"}
    (teacher / "tokenizer_config.json").write_text(json.dumps(facts))
    whole = ["recurrence={tolerance: 0.1}"]
    whole += ["report={context_lengths: [20], sample_tokens: 5, prompts: 2, examples: 3, rounds: 1}"]
    refused = ["has code of its own; expected trust_remote_code"]
    is_one_line(run(workshop, teacher, *whole)[0], str(teacher), *refused)
    done, folder = run(workshop, teacher, *whole, "teacher.trust_remote_code=true")
    assert done.returncode == 0, done.stderr
    assert (folder / "report/index.html").is_file() and (folder / "transfer/own_tokenizer.py").is_file()
    text = teacher.parent / "text.txt"
    text.write_text("Ordinary text of several lines.\n" * 40)
    words = ["recur", folder / "transfer", "--to", folder / "again", "--tolerance", "0.1", "--max-state-size", "2"]
    words += ["--text", text, "--split", "all"]
    is_one_line(command_line(*words), *refused)
    assert not (folder / "again").exists()
    assert command_line(*words, "--trust-remote-code").returncode == 0
    words = ["eval/perplexity.py", folder / "again", "--text", text, "--split", "all", "--longest", 32]
    is_one_line(command(*words), *refused)
    assert command(*words, "--trust-remote-code").returncode == 0


@pytest.mark.parametrize("change", ["teacher", "tokenizer", "text"])
def test_other_files_under_the_same_names_end_a_resumed_run(workshop, teacher, change):
    text = teacher.parent / "text.jsonl"
    shutil.copy(workshop / "text.jsonl", text)
    done, folder = run(workshop, teacher, f"data.path={text}")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "transfer")
    again, _ = run(workshop, teacher, f"data.path={text}")
    assert again.returncode == 0, "the same files"
    shutil.rmtree(folder / "transfer")
    if change == "teacher":
        change_weights(teacher, lambda weights: weights[WEIGHT].mul_(1.5))
    elif change == "tokenizer":
        tokenizer = json.loads((teacher / "tokenizer.json").read_text())
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
        (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        text.write_text(text.read_text().replace("import", "export"))
    done, _ = run(workshop, teacher, f"data.path={text}")
    name = {"teacher": "model.safetensors", "tokenizer": "tokenizer.json", "text": "text.jsonl"}[change]
    is_one_line(done, f"{name} has changed since {folder} was begun")
    assert not (folder / "transfer").exists()


def test_tokens_of_files_that_changed_are_made_anew(tmp_path):
    """As long as the text is not tokenised to the end; what the same files gave is kept."""
    before = {"teacher": {"tokenizer.json": {"bytes": 3}}, "data": {"a.txt": {"bytes": 1}}}
    checkpoint.require_same_inputs(tmp_path, before)
    for made in ("data.partial", "tokenizer"):
        (tmp_path / made).mkdir()
    checkpoint.require_same_inputs(tmp_path, before)
    assert (tmp_path / "data.partial").is_dir() and (tmp_path / "tokenizer").is_dir()
    after = before | {"data": {"a.txt": {"bytes": 2}}}
    checkpoint.require_same_inputs(tmp_path, after)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs.json"]
    assert checkpoint.read_json(tmp_path / "inputs.json") == after


@pytest.mark.parametrize("what", ["file", "folder"])
def test_text_that_is_tokenised_need_not_stay(workshop, teacher, what):
    text = teacher.parent / "text"
    text.mkdir()
    for split in data.SPLITS:
        shutil.copy(workshop / "text.jsonl", text / f"{split}.jsonl")
    words = [f"data.path={text if what == 'folder' else text / 'train.jsonl'}"]
    done, folder = run(workshop, teacher, *words)
    assert done.returncode == 0, done.stderr
    for gone in (text / "train.jsonl", text):
        shutil.rmtree(folder / "transfer")
        gone.unlink() if gone.is_file() else shutil.rmtree(gone)
        again, _ = run(workshop, teacher, *words)
        assert again.returncode == 0 and (folder / "transfer").is_dir(), again.stderr
    assert len(json.loads((folder / "inputs.json").read_text())["data"]) == (3 if what == "folder" else 1)


def test_what_is_put_right_is_not_held_against_the_run(workshop, teacher):
    """Before anything is made, recipe, teacher and text may still change; then the run goes through."""
    good, text = (teacher / "config.json").read_text(), teacher.parent / "text.jsonl"
    lines = (workshop / "text.jsonl").read_text().splitlines()
    text.write_text("\n".join([*lines[:40], "not a row", *lines[40:]]))
    change_json(teacher / "config.json", num_hidden_layers=2)
    is_one_line(
        run(workshop, teacher, f"data.path={text}", "data.evaluation_tokens=64")[0], "unknown to its config.json"
    )
    (teacher / "config.json").write_text(good)
    is_one_line(run(workshop, teacher, f"data.path={text}")[0], "text.jsonl", "41")
    text.write_text("\n".join(lines))
    done, folder = run(workshop, teacher, f"data.path={text}")
    assert done.returncode == 0, done.stderr
    assert "another recipe" in run(workshop, teacher, f"data.path={text}", "seed=5")[0].stderr
    whole, _ = run(workshop, teacher, f"data.path={text}", f"run_dir={folder}-2")
    for split in data.SPLITS:
        own, other = (np.load(f / f"data/{split}.npy") for f in (folder, Path(f"{folder}-2")))
        assert np.array_equal(own, other)


def test_a_document_begins_as_the_model_was_trained(teacher):
    """With beginning-of-text where that is another token; between documents stand both."""
    plain = AutoTokenizer.from_pretrained(teacher)
    assert data.beginning(plain) == plain.eos_token_id and data.framed([5, 6], plain) == [5, 6, 0]
    own = AutoTokenizer.from_pretrained(teacher, bos_token="<s>")
    own._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 320)])
    first, end = own.bos_token_id, own.eos_token_id
    assert first != end and data.beginning(own) == first and data.framed([5, 6], own) == [first, 5, 6, end]
    text = Text("", "", ["one", "two"])
    one, two = text.ids(own)
    assert one[0] == two[0] == first and first not in one[1:] + two[1:]
    assert text.stream(own).tolist() == [*one, end, *two, end]
    assert text.stream(plain).tolist() == [plain.eos_token_id, *one[1:], plain.eos_token_id, *two[1:]]


def at_random(folder, random):
    """One fault of a kind that copying, editing and converting checkpoints leave behind; returns what it was."""
    kind = random.integers(10)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = files[random.integers(len(files))]
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[random.integers(len(weights))]
    if kind == 0:
        path.write_bytes(path.read_bytes()[: random.integers(path.stat().st_size)])
        return f"{path.name} truncated"
    if kind == 1:
        path.unlink()
        return f"{path.name} gone"
    if kind == 2:
        content = bytearray(path.read_bytes())
        for place in random.integers(len(content), size=9):
            content[place] = random.integers(256)
        path.write_bytes(bytes(content))
        return f"{path.name} altered"
    if kind == 3:
        change_weights(folder, lambda w: w.update({name[:-3]: w.pop(name)}))
    elif kind == 4:
        change_weights(folder, lambda w: w.update({name: w[name].to(torch.float16)}))
    elif kind == 5:
        change_weights(folder, lambda w: w.update({name: w[name][..., :-1].clone()}))
    elif kind == 6:
        change_weights(folder, lambda w: w[name].view(-1)[:1].fill_([torch.nan, torch.inf][random.integers(2)]))
    elif kind == 9:
        shutil.copy(ROOT / "scavenger/assets/teacher-stdlib/tokenizer.json", folder)
        return "another model's tokenizer"
    else:
        file = folder / ["config.json", "tokenizer_config.json"][kind - 7]
        keys = sorted(json.loads(file.read_text()))
        key = keys[random.integers(len(keys))]
        values = [None, 0, -1, 7, 10**9, 0.5, "x", [], {}, True]
        value = values[random.integers(len(values))]
        change_json(file, **{key: value})
        return f"{file.name} {key}: {value}"
    return f"{name}, kind {kind}"


@pytest.mark.parametrize("seed", range(int(os.environ.get("FUZZED_FOLDERS", 16))))
def test_damaged_at_random(workshop, teacher, seed, record_property):
    """A correct run, or one line; never a traceback, and never a student of what is not there.

    FUZZED_FOLDERS=300 tries more; `--junitxml` then has how each ended.
    """
    what = at_random(teacher, np.random.default_rng(seed))
    done, folder = run(workshop, teacher)
    record_property("ended", "run" if done.returncode == 0 else "refused")
    if done.returncode == 0:
        assert (folder / "transfer").is_dir(), what
    else:
        is_one_line(done)
        assert not (folder / "transfer").exists(), what
