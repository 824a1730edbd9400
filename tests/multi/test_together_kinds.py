"""Every kind that routes, all in one company: after 50 steps each job's losses and weights are those of its own run."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest

from deltatune.methods.kinds import methods
from deltatune.methods.making import make
from deltatune.multi.together.job import Job, Outcome
from tests.conformance.cells import SMALL, TRAINING
from tests.multi.alone import alone, far, job, result, still, together
from tests.multi.test_methods import HOSTS, UNROUTABLE

ROUTABLE = [name for name in TRAINING if name not in UNROUTABLE]
STEPS = 50
ROUGH = {"unipelt"}
"""A gate's first gradients are products of what is all but zero, and AdamW makes whole steps of their rounding: losses are compared."""


def recipe(name: str) -> Any:
    fields = {field.name for field in dataclasses.fields(methods[name])}
    return make(name, {field: value for field, value in SMALL.items() if field in fields})


@cache
def company(host: str) -> dict[str, tuple[Job, Outcome]]:
    names = [name for name in ROUTABLE if HOSTS[name] == host]
    jobs = [job(recipe(name), name=name, seed=seed, max_steps=STEPS, batch_size=2) for seed, name in enumerate(names)]
    return dict(zip(names, zip(jobs, together(still(host), jobs), strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTABLE)
def test_it_equals_its_own_run(name: str) -> None:
    one, outcome = company(HOSTS[name])[name]
    other = alone(still(HOSTS[name]), one)
    if name in ROUGH:
        losses = [[entry["loss"] for entry in run.history if "loss" in entry] for run in (result(outcome), other)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    else:
        assert far(result(outcome), other) < 1e-5
    assert outcome.numbers["score"] == other.score
