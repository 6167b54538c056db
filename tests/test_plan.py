"""A plan knows its stages and leaves no trace; what it counts is what the run does."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command_line, tiny_teacher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from scavenger import losses, measure, plan, teacher
from scavenger.flops import Flops
from scavenger.model import HyenaForCausalLM
from scavenger.recipe import Cache, Filter, Training, load_recipe
from scavenger.report import comparison, report
from scavenger.report.results import Results
from scavenger.report.text import Blocks
from scavenger.run import checkpoint
from scavenger.run.run import blocks


PHASES = """
data: {context_length: 24, evaluation_tokens: 960}
transfer:
  activations:
  - {steps: 6, batch_size: 4, learning_rate: 1e-2}
  - {steps: 9, batch_size: 4, learning_rate: 1e-2, schedule: progressive}
  - {steps: 5, batch_size: 2, learning_rate: 1e-2, schedule: joint, flat: 0.1}
  logits:
  - {steps: 4, batch_size: 4, learning_rate: 1e-2, trained: mixers}
  - {steps: 3, batch_size: 8, learning_rate: 1e-2, objective: jensen_shannon, hidden_states: 0.5}
baseline: {learning_rate: 3e-3}
report: {context_lengths: [20, 60]}
"""


@pytest.fixture
def recipe(workshop, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\nteacher: {{path: {workshop}/teacher}}{PHASES}")
    return load_recipe(str(path))


def test_every_training_is_in_the_plan(recipe, tmp_path):
    before = torch.get_rng_state()
    planned = plan.stages(recipe)
    names = ["activations", "activations 2", "activations 3", "logits", "logits 2", "baseline"]
    assert [stage.name for stage in planned] == names
    assert [stage.steps for stage in planned] == [6, 9, 5, 4, 3, 27]
    assert [stage.sequences for stage in planned] == [24, 36, 10, 16, 24, 110]
    assert [stage.turns for stage in planned] == [1, 3, 1, 1, 1, 1]
    assert all(stage.tokens == 24 * stage.sequences and stage.seconds > 0 for stage in planned)
    shown = plan.text(recipe, planned)
    for stage in planned:
        (line, held) = [line for line in shown.splitlines() if line.startswith(f"{stage.name:<14}")]
        assert f" {stage.steps} " in line and str(stage.folder) in line and "complete" not in line
    assert "Activations end earlier where the held-out error no longer falls" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"], "a plan writes nothing"
    assert torch.equal(torch.get_rng_state(), before)
    assert f"\nteacher   {recipe.teacher.folder}: gpt_neox, " in shown
    embedded = plan.text(load_recipe(str(ROOT / "recipes/quickstart.yaml")), [])
    assert "\nteacher   embedded: gpt_neox, 1,317,632 parameters, 4 layers of width 128\n" in embedded


@pytest.mark.parametrize("chunk, processes, positions", [(10**9, 1, 192), (10**9, 2, 96), (4 * 320 * 7, 1, 7)])
def test_memory_of_logits(recipe, monkeypatch, chunk, processes, positions):
    """Of the largest batch of a process, 8 × 24 positions, or of a chunk; the report's batches are smaller here."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(losses, "CHUNK_COPIES", 2**20)
    monkeypatch.setattr(measure, "BATCH_TOKENS", 50)
    (line,) = [line for line in plan.text(recipe, [], processes).splitlines() if line.startswith("logits ")]
    assert f"at most {4 * 320 * positions / 2**10:.2f} GiB of memory at a time" in line
    assert f"{positions} positions of 320 words" in line


