"""A run's folder: what may be written there, what an interrupted run left, and how a finished one looks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltatune.errors import DeltaError, OutputError
from deltatune.training.files import write_text, writing
from deltatune.training.replaced import Replaced, remove
from deltatune.training.run import RUN_FILE, Run, read_run

DELTA, METRICS, CURVE, CHECKPOINTS, LOGS = "delta", "metrics.json", "curve.png", "checkpoints", "logs"
OURS = (METRICS, DELTA, CURVE, CHECKPOINTS, LOGS, RUN_FILE)
"""What makes a run, in the order in which it goes: without the first it is not finished, without the last it is no run."""


class RunFolder:
    """The output folder of one run.

    ``run.yaml`` is written first and ``metrics.json`` last: with the first alone a run can be resumed, with both it is
    finished. Checkpoints lie in ``checkpoints/`` meanwhile, and a run that is overwritten in ``replaced-run/``.

    Args:
        path: where.
        run: what is to be done.
        overwrite: whether another run in the folder may be replaced.

    Raises:
        OutputError: the folder holds a finished run, a run with other settings, or something that is no run.
    """

    def __init__(self, path: str | os.PathLike[str], run: Run, *, overwrite: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.run = run
        self.overwrite = overwrite
        self.replaced = Replaced(self.path, OURS)
        self._begun = False
        self._made: list[Path] = []
        self._check()

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer keeps its checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def delta(self) -> Path:
        """Where the delta is saved."""
        return self.path / DELTA

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"`{self.path}` is a file; a run writes into a folder. Choose another `out`.")
        if is_main():
            with writing(self.path):
                self.replaced.put_back()
        found = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        if not found or self.replaced.is_between:  # the latter where another process is at it
            return
        if RUN_FILE not in found:
            shown = ", ".join(f"`{name}`" for name in found[:3])
            raise OutputError(f"`{self.path}` holds {shown}{' and more' if len(found) > 3 else ''}, which is no run. Choose another `out`.")
        differences = self.run.differences(self._before())
        if self.overwrite:
            return
        if METRICS in found:
            raise OutputError(f"`{self.path}` holds a finished run. Choose another `out`, or overwrite it (`overwrite=True`).")
        if differences:
            raise OutputError(
                f"`{self.path}` holds an unfinished run that differs: {'; '.join(differences[:3])}. "
                "Ask for the same to resume it, choose another `out`, or overwrite it (`overwrite=True`)."
            )

    def _before(self) -> Run:
        """The run that is in the folder."""
        try:
            return read_run(self.path)
        except DeltaError as cause:
            raise OutputError(
                f"The {RUN_FILE} in `{self.path}` cannot be read as a run's: {cause} Choose another `out`, or empty the folder."
            ) from cause

    def open(self) -> None:
        """Make the folder and write ``run.yaml``; a run that is overwritten is set aside.

        Raises:
            OutputError: the folder cannot be made or written.
        """
        with writing(self.path):
            if self.overwrite and (self.path / RUN_FILE).exists():
                self._make_room()
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._begun = True
            if not (self.path / RUN_FILE).exists():
                write_text(self.path / RUN_FILE, self.run.to_yaml())
            self.checkpoints.mkdir(exist_ok=True)

    def _make_room(self) -> None:
        """Set aside what is there; but an overwriting run that was killed goes on, or makes way for another one."""
        if (self.path / METRICS).exists():
            self.replaced.drop()  # of a run that was killed when it was finished
        if not self.replaced.is_whole:
            self.replaced.set_aside()
        elif self.run.differences(self._before()):
            remove(self.path, OURS)

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``, drop the checkpoints and what was replaced; what a tracker wrote becomes ``logs/``.

        Raises:
            OutputError: the file cannot be written.
        """
        write_text(self.path / METRICS, json.dumps(metrics, indent=1) + "\n")
        with writing(self.path):
            for checkpoint in self.checkpoints.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
            if any(self.checkpoints.iterdir()):
                self.checkpoints.rename(self.path / LOGS)
            else:
                self.checkpoints.rmdir()
            self.replaced.drop()

    def abandon(self, *, resumable: bool = True) -> None:
        """After an error: unless the run can be resumed from a complete checkpoint, the folder is again what it was before.

        Args:
            resumable: whether to go on from a checkpoint could end otherwise.
        """
        finished = self._begun and (self.path / METRICS).exists()
        if finished or (resumable and any(self.checkpoints.glob("checkpoint-*/complete.json"))):
            return
        if self._begun:
            remove(self.path, OURS)
        self.replaced.put_back()
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def is_main() -> bool:
    """Of several processes, the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0
