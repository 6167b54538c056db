"""The documentation: its site builds, its code runs, its commands and recipes are understood, its messages are real."""

import argparse
import ast
import contextlib
import io
import re
import runpy
import shlex
import tomllib
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, command, launch
from mkdocs.commands import build
from mkdocs.config import load_config
from pages import PAGES, blocks, commands, prose

from scavenger import __main__ as program
from scavenger import __version__
from scavenger.recipe import EMBEDDED_TEACHER, load_recipe


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
QUICKSTART = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())
NEEDS = ("a GPU", "a server", "a cluster", "an account", "the Hub")
# Commands within sentences; a word in capitals stands for something of the reader's.
INLINE = re.compile(r"`((?:scavenger|accelerate launch|python|pip install|make) [^`]+)`")


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path):
    """In strict mode every warning of mkdocs and of docs/pages.py is an error."""
    build.build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    pages = {path.relative_to(tmp_path).parent.as_posix() for path in tmp_path.rglob("index.html")}
    assert {"recurrences", "results/quickstart", "eval/mixers", "benchmarks/decoding", "CHANGELOG"} <= pages
    assert {"notebooks/a_filter", "notebooks/from_teacher_to_recurrence"} <= pages
    assert 'href="notebooks/a_filter/"' in (tmp_path / "index.html").read_text(encoding="utf-8")
    notebook = (tmp_path / "notebooks/a_filter/index.html").read_text(encoding="utf-8")
    assert 'src="data:image/png;base64,' in notebook and "real states: error" in notebook
    assert not list(tmp_path.rglob("*.py"))
    text = (tmp_path / "recurrences/index.html").read_text(encoding="utf-8")
    assert 'href="../mixers/#filters-alone"' in text and 'href="../benchmarks/reduction/"' in text
    assert not re.search(r'<(script|link)[^>]*(src|href)="https?://(?!localhost)', text), "nothing is fetched"


def test_links_work_in_the_repository_and_on_the_site(caplog):
    made = runpy.run_path(str(ROOT / "docs/pages.py"))
    sources = {
        "layout.md": "docs/layout.md",
        "results/index.md": "docs/results/index.md",
        "eval/mixers.md": "eval/mixers.md",
    }
    files = [SimpleNamespace(src_uri=uri, abs_src_path=str(ROOT / path)) for uri, path in sources.items()]

    def shown(markdown, file):
        return made["on_page_markdown"](markdown, SimpleNamespace(file=file), {}, files)

    layout, index, mixers = files
    assert shown("[a](../../eval/mixers.md#rows) b", index) == "[a](../eval/mixers.md#rows) b"
    assert shown("[a](results/index.md)", layout) == "[a](results/index.md)"
    assert (
        shown("[`a`](../scavenger/data.py), [b](https://arxiv.org) [c](#d)", layout)
        == "`a`, [b](https://arxiv.org) [c](#d)"
    )
    assert shown("[a](../docs/layout.md)", mixers) == "[a](../layout.md)"
    fenced = "```text\n[a](nothing.md)\n```\n"
    assert shown(fenced, layout) == fenced and not caplog.records
    shown("[a](../tests/no_such_test.py)", layout)
    (record,) = caplog.records
    assert (
        record.levelname == "WARNING" and "layout.md: ../tests/no_such_test.py leads to no file" in record.getMessage()
    )


@pytest.mark.parametrize("block", blocks(needing=True), ids=str)
def test_a_block_is_tested_or_says_what_it_needs(block):
    if block.needs:
        assert block.needs.startswith(NEEDS)
    else:
        assert block.language in ("python", "bash", "yaml", "mermaid", "text") or "scavenger/\n" in block.text


PYTHON = {
    page.stem: [block.text for block in blocks("python") if block.page == page]
    for page in PAGES
    if page != ROOT / "README.md"  # tests/test_readme.py runs those, on a run of the quickstart
}


@pytest.mark.parametrize("page", [page for page, own in PYTHON.items() if own])
def test_python_runs(page, finished, tmp_path):
    """The blocks of a page one after the other, on a small run."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(finished)
    (tmp_path / "eval").symlink_to(ROOT / "eval")
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec("\n".join(PYTHON[page]), {})
    assert printed.getvalue()


class Parsed(BaseException):
    """A parser was content with its arguments; nothing of the command runs."""


@contextlib.contextmanager
def only_parsing():
    """Within the context a command ends once its own parser has read its arguments."""

    def ending(name):
        parse = getattr(argparse.ArgumentParser, name)

        def parse_and_end(parser, words=None, namespace=None):
            raise Parsed(parse(parser, words, namespace))

        return mock.patch.object(argparse.ArgumentParser, name, parse_and_end)

    with ending("parse_args"), ending("parse_intermixed_args"):
        yield


def understood(line, place):
    """Fail unless the command's own parser takes the line and a recipe in it loads; paths of the reader's are ours."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        assert args.config_file is None or (ROOT / args.config_file).is_file()
        assert bool(args.module) == (args.training_script == "scavenger")
        rest = words[words.index(args.training_script) + bool(args.module) :]
        return understood(shlex.join(["scavenger", *rest]), place)
    if words[0] == "python" and words[1].endswith(".yaml"):
        return understood(shlex.join(["scavenger", *words[1:]]), place)
    if words[0] == "make":
        return [launch("make", "--dry-run", target).check_returncode() for target in words[1:]]
    if words[:2] == ["pip", "install"]:
        asked = re.findall(r"\[([\w,]+)\]", words[-1])
        assert asked or words[-1] == "."
        return [PROJECT["optional-dependencies"][extra] for extras in asked for extra in extras.split(",")]
    with only_parsing(), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            if words[0] == "python":
                done = command(*words[1:]) if len(words) > 2 else (ROOT / words[1]).is_file()
                assert done is True, (line, done)
            else:
                assert words[0] == "scavenger", line
                program.command(words[1:])
        except Parsed as parsed:
            (args,) = parsed.args
        except SystemExit:
            pytest.fail(f"{line}: {said.getvalue()}")
        else:
            return None
    if "recipe" in args:
        ours = {"teacher.path": EMBEDDED_TEACHER, "data.path": place}
        pairs = [word.split("=", 1) for word in args.overrides]
        load_recipe(str(ROOT / args.recipe), [f"{key}={ours.get(key, value)}" for key, value in pairs])


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line, tmp_path):
    (tmp_path / "text.txt").write_text("text")
    understood(line, tmp_path)


