"""The fenced blocks of the project's pages, with what their marks say they would need."""

import re
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
# Pages of measured results are records of their time: their recipes are of earlier versions.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/results/index.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"(?:^<!-- (.*) -->\n)?^```(\w*)\n(.*?)^```$", flags=re.S | re.M)


class Block(NamedTuple):
    page: Path
    needs: str  # what a comment before it says that a machine would need, "" for nothing
    language: str
    text: str

    def __str__(self):
        first = self.text.strip().splitlines()[0]
        return f"{self.page.relative_to(ROOT)}: {first[:50]}"


def blocks(*languages: str, needing: bool = False) -> list[Block]:
    """The blocks of some languages, of all pages; only `needing` includes those that would need something."""
    found = [
        Block(page, mark or "", language, text)
        for page in PAGES
        for mark, language, text in FENCE.findall(page.read_text(encoding="utf-8"))
    ]
    return [one for one in found if (not languages or one.language in languages) and (needing or not one.needs)]


def commands() -> list[str]:
    """The lines of all blocks of bash, without comments."""
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.text.splitlines()]
    return sorted({line for line in lines if line})


def prose(page: Path) -> str:
    """A page without its blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))
