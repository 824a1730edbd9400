"""What goes wrong in one job is that job's: the others end as if it had not been there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import Diverged, Halt, Idle
from deltatune.methods import BitFit, LoRA
from deltatune.multi.together import logbook
from deltatune.multi.together.logbook import Logbook
from deltatune.multi.together.sharing import ALONE
from deltatune.multi.together.tenant import Tenant
from tests.multi.alone import alone, far, job, result, still, together
from tests.training import tiny

EXACT = 1e-5


@pytest.mark.parametrize("tokens", [100_000, ALONE, None])
def test_a_job_where_no_forward_comes_by_is_idle_alone(tokens: int | None) -> None:
    model = tiny.backbone("bert")
    model.spare = nn.Linear(32, 32)
    jobs = [job(LoRA(rank=2), max_steps=2), job(LoRA(rank=2), where="spare", max_steps=30), job(BitFit(), max_steps=2)]
    outcomes = together(model, jobs, tokens=tokens)
    assert isinstance(outcomes[1].error, Idle) and "`lora` acts at `spare`" in str(outcomes[1].error)
    for k in (0, 2):
        assert far(result(outcomes[k]), alone(model, jobs[k])) < EXACT


def failing(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The jobs with seed 1 raise an error that is none of ours: in their second loss, the reading of rows, or their scores."""
    owner = Logbook if where == "score" else Tenant
    whole = getattr(owner, where)

    def fails(self: Any, *args: Any) -> Any:
        book = self if where == "score" else self.logbook
        if book.settings.seed == 1 and book.state.global_step == (0 if where == "begin" else 1):
            raise ValueError("something of my own broke")
        return whole(self, *args)

    monkeypatch.setattr(owner, where, fails)


@pytest.mark.parametrize("tokens", [100_000, ALONE, None])
@pytest.mark.parametrize("where", ["begin", "next", "loss", "score"])
def test_an_error_of_one_job_is_its_own(where: str, tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.backbone("bert")
    jobs = [job(LoRA(rank=2, dropout=0.1), max_steps=3), job(LoRA(rank=2), seed=1, max_steps=3), job(BitFit(), max_steps=2)]
    with monkeypatch.context() as patch:
        failing(patch, where)
        outcomes = together(model, jobs, tokens=tokens)
    assert isinstance(outcomes[1].error, ValueError) and outcomes[1].result is None
    for k in (0, 2):
        assert far(result(outcomes[k]), alone(model, jobs[k])) < EXACT


def test_what_comes_from_outside_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any) -> Any:
        raise Halt

    monkeypatch.setattr(logbook, "score_rows", late)
    for tokens in (100_000, ALONE):
        with pytest.raises(Halt):
            together(tiny.backbone("bert"), [job(LoRA(rank=2), max_steps=1, evaluations=1), job(BitFit(), max_steps=1)], tokens=tokens)


@pytest.mark.parametrize("lasting", [False, True])
def test_gradients_that_are_not_finite_are_computed_anew_alone(lasting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss is finite. Once, so that the job goes on where it is well by itself; and in its own backward, too."""
    model, own = still("bert"), []
    jobs = [job(LoRA(rank=2), max_steps=3, seed=seed) for seed in range(3)]
    whole, alone_too = Tenant.loss, Tenant.alone

    def loss(self: Tenant, *args: Any) -> Tensor:
        found = whole(self, *args)
        if self.settings.seed == 1 and self.logbook.state.global_step == 1 and found.requires_grad and (lasting or not own):
            found.register_hook(lambda gradient: gradient * torch.inf)
        return found

    def noted(self: Tenant, batches: Any) -> Tensor:
        own.append(self.settings.seed)
        return alone_too(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Tenant, "loss", loss)
        patch.setattr(Tenant, "alone", noted)
        outcomes = together(model, jobs)
    assert 1 in own
    for k, one in enumerate(jobs):
        if k == 1 and lasting:
            assert isinstance(outcomes[k].error, Diverged) and "gradients" in str(outcomes[k].error)
        else:
            assert far(result(outcomes[k]), alone(model, one)) < EXACT
