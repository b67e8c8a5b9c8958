"""The gallery of the committed results, looked at in headless Chromium where there is one."""

import re
import shutil
from pathlib import Path

import pytest

from overparam.report import gallery, inventory

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "reference"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PHONE, DESKTOP = (390, 844), (1280, 900)
AXE_RULES = [
    *("color-contrast", "image-alt", "heading-order", "page-has-heading-one", "link-name", "label", "list"),
    *("button-name", "html-has-lang", "document-title", "duplicate-id-aria", "landmark-one-main", "region"),
    *("scrollable-region-focusable", "empty-table-header", "meta-viewport"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("größe") / "gallery"
    gallery.build(inventory.take(RESULTS), folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here: the gallery was not looked at (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture
def page(browser):
    """A page that fails the test for anything on the console, and for any request to another place."""
    context = browser.new_context()
    opened = context.new_page()
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    yield opened
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def html_files(pages):
    return sorted(pages.glob("*.html"))


def test_it_is_small_and_has_a_page_for_every_record(pages):
    assert len(html_files(pages)) == 1 + len(inventory.take(RESULTS).records)
    assert sum(path.stat().st_size for path in pages.rglob("*") if path.is_file()) < 15e6


def test_nothing_in_it_asks_another_host(pages):
    for path in [*html_files(pages), *pages.glob("*.css"), *pages.glob("*.js")]:
        text = path.read_text()
        assert not re.search(r"(src|srcset|@import|url\()\s*=?\s*[\"']?(https?:)?//", text), path.name
        assert not re.search(r"<link[^>]+href=\"(https?:)?//", text), path.name


def test_no_link_is_broken(pages):
    ids = {path.name: set(re.findall(r'\bid="([^"]+)"', path.read_text())) for path in html_files(pages)}
    for path in html_files(pages):
        for link in re.findall(r'(?:href|src)="([^"]+)"', path.read_text()):
            if re.match(r"(https?:|data:|mailto:)", link):
                continue
            file, _, anchor = link.partition("#")
            assert not file or (pages / file).is_file(), f"{path.name}: {link}"
            assert not anchor or anchor in ids[file or path.name], f"{path.name}: {link}"


def test_the_claims_come_first(pages):
    text = (pages / "index.html").read_text()
    assert text.index('class="claims"') < text.index("<figure")
    assert re.findall(r"<h2[^>]*>([^<]+)", text)[0] == "Claims"


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_pages_fit_and_show_every_figure(pages, page, size, tmp_path):
    page.set_viewport_size({"width": size[0], "height": size[1]})
    for path in html_files(pages):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], path.name
        page.evaluate("document.querySelectorAll('img').forEach((each) => { each.loading = 'eager'; })")
        page.wait_for_function("[...document.images].every((each) => each.complete)")
        seen = page.evaluate(
            "[...document.querySelectorAll('figure img')].map((i) => [i.naturalWidth, i.clientWidth, i.alt])"
        )
        assert seen, path.name
        assert all(natural > 0 and shown >= 200 and alt for natural, shown, alt in seen), path.name
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=tmp_path / f"{scheme}.png")
    assert (tmp_path / "light.png").read_bytes() != (tmp_path / "dark.png").read_bytes()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility_by_axe(pages, page, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    for path in html_files(pages):
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        found = Axe().run(page, options={"runOnly": {"type": "rule", "values": AXE_RULES}})
        problems = {
            violation["id"]: [node["html"][:160] for node in violation["nodes"][:3]]
            for violation in found.response["violations"]
        }
        assert problems == {}, path.name


def test_search_finds_text_of_every_page_and_goes_there(pages, page):
    page.goto((pages / "index.html").as_uri())
    page.fill("#query", "contrastive loss depth")
    first = page.locator("#results .hit a").first
    assert first.is_visible()
    links = page.locator("#results .hit a").evaluate_all(
        "(all) => all.map((each) => each.getAttribute('href'))"
    )
    assert any(link.startswith("trailing_layer_pruning-gemma-3-270m.html#") for link in links)
    first.click()
    page.wait_for_load_state()
    assert page.locator("#results").is_hidden()
    page.fill("#query", "no such words anywhere")
    assert page.locator("#results").inner_text().startswith("Nothing has")


def test_light_and_dark_can_be_chosen(pages, page):
    page.emulate_media(color_scheme="light")
    page.goto((pages / "index.html").as_uri())
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    page.click("#theme")
    assert page.evaluate(background) != before


def test_a_missing_picture_and_a_missing_notebook_are_marked(tmp_path, make_record):
    results = tmp_path / "größe"
    make_record(results / "layers" / "tiny-1", figure=True)
    (results / "layers" / "tiny-1" / "loss.png").unlink()
    index = gallery.build(inventory.take(results))
    assert 'class="missing"' in index.read_text()
    text = index.with_name("layers-tiny.html").read_text()
    assert "Missing: loss.png" in text
    assert "run by hand: there is no executed notebook" in text


def test_without_records_the_gallery_says_so(tmp_path):
    assert "No results yet" in gallery.build(inventory.take(tmp_path)).read_text()
