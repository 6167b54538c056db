"""Stage two: what is predicted is measured, what is certified is true, and a stage that was killed goes on."""

import copy
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, tiny_student
from transformers import AutoModelForCausalLM, AutoTokenizer

from scavenger import data, measure, plan
from scavenger.model import HyenaForCausalLM
from scavenger.recipe import RecipeError, Recurrence, load_recipe
from scavenger.recurrence import allocation, certificate, preview, recurrence
from scavenger.recurrence.allocation import Taps
from scavenger.run import checkpoint


ALONE = SimpleNamespace(
    device=torch.device("cpu"),
    process_index=0,
    num_processes=1,
    is_main_process=True,
    wait_for_everyone=lambda: None,
)
LENGTH = 40


@pytest.fixture
def student():
    """Two layers of five filters of 6 channels, and one of kept attention between them."""
    return tiny_student(attention_layers=[1], attention_window=7, context_length=LENGTH)


@pytest.fixture
def blocks():
    return np.random.default_rng(0).integers(0, 97, (9, LENGTH))


@pytest.fixture(scope="module")
def folder(workshop, tmp_path_factory):
    """A student with a tokenizer, as the transfer leaves it."""
    folder = tmp_path_factory.mktemp("student") / "transfer"
    tiny_student(
        vocab_size=320, attention_layers=[1], attention_window=7, context_length=LENGTH
    ).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(workshop / "teacher").save_pretrained(folder)
    return folder


def reduced_by(student, settings):
    filters = recurrence.long_filters(student)
    return [
        recurrence.reduce_filters(measure.filter_taps(filters[layer], LENGTH), settings, recurrence.aims(settings))
        if layer in filters
        else [[]]
        for layer in range(len(student.model.layers))
    ]


def log_probability(student, ids, drawn):
    return student(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, drawn).sum()


def test_responses_are_derivatives(student, blocks):
    """⟨g_f, ĥ_f - h_f⟩ against the difference quotient of log p(y) along that change, filter by filter."""
    found = reduced_by(student, Recurrence(method="balanced", tolerance=0.3))
    changes = allocation.responses(student, found, blocks[:1], sequences=1, seed=3)
    ids, step = torch.from_numpy(blocks[:1]), 1e-5
    with torch.no_grad():
        p = student(input_ids=ids, use_cache=False).logits[0, :-1].softmax(-1)
        drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3))
        with allocation.explicit_taps(student, LENGTH) as leaves:
            assert list(leaves) == [0, 2] and changes[1].shape == (1, 1, 0)
            for layer, leaf in leaves.items():
                delta = allocation.saved_taps(found[layer][0], LENGTH) - leaf
                for row in range(len(leaf)):
                    sides = []
                    for sign in (1, -1):
                        leaf[row] += sign * step * delta[row]
                        sides.append(log_probability(student, ids, drawn))
                        leaf[row] -= sign * step * delta[row]
                    quotient = float(sides[0] - sides[1]) / (2 * step)
                    assert changes[layer][0, 0, row] == pytest.approx(quotient, rel=1e-5, abs=1e-7)
    assert student.model.layers[0].mixer.filter is not leaves[0], "the student has its own filters again"


@pytest.mark.parametrize("modal", [False, True])
def test_predicted_divergence_is_measured(modal, blocks):
    """Within a factor of 1.5; the standard error of 128 squares' mean is an eighth."""
    student = tiny_student(modal=modal, attention_layers=[1], attention_window=7, context_length=LENGTH)
    exact = {layer: measure.filter_taps(filter, LENGTH) for layer, filter in recurrence.long_filters(student).items()}
    settings = Recurrence(method="balanced", tolerance=0.2, max_state_size=3)
    found = reduced_by(student, settings)
    changes = allocation.responses(student, found, blocks, sequences=128)
    predicted = float(allocation.divergences([sum(layer.sum((1, 2)) for layer in changes)], LENGTH - 1)[0])
    recurrent = recurrence.recurrent_student(student, [layer[0] for layer in found])
    measured = measure.held_out(recurrent, blocks, student).divergence
    assert measured > 1e-5 and measured / 1.5 < predicted < 1.5 * measured
    for layer, filter in recurrence.long_filters(student).items():
        assert torch.equal(measure.filter_taps(filter, LENGTH), exact[layer])


