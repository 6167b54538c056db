"""Stage one: what each phase compares, what it runs, what it trains, and what it reads."""

import copy
import json
import weakref
from functools import partial

import pytest
import torch
from conftest import Graphs, random_ids, scavenger, tiny_student, tiny_teacher
from reference import assert_close
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import scavenger.model as _registered  # noqa: F401  (AutoModel knows the student)
from scavenger import data, families, losses, plan, student, teacher, training
from scavenger.model import HyenaForCausalLM
from scavenger.recipe import Filter, Logits, Student
from scavenger.run import checkpoint
from scavenger.run.checkpoint import read_json
from scavenger.transfer import transfer


READINGS = ["teacher", "below", "student"]  # of the schedules parallel, progressive and joint
LENGTHS = [23, 11, 1, 17]  # of the documents in a batch: the rest is padding
COMPILE = torch.compile
ALONE = ["baseline=null", "recurrence=null", "report=null"]


def batch(device):
    """Ids and mask of documents, each padded to the longest."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).to(device)
    return random_ids(*mask.shape, device=device) * mask, mask


def of_all_attention(model):
    """A student whose mixers are the teacher's attention. Its angles are float64, the teacher's float32."""
    config = student.configuration(Student(), 63, model.config)
    config.attention_layers, config.attention_window = [0, 1, 2], 0
    made = HyenaForCausalLM(config).double().to(model.device)
    kept = range(model.config.num_hidden_layers)
    made.load_state_dict(families.of("gpt_neox").student_weights(model, kept))
    return made


def matchings(model, reading):
    """One matching of all layers, or for `below` one of each."""
    groups = [(0,), (1,), (2,)] if reading == "below" else [(0, 1, 2)]
    for layers in groups:
        yield layers, transfer.MixerMatching(model, layers, reading, Filter())


def errors_of(model, reading, frozen, ids, mask):
    """(layer, batch)."""
    found = []
    for layers, matching in matchings(model, reading):
        found.append(matching(ids, mask, *teacher.attention(frozen, ids, layers))[0])
    return torch.cat(found)


def logit_phase(**changes):
    return Logits(**{"steps": 1, "batch_size": 1, "learning_rate": 0.1} | changes)


def aims_of(frozen, ids, blocks=True):
    return losses.Head.of(frozen), *teacher.hidden_states(frozen, ids, blocks)


def counts_of(ids, mask):
    return torch.stack([mask.sum(), losses.following(ids, mask)[1].sum()])


@pytest.mark.parametrize("reading", READINGS)
def test_the_teachers_own_attention_has_no_error_and_no_gradient(reading, device):
    frozen = tiny_teacher().to(device)
    ids, mask = batch(device)
    model = of_all_attention(frozen)
    for layers, matching in matchings(model, reading):
        errors, tail = matching(ids, mask, *teacher.attention(frozen, ids, layers))
        assert errors.shape == (len(layers), len(ids)) and errors.max() < 1e-10 and tail == 0
        trained = [p for p in matching.parameters() if p.requires_grad]
        assert len(trained) == 8 * len(layers), "weights and biases of q, k, v and out"
        for slope in torch.autograd.grad(errors.sum(), trained):
            assert slope.abs().max() < 1e-4  # of a sum whose own scale is one; 1e-6 to 1e-5 by the angles


def test_another_mixer_has_an_error_and_a_gradient(device):
    frozen = tiny_teacher().to(device)
    ids, mask = batch(device)
    for reading in READINGS:
        errors = errors_of(tiny_student().to(device), reading, frozen, ids, mask)
        assert errors.min() > 0.1


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_the_teacher_itself_has_no_divergence_and_no_gradient(objective, device):
    frozen = tiny_teacher().to(device)
    ids, mask = batch(device)
    phase = logit_phase(objective=objective, temperature=1.5, hidden_states=0.7)
    matching = transfer.LogitMatching(of_all_attention(frozen), phase, Filter())
    value, logged, _ = matching(ids, mask, counts_of(ids, mask), 1.0, *aims_of(frozen, ids))
    assert abs(value) < 1e-10 and abs(logged["divergence"]) < 1e-10 and abs(logged["hidden_states"]) < 1e-10
    for slope in torch.autograd.grad(value, list(matching.parameters())):
        assert slope.abs().max() < 1e-4


def test_errors_are_those_of_the_mixers(device):
    """Hooks on the whole models, the formula position by position."""
    frozen, model = tiny_teacher().to(device), tiny_student().to(device)
    ids, mask = batch(device)
    given, wanted, own = {}, {}, {}
    for layer in range(3):
        attention = frozen.gpt_neox.layers[layer].attention
        attention.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: given.update(
                {layer: args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        attention.register_forward_hook(lambda module, args, out, layer=layer: wanted.update({layer: out[0]}))
        model.model.layers[layer].mixer.register_forward_hook(
            lambda module, args, out, layer=layer: own.update({layer: out})
        )
    frozen(input_ids=ids)
    model(input_ids=ids, use_cache=False)
    of_own, (_, cos, sin) = dict(own), model.model.mask_and_angles(given[0])
    of_given = {layer: model.model.layers[layer].mixer(given[layer], cos, sin) for layer in range(3)}

    def expected(found):
        rows = []
        for layer in range(3):
            pairs = [(found[layer][i, :n], wanted[layer][i, :n]) for i, n in enumerate(LENGTHS)]
            rows.append(torch.stack([(a - b).square().sum() / b.square().sum() for a, b in pairs]))
        return torch.stack(rows)

    assert_close(expected(of_given), errors_of(model, "teacher", frozen, ids, mask), 1e-12)
    assert_close(expected(of_own), errors_of(model, "student", frozen, ids, mask), 1e-12)
    assert_close(expected(of_own), errors_of(model, "below", frozen, ids, mask), 1e-12)


@pytest.mark.parametrize("reading, crosses", [("teacher", False), ("below", False), ("student", True)])
def test_which_gradients_cross_layers(reading, crosses, device):
    frozen, model = tiny_teacher().to(device), tiny_student().to(device)
    ids, mask = batch(device)
    for layers, matching in matchings(model, reading):
        for layer in model.model.layers:  # those of layers that it does not match too: would they get one?
            layer.mixer.requires_grad_(True)
        errors, _ = matching(ids, mask, *teacher.attention(frozen, ids, layers))
        for layer, error in zip(layers, errors.sum(1), strict=True):
            reached = []
            for index, other in enumerate(model.model.layers):
                slopes = torch.autograd.grad(
                    error, list(other.mixer.parameters()), retain_graph=True, allow_unused=True
                )
                if any(slope is not None and slope.any() for slope in slopes):
                    reached.append(index)
            assert reached == (list(range(layer + 1)) if crosses else [layer])


def test_only_matched_mixers_are_trained(device):
    model = tiny_student().to(device)
    transfer.MixerMatching(model, (0, 2), "student", Filter())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".layers.0.mixer." in name or ".layers.2.mixer." in name), name
    transfer.LogitMatching(model, logit_phase(trained="mixers"), Filter())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".mixer." in name), name
    transfer.LogitMatching(model, logit_phase(), Filter())
    assert all(parameter.requires_grad for parameter in model.parameters())


def calls(model):
    """Counts the calls of each layer's mixer and MLP, which a list in use gets."""
    found = []
    for index, layer in enumerate(model.base_model.layers):
        mixer = layer.attention if hasattr(layer, "attention") else layer.mixer
        for what, module in (("mixer", mixer), ("mlp", layer.mlp)):
            module.register_forward_hook(lambda *args, entry=(what, index): found.append(entry))
    return found


