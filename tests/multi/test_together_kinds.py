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
STEPS, FEWER, BOUNDS = 50, {"unipelt": 6}, {"unipelt": 1e-4}
"""A gate's first gradients are products of what is all but zero. AdamW makes whole steps of their rounding, which then grows."""


def recipe(name: str) -> Any:
    fields = {field.name for field in dataclasses.fields(methods[name])}
    return make(name, {field: value for field, value in SMALL.items() if field in fields})


@cache
def company(host: str) -> dict[str, tuple[Job, Outcome]]:
    names = [name for name in ROUTABLE if HOSTS[name] == host]
    jobs = [job(recipe(name), name=name, seed=seed, max_steps=FEWER.get(name, STEPS), batch_size=2) for seed, name in enumerate(names)]
    return dict(zip(names, zip(jobs, together(still(host), jobs), strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTABLE)
def test_it_equals_its_own_run(name: str) -> None:
    one, outcome = company(HOSTS[name])[name]
    other = alone(still(HOSTS[name]), one)
    assert far(result(outcome), other) < BOUNDS.get(name, 1e-5)
    assert outcome.numbers["score"] == other.score
