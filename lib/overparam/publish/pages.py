"""``REPORT.md``: all results of a folder on one page, beside the records."""

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


def text(inventory: Inventory) -> str:
    """Return the text of ``REPORT.md``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=False,  # the page is Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["cell"] = tables.cell

    def link(record: Record, name: str) -> str:
        return quote((folder(record).relative_to(inventory.root) / name).as_posix())

    def picture(record: Record, figure: Figure) -> str:
        files = {Path(name).suffix: link(record, name) for name in figure.files}
        alt = figure.caption.split(". ")[0].replace("[", "\\[").replace("]", "\\]")
        missing = [name for name in figure.files if not (folder(record) / name).is_file()]
        lines = [f"**`{figure.id}`** {figure.caption} ([PDF]({files['.pdf']}), [points]({files['.csv']}))"]
        lines += [f"![{alt}]({files['.png']})"] if not missing else [f"Missing: {', '.join(missing)}."]
        return "\n" + "\n\n".join(lines) + "\n"

    return environment.get_template(FILE).render(
        name=inventory.root.resolve().name,
        inventory=inventory,
        tables=tables,
        remarks=[f"{remark[0].upper()}{remark[1:]}." for remark in inventory.remarks()],
        summary=next((record for record in inventory.records if record.study == SUMMARY), None),
        records=inventory.studies,
        missing=inventory.missing,
        papers=ledger.papers().values(),
        picture=picture,
        link=link,
        dotted=ledger.without_words,
    )


def write(inventory: Inventory) -> bool:
    """Write ``REPORT.md``, and return whether it changed."""
    return write_changed(inventory.root / FILE, text(inventory).encode())
