"""Experiment 3: its claims are judged by what was measured, each way."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from deltatune.study.experiments import efficiency as own
from deltatune.study.experiments import experiments
from deltatune.study.experiments.basis import AP, BF, DIFF, FT, LR, PT
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.procedures import apart
from deltatune.study.record import Record
from deltatune.study.report.parts import Section, Table

FULL = experiments["efficiency"].study("full")
BACKBONES = ("minilm", own.PAPER)


def record(method: str, backbone: str, batch: int, length: int, live: float, **ratios: float) -> Record:
    """A measurement; ``ratios`` of parts to full fine-tuning's, 1 where left out."""
    rounds = [{part: [ratios.get(part, 1.0), 1.0] for part in (*own.PARTS, own.INFERENCE)} for _ in range(3)]
    cell = {"batch_size": batch, "max_length": length}
    numbers: dict[str, Any] = {"live_bytes": live, "rounds": rounds}
    return Record(f"{method}{backbone}{batch}{length}", backbone, "glue-sst2", "sentiment", method, 0, cell, numbers=numbers)


def evidence(*records: Record) -> Evidence:
    return Evidence(FULL, records)


def memories(method: str, batch: int, share: float) -> list[Record]:
    """Full fine-tuning and a method with that share of its memory, on two backbones."""
    return [
        record(who, backbone, batch, own.LENGTH, live) for backbone in BACKBONES for who, live in ((FT, 1000.0), (method, 1000.0 * share))
    ]


def timed(method: str, **ratios: float) -> list[Record]:
    return [record(method, own.PAPER, 1, length, 1.0, **ratios) for length in own.LENGTHS]


@pytest.mark.parametrize(("share", "verdict"), [(0.26, "holds"), (0.4, "does not hold")])
def test_three_quarters(share: float, verdict: str) -> None:
    told = own.saves_most(evidence(*memories(LR, 8, share)))
    assert told.verdict == verdict and f"{1 - share:.1%}" in told.because
    assert own.saves_most(evidence(*memories(LR, 32, share))).verdict == "undecided"  # no small batch


@pytest.mark.parametrize(("share", "verdict"), [(0.6, "holds"), (0.7, "does not hold")])
def test_a_third(share: float, verdict: str) -> None:
    assert own.saves_a_third(evidence(*memories(LR, 32, 0.5), *memories(BF, 64, share))).verdict == verdict
    assert own.saves_a_third(evidence(*memories(LR, 1, share))).verdict == "undecided"


@pytest.mark.parametrize(("share", "verdict"), [(1.2, "holds"), (0.9, "does not hold")])
def test_diff_pruning(share: float, verdict: str) -> None:
    assert own.diff_pruning_takes_more(evidence(*memories(DIFF, 1, share))).verdict == verdict
    assert own.diff_pruning_takes_more(evidence()).verdict == "undecided"


def test_the_backward() -> None:
    as_logged = [*timed(PT, backward=0.5), *timed(BF, backward=0.6)]
    assert own.backward_falls(evidence(*as_logged, *timed(AP, backward=0.8))).verdict == "holds"
    assert own.backward_falls(evidence(*as_logged, *timed(AP, backward=0.95))).verdict == "does not hold"
    assert own.backward_falls(evidence(*as_logged)).verdict == "undecided"


def test_inference() -> None:
    others = [*timed(PT), *timed(BF)]
    assert own.only_the_adapter_slows(evidence(*others, *timed(AP, inference=1.3))).verdict == "holds"
    assert own.only_the_adapter_slows(evidence(*others, *timed(AP, inference=1.0))).verdict == "does not hold"
    assert own.only_the_adapter_slows(evidence(*timed(PT, inference=1.2), *timed(BF), *timed(AP, inference=1.3))).verdict == "does not hold"
    assert own.only_the_adapter_slows(evidence(*others[:3])).verdict == "undecided"


def test_training_time() -> None:
    assert own.trains_faster(evidence(*timed(AP, backward=0.4, forward=0.8, optimiser=0.0))).verdict == "holds"
    assert own.trains_faster(evidence(*timed(AP, backward=0.9))).verdict == "does not hold"
    mixed = [one for length, one in zip(own.LENGTHS, timed(AP, backward=0.1, forward=0.1, optimiser=0.1), strict=True) if length < 100]
    mixed += [one for length, one in zip(own.LENGTHS, timed(AP), strict=True) if length > 100]
    assert own.trains_faster(evidence(*mixed)).verdict == "undecided"


def test_tables_say_what_is_saved() -> None:
    found: list[Section] = own.sections(evidence(*memories(LR, 8, 0.25), *timed(LR, backward=0.5)))
    titles = ["Memory, minilm", "Time, minilm", f"Memory, {own.PAPER}", f"Time, {own.PAPER}", "What fits"]
    assert [one.title for one in found] == titles
    table = next(block for block in found[0].blocks if isinstance(block, Table))
    assert [row for row in table.rows if row[0] == LR] == [[LR, "0.00", "75%", "0.00"]]


def test_what_does_not_fit_is_said() -> None:
    """One line a backbone and batch: gigabytes, that it does not fit, or a dash."""
    whole, delta = record(FT, own.PAPER, 32, own.LENGTH, 0.0), record(LR, own.PAPER, 32, own.LENGTH, 9.1e9)
    failed = dataclasses.replace(whole, state="failed", numbers={}, error=f"Unsupported: This needs {own.LACKING} here.")
    other = dataclasses.replace(record(AP, own.PAPER, 32, own.LENGTH, 0.0), state="failed", numbers={}, error="Ended: killed")
    table = own.sections(evidence(delta, failed, other))[-1].blocks[0]
    assert isinstance(table, Table) and len(table.rows) == 1
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert (cells["backbone"], cells["batch"], cells[LR], cells[FT], cells[AP]) == (own.PAPER, "32", "9.10", "does not fit", "-")


def test_the_error_of_lacking_memory_is_known() -> None:
    assert own.LACKING in str(apart.told(MemoryError()))
