"""A mistake in a recipe is one line that says where and what would be right."""

import dataclasses
import importlib.util
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from scavenger.recipe import Recipe, RecipeError, Section, differences, load_recipe, resolved


RECIPES = Path(__file__).parents[1] / "recipes"
MINIMAL = {
    "run_dir": "runs/x",
    "transfer": {
        "activations": {"steps": 5, "batch_size": 2, "learning_rate": "1e-3"},
        "logits": {"steps": 7, "batch_size": 2, "learning_rate": 1e-3},
    },
}


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return str(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    recipe = load_recipe(str(path))
    assert path.read_text().startswith("#!/usr/bin/env scavenger\n")
    assert path.stat().st_mode & 0o100, "a recipe is a program"
    for stage in (
        recipe.teacher.train,
        *(recipe.transfer.phases if recipe.transfer else ()),
    ):
        assert stage is None or isinstance(stage.learning_rate, float)


def test_numbers_overrides_and_defaults(tmp_path):
    recipe = load_recipe(
        write(tmp_path, MINIMAL),
        ["transfer.logits.steps=100", "student.filter.sine_frequency=1e1", "report.context_lengths=[3, 5]"],
    )
    assert recipe.transfer.activations[0].learning_rate == 1e-3
    assert recipe.transfer.logits[0].steps == 100
    assert recipe.student.filter.sine_frequency == 10.0
    assert recipe.report.context_lengths == (3, 5)
    assert recipe.baseline is None


def test_resolved_recipe_is_the_same_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    again = load_recipe(write(tmp_path, resolved(recipe)))
    assert again == recipe
    assert differences(resolved(recipe), recipe) == []
    changed = load_recipe(write(tmp_path, MINIMAL), ["transfer.logits.steps=8"])
    assert differences(resolved(recipe), changed) == ["transfer.logits.steps (the run has 7, the recipe says 8)"]


def test_a_section_may_be_a_list_of_phases(tmp_path):
    phases = "[{schedule: parallel, steps: 5, batch_size: 1, learning_rate: 1e-3}, "
    phases += "{schedule: joint, steps: 3, batch_size: 2, learning_rate: 1e-4, flat: 0.05, look_every: 10}]"
    recipe = load_recipe(
        write(tmp_path, MINIMAL), [f"transfer.activations={phases}", "transfer.activations.1.learning_rate=2e-4"]
    )
    assert [phase.schedule for phase in recipe.transfer.activations] == ["parallel", "joint"]
    assert recipe.transfer.activations[1].learning_rate == 2e-4
    assert recipe.transfer.phases == recipe.transfer.activations + recipe.transfer.logits
    again = load_recipe(write(tmp_path, resolved(recipe)))
    assert again == recipe and differences(resolved(recipe), again) == []
    changed = load_recipe(write(tmp_path, resolved(recipe)), ["transfer.activations.1.steps=4"])
    assert differences(resolved(recipe), changed) == ["transfer.activations.1.steps (the run has 3, the recipe says 4)"]
    for overrides, part in (
        (["transfer.activations.steps=4"], "transfer.activations.0.steps"),
        (["transfer.activations.2.steps=4"], "a number from 0 to 1"),
        (["transfer.activations.1.steps=0"], "transfer.activations.1.steps: found 0"),
    ):
        with pytest.raises(RecipeError, match=part):
            load_recipe(write(tmp_path, resolved(recipe)), overrides)


def test_text_may_vanish_once_it_is_tokenised(tmp_path):
    (tmp_path / "run/data").mkdir(parents=True)
    recipe = load_recipe(write(tmp_path, MINIMAL), ["data.path=/no/such/text", f"run_dir={tmp_path}/run"])
    assert recipe.data.path == "/no/such/text"


CACHE = "cache={logits: 8}"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["transfer.activations.flat=2"], ["transfer.activations.flat", "2", "between 0 and 1"]),
        (
            ["transfer.activations.flat=0.1", "transfer.activations.look_every=15"],
            ["transfer.activations.look_every", "15", "multiple of training.log_every"],
        ),
        (["transfer.activations=[]"], ["transfer.activations", "[]", "a section, or a list"]),
        (["transfer.logits.objective=kl"], ["transfer.logits.objective", "forward_kl, reverse_kl, jensen_shannon"]),
        (["transfer.logits.temperature=0"], ["transfer.logits.temperature", "0", "positive"]),
        (["transfer.logits.hidden_states=-1"], ["transfer.logits.hidden_states", "-1", "positive weight"]),
        (
            ["transfer.logits.trained=mixers", "transfer.logits.rest_learning_rate=1e-4"],
            ["transfer.logits.rest_learning_rate", "only mixers"],
        ),
        (["cache={}"], ["cache.logits", "null", "activations: true"]),
        ([CACHE, "transfer.logits.temperature=2"], ["cache.logits", "8", "temperature"]),
        ([CACHE, "transfer.logits.hidden_states=1"], ["cache.logits", "8", "hidden_states"]),
        (["training.accumulate=0"], ["training.accumulate", "0", "positive"]),
        (["teacher.dtype=fp16"], ["teacher.dtype", "float16"]),
        (["data.packing=document"], ["data.packing", "did you mean documents"]),
        (["transfer.logits.stesp=3"], ["transfer.logits.stesp", "unknown key", "`steps`"]),
        (["trnasfer={}"], ["trnasfer", "unknown key", "`transfer`"]),
        (["transfer.logits.steps=-5"], ["transfer.logits.steps", "-5", "positive"]),
        (["transfer.logits.steps=many"], ["transfer.logits.steps", "many", "whole number"]),
        (["transfer.logits.steps=2.5"], ["transfer.logits.steps", "2.5", "whole number"]),
        (["transfer.logits.steps=true"], ["transfer.logits.steps", "true", "whole number"]),
        (["transfer.logits.learning_rate=.nan"], ["transfer.logits.learning_rate", "number"]),
        (["transfer.logits.learning_rate=abc"], ["transfer.logits.learning_rate", "abc", "number"]),
        (["transfer.logits.warmup_steps=70"], ["transfer.logits.warmup_steps", "70", "0 to steps (7)"]),
        (
            ["transfer.activations.schedule=paralel"],
            ["transfer.activations.schedule", "paralel", "did you mean parallel"],
        ),
        (["transfer.logits=3"], ["transfer.logits", "3", "section"]),
        (["transfer.logits=null"], ["transfer.logits", "null", "section"]),
        (["student.mixer=hyena", "student.num_filter_heads=4"], ["student.num_filter_heads", "multihyena"]),
        (["student.attention_layers=[4]"], ["student.attention_layers", "[4]", "layers 0 to 3"]),
        (["student.attention_layers=[0, 1, 2, 3]"], ["student.attention_layers", "not all"]),
        (["student.attention_heads=[L1H0, L1]"], ["student.attention_heads", "L1", "heads as L2H3"]),
        (["student.attention_heads=[L1H0, L01H0]"], ["student.attention_heads", "each head once"]),
        (["student.attention_heads=[L4H0]"], ["student.attention_heads", "L4H0", "layers 0 to 3"]),
        (
            ["student.attention_heads=[L2H3]", "student.attention_layers=[1, 2]"],
            ["student.attention_heads", "L2H3", "no head of attention_layers [1, 2]"],
        ),
        (["student.attention_window=-1"], ["student.attention_window", "-1", "0 for no window"]),
        (["student.hyena_order=2"], ["student.hyena_order", "2", "goes with hyena"]),
        (["student.mixer=hyena", "student.hyena_order=0"], ["student.hyena_order", "0", "1 to 8"]),
        (["student.filter.position_features=4"], ["student.filter.position_features", "4", "odd"]),
        (["student.filter.form=modl"], ["student.filter.form", "modl", "did you mean modal"]),
        (["student.filter.window=0"], ["student.filter.window", "0", "contexts"]),
        (["student.filter.hankel_penalty=-1"], ["student.filter.hankel_penalty", "-1", "positive weight"]),
        (["recurrence.state_bytes=0"], ["recurrence.state_bytes", "0", "positive number of bytes"]),
        (
            ["student.filter.form=modal", "recurrence.prefill_outputs=exact"],
            ["recurrence.prefill_outputs", "a key of an earlier version", "no such line"],
        ),
        (["teacher.path=/no/such/folder"], ["teacher.path", "/no/such/folder", "config.json"]),
        (["data.path=/no/such/text"], ["data.path", "/no/such/text", "existing"]),
        (["data.revision=abc"], ["data.revision", "abc", "name"]),
        (["data.chat_loss=assistant"], ["data.chat_loss", "assistant", "all, or a chat_column"]),
        (["data.chat_column=messages"], ["data.chat_column", "messages", "name or path", "standard library"]),
        (
            [
                "data.name=some/chats",
                "data.chat_column=messages",
                "teacher.train={hidden_size: 30, num_layers: 1, num_heads: 3, vocab_size: 300,"
                " steps: 1, batch_size: 1, learning_rate: 0.1}",
            ],
            ["data.chat_column", "messages", "nothing with teacher.train"],
        ),
        (["data.context_length=0"], ["data.context_length", "0", "8 tokens"]),
        (["training.checkpoint_every=15"], ["training.checkpoint_every", "15", "multiple of log_every"]),
        (
            [
                "teacher.train={hidden_size: 30, num_layers: 1, num_heads: 4, vocab_size: 300,"
                " steps: 1, batch_size: 1, learning_rate: 0.1}"
            ],
            ["teacher.train.hidden_size", "30", "multiple of num_heads"],
        ),
        (["teacher.train={steps: 1}"], ["teacher.train.batch_size", "nothing", "whole number"]),
        (["baseline.learning_rate=1e-3", "baseline.warmup_steps=99"], ["baseline.warmup_steps", "99", "12"]),
        (["report.context_lengths=5"], ["report.context_lengths", "5", "list"]),
        (["seed=-1"], ["seed", "-1"]),
        (["seed=1" + 400 * "0"], ["seed", "whole number"]),
        (["run_dir=2024-13-45"], ["run_dir=2024-13-45", "broken YAML"]),
        (
            ["transfer.activations.schedule=progressive", "transfer.activations.steps=3"],
            ["transfer.activations.steps", "3", "4 layers"],
        ),
        (["seed"], ["'seed'", "section.key=value"]),
        (["run_dir.x=1"], ["run_dir", "not a section"]),
    ],
)
def test_mistakes_are_named(tmp_path, overrides, parts):
    path = write(tmp_path, MINIMAL)
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    message = str(error.value)
    assert message.startswith(path) and "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run_dir: [x\nseed: 1\n", ["broken YAML", "line"]),
        ("- a\n- b\n", ["expected sections"]),
        ("", ["expected sections"]),
        ("run_dir: 2024-13-45\n", ["broken YAML"]),
        ("run_dir: x\n", ["transfer", "makes nothing"]),
        ("seed: 1\n", ["run_dir", "nothing", "text"]),
    ],
)
def test_broken_files(tmp_path, text, parts):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, text))
    for part in parts:
        assert part in str(error.value)


