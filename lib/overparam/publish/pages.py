"""``REPORT.md``: everything that a results folder says, on one page beside the records."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import jinja2

from overparam.publish import tables
from overparam.publish.inventory import SUMMARY, Inventory, folder
from overparam.record import ledger
from overparam.record.record import Figure, Record
from overparam.support.files import write_changed

FILE = "REPORT.md"
TEMPLATES = Path(__file__).with_name("templates")


def text(found: Inventory) -> str:
    """``REPORT.md`` as it should be."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=False,  # it is Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["cell"] = tables.cell

    def link(record: Record, name: str) -> str:
        return quote((folder(record).relative_to(found.root) / name).as_posix())

    def picture(record: Record, figure: Figure) -> str:
        files = {Path(name).suffix: link(record, name) for name in figure.files}
        alt = figure.caption.split(". ")[0].replace("[", "\\[").replace("]", "\\]")
        gone = [name for name in figure.files if not (folder(record) / name).is_file()]
        lines = [f"**`{figure.id}`** {figure.caption} ([PDF]({files['.pdf']}), [points]({files['.csv']}))"]
        lines += [f"![{alt}]({files['.png']})"] if not gone else [f"Missing: {', '.join(gone)}."]
        return "\n" + "\n\n".join(lines) + "\n"

    return environment.get_template(FILE).render(
        name=found.root.resolve().name,
        found=found,
        tables=tables,
        remarks=[f"{remark[0].upper()}{remark[1:]}." for remark in found.remarks()],
        summary=next((record for record in found.records if record.study == SUMMARY), None),
        records=found.studies,
        missing=found.missing,
        papers=ledger.papers().values(),
        picture=picture,
        link=link,
        dotted=ledger.without_words,
    )


def write(found: Inventory) -> bool:
    """Write ``REPORT.md``, and return whether it changed."""
    return write_changed(found.root / FILE, text(found).encode())