def test_allocation_against_all_combinations():
    """Never better than the best, never worse with more; the best where curves are convex and steps are equal."""
    random = np.random.default_rng(1)
    for trial in range(30):
        convex = trial % 2 == 0
        costs = [np.cumsum(random.integers(0, 5, (4, count)), axis=0) for count in (2, 0, 1)]
        losses = [random.random((4, count)) for count in (2, 0, 1)]
        if convex:
            costs = [np.broadcast_to(np.arange(4)[:, None], cost.shape) for cost in costs]
            losses = [np.cumsum(np.sort(loss, axis=0), axis=0)[::-1] for loss in losses]
        curves = [
            list(zip(cost[:, f], loss[:, f], strict=True))
            for cost, loss in zip(costs, losses, strict=True)
            for f in range(cost.shape[1])
        ]
        combinations = [tuple(map(sum, zip(*points, strict=True))) for points in itertools.product(*curves)]
        before = np.inf
        for budget in range(sum(min(cost for cost, _ in curve) for curve in curves), 40):
            chosen = allocation.allocate(costs, losses, budget)
            spent, lost = (
                sum(allocation.picked(layer, own).sum() for layer, own in zip(values, chosen, strict=True))
                for values in (costs, losses)
            )
            best = min(loss for cost, loss in combinations if cost <= budget)
            assert spent <= budget and best - 1e-12 <= lost <= before + 1e-12
            assert not convex or lost == pytest.approx(best)
            before = lost
        assert lost == pytest.approx(min(loss for _, loss in combinations))


def test_more_bytes_lose_no_more(student, blocks):
    settings = Recurrence(method="balanced", state_bytes=10**6, max_state_size=8)
    found = reduced_by(student, settings)
    changes = allocation.responses(student, found, blocks, sequences=12)
    losses, least = allocation.divergences(changes, LENGTH - 1), allocation.state_bytes(student.config, 4)

    def sizes_of(rungs):
        return [
            [layer[rung][f].state_size for f, rung in enumerate(own)] for layer, own in zip(found, rungs, strict=True)
        ]

    predictions = []
    for budget in (0, 700, 5000, 12_000, 10**6):
        chosen = allocation.allocate(allocation.mode_costs(student.config, found), losses, budget)
        whole = recurrence.recurrent_configuration(student.config, sizes_of(chosen))
        assert whole.state_bytes <= least + budget
        predictions.append(sum(allocation.picked(layer, own).sum() for layer, own in zip(losses, chosen, strict=True)))
    assert predictions == sorted(predictions, reverse=True) and predictions[-1] < 1e-2 * predictions[0]
    rungs, predicted = allocation.spread(student, found, least + 5000, blocks)
    assert recurrence.recurrent_configuration(student.config, sizes_of(rungs)).state_bytes <= least + 5000
    assert predicted["sum_of_filters"] == pytest.approx(sum(predicted["layers"]))
    assert predictions[2] / 3 < predicted["sum_of_filters"] < 3 * predictions[2]


def test_a_budget_counts_in_the_dtype_of_decoding(student, blocks, tmp_path):
    """In 16 bits windows and short convolutions take half, so the same bytes hold more modes."""
    least, half = (allocation.state_bytes(student.config, itemsize) for itemsize in (4, 2))
    assert half < least
    made = {}
    for dtype in ("float32", "bfloat16"):
        settings = Recurrence(method="balanced", state_bytes=least + 1000, dtype=dtype, max_state_size=6)
        folder = recurrence.distil(student, settings, tmp_path / dtype, ALONE, None, blocks)
        config, facts = (
            HyenaForCausalLM.from_pretrained(folder).config,
            checkpoint.read_json(folder / "certificate.json"),
        )
        itemsize = settings.itemsize
        assert facts["state_bytes"] == config.state_bytes_of(itemsize) <= least + 1000
        assert facts["moved_bytes"] == config.moved_bytes_of(itemsize)
        assert facts["moved_bytes"] <= allocation.moved_bytes(student.config, least + 1000, itemsize)
        assert facts["settings"]["dtype"] == dtype
        made[dtype] = sum(map(sum, config.state_sizes))
    assert made["bfloat16"] > made["float32"]


