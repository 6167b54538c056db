"""Which layers should keep their attention, and the recipe that says so."""

import pytest
import torch
from conftest import command_line, tiny_student, tiny_teacher
from reference import assert_close

from scavenger import families
from scavenger.recipe import RecipeError, load_recipe
from scavenger.transfer import ranking


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
    found = ranking.checkpoint.read_json(tmp_path / "run-ranking/ranking/ranking.json")
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
