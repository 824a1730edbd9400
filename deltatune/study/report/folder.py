"""A report as a folder: the page, the Markdown with its pictures, every trial, the machines, and the design."""

from __future__ import annotations

from pathlib import Path

from deltatune.study.report.markdown import write_markdown
from deltatune.study.report.page import write_page
from deltatune.study.report.report import Report, report_of
from deltatune.study.report.results import write_design, write_machines, write_results
from deltatune.study.store.store import Store


def write_report(store: Store, name: str, folder: Path) -> tuple[Report, list[Path]]:
    """The report of a study, finished or not, and the files of it.

    Raises:
        UnknownName: the store has no such study, or nobody knows its experiment.
        OutputError: a file cannot be written.
    """
    found = report_of(store, name)
    told = [write(found, folder) for write in (write_page, write_markdown)]
    return found, told + [write(store, name, folder) for write in (write_results, write_machines, write_design)]