def test_budgets_that_cannot_be(student, blocks):
    least = allocation.state_bytes(student.config, 4)
    allocation.check(student.config, least, 4)
    with pytest.raises(RecipeError, match=f"recurrence.state_bytes: found {least - 1}; expected {least} or more"):
        allocation.check(student.config, least - 1, 4)
    whole = tiny_student(attention_layers=[1], attention_window=0)
    with pytest.raises(RecipeError, match="grows with every token"):
        allocation.check(whole.config, 10**9, 4)


def test_ladder():
    assert allocation.ladder(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert allocation.ladder(5) == [1, 2, 3, 4, 5] and allocation.ladder(1) == [1]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("count", "read", "measured"), [(7, [0, 1, 2, 3], [4, 5, 6]), (2, [0], [1]), (1, [0], [0])])
def test_a_budget_is_measured_on_other_text(student, blocks, tmp_path, monkeypatch, count, read, measured):
    """Of what is held out, the sizes are chosen on one half, and the certificate measures on the other."""
    seen = {}
    spread, measure_all = allocation.spread, certificate.measure_all

    def spreading(student, found, budget, text, *rest):
        seen["read"] = text
        return spread(student, found, budget, text, *rest)

    def measuring(*words):
        seen["measured"] = words[4]
        return measure_all(*words)

    monkeypatch.setattr(allocation, "spread", spreading)
    monkeypatch.setattr(certificate, "measure_all", measuring)
    least = allocation.state_bytes(student.config, 4)
    settings = Recurrence(state_bytes=least + 4000, max_state_size=4)
    recurrence.distil(student, settings, tmp_path / "out", ALONE, None, blocks[:count])
    assert np.array_equal(seen["read"], blocks[read]) and np.array_equal(seen["measured"], blocks[measured])
    settings = Recurrence(tolerance=0.1, max_state_size=4)
    recurrence.distil(student, settings, tmp_path / "all", ALONE, None, blocks[:count])
    assert np.array_equal(seen["measured"], blocks[:count])


