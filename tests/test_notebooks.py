"""The notebooks in docs/ run as they stand, and what is stored in them is what they show."""

import json
import re

import nbformat
import pytest
from conftest import LAUNCHED, ROOT
from nbclient import NotebookClient


FOLDER = ROOT / "docs/notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
WITHIN = 600  # seconds for a cell, on a machine however busy


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def printed(notebook):
    """What the cells print, one after the other."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def figures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def executed(name, folder):
    """A notebook after all its cells have run in a folder; raises where one raises."""
    notebook = read(name)
    client = NotebookClient(notebook, timeout=WITHIN, kernel_name="python3", resources={"metadata": {"path": folder}})
    return client.execute(env=LAUNCHED | {"HF_HOME": str(folder / "home")})


@pytest.mark.slow
def test_from_a_teacher_to_a_recurrence(tmp_path):
    made = executed("from_teacher_to_recurrence", tmp_path)
    assert sum(cell.cell_type == "code" for cell in made.cells) == 5
    rows = dict(re.findall(r"^(teacher|student|recurrent) +(.*KiB)$", printed(made), flags=re.M))
    found = {
        name: [float(number.replace(",", "")) for number in re.findall(r"[\d.,]+", row)] for name, row in rows.items()
    }
    (teacher, agreement, short, long), student, recurrent = (
        found[name] for name in ("teacher", "student", "recurrent")
    )
    assert agreement == 100 and long == 8 * short
    assert teacher < student[0] < 2 * teacher and student[3] > 4 * student[2]
    assert recurrent[0] == pytest.approx(student[0], rel=1e-2) and recurrent[2] == recurrent[3] < short


@pytest.mark.slow
def test_a_filter(tmp_path):
    text = printed(executed("a_filter", tmp_path))
    rows = re.findall(r"(\d+) modes, +(\d+) real states: error (\S+), floor (\S+)", text)
    assert len(rows) == 8 and all(float(error) >= float(floor) for *_, error, floor in rows)
    errors = [float(error) for _, _, error, _ in rows]
    assert errors == sorted(errors, reverse=True)
    own, filters = (float(number) for number in re.findall(r"from the convolution with .*: +(\S+)", text))
    assert own < 1e-12 and errors[5] / 3 < filters < 3 * errors[5]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs(name):
    """Of one run from first cell to last, with figures, small enough for a web page, and nothing of the machine."""
    notebook = read(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert figures(notebook) >= 1 and (FOLDER / f"{name}.ipynb").stat().st_size < 400_000
    text = json.dumps([cell.outputs for cell in cells])
    assert not re.search(r"/(home|root|tmp|work)/|site-packages", text)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_in_a_notebook_exist(name):
    words = "".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)\)", words):
        assert target.startswith("https://") or (FOLDER / target).exists(), target