def inline():
    found = {line for page in PAGES for line in INLINE.findall(prose(page))}
    return sorted(line.replace("RECIPE", "recipes/quickstart.yaml") for line in found)


@pytest.mark.parametrize("line", inline())
def test_commands_in_sentences_are_understood(line, tmp_path):
    if line.startswith("accelerate launch --") and not line.endswith(".yaml"):
        line += " recipes/quickstart.yaml"  # an option by itself
    if line.removeprefix("scavenger ") not in ("push", "rank", "recur", "serve"):  # mentioned, and tested in blocks
        understood(line, tmp_path)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_recipes_load(block, tmp_path):
    """Whole recipes, and sections in place of the quickstart's."""
    made = yaml.safe_load(block.text)
    for name, section in made.items() if "run_dir" not in made else ():
        made[name] = QUICKSTART[name] | section if name in QUICKSTART and isinstance(section, dict) else section
    made = made if "run_dir" in made else QUICKSTART | made
    if "path" in made["data"]:
        (tmp_path / made["data"]["path"]).write_text("{}")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    with contextlib.chdir(tmp_path):
        load_recipe("recipe.yaml")


def test_file_tree_is_the_disk():
    (block,) = [block for block in blocks("") if block.page.stem == "layout"]
    tree = block.text.splitlines()
    named, folder = set(), None
    for line in tree:
        name, depth = line.split()[0], len(line) - len(line.lstrip())
        if depth == 2:
            named.add(name)
            folder = name
        if depth == 4:
            named.add(folder + name)
    tracked = [path.removeprefix("scavenger/") for path in launch("git", "ls-files", "scavenger").stdout.split()]
    shown = {name.partition("/")[0] + "/" for name in named if "/" in name.rstrip("/")}  # folders with their files
    entries = set()
    for path in tracked:
        first, slash, inside = path.partition("/")
        entries.add(first + slash)
        if slash and first + slash in shown:
            entries.add(first + slash + inside.partition("/")[0] + ("/" if "/" in inside else ""))
    assert named == {entry for entry in entries if not entry.endswith("__init__.py")}
    top = {line.split()[0] for line in tree if not line.startswith("  ")}
    assert all((ROOT / name).exists() for name in top)


def strings():
    """Every text in the code; what is put into it reads …"""

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return node.value

    for path in [*(ROOT / "scavenger").rglob("*.py"), *(ROOT / "eval").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield text(node)


@pytest.mark.slow
def test_messages_of_troubleshooting_are_the_programs():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    code = "\n".join(strings())
    assert len(messages) > 40
    patterns = {message: ".*".join(map(re.escape, message.strip("…").split("…"))) for message in messages}
    assert not [message for message, pattern in patterns.items() if not re.search(pattern, code)]


def test_every_page_of_results_is_listed():
    index = (ROOT / "docs/results/index.md").read_text(encoding="utf-8")
    listed = {(ROOT / "docs/results" / target).resolve() for target in re.findall(r"\]\(([^)]+\.md)\)", index)}
    there = {path for pattern in ("docs/results/*.md", "eval/*.md", "benchmarks/*.md") for path in ROOT.glob(pattern)}
    assert listed == there - {ROOT / "docs/results/index.md"}
    for target, date in re.findall(r"\]\(([^)]+\.md)\) \|.*\| (\d{4}-\d\d-\d\d) \|", index):
        listed.remove((ROOT / "docs/results" / target).resolve())
        assert date in (ROOT / "docs/results" / target).read_text(encoding="utf-8"), "a page says its own date"
    assert not listed, "without a date"


def test_citation():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found.keys() >= {"cff-version", "message", "title", "authors", "license"}
    assert found["version"] == __version__ == PROJECT["version"] and found["license"] == PROJECT["license"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_forms_for_issues(form):
    found = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert found.keys() >= {"name", "description", "body"}
    assert all(field["attributes"]["label"] for field in found["body"])
    assert len({field["id"] for field in found["body"]}) == len(found["body"])
