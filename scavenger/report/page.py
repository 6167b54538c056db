"""The HTML page: one self-contained file, for screens of any width and for print."""

import base64
import html
import io
from dataclasses import dataclass, field

import matplotlib


matplotlib.use("Agg")  # draws to files, without a window
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402


PALETTE = ("#333333", "#c26d2d", "#2d6fc2", "#2f9e62", "#8a4fbe", "#b03030", "#00838f", "#7a6a00")
LINES = ("-", "-", "-", (0, (5, 2)))  # the curves of a student and its recurrence often coincide
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "savefig.bbox": "tight",
    "legend.frameon": False,
    "svg.hashsalt": "scavenger",  # the same data makes the same file
}
CSS = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 0 1rem 4rem; color: #222;
       background: #fff }
h1 { font-size: 1.5rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
nav { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ddd; padding: .45rem 0; font-size: .88rem;
      display: flex; gap: .2rem .9rem; overflow-x: auto; white-space: nowrap; z-index: 2 }
nav a { color: #2d5fa2; text-decoration: none } section { scroll-margin-top: 2.6rem }
.verdict { font-size: 1.08rem; background: #f3f6fa; border-left: 4px solid #2d6fc2; padding: .7rem 1rem }
.wide { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; font-size: .8rem }
th, td { padding: .28rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { vertical-align: bottom }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
td.better { color: #1b7a45 } td.worse { color: #a8322d }
td.better::after { content: " ▲" } td.worse::after { content: " ▼" }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: .5rem 1.5rem }
figure { margin: .4rem 0; min-width: 0; max-width: 40rem } figure img { width: 100%; height: auto }
figcaption, .note { font-size: .86rem; color: #555 } details { font-size: .9rem; margin: .2rem 0 .6rem }
summary { cursor: pointer; color: #2d5fa2 }
pre { background: #f6f6f4; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem;
      margin: .3rem 0 }
pre.given { color: #777 } pre .same { background: #dff0e4 }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .2rem 1rem }
.columns pre { max-height: 16rem; overflow: auto }
@media (max-width: 40rem) { th, td { padding: .25rem .4rem }
  th:first-child, td:first-child { max-width: 8rem; white-space: normal } pre { font-size: .74rem } }
@media print { nav { display: none } body { max-width: none; font-size: 11px } figure, tr { break-inside: avoid }
  details::details-content { content-visibility: visible; height: auto } .wide { overflow: visible }
  .columns pre { max-height: none } }
"""


@dataclass(frozen=True)
class Figure:
    """A plot as SVG, with a caption and its numbers as a table."""

    name: str  # its file's, without suffix
    svg: str
    caption: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    @property
    def html(self) -> str:
        source = base64.b64encode(self.svg.encode()).decode()
        numbers = f"<details><summary>numbers</summary>{table(self.header, self.rows)}</details>" if self.rows else ""
        return (
            f'<figure><img alt="{html.escape(self.caption)}" src="data:image/svg+xml;base64,{source}">'
            f"<figcaption>{html.escape(self.caption)}</figcaption>{numbers}</figure>"
        )


@dataclass(frozen=True)
class Section:
    """A heading, linked from the navigation bar, and the content below it."""

    title: str
    body: str
    figures: tuple[Figure, ...] = ()

    @property
    def anchor(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())

    @property
    def html(self) -> str:
        plots = f'<div class="figures">{"".join(figure.html for figure in self.figures)}</div>' if self.figures else ""
        return f'<section id="{self.anchor}"><h2>{html.escape(self.title)}</h2>\n{self.body}\n{plots}</section>'


def document(title: str, verdict: str, sections: list[Section]) -> str:
    """The whole page, without scripts and external resources."""
    links = "".join(f'<a href="#{section.anchor}">{html.escape(section.title)}</a>' for section in sections)
    body = "\n".join(section.html for section in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{html.escape(title)}</title>
<style>{CSS}</style></head>
<body><h1>{html.escape(title)}</h1>
<p class="verdict">{html.escape(verdict)}</p>
<nav>{links}</nav>
{body}
</body></html>
"""


def table(header: list[str], rows: list[list[str]], classes: dict[tuple[int, int], str] | None = None) -> str:
    """A table of text cells; `classes` maps (row, column) to a CSS class."""
    classes = classes or {}
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="{classes[line, column]}">{html.escape(cell)}</td>'
            if (line, column) in classes
            else f"<td>{html.escape(cell)}</td>"
            for column, cell in enumerate(row)
        )
        + "</tr>"
        for line, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{html.escape(text)}</p>"


def points(lines: list[str]) -> str:
    """A list of sentences."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def plot(width: float = 4.8, height: float = 3.0, rows: int = 1, **options):
    """Figure and axes of a plot in this page's style; `drawn` closes the figure."""
    plt.rcParams.update(STYLE)
    return plt.subplots(rows, 1, figsize=(width, height), **options)


def named(label: str) -> str:
    """A label escaped for a legend, which treats $ as mathematics and hides labels that begin with an underscore."""
    return label.replace("$", r"\$") if not label.startswith("_") else named(f" {label}")


def plain_ticks(axis):
    """A few tick labels without powers of ten on a logarithmic axis."""
    axis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axis.set_major_formatter(lambda x, _: f"{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def drawn(figure, name: str, caption: str, header=(), rows=()) -> Figure:
    """The plot as a `Figure` of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = file.getvalue()
    return Figure(name, svg[svg.index("<svg") :], caption, list(header), [list(row) for row in rows])
