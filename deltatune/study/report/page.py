"""A report as one HTML file that needs nothing beside it: style, pictures and the sorting of tables are within."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from deltatune.study.experiments.experiment import Claim, Judgement
from deltatune.study.plots.canvas import svg
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.report.report import Report
from deltatune.training.files import write_text

STYLE, SCRIPT = "page.css", "page.js"
"""Files beside this one, which go into the page."""

CLASSES = {"holds": "holds", "does not hold": "fails", "undecided": "open"}
LONG = 40
"""Letters from which on a cell is broken over lines."""


def write_page(report: Report, folder: Path) -> Path:
    """``report.html``.

    Raises:
        OutputError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "report.html"
    write_text(target, "\n".join(_lines(report)) + "\n")
    return target


def _lines(report: Report) -> Iterator[str]:
    yield from ("<!doctype html>", '<html lang="en">', '<meta charset="utf-8">', '<meta name="viewport" content="width=device-width">')
    yield from (f"<title>{escape(report.title)}</title>", f"<style>{_own(STYLE)}</style>", "<main>", f"<h1>{escape(report.title)}</h1>")
    yield f'<p class="question">{escape(report.question)}</p>'
    yield f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in report.facts)}</dl>"
    yield f"<p>Done again by <code>{escape(report.command)}</code>.</p>"
    if report.verdicts:
        yield "<h2>Verdicts</h2>"
        yield from (_verdict(claim, told) for claim, told in report.verdicts)
    for section in report.sections:
        yield from _section(section)
    yield from ("</main>", f"<script>{_own(SCRIPT)}</script>", "</html>")


def _own(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _verdict(claim: Claim, told: Judgement) -> str:
    return (
        f'<div class="verdict"><b class="{CLASSES[told.verdict]}">{told.verdict}</b>'
        f"<div><strong>{escape(claim.number)}</strong> {escape(claim.says)}</div><span>{escape(told.because)}</span></div>"
    )


def _section(section: Section) -> Iterator[str]:
    yield f"<h2>{escape(section.title)}</h2>"
    if section.text:
        yield f"<p>{escape(section.text)}</p>"
    for block in section.blocks:
        if isinstance(block, Picture):
            caption = escape(block.caption)
            yield f'<figure role="img" aria-label="{caption}">{svg(block.figure)}<figcaption>{caption}</figcaption></figure>'
        else:
            yield from _table(block)


def _table(table: Table) -> Iterator[str]:
    yield '<div class="scroll"><table><thead><tr>'
    yield "".join(f"<th{_words(number, table)}>{escape(name)}</th>" for number, name in enumerate(table.columns))
    yield "</tr></thead><tbody>"
    for row, cells in enumerate(table.rows):
        yield "<tr>" + "".join(_cell(text, row, column, table) for column, text in enumerate(cells)) + "</tr>"
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{escape(table.note)}</p>'


def _words(column: int, table: Table) -> str:
    return ' class="words"' if column < table.left else ""


def _cell(text: str, row: int, column: int, table: Table) -> str:
    shown = f"<strong>{escape(text)}</strong>" if (row, column) in table.strong else escape(text)
    classes = " ".join(name for name, true in (("words", column < table.left), ("long", len(text) > LONG)) if true)
    return f'<td class="{classes}">{shown}</td>' if classes else f"<td>{shown}</td>"
