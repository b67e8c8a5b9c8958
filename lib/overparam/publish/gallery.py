"""The gallery: a folder of static pages that shows a results folder, made by nbconvert and Jinja2.

It needs nothing beside itself: figures, records and notebooks are copied into it, and its pages ask no other host.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import jinja2
import nbformat
from bs4 import BeautifulSoup
from bs4.element import NavigableString, Tag
from markupsafe import Markup
from nbconvert import HTMLExporter

from overparam.publish import citing, tables
from overparam.publish.citing import Cited
from overparam.publish.inventory import SUMMARY, Inventory, Question, folder
from overparam.publish.pages import TEMPLATES
from overparam.record import ledger
from overparam.record.claims import Claim
from overparam.record.record import FILE_NAME, NOTEBOOK_NAME, Record
from overparam.support.files import replace_folder

FOLDER = "gallery"
FOREST = "fig:claims-forest-"  # and the study
TONES = {
    "reproduced": "good",
    "reproduced in direction": "half",
    "not reproduced": "bad",
    "inconclusive": "open",
    "not testable at this scale": "open",
}
_HEADINGS = {"h1", "h2", "h3", "h4"}


@dataclass(frozen=True)
class Shown:
    """A figure with everything that a page shows of it; `png` is None when the picture is gone."""

    figure: Any
    record: Record
    name: str
    alt: str
    png: str | None
    size: tuple[int, int]
    links: list[tuple[str, str]]
    missing: list[str]


def build(found: Inventory, destination: Path | None = None) -> Path:
    """Make the gallery and give it its place at once; a gallery that was there is replaced.

    Args:
        found: What the results folder holds.
        destination: Its folder, by default ``gallery`` in the results folder.

    Returns:
        Its first page.
    """
    final = destination or found.root / FOLDER
    working = final.with_name(f".{final.name}.partial")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    for record in found.records:
        _copy(record, working)
    shown = {id(record): [_shown(cited, working) for cited in _of(found, record)] for record in found.records}
    environment = _environment(found)
    pages = {
        page_of(record): _notebook_page(environment, record, shown[id(record)]) for record in found.records
    }
    pages["index.html"] = environment.get_template("index.html").render(**_index(found, shown, pages))
    sections = [section for name, html in pages.items() for section in _sections(name, html)]
    for name, html in pages.items():
        (working / name).write_text(html, encoding="utf-8")
    index = json.dumps(sections, ensure_ascii=False, indent=0).replace("</", "<\\/")
    (working / "search-index.js").write_text(f"const SECTIONS = {index};\n", encoding="utf-8")
    for name in ("style.css", "gallery.js"):
        shutil.copyfile(TEMPLATES / name, working / name)
    replace_folder(working, final)
    return final / "index.html"


def label(record: Record) -> str:
    """What pages call a record."""
    return f"{tables.title(record.study)}: {record.slug}" if record.study != SUMMARY else "All claims"


def page_of(record: Record) -> str:
    """Name of a record's page."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{record.study}-{record.slug}") + ".html"


