"""On Ray: a study survives the death of its driver and of its workers, and ends as in one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from deltatune.errors import InvalidValue
from deltatune.study.design import Study
from deltatune.study.driver import Driver
from deltatune.study.progress import Progress
from deltatune.study.record import Record
from deltatune.study.runner.ray import Resources, ray_runner
from deltatune.study.shows import Silent
from deltatune.study.store.store import Store
from deltatune.study.trial import Trial
from tests.study.killed import kill
from tests.study.test_kill import values

WORKER = "ray::work_there"


class Murder(Silent):
    """Kills the first worker that trains."""

    def __init__(self) -> None:
        self.killed: list[int] = []

    def started(self, trial: Trial, progress: Progress) -> None:
        """Wait for its process beside the driver, and kill it."""
        if trial.procedure == "train" and not self.killed:
            self.killed.append(0)
            threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        for _ in range(2000):
            for process in psutil.process_iter(["name", "cmdline", "uids"]):
                if WORKER in " ".join(process.info["cmdline"] or [process.info["name"] or ""]) and _is_ours(process):
                    self.killed[0] = process.pid
                    os.kill(process.pid, signal.SIGKILL)
                    return
            time.sleep(0.02)


def _is_ours(process: psutil.Process) -> bool:
    return any(parent.pid == os.getpid() for parent in process.parents())


@pytest.mark.slow
def test_a_study_on_ray_survives_its_driver_and_its_workers(tiny: Study, whole: list[Record], tmp_path: Path) -> None:
    assert kill(tiny.to_dict(), tmp_path, "finish:3", on_ray=True) == -9
    store, show = Store(tmp_path / "studies.db"), Murder()
    assert store.counts("tiny")["done"] == 2
    before = {record.key for record in store.records("tiny") if record.state == "done"}
    progress = Driver(store, "tiny", tmp_path / "trials", ray_runner(Resources(workers=1, cpus=1)), show).run()
    records = store.records("tiny")
    assert (progress.done, progress.failed) == (8, 0)
    assert values(records) == values(whole)
    states = {record.key: [attempt.state for attempt in store.attempts("tiny", record.key)] for record in records}
    assert all(found.count("done") == 1 for found in states.values())
    assert all(states[key] == ["done"] for key in before)
    assert show.killed[0] > 0
    assert sum(found.count("failed") for found in states.values()) == 1


def test_resources_are_shared() -> None:
    assert Resources(workers=2).of_unit(16, 1) == (8, 0.5, 2)
    assert Resources(gpus=0.25).of_unit(16, 1) == (4, 0.25, 4)
    with pytest.raises(InvalidValue, match="asks for 4 CPUs and 0 GPUs, but the cluster has 2 and 0"):
        Resources(workers=1, cpus=4).of_unit(2, 0)
    with pytest.raises(InvalidValue, match="`workers` is 0"):
        Resources(workers=0)
