"""Students of an earlier version, of the model type hyena_neox, which carry their own code.

hyena_neox.zip is one as that version saved it, with its logits on the tokens 0, 5, 10, ….
"""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import command, command_line
from reference import assert_close
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def earlier(workshop, tmp_path):
    with zipfile.ZipFile(Path(__file__).with_name("hyena_neox.zip")) as archive:
        archive.extractall(tmp_path / "earlier")
    AutoTokenizer.from_pretrained(workshop / "teacher").save_pretrained(tmp_path / "earlier")
    return tmp_path / "earlier"


def test_it_loads_with_its_own_code(earlier):
    expected = load_file(earlier / "logits.safetensors")["logits"]
    (earlier / "logits.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(earlier, trust_remote_code=True)
    assert type(model).__name__ == "HyenaNeoXForCausalLM"
    ids = torch.arange(21)[None] * 5
    with torch.no_grad():
        assert_close(expected, model(ids).logits, 1e-6)
        read = model(ids[:, :9], use_cache=True)
        assert_close(expected[:, 9:], model(ids[:, 9:], cache=read.cache).logits, 1e-5)
    assert model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None).shape == (1, 26)


def test_evaluations_take_it(earlier, tmp_path):
    (earlier / "logits.safetensors").unlink()
    text = tmp_path / "text.txt"
    text.write_text("Ordinary text of several lines.\n" * 40)
    words = ["eval/perplexity.py", earlier, "--text", text, "--split", "all", "--longest", 32]
    done = command(*words, "--trust-remote-code")
    assert done.returncode == 0 and "perplexity" in done.stdout, done.stderr
    done = command(*words)
    assert done.returncode == 2 and "expected trust_remote_code" in done.stderr


def test_what_builds_on_it_says_how_to_go_on(earlier, own_run, tmp_path, monkeypatch):
    """A recurrence of it, a run that resumes after it, and a push of it, each in one line."""
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    shutil.rmtree(own_run / "report")
    for name in ("recurrence", "transfer"):
        shutil.rmtree(own_run / name)
        shutil.copytree(earlier, own_run / name)
    recur = command_line("recur", earlier, "--to", tmp_path / "new")
    for done in (recur, command_line(own_run / "recipe.yaml"), command_line("push", own_run, "--to", "somebody/model")):
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and last.startswith("scavenger: error: "), done.stderr
        assert "a student of an earlier version (hyena_neox); expected one of this version (hyena): go on with" in last
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()