def test_killed_and_resumed_is_uninterrupted(student, blocks, tmp_path, monkeypatch):
    """Killed in the second layer, then with a file gone and one of other settings: what is whole is not made again."""
    settings = Recurrence(method="balanced", state_bytes=9000, max_state_size=6)

    def distil(name, settings=settings):
        return recurrence.distil(student, settings, tmp_path / name, ALONE, None, blocks)

    whole, calls = distil("whole"), []
    gathered = recurrence.gathered

    def counted(*given):
        calls.append(1)
        if len(calls) == fatal:
            raise Killed
        return gathered(*given)

    monkeypatch.setattr(recurrence, "gathered", counted)
    fatal = 2
    with pytest.raises(Killed):
        distil("again")
    layers = tmp_path / "again.partial/layers"
    assert [path.name for path in layers.iterdir()] == ["layer_000.safetensors"] and not (tmp_path / "again").exists()
    fatal, calls[:] = 0, []
    monkeypatch.setattr(certificate, "measure_all", lambda *rest: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        distil("again")
    assert len(calls) == 1, "the second layer only"
    monkeypatch.undo()
    monkeypatch.setattr(recurrence, "gathered", counted)
    (layers / "layer_002.safetensors").unlink()
    calls[:] = []
    again = distil("again")
    assert len(calls) == 1
    assert (again / "certificate.json").read_bytes() == (whole / "certificate.json").read_bytes()
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert {path.name for path in again.iterdir()} == {path.name for path in whole.iterdir()}
    assert {"certificate.json", "config.json"} <= {path.name for path in again.iterdir()} and not (
        again / "layers"
    ).exists()

    shutil.copytree(again, tmp_path / "other.partial")
    calls[:], fatal = [], 2
    with pytest.raises(Killed):
        distil("other")
    calls[:], fatal = [], 0
    other = distil("other", Recurrence(method="balanced", tolerance=0.1))
    assert len(calls) == 2, "a layer of other settings is none"
    assert checkpoint.read_json(other / "certificate.json")["settings"]["tolerance"] == 0.1


@pytest.mark.parametrize("method", ["balanced", "irka", "positive"])
def test_certificate_is_true_of_what_is_saved(student, blocks, tmp_path, method):
    settings = Recurrence(method=method, tolerance=3e-2, max_state_size=6)
    made = recurrence.distil(student.float(), settings, tmp_path / "made", ALONE, None, blocks)
    student = student.double()
    found = checkpoint.read_json(made / "certificate.json")
    recurrent = AutoModelForCausalLM.from_pretrained(made)
    assert found["state_bytes"] == recurrent.config.state_bytes
    for layer, filter in recurrence.long_filters(student).items():
        own, first = copy.deepcopy(recurrent.model.layers[layer].mixer.filter).double(), 0
        for row, facts in enumerate(found["layers"][layer]["filters"]):
            size = own.state_sizes[row]
            poles, residues = (
                z.detach().numpy().astype(complex)[first : first + size] for z in (own.poles, own.residues)
            )
            first += size
            taps = measure.filter_taps(filter, LENGTH)[row].numpy()
            time = np.arange(4000)
            ours = (residues[:, None] * poles[:, None] ** time).real.sum(0)
            ours[0] += own.direct[row].item()
            difference = ours.copy()
            difference[:LENGTH] -= taps
            norm = np.linalg.norm(taps)
            assert facts["state_size"] == size
            assert facts["real_states"] == sum(1 if pole.imag == 0 else 2 for pole in poles)
            assert facts["relative_error"] == pytest.approx(np.linalg.norm(difference[:LENGTH]) / norm, rel=1e-9)
            assert facts["tail"] == pytest.approx(np.linalg.norm(difference[LENGTH:]) / norm, rel=1e-6, abs=1e-12)
            # A first tap of float32 is not quite the filter's, and not in the gain of what comes after.
            assert facts["gain_error"] == pytest.approx(abs(np.fft.rfft(difference)).max(), rel=2e-2, abs=1e-6 * norm)
            assert facts["largest_radius"] == pytest.approx(max(abs(poles), default=0)) and facts["largest_radius"] < 1
            floor = weighted_floor(taps)[facts["real_states"]]
            assert facts["relative_error"] >= facts["floor"] >= floor * (1 - 1e-6) - 1e-12
            assert facts["gain_error"] >= facts["gain_floor"] * (1 - 1e-6)
            assert facts["within_tolerance"] == (facts["relative_error"] <= 3e-2)
            assert facts["error_over_floor"] is None or facts["error_over_floor"] >= 1
    filters = [f for layer in found["layers"] for f in layer["filters"]]
    assert found["within_tolerance"] == sum(f["within_tolerance"] for f in filters) and found["filters"] == 10
    rounded = found["bfloat16_state"]
    assert rounded["state_bytes"] == recurrent.config.state_bytes_of(4, 2) < found["state_bytes"]
    assert rounded["moved_bytes"] == recurrent.config.moved_bytes_of(4, 2) < found["moved_bytes"]
    assert rounded["largest_bound"] == max(f["rounding_bound"] for f in filters) > 0
    assert 0 < rounded["model"]["divergence"] < 1e-2 and rounded["model"]["tokens"] == 4 * LENGTH

    model, double = found["model"], recurrent.double()
    ids = torch.from_numpy(blocks)
    with torch.no_grad():
        log_p, log_q = (m(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1) for m in (double, student))
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert model["divergence"] == pytest.approx(divergence.mean().item(), rel=1e-2, abs=1e-7)  # float32: measured 3e-8
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert model["agreement"] == pytest.approx(same, abs=0.01)
    contexts = model["contexts"]
    assert [entry["context_length"] for entry in contexts] == [LENGTH, 2 * LENGTH, 4 * LENGTH]
    assert [entry["beyond_horizon"] is None for entry in contexts] == [True, False, False]
    assert contexts[1]["beyond_horizon"]["tokens"] == 4 * (LENGTH - 1)
    for entry in contexts:
        parts = entry["positions"]
        assert parts[0]["from"] == 0 and parts[-1]["to"] == entry["context_length"] - 2
        assert all(one["to"] + 1 == other["from"] for one, other in itertools.pairwise(parts))
        mean = sum(part["tokens"] * part["divergence"] for part in parts) / entry["tokens"]
        assert entry["divergence"] == pytest.approx(mean)
    first = contexts[0]["positions"][1]
    assert first["divergence"] == pytest.approx(
        divergence[:, first["from"] : first["to"] + 1].mean().item(), rel=1e-2, abs=1e-7
    )

    inputs, outputs = {}, {}
    for layer in (0, 2):
        student.model.layers[layer].mixer.register_forward_hook(
            lambda module, args, output, layer=layer: (
                (inputs.update({layer: args}), outputs.update({layer: output}))[2:] or None
            )
        )
    with torch.no_grad():
        student(input_ids=ids, use_cache=False)
        for layer in (0, 2):
            difference = double.model.layers[layer].mixer(*inputs[layer]) - outputs[layer]
            error = (difference.norm() / outputs[layer].norm()).item()
            assert found["layers"][layer]["output_error"] == pytest.approx(error, rel=1e-4)
    assert found["layers"][1]["output_error"] is None


def weighted_floor(taps):
    """sqrt(Σ_{k>d} σ_k(W H W)²) / ‖h‖ for d = 0, 1, …, w_i² = C(2i, i)/4^i (design of the reduction)."""
    g = taps[1:]
    side = (len(g) + 1) // 2
    weights = np.sqrt([np.prod([(2 * j - 1) / (2 * j) for j in range(1, i + 1)]) for i in range(side)])
    section = np.array([[weights[i] * g[i + j] * weights[j] for j in range(side)] for i in range(side)])
    squares = np.linalg.svd(section, compute_uv=False) ** 2
    tails = np.append(np.cumsum(squares[::-1])[::-1], np.zeros(len(g)))
    return np.sqrt(tails) / np.linalg.norm(taps)


def test_a_recurrence_of_zeros_is_found_out(student, blocks):
    """The negative control: whatever is measured must say that nothing is left."""
    settings = Recurrence(method="balanced", tolerance=3e-2, max_state_size=12)
    found = [layer[0] for layer in reduced_by(student, settings)]
    recurrent = recurrence.recurrent_student(student, found)
    good = certificate.measure_all(student, recurrent, found, settings, blocks)
    with torch.no_grad():
        for filter in recurrence.long_filters(recurrent).values():
            filter.residue.zero_()
            filter.direct.zero_()
    bad = certificate.measure_all(student, recurrent, found, settings, blocks)
    assert bad["model"]["divergence"] > 100 * good["model"]["divergence"] and bad["within_tolerance"] == 0
    assert all(f["relative_error"] == pytest.approx(1) for layer in bad["layers"] for f in layer["filters"])
    for layer in (0, 2):
        bias = student.model.layers[layer].mixer.out.bias
        assert bias is None or bad["layers"][layer]["output_error"] > 0.5
    assert good["verdict"].startswith("All 10") and bad["verdict"].startswith("0 of 10")


def test_a_filter_that_cannot_be_compressed_is_said_to_be_so():
    time = torch.arange(LENGTH, dtype=torch.float64)
    taps = torch.stack([torch.randn(LENGTH, dtype=torch.float64), 0.5**time * torch.cos(0.7 * time)])
    settings = Recurrence(method="balanced", tolerance=1e-2, max_state_size=3)
    (found,) = recurrence.reduce_filters(taps, settings, recurrence.aims(settings))
    exact = Taps(taps).requires_grad_(False)
    noise, mode = certificate.filter_facts(exact, allocation.modal_filter(found), found, settings, LENGTH)
    assert not noise["within_tolerance"] and not noise["compressible"]
    assert noise["relative_error"] >= noise["floor"] and noise["floor_at_most_modes"] > 0.1
    assert mode["within_tolerance"] and mode["compressible"] and mode["relative_error"] < 1e-6
    assert (mode["state_size"], mode["real_states"]) == (1, 2)


def test_modal_from_the_start(blocks, tmp_path):
    """Modes that are there need no more of them; and nothing of the first recurrence is left in the second."""
    student = tiny_student(modal=True, context_length=LENGTH)
    made = recurrence.distil(student, Recurrence(tolerance=1e-4), tmp_path / "made", ALONE, None, blocks)
    found = checkpoint.read_json(made / "certificate.json")
    for before, layer in zip(student.config.state_sizes, found["layers"], strict=True):
        assert all(f["state_size"] <= size for f, size in zip(layer["filters"], before, strict=True))
    assert found["within_tolerance"] == 15 and found["model"]["divergence"] < 1e-6
    assert all(f["relative_error"] >= f["floor"] for layer in found["layers"] for f in layer["filters"])


def test_filters_that_are_not_finite(student, blocks, tmp_path):
    with torch.no_grad():
        student.model.layers[2].mixer.filter.direct[3] = float("nan")
    with pytest.raises(RecipeError, match="filters are not finite; the transfer diverged"):
        recurrence.distil(student, Recurrence(), tmp_path / "made", ALONE, None, blocks)


def recur(*words):
    return command_line("recur", *words)


def test_recur(folder, workshop, tmp_path, monkeypatch):
    """A folder becomes a recurrent one, once; with text of one's own, and again from the recurrent one."""
    words = [folder, "--tolerance", "2e-2", "--method", "balanced", "--text", workshop / "text.jsonl"]
    monkeypatch.setattr(recurrence, "HELD_OUT_TOKENS", 800)
    code, out, err = recur(*words)
    made = folder.with_name("transfer-recurrent")
    found = checkpoint.read_json(made / "certificate.json")
    assert code == 0 and found["verdict"] in out and f"recurrence: {made}" in out
    assert found["text"] == "text.jsonl" and found["model"]["tokens"] == 20 * (LENGTH - 1)
    other = [*words[:-1], tmp_path / "other.jsonl", "--to", tmp_path / "other"]  # the same validation split, else other
    documents = [json.loads(line)["text"] for line in (workshop / "text.jsonl").read_text().splitlines()]
    kept = [text if data.split_of(text) == "validation" else "x" for text in documents]
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in kept))
    assert recur(*other)[0] == 0
    assert checkpoint.read_json(tmp_path / "other/certificate.json")["text_sha256"] == found["text_sha256"]
    assert AutoTokenizer.from_pretrained(made).eos_token == "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.config.filter == "modal" and len(model.generate(torch.ones(1, 3, dtype=int), max_new_tokens=4)[0]) == 7
    assert not list(folder.parent.glob("*.partial"))

    before = (made / "certificate.json").stat().st_mtime_ns
    code, out, err = recur(*words)
    assert code == 0 and "(complete)" in out and (made / "certificate.json").stat().st_mtime_ns == before
    earlier = found | {"settings": found["settings"] | {"prefill_outputs": "recurrent"}}  # of an earlier version
    checkpoint.write_json(made / "certificate.json", earlier)
    code, out, err = recur(*words)
    assert code == 0 and "(complete)" in out
    code, out, err = recur(*words[:1], "--tolerance", "1e-2")
    assert (
        code == 2
        and "exists already and was made from another student, with other settings" in err
        and err.count("\n") == 1
    )

    less = tmp_path / "less"
    budget = found["state_bytes"] - 2000
    code, out, err = recur(made, "--state-bytes", budget, "--to", less, "--text", ROOT / "README.md", "--split", "all")
    again = checkpoint.read_json(less / "certificate.json")
    assert code == 0 and again["state_bytes"] <= budget and "predicted" in again["verdict"] and "predicted KL" in out


