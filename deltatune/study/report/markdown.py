"""A report as Markdown, with its pictures beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deltatune.study.plots.canvas import svg
from deltatune.study.report.parts import Picture, Table
from deltatune.study.report.report import Report
from deltatune.training.files import write_text

PICTURES = "pictures"


def write_markdown(report: Report, folder: Path) -> Path:
    """``report.md`` and ``pictures/*.svg``.

    Raises:
        OutputError: they cannot be written.
    """
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for section in report.sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                write_text(folder / PICTURES / f"{block.name}.svg", svg(block.figure))
    target = folder / "report.md"
    write_text(target, "\n".join(_lines(report)).rstrip() + "\n")
    return target


def _lines(report: Report) -> Iterator[str]:
    yield from (f"# {report.title}", "", report.question, "")
    yield from table_lines(Table(("", ""), [(f"**{name}**", value) for name, value in report.facts], left=2))
    yield from ("", f"Done again by `{report.command}`.", "")
    if report.verdicts:
        yield from ("## Verdicts", "")
        rows = [(claim.number, claim.says, f"**{told.verdict}**", told.because) for claim, told in report.verdicts]
        yield from table_lines(Table(("claim", "says", "verdict", "because"), rows, left=4))
        yield ""
    for section in report.sections:
        yield from (f"## {section.title}", "")
        if section.text:
            yield from (section.text, "")
        for block in section.blocks:
            if isinstance(block, Picture):
                yield from (f"![{block.caption}]({PICTURES}/{block.name}.svg)", "", f"*{block.caption}*", "")
            else:
                yield from table_lines(block)
                yield from (("", block.note, "") if block.note else ("",))


def table_lines(table: Table) -> Iterator[str]:
    """A table in GitHub's form.

    >>> list(table_lines(Table(("a", "b"), [("x", "1")])))
    ['| a | b |', '|---|---:|', '| x | 1 |']
    """
    yield f"| {' | '.join(table.columns)} |"
    yield f"|{'|'.join('---' if number < table.left else '---:' for number in range(len(table.columns)))}|"
    for row, cells in enumerate(table.rows):
        shown = (f"**{cell}**" if (row, column) in table.strong else cell for column, cell in enumerate(cells))
        yield f"| {' | '.join(_cell(cell) for cell in shown)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
