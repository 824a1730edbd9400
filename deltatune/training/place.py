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
from deltatune.training.run import RUN_FILE, Run, read_run

DELTA, METRICS, CURVE, CHECKPOINTS, LOGS = "delta", "metrics.json", "curve.png", "checkpoints", "logs"
OURS = (DELTA, METRICS, CURVE, CHECKPOINTS, LOGS, RUN_FILE)


class RunFolder:
    """The output folder of one run.

    ``run.yaml`` is written first and ``metrics.json`` last: with the first alone a run can be resumed, with both it is
    finished. Checkpoints lie in ``checkpoints/`` meanwhile.

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
        found = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        if not found:
            return
        if RUN_FILE not in found and METRICS not in found:
            shown = ", ".join(f"`{name}`" for name in found[:3])
            raise OutputError(f"`{self.path}` holds {shown}{' and more' if len(found) > 3 else ''}, which is no run. Choose another `out`.")
        if self.overwrite:
            return
        if METRICS in found:
            raise OutputError(f"`{self.path}` holds a finished run. Choose another `out`, or overwrite it (overwrite=True, --overwrite).")
        self._check_same()

    def _check_same(self) -> None:
        try:
            before = read_run(self.path)
        except DeltaError as cause:
            raise OutputError(
                f"`{self.path}` holds an unfinished run whose {RUN_FILE} cannot be read: {cause} Choose another `out`, or overwrite it."
            ) from cause
        differences = self.run.differences(before)
        if differences:
            raise OutputError(
                f"`{self.path}` holds an unfinished run that differs: {'; '.join(differences[:3])}. "
                "Ask for the same to resume it, choose another `out`, or overwrite it (overwrite=True, --overwrite)."
            )

    def open(self) -> None:
        """Make the folder and write ``run.yaml``; an overwritten run goes now.

        Raises:
            OutputError: the folder cannot be made or written.
        """
        with writing(self.path):
            if self.overwrite and self.path.is_dir():
                self._clear()
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / RUN_FILE).exists():
                write_text(self.path / RUN_FILE, self.run.to_yaml())
            self.checkpoints.mkdir(exist_ok=True)

    def _clear(self) -> None:
        (self.path / METRICS).unlink(missing_ok=True)  # first, so that half a removal is not a finished run
        for name in OURS:
            entry = self.path / name
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json`` and drop the checkpoints; what a tracker wrote beside them becomes ``logs/``.

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

    def abandon(self) -> None:
        """After an error: leave nothing where the run has no complete checkpoint to resume from."""
        if any(self.checkpoints.glob("checkpoint-*/complete.json")):
            return
        if (self.path / RUN_FILE).exists():
            self._clear()
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def is_main() -> bool:
    """Of several processes, the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0
