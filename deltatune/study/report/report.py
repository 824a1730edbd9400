"""A study's report: its facts, verdicts, sections and failures, gathered as data; ``page`` and ``markdown`` write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from deltatune.study.experiments.experiment import Claim, Evidence, Judgement, experiments, judged
from deltatune.study.report.parts import Section, Table

if TYPE_CHECKING:
    from deltatune.study.store.store import Store


@dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes:
        title: the study's name.
        question: what its experiment asks.
        facts: names and values, of the study as a whole.
        verdicts: claims with what became of them.
        sections: of the experiment.
        command: does the study again.
    """

    title: str
    question: str
    facts: Sequence[tuple[str, str]]
    verdicts: Sequence[tuple[Claim, Judgement]]
    sections: Sequence[Section]
    command: str


def evidence_of(store: Store, name: str) -> Evidence:
    """What the store has of a study.

    Raises:
        UnknownName: it has no such study.
    """
    records = [record for record in store.records(name) if record.purpose == "trial"]
    return Evidence(store.study(name), records, lambda key: store.curve(name, key))


def report_of(store: Store, name: str) -> Report:
    """The report of a study, finished or not.

    Raises:
        UnknownName: the store has no such study, or nobody knows its experiment.
    """
    evidence = evidence_of(store, name)
    experiment = experiments[evidence.study.experiment]
    sections = [*experiment.sections(evidence), *_failures(evidence)]
    facts = [*_facts(evidence), *_machines(store, name)]
    return Report(name, experiment.question, facts, judged(experiment, evidence), sections, _command(evidence))


def _command(evidence: Evidence) -> str:
    study = evidence.study
    own = experiments[study.experiment].study(study.profile)
    return f"deltatune study run {study.experiment} --profile {study.profile}" if own == study else "deltatune study run study.yaml"


def _facts(evidence: Evidence) -> list[tuple[str, str]]:
    study, done = evidence.study, [record for record in evidence.records if record.state == "done"]
    waiting = len(evidence.records) - len(done)
    seconds = sum(record.seconds or 0.0 for record in done)
    trained = [record for record in done if record.tokens and record.training_seconds]
    facts = [
        ("profile", f"{study.profile}{': tries the machinery, reaches no verdict' if study.profile == 'quick' else ''}"),
        ("backbones", ", ".join(study.backbones)),
        ("tasks", f"{len(study.tasks)} in {len(set(evidence.categories.values()))} categories"),
        ("methods", ", ".join(entry.label for entry in study.entries)),
        ("seeds", ", ".join(map(str, study.seeds))),
        ("trials", f"{len(done)} done{f', {waiting} not' if waiting else ''}"),
    ]
    if seconds:
        facts.append(("throughput", f"{60 * len(done) / seconds:.2f} trials a minute of running trials, {seconds / 3600:.2f} hours in all"))
    if trained:
        tokens = sum(record.tokens or 0 for record in trained)
        rate = tokens / sum(record.training_seconds or 0.0 for record in trained)
        steps = fmean(record.steps or 0 for record in trained)
        facts.append(("training", f"{tokens:,} tokens, {rate:,.0f} a second (validation included); {steps:,.0f} steps a trial"))
    return facts


def _machines(store: Store, name: str) -> list[tuple[str, str]]:
    facts = []
    for place in store.places(name):
        machine, memory = place.machine, place.machine.get("memory_bytes")
        words = [machine.get("gpu"), machine.get("processor"), f"{machine.get('cores')} cores", f"{machine.get('threads')} threads"]
        said = ", ".join(str(word) for word in words if word) + (f", {memory / 2**30:.0f} GiB" if memory else "")
        facts += [("machine", said), ("software", ", ".join(f"{package} {version}" for package, version in place.versions.items()))]
    return facts


def _failures(evidence: Evidence) -> list[Section]:
    rows = [
        (record.method, record.task, str(record.seed), str(record.attempts), record.error or "")
        for record in evidence.records
        if record.state == "failed"
    ]
    if not rows:
        return []
    return [Section("Failures", "", (Table(("method", "task", "seed", "attempts", "error"), rows, left=5),))]
