"""Let Python run a recipe file, so that `accelerate launch recipes/x.yaml` works as typed.

Python offers a script's path to `sys.path_hooks` before it opens the file; that is how a folder or a zip file is run.
The hook below accepts a path only if it ends in .yaml or .yml and is a recipe: its first line is
`#!/usr/bin/env scavenger`, or `run_dir` or `teacher` is among its keys. All other paths, other YAML files among them,
are left to other hooks. This module is imported whenever an interpreter starts in which scavenger is installed, so it
imports only `sys` until Python is asked to run a YAML file.
"""

import sys


MARKER = b"#!/usr/bin/env scavenger"
KEY = rb"(?m)^(run_dir|teacher)[ \t]*:"
MOST_BYTES = 2**20  # far more than any recipe has


def install():
    """Add the hook; called by the line that the package installs in site-packages."""
    if _finder not in sys.path_hooks:
        sys.path_hooks.append(_finder)


def is_recipe(path) -> bool:
    """Whether the file's first line is the marker, or a line begins with a key that only recipes have."""
    if not (isinstance(path, str) and path.endswith((".yaml", ".yml"))):
        return False
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES).removeprefix(b"\xef\xbb\xbf")
    except OSError:
        return False
    import re

    return content.startswith(MARKER) or re.search(KEY, content) is not None


def _finder(path):
    if not is_recipe(path):
        raise ImportError(f"{path} is not a scavenger recipe")
    return _RecipeFinder(path)


class _RecipeFinder:
    """Finds a single module, `__main__`, in the file that Python was asked to run."""

    def __init__(self, path):
        self.path = path

    def find_spec(self, name, target=None):
        if name != "__main__":
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec("__main__", _RecipeLoader(), origin=self.path)


class _RecipeLoader:
    def create_module(self, spec):
        return None

    def get_code(self, name):
        """The code that Python runs as `__main__`; sys.argv is already [recipe, overrides …]."""
        return compile("import sys\nfrom scavenger.__main__ import main\nsys.exit(main())\n", "<recipe>", "exec")
