"""The plan of the house: imports run one way, and no two modules share a name."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# A module imports from layers above its own, or from its own layer.
LAYERS = (
    ("model", "families", "recipe"),
    ("recurrence.reduction", "run", "loading", "chat"),
    ("losses", "losses_triton", "measure", "data"),
    ("flops",),
    ("training",),
    ("teacher", "student"),
    ("transfer", "recurrence"),
    ("report",),
    ("plan", "hub", "serve"),
    ("__main__",),
)


def name_of(path):
    parts = path.relative_to(ROOT / "scavenger").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((ROOT / "scavenger").rglob("*.py"))}


def imported(name):
    """The modules of scavenger that a module imports, wherever in the file it does."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("scavenger.") for alias in node.names if alias.name.startswith("scavenger.")
            }
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = f"{package}.{source}".strip(".")
            elif source.split(".")[0] == "scavenger":
                source = source.removeprefix("scavenger").removeprefix(".")
            else:
                continue
            for alias in node.names:
                inside = f"{source}.{alias.name}".strip(".")
                found.add(inside if inside in MODULES else source)
    return found - {""}


def layer_of(name):
    fitting = [
        (len(prefix), number)
        for number, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if name == prefix or name.startswith(prefix + ".")
    ]
    return max(fitting)[1]  # the longest prefix decides


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("", "run.launch")])
def test_a_module_imports_from_the_layers_below_it(name):
    for other in imported(name):
        assert layer_of(other) <= layer_of(name), f"{name} imports {other}"


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {name: imported(name) & MODULES.keys() - {name} for name in MODULES}
    while graph:
        free = [name for name, others in graph.items() if not others & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_the_stages_do_not_know_each_other():
    for name in MODULES:
        if name.startswith("transfer."):
            assert not [other for other in imported(name) if other.startswith("recurrence.recurrence")]
        if name.startswith("recurrence."):
            assert not [other for other in imported(name) if other.startswith("transfer")]


def test_what_travels_imports_nothing_else_of_ours():
    """A saved student carries `model/` alone."""
    for name in MODULES:
        if name.startswith("model"):
            assert all(other.startswith("model") for other in imported(name)), name


def test_no_two_modules_share_a_name():
    """A stage's file has its folder's name; else a name is one module's, of the package and of eval/ together."""
    names = [path.stem for path in MODULES.values() if path.stem not in ("__init__", path.parent.name)]
    names += [path.stem for path in (ROOT / "eval").glob("*.py") if path.stem != "transfer"]
    assert sorted(names) == sorted(set(names))
