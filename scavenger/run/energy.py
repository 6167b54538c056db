"""Energy and CO2 of each stage, by codecarbon: measured where the hardware reports it, else estimated; it says which.

The result is `energy.json` in the run's folder, one entry per stage, summed over the times the stage was started. It
covers the machine of the main process: its processors, memory and graphics cards, including what other programs use.
"""

import contextlib
import importlib.util
import logging
import threading
from pathlib import Path

from scavenger.recipe import RecipeError
from scavenger.run import checkpoint
from scavenger.run.run import Run


SECONDS = 15.0  # between two readings; a process that is killed loses what came after the last one
WORLD = "world average (CODECARBON_COUNTRY_ISO_CODE is not set to a country that codecarbon knows)"


@contextlib.contextmanager
def measured(run: Run, stage_name: str):
    """Measure what runs inside: the stage whose folder is `run.folder/stage_name`; nothing where that is complete."""
    accelerator = run.accelerator
    skipped = not run.recipe.training.energy or not accelerator.is_main_process
    if skipped or checkpoint.complete(run.folder / stage_name):
        yield
        return
    ledger = _Ledger(run.folder / "energy.json", stage_name)
    ledger.tracker.start()
    try:
        yield
    finally:
        ledger.tracker.stop()
        found = getattr(ledger.tracker, "final_emissions_data", None)  # codecarbon swallows its own errors
        if found is None:
            accelerator.print(f"energy of {stage_name}: codecarbon could not measure it on this machine")
        else:
            ledger.write(found)
            accelerator.print(_line(stage_name, ledger.entry))


def rows(run_dir: Path) -> list[list[str]]:
    """The table of the report, its header first; [] where nothing was measured."""
    path = Path(run_dir) / "energy.json"
    if not path.is_file():
        return []
    stages = checkpoint.read_json(path)
    header = ["", "seconds", "kWh", "kg CO2", "g CO2 a kWh", "grid", "measured", "estimated"]
    return [header] + [
        [
            name,
            f"{entry['seconds']:,.0f}",
            f"{entry['kwh']:.3g}",
            f"{entry['kg_co2']:.3g}",
            f"{_intensity(entry):.0f}",
            entry["grid"],
            ", ".join(entry["measured"]) or "nothing",
            ", ".join(entry["estimated"]) or "nothing",
        ]
        for name, entry in stages.items()
    ]


def require_codecarbon():
    """Raise RecipeError, one line, where codecarbon is missing."""
    if importlib.util.find_spec("codecarbon") is None:
        raise RecipeError(
            "training.energy: codecarbon is not installed; expected `pip install 'scavenger[energy]'`, or energy: false"
        )


class _Ledger:
    """Receives codecarbon's readings, so that what a killed process used is counted too."""

    def __init__(self, path, stage):
        self.path, self.stage = path, stage
        stages = checkpoint.read_json(path) if path.is_file() else {}
        self.before = stages.get(stage, {})
        self.entry = {}
        self.seconds = 0.0  # of the newest reading: one that a thread still holds when the stage ends is older
        self.lock = threading.Lock()
        self.tracker = _tracker(self)

    def live_out(self, total, delta):
        """codecarbon's call after each reading, in its own thread; a full disk is reported when the stage ends."""
        with contextlib.suppress(OSError):
            self.write(total)

    def out(self, total, delta):
        """codecarbon's call at the end: the stage writes by itself then."""

    def exit(self):
        """codecarbon's last call."""

    def write(self, total):
        with self.lock:
            if total.duration < self.seconds:
                return
            self.seconds = total.duration
            sure, guessed = _how(self.tracker)
            self.entry = {
                "kwh": self.before.get("kwh", 0.0) + total.energy_consumed,
                "kg_co2": self.before.get("kg_co2", 0.0) + total.emissions,
                "seconds": self.before.get("seconds", 0.0) + total.duration,
                "starts": self.before.get("starts", 0) + 1,
                "grid": _grid(self.tracker, total),
                "measured": sorted({*self.before.get("measured", []), *sure}),
                "estimated": sorted({*self.before.get("estimated", []), *guessed}),
            }
            stages = checkpoint.read_json(self.path) if self.path.is_file() else {}
            checkpoint.write_json(self.path, stages | {self.stage: self.entry})


def _tracker(ledger):
    """codecarbon's offline tracker: silent, without files, addresses or location queries."""
    require_codecarbon()
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it warns before it reads `log_level`
    return OfflineEmissionsTracker(
        log_level="critical",
        output_methods=[],
        output_handlers=[ledger],
        emissions_endpoint=None,
        electricitymaps_api_token=None,
        measure_power_secs=SECONDS,
        api_call_interval=1,
        tracking_mode="machine",
    )


def _how(tracker):
    """What was measured and what estimated; codecarbon says so only in its log, hence the private names."""
    sure, guessed = [], []
    for item in tracker._hardware:
        kind = type(item).__name__
        if kind == "GPU":
            sure.append("graphics cards (their driver)")
        elif kind == "RAM":
            guessed.append("memory (its size)")
        elif kind == "CPU" and item._mode != "intel_rapl":
            guessed.append(f"processor (nominal {item._tdp:g} W and its load)")
        else:
            sure.append("processor (RAPL)" if kind == "CPU" else f"{kind} (its own counter)")
    return sure, guessed


def _grid(tracker, total):
    """The electricity grid that was assumed; codecarbon's configuration file or environment variables set it."""
    if tracker.force_carbon_intensity_g_co2e_kwh is not None:
        return "as codecarbon's configuration gives it"
    return total.country_name or WORLD


def _line(stage, entry):
    return (
        f"energy of {stage}: {entry['kwh']:.3g} kWh, {entry['kg_co2']:.3g} kg CO2 at {_intensity(entry):.0f} g a kWh, "
        f"{entry['grid']}; measured: {', '.join(entry['measured']) or 'nothing'}; "
        f"estimated: {', '.join(entry['estimated']) or 'nothing'}"
    )


def _intensity(entry):
    """g CO2 a kWh."""
    return 1000 * entry["kg_co2"] / entry["kwh"] if entry["kwh"] else 0.0
