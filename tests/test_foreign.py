"""Evaluation of models that are neither teachers nor students of ours."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import command
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from scavenger.report import contenders, timing
from scavenger.report.contenders import Case, Dynamic, OwnState
from scavenger.report.evaluated import Evaluated


POSITIONS = 64
SMALL = {"hidden_size": 32, "num_hidden_layers": 2}
HEADS = SMALL | {"num_attention_heads": 2, "max_position_embeddings": POSITIONS}
OF_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
TABLES = {
    "gpt2": lambda **v: GPT2LMHeadModel(GPT2Config(**OF_GPT, **v)),
    "gptj": lambda **v: GPTJForCausalLM(GPTJConfig(**OF_GPT, rotary_dim=8, **v)),
    "opt": lambda **v: OPTForCausalLM(OPTConfig(**HEADS, word_embed_proj_dim=32, ffn_dim=64, **v)),
}
STATES = {
    "mamba": lambda **v: MambaForCausalLM(MambaConfig(**SMALL, **v)),
    "mamba2": lambda **v: Mamba2ForCausalLM(
        Mamba2Config(**SMALL, num_heads=8, head_dim=8, state_size=16, n_groups=1, chunk_size=16, **v)
    ),
    "rwkv": lambda **v: RwkvForCausalLM(RwkvConfig(**SMALL, context_length=128, **v)),
}
OTHERS = {"llama": lambda **v: LlamaForCausalLM(LlamaConfig(**HEADS, intermediate_size=64, **v))}


@pytest.fixture(scope="module")
def folder(workshop, tmp_path_factory):
    """Random models of each kind, with the workshop's tokenizer."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = AutoTokenizer.from_pretrained(workshop / "teacher")
    torch.manual_seed(0)
    for name, make in (TABLES | STATES | OTHERS).items():
        end = tokenizer.eos_token_id
        make(vocab_size=320, bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(Path(json.__file__).read_text()[:4000])
    return folder


def evaluated(folder, name):
    return Evaluated(name, str(folder / name))


@pytest.mark.parametrize("name", TABLES)
def test_contexts_end_with_the_table_of_positions(folder, name):
    """The table has a row for each position: what is asked for beyond it is cut or left out, in words."""
    assert evaluated(folder, name).longest == POSITIONS
    words = [folder / name, "--text", folder / "text.txt", "--split", "all"]
    done = command("eval/perplexity.py", *words)
    assert done.returncode == 0, done.stderr
    assert f"{name} has positions for {POSITIONS} tokens, all models read no more" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])[0]["settings"]["longest"] == POSITIONS
    times = ["--cases", "1x16+8", "1x60+8", "--contexts", "20", "60", "--rounds", "1", "--seconds", "0.1"]
    done = command("eval/speed.py", folder / name, *times)
    assert done.returncode == 0 and "2 of the cases and contexts are left out" in done.stderr, done.stderr
    done = command("eval/speed.py", folder / name, "--cases", "1x60+8", "--contexts", "--rounds", "1")
    assert done.returncode == 2 and "found no case or context within 64 tokens" in done.stderr
    done = command("eval/generation.py", folder / "llama", *words, "--prompts", "2")
    assert done.returncode == 2 and f"{name} has positions for 64 tokens; expected" in done.stderr


def test_a_checkpoint_of_an_older_version_is_whole(folder, tmp_path):
    """GPT-2's own file: names without the body's prefix, and masks that no model of today reads."""
    shutil.copytree(folder / "gpt2", tmp_path / "gpt2")
    weights = load_file(tmp_path / "gpt2/model.safetensors")
    older = {name.removeprefix("transformer."): value for name, value in weights.items()}
    older |= {f"h.{layer}.attn.{name}": torch.ones(2) for layer in range(2) for name in ("bias", "masked_bias")}
    save_file(older, tmp_path / "gpt2/model.safetensors", {"format": "pt"})
    expected, found = (evaluated(where, "gpt2").model.state_dict() for where in (folder, tmp_path))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", [*STATES, *OTHERS])
def test_models_without_such_a_table_read_any_length(folder, name):
    model = evaluated(folder, name)
    assert model.longest is None
    with torch.no_grad():
        assert model.model(input_ids=torch.ones(1, 3 * POSITIONS, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("name", STATES)
@torch.no_grad()
def test_a_state_of_its_own_is_timed(folder, name):
    """Tokens are those of transformers' own generate; the bytes kept do not grow."""
    model = evaluated(folder, name)
    assert timing.kinds(model) == [OwnState]
    ids, new = torch.randint(1, 320, (2, 11), generator=torch.Generator().manual_seed(1)), 7
    contender = OwnState(model.model, Case(2, 11, new))
    contender.step(contender.read(ids[:, :2]).argmax(-1))  # must leave no trace
    tokens, sizes = [contender.read(ids).argmax(-1)], [contender.kept]
    for _ in range(new - 1):
        tokens.append(contender.step(tokens[-1]).argmax(-1))
        sizes.append(contender.kept)
    model.model.generation_config.eos_token_id = None
    expected = model.model.generate(ids, max_new_tokens=new, do_sample=False)[:, 11:]
    assert torch.equal(torch.stack(tokens, dim=1), expected)
    assert len(set(sizes)) == 1 and sizes[0] > 0
    found = contenders.generated(contender, ids, math.inf)
    assert found["tokens"][:new] == expected[0].tolist() and len(found["steps"]) == new


def test_kinds_beside_each_other_are_compared(folder):
    """One command, models with keys and values, with a table of positions, and with states of two kinds."""
    assert Dynamic in timing.kinds(evaluated(folder, "llama"))
    names = ["llama", "gpt2", "mamba", "rwkv"]
    models = [f"{name}={folder / name}" for name in names]
    words = ["--text", folder / "text.txt", "--split", "all", "--context-length", "64", "--examples", "2"]
    words += ["--measure", "perplexity", "speed", "recall", "--cases", "1x16+8", "--contexts", "20", "--rounds", "1"]
    words += ["--to", folder / "compared"]
    done = command("eval/compare.py", *models, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "compared/compare.json").read_text())
    assert list(found["details"]) == ["perplexity", "recall", "speed"]
    assert all(set(of) == set(names) for of in found["details"].values())