def test_recur_without_a_tokenizer(folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, bare / name)
    code, out, err = recur(bare, "--method", "balanced", "--to", tmp_path / "made")
    found = checkpoint.read_json(tmp_path / "made/certificate.json")
    assert code == 0 and found["model"] is None and "there is no tokenizer" in found["verdict"]
    assert not list((tmp_path / "made").glob("tokenizer*"))


def test_layers_are_shared_out(student, blocks, tmp_path, monkeypatch):
    """Of two processes each reduces its own layers and reads the other's; the main one makes what one alone makes."""
    settings, calls = Recurrence(method="balanced", tolerance=2e-2), []
    whole = recurrence.distil(student, settings, tmp_path / "whole", ALONE, None, blocks)
    gathered = recurrence.gathered
    monkeypatch.setattr(recurrence, "gathered", lambda *given: calls.append(process) or gathered(*given))

    def barrier():
        if process == 1:
            raise Killed

    def distil():
        shared = SimpleNamespace(
            **vars(ALONE) | dict(num_processes=2, process_index=process, wait_for_everyone=barrier)
        )
        shared.is_main_process = process == 0
        return recurrence.distil(student, settings, tmp_path / "shared", shared, None, blocks)

    process = 1
    with pytest.raises(Killed):
        distil()  # as far as the barrier, where the other one comes too
    process = 0
    made = distil()
    assert calls == [1, 0], "a layer each"
    for name in ("certificate.json", "model.safetensors"):
        assert (made / name).read_bytes() == (whole / name).read_bytes()