@pytest.mark.parametrize("deepest", [0, 1, 2])
def test_the_teacher_is_run_no_deeper_than_what_is_matched(deepest, device):
    frozen, model = tiny_teacher().to(device), tiny_student().to(device)
    below = [(what, layer) for layer in range(deepest) for what in ("mixer", "mlp")] + [("mixer", deepest)]
    of_teacher, of_student = calls(frozen), calls(model)
    ids, mask = batch(device)
    aim = teacher.attention(frozen, ids, (deepest,))
    assert of_teacher == below and list(aim[0]) == list(aim[1]) == [deepest]
    transfer.MixerMatching(model, (deepest,), "below", Filter())(ids, mask, *aim)
    assert of_student == below
    of_teacher.clear(), of_student.clear()
    aim = teacher.attention(frozen, ids, tuple(range(deepest + 1)))
    assert of_teacher == below, "one forward for all of them"
    transfer.MixerMatching(model, tuple(range(deepest + 1)), "teacher", Filter())(ids, mask, *aim)
    assert of_student == [("mixer", layer) for layer in range(deepest + 1)]
    of_student.clear()
    transfer.MixerMatching(model, (deepest,), "student", Filter())(ids, mask, *aim)
    assert {layer for _, layer in of_student} == set(range(deepest + 1))


