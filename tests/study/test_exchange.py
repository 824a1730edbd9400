"""A report's folder in another store: the same records, the same report, and the study goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deltatune.errors import InvalidValue
from deltatune.study.exchange import take_results
from deltatune.study.record import Record
from deltatune.study.report.markdown import write_markdown
from deltatune.study.report.report import report_of
from deltatune.study.report.results import write_design, write_machines, write_results
from deltatune.study.store.store import Store
from tests.study.made_up import TASKS, design, filled, outcome


def written(store: Store, folder: Path) -> Path:
    """What the command leaves behind, but for the pages."""
    for write in (write_results, write_machines, write_design):
        write(store, "made-up", folder)
    return folder


def seen(store: Store) -> list[Record]:
    """All records, whose machines have numbers of their own in each store."""
    return [replace(record, machine=None, attempts=0) for record in store.records("made-up")]


def test_another_store_holds_the_same(tmp_path: Path) -> None:
    first, second = filled(tmp_path / "one.db", design()), Store(tmp_path / "two.db")
    taken = take_results(second, written(first, tmp_path / "report"))
    assert (taken.study, taken.taken, taken.known, taken.strange) == ("made-up", 50, 0, 0)
    assert second.study("made-up") == first.study("made-up") and seen(second) == seen(first)
    key = first.records("made-up")[0].key
    assert second.curve("made-up", key) == first.curve("made-up", key) != []
    assert [(row.machine, row.versions) for row in second.places("made-up")] == [
        (row.machine, row.versions) for row in first.places("made-up")
    ]
    texts = [write_markdown(report_of(store, "made-up"), tmp_path / name).read_text() for store, name in ((first, "a"), (second, "b"))]
    assert texts[0] == texts[1]


def test_what_was_left_waits_and_what_is_done_stays(tmp_path: Path) -> None:
    first = filled(tmp_path / "one.db", design(), leave=["lora"])
    report, store = written(first, tmp_path / "report"), Store(tmp_path / "two.db")
    assert take_results(store, report).taken == 40
    with store.writer("made-up") as writer:
        waiting = writer.waiting()
        assert {trial.label for trial in waiting} == {"lora"} and len(waiting) == len(TASKS)
        writer.start(waiting[0])
        writer.finish(outcome(waiting[0]))
    again = take_results(store, report)
    assert (again.taken, again.known) == (0, 40) and store.counts("made-up")["done"] == 41


def test_results_of_another_design_are_told(tmp_path: Path) -> None:
    report = written(filled(tmp_path / "one.db", design()), tmp_path / "report")
    design_file = report / "study.yaml"
    design_file.write_text(design_file.read_text().replace("- bbc-news\n", ""))
    taken = take_results(Store(tmp_path / "two.db"), report)
    assert (taken.taken, taken.strange) == (45, 5)


def test_results_are_taken_into_todays_design(tmp_path: Path) -> None:
    report = written(filled(tmp_path / "one.db", design()), tmp_path / "report")
    taken = take_results(Store(tmp_path / "two.db"), report, study=design(methods=["lora"]))
    assert (taken.taken, taken.strange) == (30, 20)


def test_a_search_is_not_carried_over(tmp_path: Path) -> None:
    store = Store(tmp_path / "one.db")
    store.add(design(rates={"trials": 2}))
    with pytest.raises(InvalidValue, match="a report does not hold the search"):
        take_results(Store(tmp_path / "two.db"), written(store, tmp_path / "report"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "machines.json").unlink(), "FileNotFoundError"),
        (lambda folder: (folder / "machines.json").write_text("{}"), "KeyError"),
        (lambda folder: (folder / "results.csv").write_text("key,state\nx,done\n"), "KeyError: 'curve'"),
    ],
)
def test_what_is_no_report_enters_nothing(damage: object, said: str, tmp_path: Path) -> None:
    report, store = written(filled(tmp_path / "one.db", design()), tmp_path / "report"), Store(tmp_path / "two.db")
    assert callable(damage)
    damage(report)
    with pytest.raises(InvalidValue, match=f"does not hold results as a report writes them: {said}"):
        take_results(store, report)
    assert store.names() == []
