"""What an experiment is: a design for each profile, claims with their judges, and the sections of its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deltatune.registry import Registry
from deltatune.study.design import Profile, Study
from deltatune.study.record import Record
from deltatune.study.report.parts import Section
from deltatune.study.statistics import Scores, scores_of

Verdict = Literal["holds", "does not hold", "undecided"]
Curve = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Evidence:
    """What a study has brought so far.

    Attributes:
        study: its design.
        records: its trials, searches left out.
        curve: gives a trial's learning curve by its key.
    """

    study: Study
    records: Sequence[Record]
    curve: Callable[[str], Curve] = field(default=lambda key: ())

    @property
    def done(self) -> list[Record]:
        """The trials that have a score."""
        return [record for record in self.records if record.state == "done" and record.score is not None]

    @property
    def methods(self) -> list[str]:
        """Labels in the study's order, of methods that have a score somewhere."""
        there = {record.method for record in self.done}
        return [entry.label for entry in self.study.entries if entry.label in there]

    @property
    def categories(self) -> dict[str, str]:
        """Task -> category."""
        return {record.task: record.category for record in self.records}

    def narrowed(self, keep: Callable[[Record], bool]) -> Evidence:
        """What some of the trials say."""
        return replace(self, records=[record for record in self.records if keep(record)])

    def scores(self, backbone: str | None = None) -> Scores:
        """Task -> method -> mean score, of all backbones or of one."""
        return scores_of(record for record in self.done if backbone in (None, record.backbone))


@dataclass(frozen=True)
class Judgement:
    """What became of a claim.

    Attributes:
        verdict: holds, does not hold, or undecided.
        because: the numbers, in a sentence.
    """

    verdict: Verdict
    because: str


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper that can be tried.

    Attributes:
        number: in the project's list of claims, such as E2.
        says: the sentence.
        judge: looks at the evidence.
    """

    number: str
    says: str
    judge: Callable[[Evidence], Judgement]


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
        name: on the command line.
        question: what it asks.
        study: the design of a profile.
        claims: what it judges.
        sections: what its report shows besides verdicts.
    """

    name: str
    question: str
    study: Callable[[Profile], Study]
    claims: tuple[Claim, ...]
    sections: Callable[[Evidence], list[Section]]


experiments: Registry[Experiment] = Registry("experiment", "experiments", builtin="deltatune.study.experiments.builtin")
"""Every experiment, by name."""


def judged(experiment: Experiment, evidence: Evidence) -> list[tuple[Claim, Judgement]]:
    """Each claim with its verdict; the profile ``quick`` reaches none."""
    found = [(claim, claim.judge(evidence)) for claim in experiment.claims]
    if evidence.study.profile == "full":
        return found
    return [(claim, Judgement("undecided", f"The profile `quick` only tries the machinery. {told.because}")) for claim, told in found]
