"""The runner on Ray: units as tasks of a cluster, on this machine or on many; a worker that dies costs its unit an attempt."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltatune.errors import InvalidValue, Unsupported, missing_extra
from deltatune.study.runner.runner import Begun, Happening, Runner, Unit
from deltatune.study.runner.work import TimeLimit, carry_out, failure_of
from deltatune.study.surroundings import surroundings
from deltatune.study.trial import Failure, Outcome, trial_from_dict

TICK = 0.5
"""Seconds between two looks at the clock."""

GRACE = 60.0
"""Seconds beyond its limit after which a trial that does not stop by itself is ended with its process."""

STORE_BYTES = 100 * 2**20
"""Of Ray's memory for objects; what goes through it are settings and numbers."""


@dataclass(frozen=True)
class Resources:
    """What the cluster is asked for.

    Attributes:
        address: of a cluster; None starts one on this machine.
        workers: most units at the same time; None takes as many as fit.
        cpus: of a unit; None shares all cores among the workers.
        gpus: of a unit; None shares all GPUs among the workers.

    Raises:
        InvalidValue: nothing would fit.
    """

    address: str | None = None
    workers: int | None = None
    cpus: float | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "cpus"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InvalidValue(f"`{name}` is {value}; it has to be greater than 0, or left out.")

    def of_unit(self, cores: float, cards: float) -> tuple[float, float, int]:
        """CPUs and GPUs of a unit, and how many fit.

        >>> Resources().of_unit(16, 2), Resources(workers=4).of_unit(16, 0), Resources(cpus=1).of_unit(2, 0)
        ((8.0, 1.0, 2), (4.0, 0.0, 4), (1, 0.0, 2))

        Raises:
            InvalidValue: none fits.
        """
        fitting = [int(cores // self.cpus)] if self.cpus else []
        fitting += [int(cards // self.gpus)] if self.gpus else []
        workers = self.workers or min(fitting, default=int(cards) or max(1, int(cores // 2)))
        cpus = self.cpus or max(1.0, float(cores // workers if workers else cores))
        gpus = self.gpus if self.gpus is not None else cards / workers if cards and workers else 0.0
        if workers < 1 or cpus > cores or gpus > cards:
            raise InvalidValue(
                f"A trial asks for {cpus:g} CPUs and {gpus:g} GPUs, but the cluster has {cores:g} and {cards:g}. Ask for less."
            )
        return cpus, gpus, workers


def ray_runner(resources: Resources) -> Callable[[Path, float | None], Runner]:
    """What makes the runner of a study, from its folder and its time limit."""
    return lambda folder, limit: RayRunner(folder, limit, resources)


class RayRunner(Runner):
    """Trials on Ray.

    Args:
        folder: of the study; of a cluster on several machines, one that they share.
        limit: most seconds of one trial.
        resources: what the cluster is asked for.

    Raises:
        MissingExtra: Ray is not installed.
        Unsupported: the cluster cannot be reached.
        InvalidValue: what is asked for does not fit.
    """

    def __init__(self, folder: Path, limit: float | None, resources: Resources) -> None:
        self.folder, self.limit = folder.resolve(), limit
        self.ray = _connected(resources.address)
        there = self.ray.cluster_resources()
        cpus, gpus, self._workers = resources.of_unit(there.get("CPU", 0), there.get("GPU", 0))
        self._work = self.ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=0)(work_there)

    @property
    def at_once(self) -> int:
        """As many as fit."""
        return self._workers

    def conduct(self, queue: deque[Unit]) -> Iterator[Happening]:
        """Keep the cluster busy, and pass on what comes back."""
        running: dict[Any, tuple[Unit, float]] = {}
        try:
            while queue or running:
                while queue and len(running) < self._workers:
                    unit = queue.popleft()
                    yield Begun(unit)
                    running[self._begin(unit)] = (unit, time.monotonic())
                ready, _ = self.ray.wait(list(running), num_returns=1, timeout=TICK)
                for reference in ready:
                    unit, began = running.pop(reference)
                    yield from self._results(reference, unit, time.monotonic() - began)
                self._end_late(running)
        finally:
            for reference in running:
                self.ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self.ray.shutdown()

    def _begin(self, unit: Unit) -> Any:
        return self._work.remote([trial.to_dict() for trial in unit], str(self.folder), self.limit, os.getcwd())

    def _results(self, reference: Any, unit: Unit, seconds: float) -> Iterator[Outcome | Failure]:
        try:
            found: Sequence[Outcome | Failure] = self.ray.get(reference)
        except self.ray.exceptions.TaskCancelledError:
            late = TimeLimit(f"The trial did not stop {GRACE:g} seconds beyond its limit of {self.limit:g}, and was ended.")
            found = [failure_of(trial, late, seconds) for trial in unit]
        except self.ray.exceptions.RayError as cause:  # the worker or its machine died: another attempt may do
            found = [failure_of(trial, cause, seconds) for trial in unit]
        yield from found

    def _end_late(self, running: dict[Any, tuple[Unit, float]]) -> None:
        for reference, (unit, began) in running.items():
            if self.limit is not None and time.monotonic() - began > self.limit * len(unit) + GRACE:
                self.ray.cancel(reference, force=True)


def work_there(written: Sequence[dict[str, Any]], folder: str, limit: float | None, here: str) -> list[Outcome | Failure]:
    """The work of a unit, in a worker's process."""
    if Path(here).is_dir():
        os.chdir(here)  # files of one's own may be named from there
    found = carry_out([trial_from_dict(one) for one in written], Path(folder), limit)
    return [replace(one, place=surroundings()) if isinstance(one, Outcome) else one for one in found]


def _connected(address: str | None) -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as cause:
        raise missing_extra("ray", "study") from cause
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError) as cause:
        raise Unsupported(
            f"Ray cannot be reached at `{address or 'this machine'}`: {cause}. Start a cluster, or leave the address out."
        ) from cause
    return ray
