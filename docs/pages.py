"""A hook of mkdocs: pages that lie outside docs/, notebooks, and links that work in the repository as on the site.

Pages link to files of the repository by relative paths. A link to a page of the site leads there. A link to any other
file that exists keeps its words only. A link to nothing is a warning, an error under `mkdocs build --strict`.
"""

import json
import logging
import os
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "eval/*.md", "benchmarks/*.md")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^[ ]*```.*?^[ ]*```[ ]*$)", flags=re.S | re.M)
log = logging.getLogger("mkdocs.hooks")


def on_files(files, config):
    """Add the pages outside docs/ by their paths in the repository, and each notebook as a page."""
    for path in notebooks():
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=as_markdown(path)))
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links to files of the repository into links of the site."""
    pages = {Path(file.abs_src_path): file.src_uri for file in files if file.abs_src_path}
    pages |= {path: f"notebooks/{path.stem}.md" for path in notebooks()}
    own = Path(page.file.abs_src_path or ROOT / "docs" / page.file.src_uri)

    def link(match):
        image, words, target = match.groups()
        path, mark, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        found = (own.parent / path).resolve()
        if found in pages:
            here = os.path.dirname(page.file.src_uri) or "."
            return f"{image}[{words}]({os.path.relpath(pages[found], here)}{mark}{anchor})"
        if not found.exists():
            log.warning(f"{page.file.src_uri}: {target} leads to no file")
        return words

    parts = FENCE.split(markdown)
    return "".join(part if index % 2 else LINK.sub(link, part) for index, part in enumerate(parts))


def notebooks():
    return sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def as_markdown(path):
    """A notebook as Markdown: its cells, with what they print and draw."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        language = "bash" if source.startswith("%%bash") else "python"
        parts.append(f"```{language}\n{source.removeprefix('%%bash').strip()}\n```")
        for output in cell["outputs"]:
            if output.get("name") == "stdout":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            image = output.get("data", {}).get("image/png")
            if image is not None:
                parts.append(f"![what the cell draws](data:image/png;base64,{''.join(image.split())})")
    return "\n\n".join(parts) + "\n"
