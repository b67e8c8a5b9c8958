"""The gallery of the committed results, looked at in headless Chromium where there is one."""

import re
import shutil
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from overparam.publish import gallery, inventory

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "reference"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PHONE, DESKTOP = (390, 844), (1280, 900)
AXE_RULES = [
    *("image-alt", "heading-order", "page-has-heading-one", "link-name", "label", "list"),
    *("button-name", "html-has-lang", "document-title", "duplicate-id-aria", "landmark-one-main", "region"),
    *("scrollable-region-focusable", "empty-table-header", "meta-viewport"),
]

# the number of elements with text of their own, and those whose contrast with what is behind them is below 4.5
CONTRAST = """() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgb.slice(0, 3).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const rgb = numbers(getComputedStyle(element).backgroundColor);
    return rgb.length === 3 || rgb[3] === 1 || !element.parentElement ? rgb : behind(element.parentElement);
  };
  const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const found = [...document.body.querySelectorAll('*')].filter((each) => own(each) && each.checkVisibility());
  const contrast = (each) => {
    const [a, b] = [light(numbers(getComputedStyle(each).color)), light(behind(each))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const faint = found.filter((each) => contrast(each) < 4.5).slice(0, 5);
  return [found.length, faint.map((each) => each.outerHTML.slice(0, 120))];
}"""


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
    assert sum(path.stat().st_size for path in pages.rglob("*") if path.is_file()) < 30e6


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


def test_every_verdict_leads_to_its_row_in_the_notebook(pages):
    soup = BeautifulSoup((pages / "index.html").read_text(), "html.parser")
    links = [link["href"] for link in soup.select("table.claims a") if link.get_text() == "notebook"]
    assert len(links) == len(list(inventory.take(RESULTS).verdicts()))
    for link in links:
        page, _, anchor = link.partition("#")
        row = BeautifulSoup((pages / page).read_text(), "html.parser").select_one(f"tr[id='{anchor}']")
        statement = soup.select_one(f"tbody[id='{anchor}'] .statement").get_text()
        assert statement in row.get_text().replace("`", ""), link


def test_verdicts_are_counted_by_study_first(pages):
    soup = BeautifulSoup((pages / "index.html").read_text(), "html.parser")
    counts = soup.find("table")
    assert counts["class"] == ["counts"]
    sums = [int(cell.get_text()) for cell in counts.select("tfoot td")]
    assert sum(sums) == len(list(inventory.take(RESULTS).verdicts("claim")))
    for link in counts.select("tbody a"):
        assert soup.find(id=link["href"].removeprefix("#")).name == "h3"


def test_checks_have_a_table_of_their_own(pages):
    soup = BeautifulSoup((pages / "index.html").read_text(), "html.parser")
    (table,) = [each for each in soup.select("table.claims") if each.th.get_text() == "check"]
    assert len(table.select("tbody")) == len(inventory.take(RESULTS).questions("check"))
    assert "chrF++ 42" in table.get_text()
    assert "met" in [each.get_text() for each in table.select(".verdict")]
    others = [each.get_text() for each in soup.select("table.claims") if each is not table]
    assert not any("chrF++ 42" in text for text in others)


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


def test_accessibility_by_axe(pages, page):
    from axe_playwright_python.sync_playwright import Axe

    options = {"runOnly": {"type": "rule", "values": AXE_RULES}, "resultTypes": ["violations"]}
    for name in ("index.html", "moe_pretraining-moe-translator.html"):
        page.goto((pages / name).as_uri())
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        found = Axe().run(page, options=options).response["violations"]
        problems = {each["id"]: [node["html"][:160] for node in each["nodes"][:3]] for each in found}
        assert problems == {}, name


def test_text_stands_out_from_its_background(pages, page):
    """Contrast of 4.5 (WCAG AA) of all text, light and dark; axe needs minutes for pages of so many cells."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for path in html_files(pages):
            page.goto(path.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            texts, faint = page.evaluate(CONTRAST)
            assert texts > 100, path.name
            assert faint == [], (scheme, path.name)


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
    page.fill("#query", "qwxz")
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
    assert "not run by the batch runner: there is no executed notebook" in text


def test_without_records_the_gallery_says_so(tmp_path):
    assert "No results yet" in gallery.build(inventory.take(tmp_path)).read_text()
