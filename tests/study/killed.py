"""A study whose driver dies: the body of a process of its own, killed at some moment of some trial."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from deltatune.study import driver as driver_module
from deltatune.study.design import study_from_dict
from deltatune.study.runner import local
from deltatune.study.runner.local import LocalRunner
from deltatune.study.runner.ray import Resources, ray_runner
from deltatune.study.store import writer
from deltatune.study.store.store import Store
from deltatune.training import trainer
from tests.study.conftest import driver

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])

PLACES: dict[str, tuple[Any, str]] = {
    "begin": (local, "carry_out"),
    "step": (trainer.DeltaTrainer, "compute_loss"),
    "finish": (writer.Writer, "finish"),
    "commit": (writer, "_end"),
    "sweep": (driver_module, "discard"),
}
"""Where one can die: ahead of a trial, in its middle, between its files and the store, inside the transaction, and behind it."""


def die(written: dict[str, Any], place: Path, moment: str, on_ray: bool = False) -> None:
    """Run the study and be killed at the moment, ``kind:number``."""
    torch.set_num_threads(1)
    kind, number = moment.split(":")
    owner, name = PLACES[kind]
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    store, study = Store(place / "studies.db"), study_from_dict(written)
    store.add(study)
    runner = ray_runner(Resources(workers=1, cpus=1)) if on_ray else LocalRunner
    driver(store, study, place / "trials", runner=runner).run()


def kill(written: dict[str, Any], place: Path, moment: str, *, on_ray: bool = False) -> int:
    """``die`` in a process of its own; returns its exit code, minus the signal."""
    process = CONTEXT.Process(target=die, args=(written, place, moment, on_ray))
    process.start()
    process.join(240)
    assert process.exitcode is not None
    return process.exitcode