def test_mistakes_of_a_program(tmp_path):
    words = ["recur", tmp_path / "absent", "--tolerance"]
    done = command_line(*words, "1e-2")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("scavenger: error: ") and "no such folder" in done.stderr
    done = command_line(*words, "much")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_method_that_only_the_benchmark_has_is_not_offered():
    done = command_line("recur", "folder", "--method", "gradient")
    assert done.returncode == 2 and "invalid choice: 'gradient'" in done.stderr


def test_mistakes_end_in_one_line(folder, workshop, tmp_path):
    (tmp_path / "run/transfer").mkdir(parents=True)
    (tmp_path / "run/transfer/config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    attention, damaged, short = (tmp_path / name for name in ("attention", "damaged", "short"))
    tiny_student(attention_layers=[0, 1, 2], attention_window=7).float().save_pretrained(attention)
    for name in (damaged, short):
        shutil.copytree(folder, name)
    (damaged / "model.safetensors").write_bytes(b"not a safetensors file")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    (tmp_path / "little.txt").write_text("x = 1\n")
    for words, parts in (
        ([tmp_path / "absent"], ["absent: no such folder"]),
        ([tmp_path / "run"], ["no config.json", "did you mean", "run/transfer?"]),
        ([tmp_path / "run/transfer"], ["is a None", "expected a student (hyena)"]),
        ([workshop / "teacher"], ["is a gpt_neox", "expected a student (hyena)"]),
        ([attention], ["keeps attention in every layer"]),
        ([damaged], ["cannot be loaded"]),
        ([short], ["the checkpoint lacks model.layers.3."]),
        ([folder, "--tolerance", "2"], ["--tolerance: found 2.0; expected a relative error between 0 and 1"]),
        ([folder, "--max-state-size", "0"], ["--max-state-size: found 0"]),
        ([folder, "--horizon", "3"], ["--horizon: found 3; expected 8 taps or more"]),
        ([folder, "--text", tmp_path / "nix"], ["--text:", "is not there"]),
        (
            [folder, "--text", tmp_path / "little.txt", "--to", tmp_path / "x"],
            ["--text: found", "in the validation split", "a context of the student", "or --split all"],
        ),
        ([folder, "--to", tmp_path / "file"], ["exists already"]),
        ([folder, "--state-bytes", "9", "--to", tmp_path / "x"], ["recurrence.state_bytes: found 9"]),
    ):
        code, out, err = recur(*words)
        line = err.splitlines()[-1]
        assert code == 2 and line.startswith("scavenger: error: ") and all(part in line for part in parts), err
        assert "Traceback" not in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("method, by", [("balanced", "By balanced truncation"), ("positive", "As positive modes")])
def test_plan_of_the_recurrence(method, by, folder, workshop, tmp_path, monkeypatch):
    """The table says what the stage then makes, by its method; nothing is written."""
    run = tmp_path / "run"
    shutil.copytree(folder, run / "transfer")
    (run / "data").mkdir()
    np.save(run / "data/validation.npy", np.random.default_rng(0).integers(0, 320, (12, LENGTH), dtype=np.uint16))
    overrides = [
        f"run_dir={run}",
        "recurrence.tolerance=2e-2",
        f"recurrence.method={method}",
        "recurrence.max_state_size=9",
    ]
    recipe = load_recipe(str(workshop / "recipe.yaml"), overrides)
    rows = [line.split() for line in preview.show(recipe).splitlines() if line.startswith(("0.", "1,", "2,", "3,"))]
    totals = {float(row[0]): row for row in rows if row[1] == "all"}
    assert list(totals) == [0.3, 0.1, 0.03, 0.02, 0.01, 0.003] and len(rows) == 3 * 6
    modes = [int(row[3]) for row in totals.values()]
    assert modes == sorted(modes)
    exact = HyenaForCausalLM.from_pretrained(run / "transfer").eval()
    made = [layer[0] for layer in reduced_by(exact, recipe.recurrence)]
    sizes = [[f.state_size for f in layer] for layer in made]
    config = recurrence.recurrent_configuration(exact.config, sizes, method == "positive")
    row = totals[0.02]
    assert int(row[3]) == sum(map(sum, sizes)) and row[5] == f"{config.state_bytes / 1024:,.1f}"
    assert (int(row[-7]), int(row[-5])) == (config.break_even_length, config.break_even_length_of(2))
    assert row[-3] == f"{config.moved_bytes_of(4) / 1024:,.1f}"
    assert int(row[-2]) == config.moved_break_even_length_of(2)

    assert "% of the filters" not in preview.show(recipe)
    monkeypatch.setattr(preview, "FILTERS", 2)
    share = 2 / (exact.config.num_filters * exact.config.hyena_order)
    assert f"{by}. {100 * share:.0f} % of the filters were reduced. KL" in preview.show(recipe)
    monkeypatch.undo()

    budget = config.state_bytes
    text = preview.show(load_recipe(str(workshop / "recipe.yaml"), [*overrides, f"recurrence.state_bytes={budget}"]))
    rows = [line.split() for line in text.splitlines() if " all " in line]
    assert len(rows) == 3 and all(float(row[5]) * 1024 <= float(row[0].replace(",", "")) + 60 for row in rows)
    assert [path.name for path in sorted(run.iterdir())] == ["data", "transfer"]
    assert f"Then each filter becomes a recurrence of at most 9 modes ({method})" in plan.show(recipe)
    # The teacher has 2 · 3 · 30 keys and values a token.
    recipe = load_recipe(str(workshop / "recipe.yaml"), [*overrides, "recurrence.state_bytes=72_001"])
    said = (
        "72,001 bytes of state in float32 (the teacher's KV cache of 101 tokens in float32, of 201 in 16 bits), spent"
    )
    shown = plan.show(recipe)
    assert said in shown
    planned = plan._student_configuration(recipe, plan._configuration(recipe))
    moved = allocation.moved_bytes(planned, 72_001, 4)
    assert f"A step reads and writes {moved:,} bytes of such a state" in shown
    assert f"with a KV cache in 16 bits, from {-(-moved // 360)} tokens on" in shown
