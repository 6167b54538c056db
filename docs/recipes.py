"""Write docs/recipes.md, the reference of every key of a recipe, from the dataclasses of scavenger/recipe.py.

python docs/recipes.py
"""

import dataclasses
import json
import types
import typing
from pathlib import Path

from scavenger.recipe import Recipe, Section, describe


PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Recipes

A recipe is one YAML file, one experiment. Its first line is `#!/usr/bin/env scavenger`. Without that line,
`accelerate launch` recognises a recipe by its keys `run_dir` and `teacher`.

Every key below can also be set on the command line, as `section.key=value`:

    scavenger recipes/quickstart.yaml transfer.logits.steps=100 student.filter.form=modal

`transfer.activations` and `transfer.logits` may be lists of sections that follow one another; their keys are then
`transfer.logits.0.steps=100`. An optional section that is left out is a stage that does not run; `section=null` leaves
it out. A key without a default must be given.

How to choose: [Teachers and text](teachers.md), [Transfer](transfer.md), [Mixers and recall](mixers.md),
[Recurrences](recurrences.md). Shipped recipes: [Teachers and text](teachers.md#shipped-recipes).

Generated from the code by `python docs/recipes.py`.
"""


def main():
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole reference."""
    return "\n".join([HEAD, *_section(Recipe, "")])


def _section(kind, name):
    """A table of the section's keys, then the sections inside it."""
    hints, inner = typing.get_type_hints(kind), []
    lines = [f"## {name or 'The recipe itself'}", "", kind.__doc__.strip(), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        own = _inside(hints[field.name])
        if own is not None:
            place = f"{name}.{field.name}".strip(".")
            inner.append((own, place))
            left_out = types.NoneType in typing.get_args(hints[field.name])
            default = (
                "left out" if left_out else "see there" if field.default_factory is not dataclasses.MISSING else ""
            )
            shown = ["section", default, f"{field.metadata['meaning']}: [{place}](#{place.replace('.', '').lower()})"]
        else:
            shown = [describe(hints[field.name]), _default(field), _meaning(field)]
        lines.append("| " + " | ".join([f"`{field.name}`", *shown]) + " |")
    lines.append("")
    for own, place in inner:
        lines += _section(own, place)
    return lines


def _inside(hint):
    """The section that a field holds, if it does: as it is, optional, or a list of sections."""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _default(field):
    if field.default is dataclasses.MISSING:
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(value)}`".replace('"', "")


def _meaning(field):
    unit, bounds = field.metadata["unit"], field.metadata["bounds"]
    return "; ".join(
        filter(None, [field.metadata["meaning"], unit and f"in {unit}", bounds and f"expects {bounds.right}"])
    )


if __name__ == "__main__":
    main()
