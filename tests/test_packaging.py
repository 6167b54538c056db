"""The wheel holds the package and nothing else, and a recipe runs where only the wheel is installed."""

import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, launch

from scavenger.recipe import EMBEDDED_TEACHER


# An interpreter whose only site-packages is the folder given first; it finds dependencies, but not their .pth lines, in
# the folders given last. It does what `python RECIPE --help` does.
FRESH = """
import runpy, site, sys
wheel, recipe, *dependencies = sys.argv[1:]
site.addsitedir(wheel)
sys.path += dependencies
import scavenger
assert scavenger.__file__.startswith(wheel), scavenger.__file__
sys.argv = [recipe, "--help"]
runpy.run_path(recipe, run_name="__main__")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    made = launch(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    assert made.returncode == 0, made.stderr
    (path,) = folder.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package(wheel):
    """Every tracked file, byte for byte, the line for recipes, and metadata."""
    tracked = launch("git", "ls-files", "scavenger").stdout.split()
    assert {f"scavenger/assets/{EMBEDDED_TEACHER.name}/model.safetensors", "scavenger/report/pythia.json"} < set(
        tracked
    )
    for name in [*tracked, "scavenger-recipes.pth"]:
        assert wheel.read(name) == (ROOT / name).read_bytes(), name
    rest = [name for name in wheel.namelist() if name not in tracked and name != "scavenger-recipes.pth"]
    assert all(".dist-info/" in name for name in rest), rest
    (commands,) = (wheel.read(name).decode() for name in rest if name.endswith("entry_points.txt"))
    assert "scavenger = scavenger.__main__:main" in commands
    assert any(name.endswith("licenses/LICENSE") for name in rest)


def test_an_installed_wheel_runs_recipes(wheel, tmp_path):
    wheel.extractall(tmp_path / "site-packages")
    recipe = tmp_path / "quickstart.yaml"
    recipe.write_bytes((ROOT / "recipes/quickstart.yaml").read_bytes())
    dependencies = [folder for folder in sys.path if folder.endswith("site-packages")]
    words = [sys.executable, "-I", "-S", "-c", FRESH, str(tmp_path / "site-packages"), str(recipe), *dependencies]
    made = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("usage: scavenger")
