"""The page in a real browser: wide, on a phone and in print, with nothing fetched and nothing said in its console."""

import re
import shutil

import pytest

from scavenger.report import page
from scavenger.run.checkpoint import read_json


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
# No sandbox in a container's root; the rest keeps the browser from asking its maker's hosts for anything.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM is not None, "no Chromium on this machine (apt-get install chromium)"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(quickstart):
    """A report with everything that it can have."""
    run, _ = quickstart
    return run / "report"


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["wide", "phone"])
def seen(request, browser, report):
    """The page, and what it said and asked for."""
    width, height = request.param
    opened = browser.new_page(viewport={"width": width, "height": height})
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda asked_for: asked.append(asked_for.url))
    opened.goto((report / "index.html").as_uri())
    yield opened, said, asked
    opened.close()


def test_nothing_is_fetched_and_nothing_goes_wrong(seen, report):
    opened, said, asked = seen
    assert said == []
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert [url for url in asked if url.startswith("file:")] == [(report / "index.html").as_uri()]
    source = (report / "index.html").read_text()
    assert "<script" not in source and not re.search(r'(src|href)="(?!data:|#)', source)


def test_it_fits_the_screen(seen):
    opened, _, _ = seen
    widths = opened.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widths[0] == widths[1], "the page scrolls sideways"
    small = opened.evaluate(
        "[...document.querySelectorAll('p, td, summary')].filter(e => e.offsetParent)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(small) >= 11


def test_every_plot_is_drawn(seen, report):
    opened, _, _ = seen
    facts = "i.complete, i.naturalWidth, i.getBoundingClientRect().width"
    sizes = opened.evaluate(f"[...document.images].map(i => [{facts}])")
    plots = sorted(path.stem for path in (report / "plots").glob("*.svg"))
    assert len(sizes) == len(plots) and all(complete and natural > 100 for complete, natural, _ in sizes)
    screen = opened.viewport_size["width"]
    assert all(min(200, screen / 2) < width <= screen for _, _, width in sizes)
    assert {"quality", "position", "divergence", "step", "state"} <= {*plots}
    assert {"pairs", "copying", "passkey", "needle", "needle-gain", "passages", "repeats"} <= {*plots}
    assert {"activations", "logits", "floors", "errors", "state-sizes", "exactness", "hankel", "filter"} <= {*plots}


def test_every_part_and_every_figure_is_a_click_away(seen, report):
    """Each link of the first line leads to its part; what is folded opens at a click and has its numbers."""
    opened, _, _ = seen
    links = opened.locator("nav a")
    titles = [links.nth(index).inner_text() for index in range(links.count())]
    assert titles[:3] == ["Result", "Comparison", "By position"] and titles[-1] == "What was run"
    for index, title in enumerate(titles):
        links.nth(index).click()
        assert opened.locator("section:target h2").inner_text() == title
    folded = opened.locator("details")
    for index in range(folded.count()):
        if not folded.nth(index).is_visible():
            continue
        folded.nth(index).locator("summary").first.click()
        assert folded.nth(index).get_attribute("open") is not None
    text = opened.locator("body").inner_text()
    for row in read_json(report / "report.json")["comparison"]["rows"]:
        assert row["metric"] in text, row["metric"]


def test_in_print(browser, report):
    opened = browser.new_page()
    opened.goto((report / "index.html").as_uri())
    opened.emulate_media(media="print")
    assert not opened.locator("nav").is_visible()
    first = opened.locator("details table").first
    assert first.bounding_box()["height"] > 20, "paper has no click: what is folded is open"
    assert len(opened.pdf()) > 50_000
    opened.close()


def test_text_is_text():
    """What models write and what people name is shown, not run."""
    evil = "<script>alert(1)</script>\"'&"
    made = page.document(evil, evil, [page.Section(evil, page.table([evil], [[evil]]) + page.paragraph(evil))])
    assert "<script" not in made and made.count("&lt;script&gt;") == 8