def test_a_teacher_of_no_known_family(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(RecipeError, match="gpt2.*one of the families gemma, gpt_neox, llama, "):
        load_recipe(write(tmp_path, MINIMAL), [f"teacher.path={tmp_path}"])


@pytest.mark.parametrize("config", ['{"model_type": "gpt_neox"}', "[]", '"gpt_neox"'])
def test_a_teacher_without_a_shape(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RecipeError, match="teacher.path.*expected"):
        load_recipe(write(tmp_path, MINIMAL), [f"teacher.path={tmp_path}"])


def test_a_missing_recipe():
    with pytest.raises(RecipeError, match="nowhere.yaml: no such recipe"):
        load_recipe("nowhere.yaml")


def test_recipes_need_no_torch(tmp_path):
    loading = f"from scavenger.recipe import load_recipe; load_recipe({write(tmp_path, MINIMAL)!r})"
    code = f"import sys; {loading}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def sections():
    """Every section's class, by its place in a recipe."""
    found, waiting = {}, [("", Recipe)]
    while waiting:
        place, kind = waiting.pop()
        found[place] = kind
        for name, hint in typing.get_type_hints(kind).items():
            for part in (hint, *typing.get_args(hint)):
                if isinstance(part, type) and issubclass(part, Section):
                    waiting.append((f"{place}.{name}".strip("."), part))
    return found


BOUNDED = [
    (place, field)
    for place, kind in sections().items()
    for field in dataclasses.fields(kind)
    if field.metadata["bounds"] is not None
]


@pytest.mark.parametrize(("place", "field"), BOUNDED, ids=lambda word: getattr(word, "name", word))
def test_every_bound_holds(place, field):
    """Just outside a bound is refused in the bound's words, just inside is not."""
    kind, bounds = sections()[place], field.metadata["bounds"]
    whole = "int" in str(field.type)
    step = 1 if whole else 1e-9

    def made(value):
        value = (value,) if "tuple" in str(field.type) else value
        instance = object.__new__(kind)
        for other in dataclasses.fields(kind):
            object.__setattr__(instance, other.name, None)
        object.__setattr__(instance, field.name, value)
        object.__setattr__(instance, "relations", lambda: None)
        Section.__post_init__(instance)

    for edge, inside, outside in (
        (bounds.least, 0, -step),
        (bounds.most, 0, step),
        (bounds.above, step, 0),
        (bounds.below, -step, 0),
    ):
        if edge is not None:
            made(edge + inside)
            with pytest.raises(Exception) as error:
                made(edge + outside)
            assert error.value.key == field.name and error.value.right == bounds.right


def test_the_reference_is_current():
    """docs/recipes.md is what docs/recipes.py makes, and every key has a meaning there."""
    spec = importlib.util.spec_from_file_location("reference", RECIPES.parent / "docs/recipes.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    page = (RECIPES.parent / "docs/recipes.md").read_text(encoding="utf-8")
    assert page == reference.page(), "run python docs/recipes.py"
    for place, kind in sections().items():
        assert kind.__doc__.strip() in page
        for field in dataclasses.fields(kind):
            assert field.metadata["meaning"] and field.metadata["meaning"] in page, f"{place}.{field.name}"


def test_a_run_with_a_removed_key_is_the_same_run(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL | {"recurrence": {"tolerance": 0.1}}))
    values = yaml.safe_load(resolved(recipe))
    values["recurrence"]["prefill_outputs"] = "recurrent"
    assert differences(yaml.safe_dump(values), recipe) == []
    values["recurrence"]["prefill_outputs"] = "exact"
    (difference,) = differences(yaml.safe_dump(values), recipe)
    assert difference.startswith('recurrence.prefill_outputs (the run has "exact"')
