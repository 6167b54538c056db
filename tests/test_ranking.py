"""Which layers, or single heads, should keep their attention, and the recipe that says so."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import command_line, random_ids, tiny_of, tiny_student, tiny_teacher
from reference import assert_close

from scavenger import data, families, student, teacher
from scavenger.recipe import RecipeError, Student, Teacher, load_recipe
from scavenger.report import heads, retrieval
from scavenger.run import checkpoint
from scavenger.transfer import ranking


TEXT = np.random.default_rng(5).integers(1, 97, (11, 41))  # tokens of the tiny models' vocabulary


@pytest.mark.parametrize("layer", [0, 2])
def test_a_mixer_alone_is_the_teacher_with_one_output_replaced(layer):
    frozen, matched = tiny_teacher(), tiny_student()
    matched.load_state_dict(families.of("gpt_neox").student_weights(frozen, []), strict=False)
    ids = torch.randint(0, 97, (2, 23))
    _, cos, sin = matched.model.mask_and_angles(torch.zeros(2, 23, 30, dtype=torch.float64))
    mixer = matched.model.layers[layer].mixer
    hook = frozen.gpt_neox.layers[layer].attention.register_forward_hook(
        lambda module, args, output: (mixer(args[0], cos, sin), output[1])
    )
    expected = frozen(input_ids=ids).logits
    hook.remove()
    found = ranking.alone(frozen, matched, layer).double()(input_ids=ids, use_cache=False).logits
    assert_close(expected, found, 1e-6)  # the teacher's angles are float32
    assert (frozen(input_ids=ids).logits - found).abs().max() > 1e-4


def test_the_layers_that_matter_most_are_kept(tmp_path, workshop):
    recipe = load_recipe(str(workshop / "recipe.yaml"))
    found = [
        {"layer": layer, "divergence": value, "agreement": 0.5, "perplexity": 9.0, "tokens": 10}
        for layer, value in ((1, 0.7), (2, 0.4), (0, 0.1))
    ]
    made = ranking.recommended(recipe, found, 2)
    ranking.write_recipe(made, found, tmp_path / "kept.yaml")
    read = load_recipe(str(tmp_path / "kept.yaml"))
    assert read == made and read.student.attention_layers == (1, 2) and read.run_dir != recipe.run_dir
    ranking.write_recipe(made, found, tmp_path / "kept.yaml")  # the same again is no mistake
    with pytest.raises(RecipeError, match="exists already"):
        ranking.write_recipe(ranking.recommended(recipe, found, 1), found, tmp_path / "kept.yaml")
    assert load_recipe(str(tmp_path / "kept.yaml")) == made
    for keep in (0, 3):
        with pytest.raises(RecipeError, match="expected 1 to 2, some and not all of the teacher's layers"):
            ranking.check(recipe, keep, tmp_path / "kept.yaml")
    with pytest.raises(RecipeError, match="is not a folder"):
        ranking.check(recipe, 1, tmp_path / "nowhere" / "kept.yaml")
    with pytest.raises(RecipeError, match="layers are ranked by matching activations"):
        ranking.check(load_recipe("recipes/teacher-stdlib.yaml"), 1, tmp_path / "kept.yaml")


def test_rank_command(workshop, tmp_path):
    words = ["rank", workshop / "recipe.yaml", "--to", tmp_path / "kept.yaml", f"run_dir={tmp_path}/run"]
    done = command_line(*words)
    assert done.returncode == 0, done.stderr
    found = checkpoint.read_json(tmp_path / "run-ranking/ranking/ranking.json")
    assert sorted(entry["layer"] for entry in found) == [0, 1, 2]
    values = [entry["divergence"] for entry in found]
    assert values == sorted(values, reverse=True) and values[-1] > 0
    assert (tmp_path / "run-ranking/ranking/ranking.png").stat().st_size > 1000
    assert load_recipe(str(tmp_path / "kept.yaml")).student.attention_layers == (found[0]["layer"],)
    again = command_line(*words[:3], tmp_path / "two.yaml", *words[4:], "--keep", 2)
    assert again.returncode == 0 and "activations:" not in again.stderr, "what was matched is not matched again"
    assert len(load_recipe(str(tmp_path / "two.yaml")).student.attention_layers) == 2
    wrong = command_line(*words, "--keep", 3)
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("scavenger: error: --keep: found 3")


def columns_of(model, head):
    """The columns of an output projection that read a head of k and v, through each head of q that shares it."""
    block = families.of(model.config.model_type).block(model.config)
    shared = model.config.num_attention_heads // block["num_key_value_heads"]
    return [
        q * block["head_dim"] + c for q in range(head * shared, (head + 1) * shared) for c in range(block["head_dim"])
    ]


@torch.no_grad()
def without_columns(model, layer, head):
    """A copy whose output projection does not read the head."""
    changed = copy.deepcopy(model)
    families.of(model.config.model_type).outputs(changed)[layer].weight[:, columns_of(model, head)] = 0.0
    return changed


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", families.MODEL_TYPES)
def test_a_silenced_head_is_one_whose_output_nobody_reads_and_one_whose_values_are_zero(family):
    model, ids = tiny_of(family), random_ids(2, 51, device="cpu")
    whole, block = logits_of(model, ids), families.of(family).block(model.config)
    everything = Student(attention_layers=(0, 1, 2), attention_window=0)  # the student is its teacher
    for layer, head in itertools.product(range(3), range(block["num_key_value_heads"])):
        with heads.silenced(model, layer, head):
            found = logits_of(model, ids)
        assert torch.equal(found, logits_of(without_columns(model, layer, head), ids))
        valueless = student.from_teacher(everything, 63, model, 0).eval()
        with torch.no_grad():
            for parameter in valueless.model.layers[layer].mixer.v.parameters():
                parameter.unflatten(0, (-1, block["head_dim"]))[head] = 0.0
        assert torch.equal(found, logits_of(valueless, ids))
        assert (found - whole).abs().max() > 1e-2
    assert torch.equal(whole, logits_of(model, ids)), "the hooks are gone"


@pytest.mark.parametrize("family", families.MODEL_TYPES)
def test_the_score_of_a_head_is_the_mean_fall_of_two_gains(family):
    model = without_columns(tiny_of(family), 1, 2)
    found = heads.measured(model, TEXT, [0], 70, 3)
    falls = {(entry["layer"], entry["head"]): entry for entry in found["heads"]}
    assert len(falls) == len(found["heads"]) == 3 * families.of(family).block(model.config)["num_key_value_heads"]
    silent = falls.pop((1, 2))
    assert silent["fall"] == silent["passages"] == silent["pairs"] == 0, "it was zero already"
    assert all(entry["fall"] and entry["passages"] and entry["pairs"] for entry in falls.values())
    scores = [entry["fall"] for entry in found["heads"]]
    assert scores == sorted(scores, reverse=True)
    assert found["distance"] == 16
    (passages, *_), (_, _, pairs, *_) = (
        retrieval.repeated_passages(without_columns(model, 2, 1), TEXT, (16,), heads.EXAMPLES, 3),
        retrieval.associative_recall(without_columns(model, 2, 1), TEXT, [0], (16,), heads.EXAMPLES, 3),
    )
    assert (passages.name, pairs.name) == ("gain on repeated passages", "gain of pairs")
    entry = falls[2, 1]
    for name, metric in (("passages", passages), ("pairs", pairs)):
        without = sum(metric.numerators) / sum(metric.denominators)
        assert entry[name] == pytest.approx(found["teacher"][name] - without, abs=1e-12)
    assert entry["fall"] == pytest.approx((entry["passages"] + entry["pairs"]) / 2, abs=1e-12)


def test_the_heads_that_look_words_up_in_the_embedded_teacher_come_first(tmp_path):
    """L1H1, which reads the token before, and L2H3, which reads far back; others cost less than a fourth of either."""
    recipe = load_recipe("recipes/quickstart.yaml")
    frozen, tokenizer = teacher.load(Teacher(), tmp_path), teacher.tokenizer(recipe, tmp_path)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in list(data.stdlib_files().values())[5::80]]
    text = np.concatenate(tokenizer(texts, add_special_tokens=False)["input_ids"])[:32768].astype(np.int64)
    found = heads.measured(frozen, text, tokenizer.all_special_ids, 256, 0)
    assert found["distance"] == 128 and found["teacher"]["passages"] > 0.5 and found["teacher"]["pairs"] > 1
    first, second, *others = found["heads"]
    assert [(entry["layer"], entry["head"]) for entry in (first, second)] == [(1, 1), (2, 3)]
    for task in ("fall", "passages", "pairs"):
        assert min(first[task], second[task]) > 4 * max(entry[task] for entry in others)
    frozen.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.from_numpy(text[: 8 * 256].reshape(8, 256))
        weights = frozen(input_ids=ids, output_attentions=True, use_cache=False).attentions
    before = {
        (layer, head): torch.diagonal(weights[layer][:, head], -1, 1, 2).mean()
        for layer, head in itertools.product(range(4), repeat=2)
    }
    assert before[1, 1] == max(before.values()) > 0.5 and before[2, 3] < 0.1


def test_the_heads_that_matter_most_are_kept(tmp_path, workshop):
    recipe = load_recipe(str(workshop / "recipe.yaml"), ["student.attention_layers=[1]"])
    found = {
        "distance": 16,
        "examples": 3,
        "teacher": {"passages": 1.5, "pairs": 2.5},
        "heads": [
            {"layer": layer, "head": head, "fall": value, "passages": value - 0.1, "pairs": value + 0.1}
            for layer, head, value in ((2, 3, 1.1), (0, 4, 0.5), (1, 0, 0.0), (2, 0, -0.2))
        ],
    }
    made = heads.recommended(recipe, found, 2)
    heads.write_recipe(made, found, tmp_path / "kept.yaml")
    read = load_recipe(str(tmp_path / "kept.yaml"))
    assert read == made and read.run_dir != recipe.run_dir
    assert read.student.attention_heads == ("L0H4", "L2H3") and read.student.attention_layers == ()
    comment = [line for line in (tmp_path / "kept.yaml").read_text().splitlines() if line.startswith("# ")]
    rows = [line.split()[1:] for line in comment[-4:]]
    assert rows[0] == ["L2H3", "1.000", "1.200", "1.100"] and rows[3] == ["L2H0", "-0.300", "-0.100", "-0.200"]
    with pytest.raises(RecipeError, match="exists already"):
        heads.write_recipe(heads.recommended(recipe, found, 1), found, tmp_path / "kept.yaml")
    again = dataclasses.replace(read, run_dir=recipe.run_dir)
    assert ranking.without_attention(again) == ranking.without_attention(recipe), "both rankings share a folder"
    layers = ranking.recommended(read, [{"layer": 2}, {"layer": 0}, {"layer": 1}], 1)
    assert layers.student.attention_layers == (2,) and layers.student.attention_heads == ()


def test_head_rankings_that_cannot_be(tmp_path, workshop):
    recipe = load_recipe(str(workshop / "recipe.yaml"), ["data.context_length=64"])
    heads.check(recipe, 14, None)
    for keep in (-1, 0, 15):
        with pytest.raises(RecipeError, match=f"--heads: found {keep}; expected 1 to 14, some and not all"):
            heads.check(recipe, keep, None)
    with pytest.raises(RecipeError, match="--to: .* is a folder; expected"):
        heads.check(recipe, 1, tmp_path)
    short = load_recipe(str(workshop / "recipe.yaml"))
    with pytest.raises(RecipeError, match="data.context_length: found a context of 48 tokens; expected 64 or more"):
        heads.check(short, 1, None)
    trained = load_recipe("recipes/teacher-stdlib.yaml")
    heads.check(trained, 15, None)  # neither a transfer nor the teacher is needed for the check
    with pytest.raises(RecipeError, match="--heads: found 16; expected 1 to 15"):
        heads.check(trained, 16, None)
    with pytest.raises(RecipeError, match="validation split: the text has 10 different tokens; expected 16 or more"):
        heads.measured(tiny_of("gpt_neox"), TEXT % 10, [], 64, 0)
    with pytest.raises(RecipeError, match="validation split: the text has 47 tokens; expected 48 or more"):
        heads.measured(tiny_of("gpt_neox"), TEXT.reshape(-1)[:47], [], 64, 0)


def test_rank_command_for_heads(workshop, tmp_path):
    words = ["rank", workshop / "recipe.yaml", f"run_dir={tmp_path}/run", "data.context_length=64", "--heads"]
    done = command_line(*words, 4, "--to", tmp_path / "kept.yaml")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run-ranking"
    found = checkpoint.read_json(folder / "heads/ranking.json")
    assert sorted((entry["layer"], entry["head"]) for entry in found["heads"]) == [*np.ndindex(3, 5)]
    assert (folder / "heads/ranking.png").stat().st_size > 1000
    assert {path.name for path in folder.iterdir()}.isdisjoint({"ranking", "activations"}), "nothing was trained"
    best = sorted(f"L{entry['layer']}H{entry['head']}" for entry in found["heads"][:4])
    assert load_recipe(str(tmp_path / "kept.yaml")).student.attention_heads == tuple(best)
    assert f"recipe that keeps heads {', '.join(best)}: {tmp_path}/kept.yaml" in done.stdout
    assert "15/15" in done.stderr and "head/s" in done.stderr
    again = command_line(*words, 1)
    assert again.returncode == 0 and "head/s" not in again.stderr, "what was measured is not measured again"
    assert again.stdout.startswith("gains by") and again.stdout in done.stdout, "without --to only the table is printed"
    wrong = command_line(*words, 0)
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("scavenger: error: --heads: found 0")
    both = command_line(*words, 1, "--keep", 1)
    assert both.returncode == 2 and "not allowed with argument" in both.stderr