@pytest.mark.parametrize("reading", READINGS)
def test_errors_do_not_depend_on_how_a_batch_is_cut_or_padded(reading, device):
    frozen, model = tiny_teacher().to(device), tiny_student().to(device)
    ids, mask = batch(device)
    whole = errors_of(model, reading, frozen, ids, mask)
    for size in (1, 3):
        parts = [
            errors_of(model, reading, frozen, *part) for part in zip(ids.split(size), mask.split(size), strict=True)
        ]
        assert_close(whole, torch.cat(parts, 1), 1e-12)
    noisy = torch.where(mask, ids, random_ids(*ids.shape, device=device))
    assert_close(whole, errors_of(model, reading, frozen, noisy, mask), 1e-12)


MIXED = {"objective": "jensen_shannon", "temperature": 1.7, "cross_entropy": 0.3, "hidden_states": 0.4}


@pytest.mark.parametrize("changes", [{}, {"objective": "reverse_kl"}, {"cross_entropy": 0.25}, MIXED])
@pytest.mark.parametrize("rows", [4, 1000])
def test_the_loss_of_logits_is_its_definition(changes, rows, monkeypatch, device):
    """From both models' own logits and blocks, one position at a time."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 97 * rows)
    frozen, model = tiny_teacher().to(device), tiny_student().to(device)
    ids, mask = batch(device)
    phase = logit_phase(**changes)
    outputs = {"own": [], "theirs": []}
    hooks = []
    for name, network in (("own", model), ("theirs", frozen)):
        for layer in network.base_model.layers:
            keep = outputs[name].append
            hooks.append(layer.register_forward_hook(lambda module, args, out, keep=keep: keep(out)))
    own, theirs = (network(input_ids=ids, use_cache=False).logits for network in (model, frozen))
    for hook in hooks:
        hook.remove()
    places = [(i, t) for i, length in enumerate(LENGTHS) for t in range(length)]
    divergence = torch.stack(
        [losses.logit_divergence(own[place], theirs[place], phase.objective, phase.temperature) for place in places]
    ).mean()
    entropy = torch.stack([-own[i, t].log_softmax(-1)[ids[i, t + 1]] for i, t in places if t + 1 < LENGTHS[i]]).mean()
    errors = [
        (a[i, :n] - b[i, :n]).square().sum() / b[i, :n].square().sum()
        for a, b in zip(outputs["own"], outputs["theirs"], strict=True)
        for i, n in enumerate(LENGTHS)
    ]
    expected = (1 - phase.cross_entropy) * divergence + phase.cross_entropy * entropy
    expected = expected + phase.hidden_states * torch.stack(errors).mean()

    matching = transfer.LogitMatching(model, phase, Filter())
    aim = aims_of(frozen, ids, phase.hidden_states > 0)
    value, logged, _ = matching(ids, mask, counts_of(ids, mask), 1.0, *aim)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)  # measured 1.5e-7: weights of the terms are float32
    assert logged["divergence"].item() == pytest.approx(divergence.item(), rel=1e-6)
    assert ("cross_entropy" in logged) == (phase.cross_entropy > 0)
    assert ("hidden_states" in logged) == (phase.hidden_states > 0)
    parameters = [p for name, p in model.named_parameters() if "filter.frequency" not in name]
    for slope, plain in zip(
        torch.autograd.grad(value, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert_close(plain, slope, 1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_shares_of_the_logits_add_up_to_the_whole(size, device):
    """Value, logged values and gradients, however the batch is cut; documents of one token count for nothing."""
    frozen, model = tiny_teacher().to(device), tiny_student().to(device)
    ids, mask = batch(device)
    matching = transfer.LogitMatching(model, logit_phase(**MIXED), Filter())
    parameters, counts = list(model.parameters()), counts_of(ids, mask)

    def found(ids, mask, share):
        value, logged, _ = matching(ids, mask, counts, share, *aims_of(frozen, ids))
        slopes = torch.autograd.grad(value, parameters)
        return [value.detach(), *(item.detach() for item in logged.values()), *slopes]

    whole = found(ids, mask, 1.0)
    parts = [found(*part, len(part[0]) / len(ids)) for part in zip(ids.split(size), mask.split(size), strict=True)]
    for reference, *pieces in zip(whole, *parts, strict=True):
        assert_close(reference, sum(pieces), 1e-6)  # weights and sums of the terms are float32
    noisy = torch.where(mask, ids, random_ids(*ids.shape, device=device))
    for reference, x in zip(whole, found(noisy, mask, 1.0), strict=True):
        assert_close(reference, x, 1e-12)


def test_a_kept_distribution_of_all_words_is_the_teachers(device):
    frozen, model = tiny_teacher().to(device), tiny_student().to(device)
    ids, mask = batch(device)
    matching = transfer.LogitMatching(model, logit_phase(cross_entropy=0.2), Filter())
    log_p = frozen(input_ids=ids).logits.log_softmax(-1)
    kept = log_p.topk(97, -1)
    nothing = torch.full(ids.shape, -torch.inf, dtype=torch.float64, device=device)
    counts = counts_of(ids, mask)
    from_disk = matching(ids, mask, counts, 1.0, losses.TopK(kept.values, kept.indices, nothing), None, [])
    live = matching(ids, mask, counts, 1.0, *aims_of(frozen, ids, False))
    assert from_disk[0].item() == pytest.approx(live[0].item(), rel=1e-10)


class Held(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still there."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for item in tree_leaves(made):
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                self.storages[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.storages.pop, storage._cdata, None)
        return made

    @property
    def bytes(self):
        return sum(self.storages.values())


@pytest.mark.parametrize("what", [*READINGS, "logits", "tokens", "tokens of a teacher"])
@pytest.mark.parametrize("modal", [False, True])
def test_activations_that_are_not_kept_are_computed_again(what, modal):
    """The same loss and gradients; fewer bytes are held between the passes."""
    frozen = tiny_teacher()
    ids, mask = batch("cpu")
    values, slopes, held = [], [], []
    for checkpointed in (False, True):
        model = tiny_teacher() if what == "tokens of a teacher" else tiny_student(modal=modal, window=7)
        if what in READINGS:
            layers = (2,) if what == "below" else (0, 1, 2)
            module = transfer.MixerMatching(model, layers, what, Filter())
            words = ids, mask, *teacher.attention(frozen, ids, layers)
        elif what == "logits":
            module = transfer.LogitMatching(model, logit_phase(hidden_states=0.3), Filter())
            words = ids, mask, counts_of(ids, mask), 1.0, *aims_of(frozen, ids)
        else:
            module, words = training.NextTokens(model), (ids, mask)
        module.train()
        if checkpointed:
            training.checkpoint_activations(module)
        with Held() as now:
            found = module(*words)
            value = found[0].sum() if isinstance(found, tuple) else found
            held.append(now.bytes)
        trained = [p for p in module.parameters() if p.requires_grad]
        values.append(value.detach())
        slopes.append(torch.autograd.grad(value, trained, allow_unused=True))
    assert values[0] == values[1] and held[1] < 0.8 * held[0], held
    for expected, again in zip(*slopes, strict=True):
        assert (expected is None) == (again is None)
        if expected is not None:
            assert_close(expected, again, 1e-13)


@pytest.mark.parametrize(
    "what, shape",
    [
        ("teacher", {}),
        ("student", {"filters": 10, "window": 7}),
        ("student", {"attention_layers": [1], "attention_window": 7}),
        ("logits", {"modal": True}),
    ],
)
def test_compiled_parts_are_the_parts(what, shape, monkeypatch):
    """The same loss and gradients; nothing is compiled again in later steps, for more layers, or in a measurement."""
    ids, mask = batch("cpu")
    counts = {}
    for count in (3, 5):
        graphs = Graphs()
        monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=graphs))
        torch._dynamo.reset()
        frozen = tiny_teacher(num_hidden_layers=count)
        model = tiny_student(num_hidden_layers=count, **shape).train()
        plain = copy.deepcopy(model)
        layers = tuple(layer for layer in range(count) if layer not in model.config.attention_layers)

        def found(model):
            if what == "logits":
                module = transfer.LogitMatching(model, logit_phase(), Filter())
                words = counts_of(ids, mask), 1.0, *aims_of(frozen, ids, False)  # noqa: B023
            else:
                module = transfer.MixerMatching(model, layers, what, Filter())  # noqa: B023
                words = teacher.attention(frozen, ids, layers)  # noqa: B023
            value = module(ids, mask, *words)[0].sum()
            trained = [p for p in module.parameters() if p.requires_grad]
            return [value.detach(), *torch.autograd.grad(value, trained)]

        with training.compiled(model):
            made = found(model)
            counts[count] = graphs.count
            found(model)
            with torch.no_grad():
                measured = model(input_ids=ids[:3, :11], use_cache=False).logits
        assert graphs.count == counts[count] > 0
        assert "forward" not in vars(model.model.layers[0].mixer)
        assert_close(plain(input_ids=ids[:3, :11], use_cache=False).logits, measured, 1e-14)
        for expected, own in zip(found(plain), made, strict=True):
            assert_close(expected, own, 1e-7 if own.ndim == 0 else 1e-12)  # the sum of logits' terms is float32
    assert counts[3] == counts[5]


def phases(*sections):
    return json.dumps([{"batch_size": 4, "learning_rate": 1e-2} | section for section in sections])


def kept_teachers(monkeypatch, then=lambda model: None):
    """The teachers that are loaded from now on."""
    loaded, load = [], teacher.load

    def watched(*args):
        model = load(*args)
        then(model)
        loaded.append(model)
        return model

    monkeypatch.setattr(teacher, "load", watched)
    return loaded


def test_phases_follow_one_another(workshop, tmp_path, monkeypatch):
    """Parallel until it is flat, then joint, then two phases of logits; the baseline reads what they read."""
    read, batch = [], data.batch

    def watched(array, first, size, *more):
        read.append((first, size))
        return batch(array, first, size, *more)

    monkeypatch.setattr(data, "batch", watched)
    activations = phases(
        {"steps": 8, "flat": 0.99, "look_every": 2},
        {"steps": 2, "schedule": "joint", "batch_size": 2, "learning_rate": 1e-3},
    )
    logits = phases(
        {"steps": 2, "trained": "mixers"},
        {"steps": 3, "batch_size": 6, "objective": "jensen_shannon", "hidden_states": 0.1, "rest_learning_rate": 1e-3},
    )
    scavenger(
        workshop / "recipe.yaml",
        f"run_dir={tmp_path}/run",
        f"transfer.activations={activations}",
        f"transfer.logits={logits}",
        "recurrence=null",
        "report=null",
    )
    turns = read_json(tmp_path / "run/transfer/turns.json")
    assert turns == [
        {"name": "activations", "first": 0, "steps": 4, "batch_size": 4},
        {"name": "activations, jointly", "first": 16, "steps": 2, "batch_size": 2},
        {"name": "logits", "first": 20, "steps": 2, "batch_size": 4},
        {"name": "logits 2", "first": 28, "steps": 3, "batch_size": 6},
    ]
    assert read_json(tmp_path / "run/transfer/activations/turns.json") == turns[:2]
    assert transfer.sequences(tmp_path / "run/transfer") == 46
    expected = [
        (turn["first"] + step * turn["batch_size"], turn["batch_size"])
        for turn in turns
        for step in range(turn["steps"])
    ]
    assert read == expected + expected, "the baseline reads what transfer read, to the last sequence"

    before = read_json(tmp_path / "run/transfer/activations/history.json")
    assert [entry["step"] for entry in before] == [2, 4, 6]
    assert [("held_out" in entry) for entry in before] == [True, True, False]
    after = read_json(tmp_path / "run/transfer/history.json")
    assert [entry["step"] for entry in after] == [2, 4, 5]
    assert [("hidden_states" in entry) for entry in after] == [False, True, True]
    assert read_json(tmp_path / "run/baseline/history.json")[-1]["step"] == 11
    assert not list((tmp_path / "run").rglob("turn_*"))


def test_a_phase_that_goes_on_falling_is_not_ended(workshop, tmp_path):
    scavenger(
        workshop / "recipe.yaml",
        f"run_dir={tmp_path}/run",
        "transfer.activations.flat=1e-9",
        "transfer.activations.look_every=2",
        "transfer.logits.steps=1",
        *ALONE,
    )
    looks = [entry["held_out"] for entry in read_json(tmp_path / "run/transfer/activations/history.json")]
    assert len(looks) == 5 and looks == sorted(looks, reverse=True)


@pytest.mark.parametrize("schedule", ["parallel", "progressive", "joint"])
def test_no_head_and_no_logits_are_computed(workshop, tmp_path, monkeypatch, schedule):
    """Not by either model in any step, nor is the chunked projection in use before the logits' own."""

    def refuse(module, args):
        raise AssertionError("a head was run")

    kept_teachers(monkeypatch, lambda model: model.lm_head.register_forward_pre_hook(refuse))
    load = HyenaForCausalLM.__init__

    def made(self, config):
        load(self, config)
        self.lm_head.register_forward_pre_hook(refuse)

    monkeypatch.setattr(HyenaForCausalLM, "__init__", made)
    projected, seen = losses.projected, []

    def watched(*args):
        seen.append((tmp_path / "run/transfer.partial/activations").is_dir())
        return projected(*args)

    monkeypatch.setattr(losses, "projected", watched)
    monkeypatch.setattr(plan, "stages", lambda *args: [])  # which tries steps of both beforehand
    monkeypatch.setattr(transfer, "held_out_loss", lambda *args: {})  # which comes with checkpoints, not with steps
    scavenger(
        workshop / "recipe.yaml",
        f"run_dir={tmp_path}/run",
        f"transfer.activations.schedule={schedule}",
        "transfer.activations.steps=3",
        "transfer.logits.steps=2",
        *ALONE,
    )
    assert seen == [True, True]


