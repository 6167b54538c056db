"""Students that care for their recurrence: floors are watched and pressed on, filters may be modal from the start."""

import shutil

import numpy as np
import pytest
import torch
from conftest import scavenger
from transformers import AutoModelForCausalLM

from scavenger import data, measure
from scavenger.model.filters import MAX_RADIUS, ModalFilter
from scavenger.recipe import load_recipe
from scavenger.run.checkpoint import read_json
from scavenger.transfer import transfer


@pytest.fixture(scope="module")
def begun(finished, workshop, tmp_path_factory):
    """A run folder that has the workshop's text and its first stage, under a recipe that is still to be named."""

    def copied(*overrides, keep=("data", "teacher", "transfer")):
        run = tmp_path_factory.mktemp("begun")
        for name in keep:
            if (finished / name).is_dir():
                shutil.copytree(finished / name, run / name)
        words = [f"run_dir={run}", "baseline=null", "report=null", *overrides]
        scavenger(workshop / "recipe.yaml", *words)
        return run, load_recipe(str(workshop / "recipe.yaml"), words)

    return copied


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_floors_are_watched(finished, workshop):
    """What the history says of its last step is what the saved filters have."""
    recipe = load_recipe(str(workshop / "recipe.yaml"))
    for stage in ("transfer/activations", "transfer"):
        found = transfer.floors(loaded(finished / stage), recipe.student.filter.hankel_states)
        last = read_json(finished / stage / "history.json")[-1]
        assert list(found) == ["floor_0", "floor_1", "floor_2"]
        assert {key: last[key] for key in found} == pytest.approx(found, rel=1e-3)


def test_the_held_out_loss_is_watched(finished):
    """Of each student that has a folder, the loss that its history ends with."""
    blocks = data.blocks(finished / "data", "validation")[: transfer.HELD_OUT]
    for stage in ("transfer/activations", "transfer", "baseline"):
        last = read_json(finished / stage / "history.json")[-1]
        assert last["held_out_loss"] == pytest.approx(measure.held_out(loaded(finished / stage), blocks).loss, rel=1e-3)


def test_the_penalty_presses_on_the_floor(finished, begun):
    pressed, recipe = begun(
        "recurrence=null", "student.filter.hankel_penalty=30", "student.filter.hankel_states=2", keep=["data"]
    )
    free, held = loaded(finished / "transfer"), loaded(pressed / "transfer")
    states = recipe.student.filter.hankel_states
    before, after = (np.mean(list(transfer.floors(model, states).values())) for model in (free, held))
    assert after < 0.5 * before
    tails = [entry["hankel_tail"] for entry in read_json(pressed / "transfer/history.json")]
    assert tails[-1] < tails[0]


def test_a_student_without_penalty_is_not_changed_by_the_watching(finished, begun):
    run, _ = begun("recurrence=null", "student.filter.hankel_states=3", keep=["data"])
    for (name, one), other in zip(
        loaded(finished / "transfer").state_dict().items(), loaded(run / "transfer").state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_poles_that_left_the_disc_come_back():
    torch.manual_seed(0)
    filters = ModalFilter([3, 0, 2]).double()
    with torch.no_grad():
        filters.pole.mul_(torch.tensor([0.5, 1.7, 1.0, 3.0, 1.0])[:, None])
    before = filters.poles.detach().clone()
    filters.stabilise()
    after = filters.poles.detach()
    inside = before.abs() <= MAX_RADIUS
    assert 0 < inside.sum() < 5
    assert torch.equal(before[inside], after[inside])
    torch.testing.assert_close(after[~inside].abs(), torch.full_like(after[~inside].real, MAX_RADIUS))
    torch.testing.assert_close(after.angle(), before.angle())


@pytest.mark.slow
def test_filters_modal_from_the_start(begun):
    run, recipe = begun(
        "student.filter.form=modal", "student.filter.state_size=3", "student.attention_layers=[1]", keep=["data"]
    )
    model = loaded(run / "transfer")
    assert model.config.filter == "modal" and model.config.state_sizes == [[3] * 5, [], [3] * 5]
    first, last = (read_json(run / "transfer/activations/history.json")[index]["loss"] for index in (0, -1))
    assert last < 0.9 * first
    reduced = loaded(run / "recurrence")
    assert max(map(max, filter(None, reduced.config.state_sizes))) <= 3
    blocks = data.blocks(run / "data", "test")
    assert measure.held_out(reduced, blocks, model).divergence < 1e-5
