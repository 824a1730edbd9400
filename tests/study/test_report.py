"""Reports: verdicts by the numbers, pictures of data, a page that needs nothing beside it."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deltatune.study.design import Study
from deltatune.study.experiments import experiments
from deltatune.study.experiments.experiment import judged
from deltatune.study.experiments.performance import design as performance
from deltatune.study.plots.canvas import svg
from deltatune.study.plots.categories import categories_of
from deltatune.study.plots.scores import draw_method_scores, method_scores
from deltatune.study.plots.shares import shares_of
from deltatune.study.report.markdown import write_markdown
from deltatune.study.report.page import write_page
from deltatune.study.report.parts import Picture, Table
from deltatune.study.report.report import Report, evidence_of, report_of
from deltatune.study.report.results import write_results
from deltatune.study.store.store import Store
from tests.study.made_up import TASKS, design, filled

METHODS = ["full", "lora", "adapter", "prefix-tuning", "prompt-tuning", "bitfit", "linear-probe", "diff-pruning", "last-layers"]


@pytest.fixture(scope="module")
def study() -> Study:
    """Ten tasks, nine methods, two seeds."""
    return design(methods=METHODS, seeds=[0, 1])


@pytest.fixture(scope="module")
def store(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The study, finished."""
    return filled(tmp_path_factory.mktemp("report") / "s.db", study)


@pytest.fixture(scope="module")
def report(store: Store) -> Report:
    """Of the finished study."""
    return report_of(store, "made-up")


def test_verdicts_follow_the_numbers(report: Report) -> None:
    verdicts = {(claim.number, claim.says.split()[0]): told for claim, told in report.verdicts}
    assert verdicts["E23", "BitFit"].verdict == "holds"
    assert verdicts["C6", "Training"].verdict == "holds"
    assert verdicts["E2", "LoRA,"].verdict == "holds"
    assert verdicts["E3", "Quality"].verdict == "holds" and "full" not in verdicts["E3", "Quality"].because
    assert verdicts["E25", "LoRA"].verdict == "holds"


def test_the_quick_profile_reaches_no_verdict(tmp_path: Path) -> None:
    store = filled(tmp_path / "s.db", design(methods=METHODS, profile="quick"))
    verdicts = judged(experiments["performance"], evidence_of(store, "made-up"))
    assert {told.verdict for _, told in verdicts} == {"undecided"}
    assert all("only tries the machinery" in told.because for _, told in verdicts)


def test_what_is_missing_decides_nothing(tmp_path: Path) -> None:
    store = filled(tmp_path / "s.db", design(methods=METHODS), leave=["prefix-tuning"])
    told = {claim.says: told for claim, told in judged(experiments["performance"], evidence_of(store, "made-up"))}
    ranking = told["The ranking is FT > LoRA > adapter > prefix > prompt."]
    assert (ranking.verdict, ranking.because) == ("undecided", "No scores of prefix-tuning.")


def test_a_reversed_ranking_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.study import made_up

    monkeypatch.setitem(made_up.QUALITY, "prompt-tuning", 0.95)
    store = filled(tmp_path / "s.db", design(methods=METHODS))
    ranking = judged(experiments["performance"], evidence_of(store, "made-up"))[0][1]
    assert ranking.verdict == "does not hold"


def test_the_page_needs_nothing_beside_it(report: Report, tmp_path: Path) -> None:
    text = write_page(report, tmp_path).read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]
    assert not re.search(r'(src|href)="', text.replace('xlink:href="#', "").replace('href="#', "")) and "http-equiv" not in text
    assert (
        text.count("<svg") == text.count("</svg>") == sum(isinstance(one, Picture) for part in report.sections for one in part.blocks) >= 4
    )
    assert text.count('class="verdict"') == 9
    assert "undefined" not in text and "nan" not in re.sub(r"<(svg|script).*?</(svg|script)>", "", text, flags=re.DOTALL).lower().replace(
        "finance", ""
    )


def test_the_markdown_has_its_pictures(report: Report, tmp_path: Path) -> None:
    text = write_markdown(report, tmp_path).read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) >= 4 and all((tmp_path / name).is_file() for name in pictures)
    for name in pictures:
        ElementTree.parse(tmp_path / name)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_every_trial_is_in_the_results(store: Store, study: Study, tmp_path: Path) -> None:
    with write_results(store, "made-up", tmp_path).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list(study.trials()))
    assert {"experiment", "backbone", "task", "method", "seed", "metric", "score"} <= rows[0].keys()
    assert {row["experiment"] for row in rows} == {"performance"}


def test_tables_are_whole(report: Report) -> None:
    tables = [block for section in report.sections for block in section.blocks if isinstance(block, Table)]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    [every] = [table for table in tables if table.columns[0] == "task"]
    assert sorted(row[0] for row in every.rows) == sorted(TASKS)
    assert len({row for row, _ in every.strong}) == len(TASKS)


def test_failures_are_in_the_report(tmp_path: Path) -> None:
    from deltatune.study.trial import Failure

    store = filled(tmp_path / "s.db", design(), leave=["lora"])
    with store.writer("made-up") as writer:
        for trial in writer.waiting():
            writer.start(trial)
            writer.fail(Failure(trial.key, "Diverged", "at step 3", ""), again=False)
    report = report_of(store, "made-up")
    assert report.sections[-1].title == "Failures"
    assert dict(report.facts)["trials"] == "40 done, 10 not"


def test_an_empty_study_has_a_report(tmp_path: Path) -> None:
    store = filled(tmp_path / "s.db", design(), leave=["full", "lora", "bitfit", "frozen", "random-delta"])
    report = report_of(store, "made-up")
    assert report.sections == [] and dict(report.facts)["trials"] == "0 done, 50 not"
    assert write_page(report, tmp_path).stat().st_size > 1000


def test_data_of_pictures(store: Store, study: Study) -> None:
    evidence = evidence_of(store, "made-up")
    rows = method_scores(evidence.scores(), evidence.methods)
    assert [row.mean.value for row in rows] == sorted((row.mean.value for row in rows), reverse=True)
    assert all(len(row.tasks) == len(TASKS) for row in rows)
    table = categories_of(evidence.scores(), evidence.categories, evidence.methods)
    assert sum(count for _, count in table.names) == len(TASKS)
    points = {point.method: point.share for point in shares_of(evidence.done)}
    assert "frozen" not in points and points["full"] > points["lora"] > points["bitfit"]


def test_a_picture_is_the_same_each_time(store: Store) -> None:
    evidence = evidence_of(store, "made-up")
    drawn = [svg(draw_method_scores(method_scores(evidence.scores(), evidence.methods), evidence.methods)) for _ in range(2)]
    assert drawn[0] == drawn[1] and "<text" not in drawn[0]


def test_the_designs_of_performance() -> None:
    quick = performance("quick")
    assert len(list(quick.trials())) == 2 * 9
    assert {"frozen", "random-delta"} < {entry.label for entry in quick.entries}