@pytest.mark.parametrize("changes", [{"trained": "mixers"}, {"rest_learning_rate": 1e-4}])
def test_what_a_step_moves_and_how_far(workshop, tmp_path, changes):
    """AdamW's first step is of the learning rate's size in each direction that has a gradient."""
    scavenger(
        workshop / "recipe.yaml",
        f"run_dir={tmp_path}/run",
        "transfer.activations.steps=1",
        f"transfer.logits={phases(changes | {'steps': 1})}",
        *ALONE,
    )
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name).state_dict()
        for name in ("transfer/activations", "transfer")
    )
    for name, value in before.items():
        step = (after[name] - value).abs().max().item()
        if ".mixer." in name:
            assert step == pytest.approx(1e-2, rel=0.05), name
        elif "trained" in changes or name == "model.rotary.inv_freq":  # a constant
            assert step == 0, name
        else:
            assert step == pytest.approx(1e-4, rel=0.05), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_teacher_is_left_as_it_is(workshop, tmp_path, monkeypatch, dtype):
    """In its own dtype, without a gradient, in no optimiser and in no checkpoint."""
    loaded = kept_teachers(monkeypatch)
    optimised, groups = [], training._groups
    written, save = [], checkpoint.save_step

    def grouped(*args):
        found = groups(*args)
        optimised.extend(parameter for group in found for parameter in group["params"])
        return found

    def saved(run, steps_dir, step, *args):
        save(run, steps_dir, step, *args)
        for path in (steps_dir / f"{step:09d}").rglob("*.safetensors"):
            with safe_open(path, "pt") as file:
                written.append(set(file.keys()))

    monkeypatch.setattr(training, "_groups", grouped)
    monkeypatch.setattr(checkpoint, "save_step", saved)
    scavenger(
        workshop / "recipe.yaml",
        f"run_dir={tmp_path}/run",
        f"teacher.dtype={str(dtype).removeprefix('torch.')}",
        "transfer.activations.steps=5",
        "transfer.logits.steps=5",
        "transfer.logits.hidden_states=0.1",
        *ALONE,
    )
    *_, model = loaded  # the first only shows that the checkpoint is whole
    fresh = AutoModelForCausalLM.from_pretrained(workshop / "teacher", dtype=dtype).state_dict()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype and not parameter.requires_grad and parameter.grad is None, name
        assert torch.equal(parameter, fresh[name]), name
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert len(optimised) > 50 and not theirs & {parameter.data_ptr() for parameter in optimised}
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "run/transfer")
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    assert len(written) == 2
    for keys in written:
        assert keys <= {"head"} | {f"model.{name}" for name in made.state_dict()}
    history = read_json(tmp_path / "run/transfer/history.json")
    assert history[-1]["loss"] < history[0]["loss"]


