"""The gallery: a folder of static web pages about a results folder, made with nbconvert and Jinja2.

It is self-contained: figures, records and notebooks are copied into it, and its pages load nothing from other hosts.
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
FOREST = "fig:claims-forest-"  # followed by the study
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
    """A figure with everything that a page shows about it; `png` is None if the picture is missing."""

    figure: Any
    record: Record
    name: str
    alt: str
    png: str | None
    size: tuple[int, int]
    links: list[tuple[str, str]]
    missing: list[str]


def build(inventory: Inventory, destination: Path | None = None) -> Path:
    """Make the gallery, replacing an older one in one step.

    Args:
        inventory: Contents of the results folder.
        destination: Folder of the gallery; by default ``gallery`` in the results folder.

    Returns:
        Path of its first page.
    """
    final = destination or inventory.root / FOLDER
    working = final.with_name(f".{final.name}.partial")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    for record in inventory.records:
        _copy(record, working)
    shown = {
        id(record): [_shown(cited, working) for cited in _of(inventory, record)]
        for record in inventory.records
    }
    environment = _environment(inventory)
    pages = {
        page_of(record): _notebook_page(environment, record, shown[id(record)])
        for record in inventory.records
    }
    pages["index.html"] = environment.get_template("index.html").render(**_index(inventory, shown, pages))
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
    """Name of a record on pages."""
    return f"{tables.title(record.study)}: {record.slug}" if record.study != SUMMARY else "All claims"


def page_of(record: Record) -> str:
    """Name of a record's page."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{record.study}-{record.slug}") + ".html"


def anchor_of(claim: Claim) -> str:
    """HTML id of a claim's row in the executed notebook, and of its rows on the first page."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"claim-{claim.id}")


def _studies(inventory: Inventory) -> list[str]:
    return list(dict.fromkeys(record.study for record in inventory.studies))


def _environment(inventory: Inventory) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    summary = [record for record in inventory.records if record.study == SUMMARY]
    by_study = {study: [r for r in inventory.studies if r.study == study] for study in _studies(inventory)}
    environment.globals.update(
        profile=inventory.root.resolve().name,
        records=[*inventory.studies, *summary],
        menu=[*((tables.title(study), records) for study, records in by_study.items()), ("", summary)],
        short=lambda record: "All claims" if record.study == SUMMARY else ledger.model_name(record.slug),
        origin=tables.origin(inventory.studies) if inventory.studies else "",
        nothing=tables.nothing(inventory),
        label=label,
        title=tables.title,
        page_of=page_of,
        dotted=ledger.without_words,
    )
    return environment


def _index(inventory: Inventory, shown: dict[int, list[Shown]], pages: dict[str, str]) -> dict[str, Any]:
    counts = tables.counts(inventory)
    summary = [each for record in inventory.records if record.study == SUMMARY for each in shown[id(record)]]
    return {
        "verdicts": [(verdict, TONES[verdict]) for verdict in tables.VERDICTS],
        "counts": counts,
        "sums": [sum(column) for column in zip(*(numbers for _, numbers in counts), strict=True)],
        "studies": [
            (study, list(_questions(inventory, "claim", pages, study)), _forest_of(study, summary))
            for study, _ in counts
        ],
        "checks": list(_questions(inventory, "check", pages)),
        "remarks": inventory.remarks(),
        "missing": inventory.missing,
        "groups": [(record, shown[id(record)]) for record in inventory.studies],
        "summary": [each for each in summary if not each.figure.id.startswith(FOREST)],
    }


def _forest_of(study: str, summary: Sequence[Shown]) -> Shown | None:
    wanted = f"{FOREST}{study.replace('_', '-')}"
    return next((each for each in summary if each.figure.id == wanted), None)


def _questions(
    inventory: Inventory, type: Literal["claim", "check"], pages: dict[str, str], study: str | None = None
) -> Iterator[dict[str, Any]]:
    """Claims or checks as the first page shows them: one statement, and a row for each model."""
    for question in inventory.questions(type):
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


def _of(inventory: Inventory, record: Record) -> list[Cited]:
    return [cited for cited in citing.figures(inventory) if cited.record is record]


def _copy(record: Record, working: Path) -> None:
    """Copy the files that pages link to, except missing ones."""
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
        body += "<p>This study was not run by the batch runner: there is no executed notebook.</p>"
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
    """Render an executed notebook, with its pictures replaced, in order, by the record's figures.

    The first table row that begins with a claim's statement gets the claim's anchor.

    Returns:
        The HTML, and how many figures it contains: none unless there are as many pictures as figures.
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
    """Set ids of rows in a verdict table; `waiting` maps statements to ids, and used ones are removed from it."""
    if not waiting or ">verdict</th>" not in html:
        return html
    soup = BeautifulSoup(html, "html.parser")
    for row in soup.select("tbody tr"):
        first = row.find("td")
        if first and (anchor := waiting.pop(" ".join(first.get_text().split()), None)):
            row["id"] = anchor
    return str(soup)


def _without_empty_headers(html: str) -> str:
    """Replace the empty header cells that pandas writes by plain cells."""
    return re.sub(r"<th([^>]*)>(?:\s|&nbsp;)*</th>", r"<td\1></td>", html)


def _linked(html: str) -> str:
    """Replace links to other notebooks by their text: their pages have other names here."""
    return re.sub(r'<a href="[^":#]+\.ipynb">(.*?)</a>', r"\1", html)


def _sections(page: str, html: str) -> list[dict[str, str]]:
    """Split the main part of a page at headings, figures and claims, for the search."""
    main = BeautifulSoup(html, "html.parser").main
    assert main is not None  # every template has it
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

    sections = []
    for part in main.select("figure[id], tbody[id]"):
        title = part.select_one(".statement, .id")
        text = " ".join(part.extract().get_text(" ").split())
        sections.append(section(title, part["id"], text))
    for node in main.descendants:
        if isinstance(node, Tag) and node.name in _HEADINGS:
            sections.append(section(node, node.get("id")))
        elif (
            sections
            and isinstance(node, NavigableString)
            and node.parent
            and node.parent.name not in _HEADINGS
        ):
            sections[-1]["text"] += "".join(f"{word} " for word in node.split())
    return sections
