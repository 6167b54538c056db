"""Energy and CO2 of stages: added up over interruptions, plain about estimates, silent, and off the network."""

import json
import os
import socket
import time
from types import SimpleNamespace

import pytest
from program import HANGS, forked

from scavenger.recipe import RecipeError, load_recipe
from scavenger.run import energy, processes
from scavenger.run.run import Run


MAIN = SimpleNamespace(is_main_process=True, print=print)


@pytest.fixture
def recipe(workshop, tmp_path):
    (tmp_path / "run").mkdir()
    return load_recipe(str(workshop / "recipe.yaml"), [f"run_dir={tmp_path}/run", "training.energy=true"])


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No configuration of codecarbon but the test's own, and no socket for anything beyond this machine's files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("CODECARBON_")]:
        monkeypatch.delenv(name)

    connect = socket.socket.connect

    def on_this_machine(self, address):
        assert self.family == socket.AF_UNIX, f"a connection to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", on_this_machine)


def entry(run):
    return json.loads((run / "energy.json").read_text())


def test_a_stage_is_measured_and_added_up(recipe, tmp_path, capfd, monkeypatch):
    run = tmp_path / "run"
    with energy.measured(Run(recipe, run, MAIN, None), "transfer"):
        time.sleep(0.3)
    first = entry(run)["transfer"]
    assert first["seconds"] > 0.3 and first["starts"] == 1 and first["kwh"] > 0
    # 475 g CO2 a kWh: what codecarbon has as the world's average
    assert first["kg_co2"] == pytest.approx(0.475 * first["kwh"]) and first["grid"].startswith("world average")
    with pytest.raises(KeyboardInterrupt), energy.measured(Run(recipe, run, MAIN, None), "transfer"):
        time.sleep(0.2)
        raise KeyboardInterrupt
    second = entry(run)["transfer"]
    assert second["seconds"] > first["seconds"] + 0.2 and second["starts"] == 2
    assert second["kwh"] > first["kwh"] and second["kg_co2"] > first["kg_co2"]
    monkeypatch.setenv("CODECARBON_COUNTRY_ISO_CODE", "FRA")
    with energy.measured(Run(recipe, run, MAIN, None), "baseline"):
        time.sleep(0.1)
    found = entry(run)
    assert found["transfer"] == second and found["baseline"]["grid"] == "France"
    assert found["baseline"]["kg_co2"] < 0.2 * found["baseline"]["kwh"], "mostly nuclear"
    out, err = capfd.readouterr()
    assert err == "" and len(out.splitlines()) == 3, "one line for each stage, nothing of codecarbon's own"
    assert all(line.startswith("energy of ") for line in out.splitlines())
    header, *table = energy.rows(run)
    assert [row[0] for row in table] == ["transfer", "baseline"] and {len(row) for row in table} == {len(header)}
    assert not list(tmp_path.rglob("*.csv")) and not list(run.glob("*.partial"))


@pytest.mark.slow
def test_it_says_what_is_measured_and_what_estimated(recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with energy.measured(Run(recipe, run, MAIN, None), "transfer"):
        pass
    rapl = os.access("/sys/class/powercap/intel-rapl/subsystem/intel-rapl:0/energy_uj", os.R_OK)
    found = entry(run)["transfer"]
    assert ("processor (RAPL)" in found["measured"]) == rapl
    assert any(name.startswith("processor (nominal") for name in found["estimated"]) != rapl
    assert "memory (its size)" in found["estimated"]
    hardware = [type("RAM", (), {})(), type("CPU", (), {"_mode": "intel_rapl"})(), type("GPU", (), {})()]
    assert energy._how(SimpleNamespace(_hardware=hardware)) == (
        ["processor (RAPL)", "graphics cards (their driver)"],
        ["memory (its size)"],
    )


def test_a_complete_stage_another_process_and_a_recipe_without_cost_nothing(recipe, workshop, tmp_path):
    run = tmp_path / "run"
    with energy.measured(Run(recipe, run, SimpleNamespace(is_main_process=False), None), "transfer"):
        pass
    with energy.measured(Run(load_recipe(str(workshop / "recipe.yaml")), run, MAIN, None), "transfer"):
        pass
    (run / "transfer").mkdir()
    with energy.measured(Run(recipe, run, MAIN, None), "transfer"):
        pass
    assert not (run / "energy.json").exists() and energy.rows(run) == []


def _measured(recipe, folder):
    energy.SECONDS = 0.2
    with energy.measured(Run(load_recipe(str(recipe), ["training.energy=true"]), folder, MAIN, None), "transfer"):
        time.sleep(HANGS)


def test_a_killed_process_is_counted(tmp_path, workshop):
    """What was read before SIGKILL is in the file, and the next start adds to it."""
    ledger = tmp_path / "energy.json"
    process = forked(_measured, workshop / "recipe.yaml", tmp_path)
    deadline = time.monotonic() + HANGS
    while not (ledger.is_file() and entry(tmp_path)["transfer"]["seconds"] > 0.5):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.join()
    before = entry(tmp_path)["transfer"]
    recipe = load_recipe(str(workshop / "recipe.yaml"), ["training.energy=true"])
    with energy.measured(Run(recipe, tmp_path, MAIN, None), "transfer"):
        time.sleep(0.1)
    after = entry(tmp_path)["transfer"]
    assert after["starts"] == 2 and after["kwh"] > before["kwh"] and after["seconds"] > before["seconds"] + 0.1


def test_codecarbon_missing_is_one_line(recipe, monkeypatch):
    find = energy.importlib.util.find_spec
    monkeypatch.setattr(
        energy.importlib.util, "find_spec", lambda name, *rest: None if name == "codecarbon" else find(name, *rest)
    )
    with pytest.raises(RecipeError, match=r"training.energy: codecarbon is not installed.*scavenger\[energy\]"):
        processes.start(recipe)