def anchor_of(claim: Claim) -> str:
    """Id of the place of a claim: of its row in the executed notebook, and of its rows on the first page."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"claim-{claim.id}")


def _studies(found: Inventory) -> list[str]:
    return list(dict.fromkeys(record.study for record in found.studies))


def _environment(found: Inventory) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    summary = [record for record in found.records if record.study == SUMMARY]
    by_study = {study: [r for r in found.studies if r.study == study] for study in _studies(found)}
    environment.globals.update(
        profile=found.root.resolve().name,
        records=[*found.studies, *summary],
        menu=[*((tables.title(study), records) for study, records in by_study.items()), ("", summary)],
        short=lambda record: "All claims" if record.study == SUMMARY else ledger.model_name(record.slug),
        origin=tables.origin(found.studies) if found.studies else "",
        nothing=tables.nothing(found),
        label=label,
        title=tables.title,
        page_of=page_of,
        dotted=ledger.without_words,
    )
    return environment


def _index(found: Inventory, shown: dict[int, list[Shown]], pages: dict[str, str]) -> dict[str, Any]:
    counts = tables.counts(found)
    summary = [each for record in found.records if record.study == SUMMARY for each in shown[id(record)]]
    return {
        "verdicts": [(verdict, TONES[verdict]) for verdict in tables.VERDICTS],
        "counts": counts,
        "sums": [sum(column) for column in zip(*(numbers for _, numbers in counts), strict=True)],
        "studies": [
            (study, list(_questions(found, "claim", pages, study)), _forest_of(study, summary))
            for study, _ in counts
        ],
        "checks": list(_questions(found, "check", pages)),
        "remarks": found.remarks(),
        "missing": found.missing,
        "groups": [(record, shown[id(record)]) for record in found.studies],
        "summary": [each for each in summary if not each.figure.id.startswith(FOREST)],
    }


def _forest_of(study: str, summary: Sequence[Shown]) -> Shown | None:
    wanted = f"{FOREST}{study.replace('_', '-')}"
    return next((each for each in summary if each.figure.id == wanted), None)


def _questions(
    found: Inventory, type: Literal["claim", "check"], pages: dict[str, str], study: str | None = None
) -> Iterator[dict[str, Any]]:
    """What the first page shows of claims, or of checks: one statement, and a row for each model."""
    for question in found.questions(type):
        if study in (None, question.study):
            paper = _paper(question)
            yield {
                "anchor": anchor_of(question.claim),
                "statement": question.claim.statement,
                "source": question.claim.source,
                "url": paper.url if paper else None,
                "conditions": paper.conditions if paper else None,
                "published": question.claim.published,
                "study": question.study,
                "answers": [_answer(type, claim, record, pages) for claim, record in question.answers],
            }


def _paper(question: Question) -> ledger.Paper | None:
    return ledger.papers()[question.entry.paper] if question.entry and question.entry.paper else None


def _answer(type: str, claim: Claim, record: Record, pages: dict[str, str]) -> dict[str, Any]:
    page, place = page_of(record), anchor_of(claim)
    cell = f"{page}#{place}" if f'id="{place}"' in pages[page] else page
    figure = tables.png_of(claim, record) and f"{page}#{claim.figure.removeprefix('fig:')}"
    return {
        "model": record.slug,
        "measured": tables.measured_text(claim),
        "note": tables.shown_of(claim.note),
        "claim": claim,
        "verdict": tables.outcome(claim) if type == "check" else claim.verdict,
        "tone": TONES[claim.verdict],
        "links": [
            (text, link)
            for text, link in (("notebook", cell), ("figure", figure), ("record", _file(record, FILE_NAME)))
            if link
        ],
    }


def _of(found: Inventory, record: Record) -> list[Cited]:
    return [cited for cited in citing.figures(found) if cited.record is record]


def _copy(record: Record, working: Path) -> None:
    """Copy what the pages link to; files that are gone are left out."""
    target = working / "files" / record.study / folder(record).name
    target.mkdir(parents=True, exist_ok=True)
    names = [FILE_NAME, *(name for figure in record.figures for name in figure.files)]
    for name in [*names, *([record.notebook.file] if record.notebook else [])]:
        if (folder(record) / name).is_file():
            shutil.copyfile(folder(record) / name, target / name)


def _file(record: Record, name: str) -> str:
    return quote(f"files/{record.study}/{folder(record).name}/{name}")


def _shown(cited: Cited, working: Path) -> Shown:
    record, figure = cited.record, cited.figure
    here = working / "files" / record.study / folder(record).name
    missing = [name for name in figure.files if not (here / name).is_file()]
    by_ending = {Path(name).suffix: name for name in figure.files if name not in missing}
    links = [
        (text, _file(record, by_ending[ending]))
        for text, ending in (("PDF", ".pdf"), ("PNG", ".png"), ("points (CSV)", ".csv"))
        if ending in by_ending
    ]
    links.append(("record", _file(record, FILE_NAME)))
    png = by_ending.get(".png")
    first = figure.caption.split(". ")[0].rstrip(".")
    return Shown(
        figure,
        record,
        cited.name,
        alt=f"Chart: {first}.",
        png=_file(record, png) if png else None,
        size=_size(here / png) if png else (0, 0),
        links=links,
        missing=missing,
    )


def _size(png: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    with png.open("rb") as file:
        width, height = struct.unpack(">II", file.read(24)[16:24])
    return width, height


def _notebook_page(environment: jinja2.Environment, record: Record, figures: Sequence[Shown]) -> str:
    macro: Any = environment.get_template("figure.html").module
    blocks = [str(macro.figure(shown, 2)) for shown in figures]
    path = folder(record) / NOTEBOOK_NAME
    body, used = "<h1>" + label(record) + "</h1>", 0
    links = [("record", _file(record, FILE_NAME))]
    if record.notebook is None:
        body += "<p>It was run by hand: there is no executed notebook.</p>"
    elif not path.is_file():
        body += f'<p class="missing">Missing: {record.notebook.file}.</p>'
    else:
        body, used = _rendered(path, blocks, record.claims)
        links.append(("executed notebook", _file(record, record.notebook.file)))
    return environment.get_template("run.html").render(
        current=record,
        notebook=Markup(body),
        leftover=Markup("\n".join(blocks[used:])),
        links=links,
    )


def _rendered(path: Path, figures: Sequence[str], claims: Sequence[Claim]) -> tuple[str, int]:
    """Render an executed notebook; its pictures, in their order, become the record's figures.

    The first row of a table that begins with the statement of a claim gets the claim's anchor.

    Returns:
        The HTML, and how many of the figures are in it: none if there are not as many pictures as figures.
    """
    notebook: Any = nbformat.read(path, as_version=4)
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    fits = len(pictures) == len(figures)
    for output, html in zip(pictures, figures, strict=True) if fits else ():
        output.data = nbformat.from_dict({"text/html": html})
        output.metadata["figure"] = True
    waiting = {" ".join(claim.statement.split()): anchor_of(claim) for claim in claims}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if html := output.get("data", {}).get("text/html"):
                html = _without_empty_headers(html.replace('<table border="1"', "<table"))
                output.data["text/html"] = _with_anchors(html, waiting)
    exporter = HTMLExporter(
        template_name="notebook", extra_template_basedirs=[str(TEMPLATES)], exclude_anchor_links=True
    )
    exporter.register_filter("first_line", lambda source: source.strip().partition("\n")[0] or "code")
    body, _ = exporter.from_notebook_node(notebook)
    return _linked(body), len(figures) if fits else 0


def _with_anchors(html: str, waiting: dict[str, str]) -> str:
    """Give ids to the rows of a verdict table; `waiting` maps statements to ids, and loses those that are given."""
    if not waiting or ">verdict</th>" not in html:
        return html
    soup = BeautifulSoup(html, "html.parser")
    for row in soup.select("tbody tr"):
        first = row.find("td")
        if first and (anchor := waiting.pop(" ".join(first.get_text().split()), None)):
            row["id"] = anchor
    return str(soup)


def _without_empty_headers(html: str) -> str:
    """Make plain cells of the corners that pandas writes as headers of nothing."""
    return re.sub(r"<th([^>]*)>(?:\s|&nbsp;)*</th>", r"<td\1></td>", html)


def _linked(html: str) -> str:
    """Turn links to other notebooks of the suite into text: their pages have other names here."""
    return re.sub(r'<a href="[^":#]+\.ipynb">(.*?)</a>', r"\1", html)


def _sections(page: str, html: str) -> list[dict[str, str]]:
    """Cut the main part of a page at headings, figures and claims, for the search."""
    main = BeautifulSoup(html, "html.parser").main
    assert main is not None  # by the templates
    assert main.h1 is not None
    for each in main(["script", "style"]):
        each.decompose()
    name = main.h1.get_text(" ", strip=True)

    def section(title: Tag | None, anchor: Any, text: str = "") -> dict[str, str]:
        link = f"{page}#{quote(str(anchor))}" if anchor else page
        return {
            "link": link,
            "page": name,
            "title": title.get_text(" ", strip=True) if title else "",
            "text": text,
        }

    found = []
    for part in main.select("figure[id], tbody[id]"):
        title = part.select_one(".statement, .id")
        text = " ".join(part.extract().get_text(" ").split())
        found.append(section(title, part["id"], text))
    for node in main.descendants:
        if isinstance(node, Tag) and node.name in _HEADINGS:
            found.append(section(node, node.get("id")))
        elif (
            found and isinstance(node, NavigableString) and node.parent and node.parent.name not in _HEADINGS
        ):
            found[-1]["text"] += "".join(f"{word} " for word in node.split())
    return found