@pytest.mark.parametrize("kernel", [False, True])
def test_memory_of_logits_on_a_gpu(recipe, kernel, monkeypatch):
    """A batch of training at a time with the kernel, a chunk of the others without."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 320 * 7)
    monkeypatch.setattr(losses, "losses_and_slope_", kernel or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    line = plan._logit_line(recipe, plan._configuration(recipe), 1)
    assert f"{192 if kernel else 7} positions of 320 words" in line
    copies, positions = (losses.GPU_CHUNK_COPIES, 192) if kernel else (losses.CHUNK_COPIES, 7)
    assert f"at most {4 * 320 * copies * positions / 2**30:.2f} GiB" in line


@pytest.mark.parametrize("form", ["implicit", "modal"])
def test_what_layers_keep_is_what_they_really_keep(recipe, form):
    recipe = dataclasses.replace(
        recipe, student=dataclasses.replace(recipe.student, attention_layers=(1,), filter=Filter(form=form))
    )
    config = plan._configuration(recipe)
    body = HyenaForCausalLM(plan._student_configuration(recipe, config)).model
    planned = plan.kept_activations(body, torch.randn(8, 24, 30))
    with FakeTensorMode():  # as a plan counts
        unnumbered = HyenaForCausalLM(plan._student_configuration(recipe, config)).model
        assert plan.kept_activations(unnumbered, torch.zeros(8, 24, 30)) == planned
    kept = {}
    own = {parameter.untyped_storage()._cdata for parameter in body.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = body.embed(torch.zeros(8, 24, dtype=torch.long))
        _, cos, sin = body.mask_and_angles(hidden)
        for layer in body.layers:
            hidden = layer(hidden, cos, sin, None, None)
    # A layer's output is the input of the next: planned for each of three layers, really there once for two of them.
    found = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    assert planned == pytest.approx(found, rel=0.1)
    (line,) = [line for line in plan.text(recipe, []).splitlines() if line.startswith("layers ")]
    assert f"keep about {planned / 2**20:,.0f} MiB for the backward pass of 8 sequences" in line
    (other,) = [
        line
        for line in plan.text(
            dataclasses.replace(recipe, training=Training(checkpoint_activations=True)), []
        ).splitlines()
        if line.startswith("layers ")
    ]
    assert " with training.checkpoint" in line and " without training.checkpoint" in other


def test_memory_by_what_it_holds(recipe):
    size = sum(p.numel() for p in tiny_teacher(vocab_size=320).parameters())
    made = {stage.name: stage.memory for stage in plan.stages(recipe)}
    for name, memory in made.items():
        assert memory["teacher"] == (0 if name == "baseline" else 4 * size)
        assert memory["moments"] == 2 * memory["gradients"]
    assert made["logits 2"]["gradients"] == made["logits 2"]["weights"] == made["baseline"]["gradients"]
    assert made["logits"]["gradients"] == made["activations"]["gradients"] == 3 * made["activations 2"]["gradients"]
    for stage in plan.stages(recipe, 2):  # gradients once more in the buckets of data parallelism
        assert stage.memory == made[stage.name] | {"gradients": 2 * made[stage.name]["gradients"]}


def test_parameters_and_gradients_are_those_of_the_real_training(recipe):
    """What is held, against the modules that the timed step really makes."""
    config, cpu = plan._configuration(recipe), torch.device("cpu")
    for _, phase, layers in plan._trainings(recipe, config):
        step = plan._Step(recipe, config, phase, layers, cpu)
        held = plan._held(recipe, config, phase, layers, cpu)
        assert held["gradients"] == sum(p.nbytes for p in step.parameters)
        assert held["weights"] == sum(p.nbytes for p in step.module.model.parameters())
        assert held["teacher"] == (sum(p.nbytes for p in step.frozen.parameters()) if step.frozen else 0)


def test_rates_and_cost_follow_from_the_timed_step(recipe, monkeypatch):
    """Of two processes on a card that multiplies 2 TFLOP/s: a step of a second, an update of half a second."""
    monkeypatch.setattr(measure, "matrix_rate", lambda device, dtype: 2e12)
    monkeypatch.setattr(plan, "timed", lambda *words: (1.0, 0.5, 3 * 2**30))
    planned = plan.stages(recipe, 2)
    for stage in planned:
        assert stage.seconds == 1.5 * stage.steps if stage.name != "baseline" else stage.seconds < 1.5 * stage.steps
        assert stage.tokens_per_second == stage.tokens / stage.seconds and stage.peak == 4e12
        assert stage.utilisation == stage.flops / stage.seconds / 4e12
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Imaginary")
    shown = plan.text(recipe, planned, 2)
    first = planned[0]
    (line,) = [line for line in shown.splitlines() if line.startswith("activations ") and "run/" in line][:1]
    assert (
        line.split()[6:9] == [f"{first.tokens / 9:,.0f}", f"{100 * first.utilisation:.1f}", "%"] and " 3.00G " in line
    )
    hours = sum(stage.seconds for stage in planned) * 2 / 3600
    assert (
        f"the share of 2TFLOP/s, which a square matrix product reached just now. Cost: {hours:.2g} GPU-hours." in shown
    )
    assert "Memory is the most that the timed step held." in shown
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU-hours" not in plan.text(recipe, planned, 2)


def test_matrix_rate(monkeypatch):
    """Operations over the shortest of the times that a clock gives."""
    clock = iter([0.0, 4.0, 4.0, 6.0, *(8.0 + 5 * turn for turn in range(12))])
    monkeypatch.setattr(measure, "_now", lambda device: next(clock))
    monkeypatch.setitem(measure.MATRIX, "cpu", 10)
    assert measure.matrix_rate.__wrapped__(torch.device("cpu"), torch.float32) == 2 * 10**3 / 2.0


def test_a_step_that_is_too_large_is_timed_in_part_or_not_at_all(recipe, monkeypatch):
    timed, forward_backward = [], plan._Step.forward_backward

    def watched(self, rows, length):
        timed.append((rows, length))
        return forward_backward(self, rows, length)

    monkeypatch.setattr(plan._Step, "forward_backward", watched)
    config = plan._configuration(recipe)
    stage, phase, layers = list(plan._trainings(recipe, config))[0]
    words = (recipe, config, phase, layers, 4, stage.flops / stage.sequences, torch.device("cpu"))
    whole, *_ = plan.timed(*words)
    monkeypatch.setattr(plan, "TIMED_FLOPS", 2.5 * stage.flops / stage.sequences)
    part, *_ = plan.timed(*words)
    assert whole > 0 and part > 0 and timed == [(1, 8), (4, 24), (1, 8), (2, 24)]
    monkeypatch.setattr(plan, "TIMED_FLOPS", 0.9 * stage.flops / stage.sequences)
    assert plan.timed(*words) is None and len(timed) == 4
    planned = plan.stages(recipe)
    assert planned[0].seconds is None and planned[0].memory["weights"] > 0
    shown = plan.text(recipe, planned)
    assert "Not timed, as a step is too large to be timed on this CPU: activations" in shown
    assert next(line for line in shown.splitlines() if line.startswith("activations ")).split()[4] == "–"


def test_what_is_made_is_not_tried_again(recipe, monkeypatch):
    run = Path(recipe.run_dir)
    beside = run / "transfer.partial"
    (beside / "activations.partial/turn_00").mkdir(parents=True)
    (beside / "activations.partial/turn_01").mkdir()
    (beside / "activations.partial/turn_02.partial/steps/000000002").mkdir(parents=True)
    (beside / "activations.partial/turn_02.partial/steps/000000003.partial").mkdir()
    planned = {stage.name: stage for stage in plan.stages(recipe)}
    assert [stage.done for stage in planned.values()] == [1, pytest.approx((1 + 2 / 3) / 3), 0, 0, 0, 0]
    assert planned["activations"].seconds is None and planned["activations 2"].seconds > 0
    shown = plan.text(recipe, list(planned.values())).splitlines()
    assert [line.split("(")[1] for line in shown if line.endswith(("(complete)", "(resumes)"))] == [
        "complete)",
        "resumes)",
    ]
    shutil.move(beside / "activations.partial", beside / "activations")
    (beside / "turn_00").mkdir()
    assert [stage.done for stage in plan.stages(recipe)] == [1, 1, 1, 1, 0, 0]
    shutil.move(beside, run / "transfer")
    (run / "baseline").mkdir()
    monkeypatch.setattr(plan, "timed", None)
    planned = plan.stages(recipe)
    assert [stage.done for stage in planned] == [1] * 6
    assert not any("MiB" in line for line in plan.text(recipe, planned).splitlines() if not line.startswith("layers"))


def test_operations_are_those_of_the_matrices(recipe):
    model, length = tiny_teacher(vocab_size=320).float(), 24
    flops = Flops(model.config, length)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, length, dtype=torch.long))
    counts = {str(key): count for key, count in counter.get_flop_counts()["Global"].items()}
    assert sum(counts[key] for key in ("aten.mm", "aten.addmm") if key in counts) == 3 * length * (
        flops.whole - 3 * 2 * length * model.config.hidden_size
    )
    layers, (parallel, by_layer, jointly) = (0, 1, 2), recipe.transfer.activations
    one = cached(recipe)
    deepest = 2 * (flops.mixer + flops.mlp) + flops.mixer
    assert flops.of(recipe, parallel, layers) == deepest + 9 * flops.mixer
    assert flops.of(one, parallel, layers) == 9 * flops.mixer
    alone = flops.of(recipe, dataclasses.replace(parallel), (1,)) + flops.mixer + flops.mlp
    assert flops.of(recipe, by_layer, layers) == alone  # of the middle one, with the student below it
    assert flops.of(recipe, jointly, layers) == 2 * deepest + 6 * flops.mixer + 2 * flops.mlp
    mixers, everything = recipe.transfer.logits
    assert flops.of(recipe, everything, layers) == 4 * flops.whole == flops.of(one, everything, layers) + flops.whole
    saved = 3 * flops.mlp + flops.head
    assert flops.of(recipe, mixers, layers) == 4 * flops.whole - saved


def cached(recipe):
    """The recipe with a cache of all that there is, which has no hidden states."""
    logits = tuple(dataclasses.replace(phase, hidden_states=0.0) for phase in recipe.transfer.logits)
    transfer = dataclasses.replace(recipe.transfer, logits=logits)
    return dataclasses.replace(recipe, transfer=transfer, cache=Cache(activations=True, logits=7))


def test_with_a_cache_the_teacher_is_not_run(recipe, monkeypatch):
    monkeypatch.setattr(teacher, "attention", None)
    monkeypatch.setattr(teacher, "hidden_states", None)
    recipe = cached(recipe)
    planned = plan.stages(recipe)
    assert all(stage.seconds > 0 for stage in planned)
    shown = plan.text(recipe, planned)
    assert f"cache     cache: {3 * 2 * 2 * 30 + 7 * 4 + 4:,} bytes a token" in shown
    assert "Not included: reading text, checkpoints, recurrence and report, filling and reading the cache." in shown


def test_a_plan_is_compared_with_its_run(finished, workshop, tmp_path):
    recipe = load_recipe(str(workshop / "recipe.yaml"), [f"run_dir={tmp_path}/run"])
    planned = plan.stages(recipe)
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "plan.json").unlink(missing_ok=True)
    assert report.compared_with_plan(run) == []
    plan.write(planned, run)
    found = report.compared_with_plan(run)
    assert [row["stage"] for row in found] == ["activations", "logits", "baseline"]
    assert [row["planned"] for row in found] == [stage.seconds for stage in planned]
    for row in report.trained(run, recipe.data.context_length):
        assert 0 < row["mfu"] < 2, "of a rate that was measured a moment before"
    for row, place in zip(found, ("transfer/activations", "transfer", "baseline"), strict=True):
        assert row["taken"] == checkpoint.read_json(run / place / "history.json")[-1]["seconds"] > 0
    plan.write([], run)
    assert report.compared_with_plan(run) == found, "the first launch's plan stays"


def test_seconds_of_turns(tmp_path):
    run = tmp_path / "run"
    for place, names, history in (
        ("transfer", "aabc", [(3, 7.0), (6, 1.5)]),
        ("transfer/activations", "aa", [(2, 1.0), (4, 2.0), (6, 0.5), (9, 4.0)]),
    ):
        (run / place).mkdir(parents=True, exist_ok=True)
        steps = {"a": 4, "b": 3, "c": 3} if place == "transfer" else {"a": 4}
        turns = [{"name": name, "steps": steps[name]} for name in names]
        if place != "transfer":
            turns[1]["steps"] = 5
        checkpoint.write_json(run / place / "turns.json", turns)
        checkpoint.write_json(run / place / "history.json", [{"step": step, "seconds": s} for step, s in history])
    stages = [
        ("activations", 2, 9.0, "transfer/activations"),
        ("logits", 1, 5.0, "transfer"),
        ("logits 2", 1, 2.0, "transfer"),
    ]
    facts = [{"name": name, "turns": turns, "seconds": s, "folder": f} for name, turns, s, f in stages]
    checkpoint.write_json(run / "plan.json", facts)
    taken = [(row["stage"], row["planned"], row["taken"]) for row in report.compared_with_plan(run)]
    assert taken == [("activations", 9.0, 6.0), ("logits", 5.0, 7.0), ("logits 2", 2.0, 1.5)]


def test_the_teacher_is_planned_in_its_own_dtype(workshop):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    published = load_recipe("recipes/neox70m.yaml")
    config = tiny_teacher().half().config
    config.dtype = torch.float16
    assert plan._teacher_dtype(published, config, cuda) == torch.float16
    assert plan._teacher_dtype(published, config, cpu) == torch.float32
    named = load_recipe("recipes/neox70m.yaml", ["teacher.dtype=bfloat16"])
    assert plan._teacher_dtype(named, config, cuda) == torch.bfloat16
    own = load_recipe(str(workshop / "recipe.yaml"))
    assert plan._teacher_dtype(own, plan._configuration(own), cuda) == torch.float32


def test_the_report_reads_and_generates_what_the_plan_says(finished, workshop):
    """Tokens counted at the model's embedding while it is measured, but for the timings."""
    recipe = load_recipe(str(workshop / "recipe.yaml"))
    models = report.evaluated(recipe, finished)
    distilled = models[2]
    read = []
    distilled.model.model.embed.register_forward_hook(lambda module, args, out: read.append(args[0].shape))
    test = blocks(finished / "data", "test")
    asked = dataclasses.replace(report.settings(recipe, models, test.size), speed=None)
    comparison.run([models[0], distilled], Blocks("test", test), asked, Results(None))
    work = report.work(recipe)
    generated = sum(rows for rows, length in read if length == 1)
    assert sum(rows * length for rows, length in read) - generated <= work["tokens_read"]
    assert work["tokens_read"] <= 3 * (sum(rows * length for rows, length in read) - generated)
    prompts = asked.generation.prompts
    assert work["tokens_generated"] == 2 * prompts * asked.generation.new_tokens == generated + 2 * prompts
    assert work["timing_seconds"] == 2 * 10 * 7 * 2, "seconds of steps and of prompts, caches, contexts"


def test_a_mixer_that_does_not_fit_the_teacher_ends_before_any_work(workshop, tmp_path):
    done = command_line(workshop / "recipe.yaml", f"run_dir={tmp_path}/run", "student.num_filter_heads=7")
    expected = "student.num_filter_heads: found 7; expected a divisor of the 30 channels of 5 heads"
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"scavenger: error: {expected}"
    assert not (tmp_path / "run" / "data").exists()
