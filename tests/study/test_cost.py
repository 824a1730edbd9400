"""The procedure ``cost``: memory counted to the byte, times in turns, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune.study.procedures.cost as cost
from deltatune.errors import InvalidValue, Unsupported
from deltatune.methods import LoRA
from deltatune.study.design import Entry, Study, study_from_dict
from deltatune.study.procedures import procedures
from deltatune.study.procedures.apart import Ended, apart, told
from deltatune.study.procedures.step import INFERENCE, PARTS, batch_of, expect, load, plain, twin
from deltatune.study.trial import Trial
from deltatune.training.live import live_tensors
from deltatune.training.run import Run
from deltatune.training.settings import Settings
from tests.study.given import give
from tests.training.tiny import folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder("bert", tmp_path_factory.mktemp("cost"))


def trial(backbone: str, **options: Any) -> Trial:
    """LoRA on two rows of eight tokens."""
    run = Run(backbone, "bbc-news", (LoRA(rank=2),), settings=Settings(batch_size=2, max_length=8))
    return Trial(run, "lora", "cost", options={"rounds": 2, **options})


def test_live_tensors_are_counted_to_the_byte() -> None:
    weight = torch.ones(1000, 1000, requires_grad=True)
    with live_tensors() as live:
        start = live.bytes
        held = weight * 2
        view = held[:10]
        assert live.bytes - start == 4_000_000  # a view shares its storage
        (held * 3).sum()  # four more for a moment
        assert live.bytes - start == 4_000_000 and live.peak - start >= 8_000_000
        del held, view
        assert live.bytes == start


def test_a_twin_shares_numbers_and_not_gradients(tiny: str) -> None:
    one = trial(tiny)
    model = load(one)
    other = twin(model)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    model.requires_grad_(False)
    full, batch = plain(other, 0.1), batch_of(other, one)
    before = [b.detach().clone() for _, b in pairs]
    assert set(full.step(batch)) == set(PARTS)
    assert any(not torch.equal(a, was) for (a, _), was in zip(pairs, before, strict=True))  # the one sees the other's step
    assert all(a.grad is None for a, _ in pairs)


def test_what_would_take_too_long_says_so(tiny: str) -> None:
    one = trial(tiny, most_seconds=1e-9)
    with pytest.raises(Unsupported, match="`most_seconds` leaves 1e-09 for three"):
        expect(load(one), one)


@pytest.mark.slow
def test_a_trial_from_end_to_end(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = procedures["cost"](trial(tiny), tmp_path)
    numbers = found.numbers
    assert numbers["trainable_parameters"] < numbers["total_parameters"] < numbers["live_bytes"] and "score" not in numbers
    assert len(numbers["rounds"]) == 2
    assert all(
        set(one) == {*PARTS, INFERENCE} and all(len(pair) == 2 and min(pair) > 0 for pair in one.values()) for one in numbers["rounds"]
    )
    calls: list[Any] = []
    monkeypatch.setattr(cost, "apart", lambda work, *given: calls.append(work) or [])
    again = procedures["cost"](trial(tiny), tmp_path)  # what was measured ahead of a kill is not measured twice
    assert [one.__name__ for one in calls] == ["times"] and again.numbers["live_bytes"] == numbers["live_bytes"]


@pytest.mark.slow
def test_a_process_of_its_own() -> None:
    assert apart(give, "") != os.getpid()
    with pytest.raises(InvalidValue, match="not like this"):
        apart(give, "ours")
    with pytest.raises(Ended, match="code 9"):
        apart(give, "killed")


@pytest.mark.slow
def test_it_ends_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    place = tmp_path / "number"
    driver = subprocess.Popen([sys.executable, "-m", "tests.study.given", str(place)])
    number = until(lambda: place.exists() and place.read_text())
    driver.kill()
    driver.wait()
    assert until(lambda: not is_running(int(number)))


def until(there: Callable[[], Any]) -> Any:
    """What is there at last; starting processes takes long on a busy machine."""
    last = time.monotonic() + 240
    while not (found := there()) and time.monotonic() < last:
        time.sleep(0.2)
    return found


def is_running(number: int) -> bool:
    """A process of this number is there, and no mere entry of one that has ended."""
    try:
        os.kill(number, 0)
        status = Path(f"/proc/{number}/status")
        return not status.exists() or "State:\tZ" not in status.read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_errors_of_a_process_of_its_own() -> None:
    assert isinstance(told(MemoryError()), Unsupported) and isinstance(told(RuntimeError("can't allocate memory")), Unsupported)
    assert isinstance(told(KeyError("gone")), Ended) and "KeyError: 'gone'" in str(told(KeyError("gone")))


def test_points_are_cells_and_baselines_can_be_left_out() -> None:
    points = ({"batch_size": 1, "max_length": 16}, {"batch_size": 8, "max_length": 128})
    study = Study("s", ("minilm",), ("bbc-news",), (Entry("lora", (LoRA(),)),), points=points, baselines=False)
    assert [dict(one.cell) for one in study.trials()] == list(points)
    assert study_from_dict(study.to_dict()) == study
    with pytest.raises(InvalidValue, match="a `grid` and `points`"):
        Study("s", ("minilm",), ("bbc-news",), (Entry("lora", (LoRA(),)),), points=points, grid={"shots": (4,)})
