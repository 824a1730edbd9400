"""Experiment 10: its claims are judged by scores and by how far biases moved, each way."""

from __future__ import annotations

from typing import Any

import pytest

from deltatune.backbones import load_backbone
from deltatune.injection.attach import attach
from deltatune.study.experiments import biases as own
from deltatune.study.experiments import experiments
from deltatune.study.experiments.basis import BF, PROBE
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.record import Record
from tests.study.made_up import TASKS

FULL = experiments["biases"].study("full")


def evidence(same: float = 1.0, **far: float) -> Evidence:
    """BitFit's trials on seven tasks; ``far`` is the change of kinds by the last word of their role, 0.01 where left out."""
    records = []
    for number, task in enumerate(TASKS[:7]):
        lines = [
            {"kind": kind, "layer": 0, "change": far.get(kind.rpartition(".")[2], 0.01) * (1 + number / 100), "size": 8, "original": 0.1}
            for kind in own.KINDS
        ]
        numbers: dict[str, Any] = {
            "movement": lines,
            "undone": {own.KEY: {"score": 0.8, "same": same}, "none": {"score": 0.8, "same": 1.0}},
        }
        records.append(Record(task, "minilm", task, "c", BF, 0, score=0.8, numbers=numbers))
    return Evidence(FULL, records)


def scored(**scores: float) -> Evidence:
    """Mean scores by short names, a little apart from task to task."""
    labels = {
        "bitfit": BF,
        "pair": own.PAIR,
        "query": own.without(own.QUERY),
        "up": own.without(own.UP),
        "entries": own.ENTRIES,
        "rows": own.ROWS,
    }
    return Evidence(
        FULL,
        [
            Record(f"{task}{name}", "minilm", task, "c", labels.get(name, PROBE), 0, score=score + number / 500)
            for number, task in enumerate(TASKS)
            for name, score in scores.items()
        ],
    )


def test_who_moves_most() -> None:
    assert own.query_and_up_move_most(evidence(query=0.03, up=0.02)).verdict == "holds"
    assert own.query_and_up_move_most(evidence(query=0.03, up=0.005)).verdict == "does not hold"
    assert own.query_and_up_move_most(Evidence(FULL, ())).verdict == "undecided"


@pytest.mark.parametrize(("key", "verdict"), [(0.001, "holds"), (0.008, "does not hold")])
def test_the_key(key: float, verdict: str) -> None:
    assert own.the_key_hardly_moves(evidence(key=key)).verdict == verdict


@pytest.mark.parametrize(("same", "verdict"), [(1.0, "holds"), (0.9, "does not hold")])
def test_the_key_put_back(same: float, verdict: str) -> None:
    assert own.the_key_is_inert(evidence(same)).verdict == verdict
    assert own.the_key_is_inert(scored(bitfit=0.8)).verdict == "undecided"


def test_what_fixing_costs() -> None:
    assert own.fixing_costs(scored(bitfit=0.8, query=0.75, up=0.7)).verdict == "holds"
    assert own.fixing_costs(scored(bitfit=0.8, query=0.85, up=0.7)).verdict == "does not hold"
    assert own.fixing_costs(scored(bitfit=0.8, query=0.8, up=0.7)).verdict == "undecided"


def test_random_subsets() -> None:
    assert own.random_is_worse(scored(bitfit=0.8, entries=0.77, rows=0.76)).verdict == "holds"
    assert own.random_is_worse(scored(bitfit=0.8, entries=0.5, rows=0.76)).verdict == "does not hold"
    assert own.random_is_worse(scored(bitfit=0.8, entries=0.77)).verdict == "undecided"


@pytest.mark.parametrize("label", [own.PAIR, "key-alone", own.without(own.QUERY), own.ENTRIES, own.ROWS, BF])
def test_the_entries_fit_minilm(label: str) -> None:
    entry = next(one for one in FULL.methods if one.label == label)
    delta: Any = attach(load_backbone("minilm"), entry.methods[0], entry.where)
    sizes = {BF: 26_112, own.PAIR: 6 * (384 + 1536), "key-alone": 6 * 384, own.without(own.QUERY): 26_112 - 6 * 384}
    assert delta.budget().delta == sizes[label] if label in sizes else abs(delta.budget().delta / 26_112 - 1) < 0.15