def test_documents_and_parts_are_those_of_one_batch(workshop, tmp_path):
    """Padded documents, a batch whole or in four parts: the same losses."""
    curves = []
    for parts in (1, 4):
        scavenger(
            workshop / "recipe.yaml",
            f"run_dir={tmp_path}/{parts}",
            "data.packing=documents",
            f"training.accumulate={parts}",
            "transfer.logits.cross_entropy=0.2",
            "transfer.logits.hidden_states=0.1",
            *ALONE,
        )
        curves.append(
            [
                entry[key]
                for name in ("transfer/activations", "transfer")
                for entry in read_json(tmp_path / str(parts) / name / "history.json")
                for key in sorted(entry)
                if key == "loss" or key in ("divergence", "cross_entropy", "hidden_states") or "layer_" in key
            ]
        )
    assert len(curves[0]) == 5 * 4 + 5 * 4
    whole, parts = torch.tensor(curves)
    # The same sums in another order, in float32; Adam makes a step of every rounding of a gradient that is nearly zero.
    torch.testing.assert_close(whole, parts, rtol=2e-3, atol=0)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: numbers taken out of tensors, and shapes that depend on numbers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.overloadpacket in (
            *(torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero),
            *(torch.ops.aten.masked_select, torch.ops.aten.repeat_interleave, torch.ops.aten.is_nonzero),
        )
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", ["parallel", "joint"])
def test_a_step_waits_once_and_a_part_of_it_never(workshop, tmp_path, monkeypatch, schedule):
    """Of two micro-batches, where the host runs ahead; the one wait is for the step before."""
    train, tolist, found = training.train, torch.Tensor.tolist, {}

    def counted(run, optimisation):
        waits = Waits()

        def taken(tensor):
            waits.count += 1
            return tolist(tensor)

        with monkeypatch.context() as patched, waits:
            patched.setattr(torch.Tensor, "tolist", taken)
            trained = train(run, optimisation)
        found.setdefault(optimisation.name, []).append(waits.count)
        return trained

    monkeypatch.setattr(training, "runs_ahead", lambda accelerator: True)
    monkeypatch.setattr(training, "train", counted)
    words = ["training.log_every=100", "training.checkpoint_every=100", "training.accumulate=2"]
    words += ["recurrence=null", "report=null"]
    for steps in (3, 8):
        scavenger(
            workshop / "recipe.yaml",
            f"run_dir={tmp_path}/{steps}",
            f"transfer.activations.steps={steps}",
            f"transfer.activations.schedule={schedule}",
            f"transfer.logits={phases({'steps': steps, 'cross_entropy': 0.2, 'hidden_states': 0.1})}",
            *words,
        )
    more = [after - before for before, after in found.values()]
    assert more == [5, 5, 10], "once for each further step; the baseline makes those of both"


def test_a_run_that_is_ahead_is_the_same(workshop, tmp_path, monkeypatch):
    """To the last bit: its curves and its students."""
    for ahead in (False, True):
        monkeypatch.setattr(training, "runs_ahead", lambda accelerator, ahead=ahead: ahead)
        scavenger(workshop / "recipe.yaml", f"run_dir={tmp_path}/{ahead}", "recurrence=null", "report=null")
    for stage in ("transfer/activations", "transfer", "baseline"):
        curves, weights = [], []
        for ahead in (False, True):
            folder = tmp_path / str(ahead) / stage
            timed = ("seconds", "tokens_per_second", "time_in", "mfu")
            history = read_json(folder / "history.json")
            curves.append([{k: v for k, v in entry.items() if not k.startswith(timed)} for entry in history])
            weights.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())
        assert curves[0] == curves[1] and weights[0].keys() == weights[1].keys()
        for name, value in weights[0].items():
            assert torch.equal(value, weights[1][name]), name
