"""Citing figures: the list of all figures of a results folder, and BibTeX and caption for one of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from overparam.publish.inventory import Inventory, folder
from overparam.record import ledger
from overparam.record.record import FILE_NAME, Figure, Record
from overparam.support.files import write_changed
from overparam.support.suggest import hint

FILE = "figures.json"
LICENSE = "Apache-2.0"


@dataclass(frozen=True)
class Cited:
    """A figure with its record."""

    figure: Figure
    record: Record

    @property
    def name(self) -> str:
        """Its full name, ``fig:id@slug``; several records may have the same id."""
        return f"{self.figure.id}@{self.record.slug}"

    @property
    def claims(self) -> list[str]:
        """Ids of the claims that it shows."""
        return [claim.id for claim in self.record.claims if claim.figure == self.figure.id]


def figures(inventory: Inventory) -> list[Cited]:
    """All figures, in the order of their records."""
    return [Cited(figure, record) for record in inventory.records for figure in record.figures]


def rows(inventory: Inventory) -> list[dict[str, Any]]:
    """The content of ``figures.json``: a row for each figure, with paths relative to the results folder."""
    result = []
    for cited in figures(inventory):
        record, place = cited.record, folder(cited.record).relative_to(inventory.root)
        files = {(place / name).as_posix(): sha256 for name, sha256 in cited.figure.files.items()}
        notebook = (place / record.notebook.file).as_posix() if record.notebook else None
        result.append(
            {
                "name": cited.name,
                "id": cited.figure.id,
                "caption": cited.figure.caption,
                "files": files,
                "csv": next((name for name in files if name.endswith(".csv")), None),
                "record": (place / FILE_NAME).as_posix(),
                "notebook": notebook,
                "claims": cited.claims,
                "key": record.key,
                "git": record.provenance["git"]["sha"],
                "command": record.command,
                "license": LICENSE,
            }
        )
    return result


def text(inventory: Inventory) -> str:
    """Return the text of ``figures.json``."""
    return json.dumps(rows(inventory), indent=1, ensure_ascii=False) + "\n"


def write(inventory: Inventory) -> bool:
    """Write ``figures.json``, and return whether it changed."""
    return write_changed(inventory.root / FILE, text(inventory).encode())


def find(inventory: Inventory, name: str) -> Cited:
    """Find a figure by its id, or by ``id@slug`` if several records have it.

    Raises:
        ValueError: when there is none, or more than one.
    """
    wanted = name if name.startswith("fig:") else f"fig:{name}"
    every = figures(inventory)
    matches = [cited for cited in every if wanted in (cited.figure.id, cited.name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(
            f"{len(matches)} records have the figure {wanted}: name one, {' or '.join(c.name for c in matches)}"
        )
    names = [cited.name for cited in every] + [cited.figure.id for cited in every]
    raise ValueError(f"no figure {wanted} in {inventory.root}: {hint(wanted, names)}")


def bibtex(cited: Cited, citation_file: Path) -> str:
    """A BibTeX entry of a figure, with authors and version of the software from ``CITATION.cff``."""
    software = yaml.safe_load(citation_file.read_text(encoding="utf-8"))
    record, git = cited.record, cited.record.provenance["git"]
    title = _escaped(f"{software['title']}. Figure {cited.figure.id}, {record.slug}")
    key = f"overparam:{cited.figure.id.removeprefix('fig:')}:{record.slug}"
    commit = (git["sha"] or "unknown") + (" with uncommitted changes" if git["dirty"] else "")
    fields = {
        "title": f"{{{title}}}",
        "author": " and ".join(_author(author) for author in software["authors"]),
        "year": record.started[:4],
        "version": str(software["version"]),
        "howpublished": "Software and data",
        "note": _escaped(f"Figure {cited.name}, commit {commit}, record key {record.key}; {LICENSE}"),
    }
    if doi := software.get("doi"):
        fields["doi"] = doi
    if url := software.get("repository-code"):
        fields["url"] = url
    lines = [f"  {name:<12} = {{{value}}}" for name, value in fields.items()]
    return "\n".join([f"@misc{{{key},", ",\n".join(lines), "}"])


def caption(cited: Cited) -> str:
    """A caption for a paper: what the figure shows, which published claims it tests, and its record."""
    record, sources = cited.record, []
    for claim_id in cited.claims:
        entry = ledger.find(claim_id)
        if entry and entry.paper and entry.cited() not in sources:
            sources.append(entry.cited())
    parts = [cited.figure.caption]
    if sources:
        parts.append(f"Tests claims of {'; '.join(sources)}.")
    parts.append(
        f"Measured by overparam, study {record.study}, {record.profile} profile, record {record.key[:8]}."
    )
    return " ".join(parts)


def _author(author: dict[str, str]) -> str:
    family = " ".join(filter(None, [author.get("name-particle"), author.get("family-names")]))
    if family:
        return _escaped(f"{family}, {author.get('given-names', '')}".rstrip(", "))
    return f"{{{_escaped(author['name'])}}}"


def _escaped(value: str) -> str:
    for character in "&%_#$":
        value = value.replace(character, f"\\{character}")
    return value
