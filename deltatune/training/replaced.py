"""The run that another one replaces: set aside in its folder until the new one is finished, so that no kill loses both."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

REPLACED = "replaced-run"


class Replaced:
    """``replaced-run/`` in a run's folder: the files of the run that was there before.

    Files move one by one, and the last of ``names`` moves last in either direction. So the new run has begun where folder
    and ``replaced-run/`` both hold the last; where one of them does, a process was killed while it moved files.

    Args:
        folder: the run's folder.
        names: the files and folders that make a run.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.place = folder / REPLACED
        self.names = tuple(names)

    @property
    def is_whole(self) -> bool:
        """The run that was replaced is here, and a new one has begun."""
        return (self.place / self.names[-1]).exists() and (self.folder / self.names[-1]).exists()

    @property
    def is_between(self) -> bool:
        """Files are on the move, or were when a process was killed."""
        return self.place.is_dir() and not self.is_whole

    def set_aside(self) -> None:
        """Move the run in the folder here."""
        self.place.mkdir(exist_ok=True)
        for name in self.names:
            move(self.folder / name, self.place / name)

    def put_back(self) -> None:
        """Move the run to where it was; nothing to do where it is there."""
        if self.is_between:
            for name in self.names:
                move(self.place / name, self.folder / name)
            self.place.rmdir()

    def drop(self) -> None:
        """Remove the run that was replaced."""
        if self.place.is_dir():
            remove(self.place, self.names)
            self.place.rmdir()


def move(entry: Path, target: Path) -> None:
    """Rename what is there, if anything is."""
    if entry.exists() or entry.is_symlink():
        entry.rename(target)


def remove(folder: Path, names: Sequence[str]) -> None:
    """Remove these files and folders, in order; what they link to stays."""
    for name in names:
        entry = folder / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
