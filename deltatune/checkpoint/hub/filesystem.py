"""A hub in a folder: of this machine, or of any file system that fsspec reaches (memory, S3, GCS, SFTP, ...).

```
objects/<id>/{delta.json, delta.safetensors, members/..., README.md, SHA256SUMS}
names/<name>            the id it points to
index.json              facts out of the records, made from them whenever it lacks one
staging/<time>-<token>  files on their way in
```

A file comes into being under ``staging`` and is moved to its place, and ``SHA256SUMS`` comes last: a delta is there when
that file is. Two who push the same delta write the same bytes, so neither harms the other.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from pathlib import Path
from typing import Any

from deltatune.checkpoint.hub.entry import Entry, count_values, entry_from, named_entries
from deltatune.checkpoint.hub.manifest import ID, MANIFEST, MAX_MANIFEST, Parcel, unpack
from deltatune.checkpoint.hub.shelf import NAME, Held, Shelf, check_name, pick, reached, refuse_move
from deltatune.checkpoint.record import TENSORS
from deltatune.checkpoint.strict_json import parse
from deltatune.errors import CheckpointError, InvalidValue, OutputError, missing_extra

OBJECTS, NAMES, INDEX, STAGING, CARD = "objects", "names", "index.json", "staging", "README.md"
INDEX_VERSION = 1
MAX_INDEX = 2**26
"""Bytes; an entry has some 600."""
ABANDONED = 86_400
"""Seconds after which what lies in ``staging`` was left by a push that was killed."""


class FolderShelf(Shelf):
    """A hub in a folder; see the module's text for its layout."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]
        except ImportError as cause:
            raise missing_extra("fsspec", "train") from cause
        try:
            self.files, self.root = url_to_fs(location)
        except (ImportError, ValueError, OSError) as cause:
            raise InvalidValue(f"`{location}` is no place for a hub: {cause}. Give a folder, or a URL that fsspec knows.") from cause
        self.root = self.root.rstrip("/")

    def put(self, parcel: Parcel, card: bytes, name: str | None, overwrite: bool) -> None:
        """Take a delta in; see ``Shelf``."""
        id = parcel.manifest.id
        with reached(self.location, "written", OutputError):
            old = self._pointed(check_name(name)) if name is not None else None
            if name is not None and old not in (None, id) and not overwrite:
                raise refuse_move(self.location, name, str(old))
            if not self._holds(parcel):
                self._store(parcel, card)
            if name is not None and old != id:
                self._place(f"{id}\n".encode(), f"{NAMES}/{name}")
            self._sweep()
        if name is not None and not overwrite and self._pointed(name) != id:
            raise refuse_move(self.location, name, str(self._pointed(name)))  # someone else was faster

    def find(self, wanted: str | None) -> Held:
        """The delta of that name or id; see ``Shelf``."""
        if wanted is None:
            raise InvalidValue(f"Which delta of `{self.location}`? Give its name or id; `deltatune hub list` shows what there is.")
        with reached(self.location, "read"):
            self.files.invalidate_cache()
            id = self._pointed(wanted)
            return self._held(id if id is not None else pick(wanted, self._ids(), self._names(), self.location), wanted)

    def copy(self, held: Held, file: str, target: Path) -> None:
        """Bring one file to a path; see ``Shelf``."""
        with reached(f"{held.place}/{file}", "read"):
            self.files.get_file(f"{held.place}/{file}", str(target))

    def parameters(self, held: Held) -> int:
        """How many numbers the tensor files hold; see ``Shelf``."""
        return sum(self._values(f"{held.place}/{name}") for name in held.manifest.sums if name.endswith(TENSORS))

    def entries(self) -> list[Entry]:
        """Everything it holds; what the index lacks is read from the records, and the index is written anew."""
        with reached(self.location, "read"):
            self.files.invalidate_cache()
            known, names = self._index(), self._names()
            found = {id: known[id] for id in self._ids() if id in known}
            missing = [id for id in self._ids() if id not in known and self._is_whole(id)]
        broken = []
        for id in missing:
            try:
                found[id] = self.describe(self._held(id, id))
            except CheckpointError as cause:
                broken.append(cause)
        if len(broken) > len(found):
            raise broken[0]
        if found.keys() != known.keys():
            self._write_index(found)
        return named_entries(found, names)

    def _values(self, file: str) -> int:
        with reached(file, "read"):
            return count_values(lambda start, end: bytes(self.files.cat_file(file, start=start, end=end)), file)

    def _held(self, id: str, name: str) -> Held:
        place = self._at(f"{OBJECTS}/{id}")
        with reached(f"{place}/{MANIFEST}", "read"):
            content = self.files.cat_file(f"{place}/{MANIFEST}", end=MAX_MANIFEST)
            manifest = unpack(content, id, f"{place}/{MANIFEST}")
            sizes = {file: int(self.files.info(f"{place}/{file}")["size"]) for file in manifest.sums}
        return Held(id, name, place, manifest, sizes)

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _ids(self) -> list[str]:
        return sorted(name for name in self._listed(OBJECTS) if ID.fullmatch(name))

    def _names(self) -> dict[str, str]:
        """Name -> id, of those that point to something; a broken one does not hide the others, and ``find`` tells what is wrong."""
        found: dict[str, str] = {}
        for name in filter(NAME.fullmatch, self._listed(NAMES)):
            with contextlib.suppress(CheckpointError):
                id = self._pointed(name)
                found |= {} if id is None else {name: id}
        return found

    def _listed(self, folder: str) -> list[str]:
        try:
            found: list[Any] = self.files.ls(self._at(folder), detail=False)
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rpartition("/")[2] for path in found]

    def _pointed(self, name: str) -> str | None:
        """The id a name points to; None where nobody has the name."""
        if ID.fullmatch(name) or "/" in name or name in ("", ".", ".."):
            return None
        place = self._at(f"{NAMES}/{name}")
        try:
            id = self.files.cat_file(place, end=80).decode("utf-8", "replace").strip()
        except (FileNotFoundError, IsADirectoryError):
            return None
        if not ID.fullmatch(id):
            raise CheckpointError(f"`{place}` does not hold the id of a delta. Push the delta again with --overwrite.")
        return str(id)

    def _is_whole(self, id: str) -> bool:
        return bool(self.files.exists(self._at(f"{OBJECTS}/{id}/{MANIFEST}")))

    def _holds(self, parcel: Parcel) -> bool:
        """Every file is there in its full length; one that was lost comes back with the next push."""
        id = parcel.manifest.id
        try:
            return self._is_whole(id) and self._held(id, id).sizes == parcel.sizes
        except CheckpointError:
            return False

    def _store(self, parcel: Parcel, card: bytes) -> None:
        """Every file of a delta, its manifest last."""
        object_ = f"{OBJECTS}/{parcel.manifest.id}"
        for name in sorted(parcel.manifest.sums):
            self._place(parcel.folder / name, f"{object_}/{name}")
        self._place(card, f"{object_}/{CARD}")
        self._place(parcel.manifest.to_bytes(), f"{object_}/{MANIFEST}")

    def _place(self, content: bytes | Path, path: str) -> None:
        """One file, whole or not at all."""
        folder = self._at(f"{STAGING}/{int(time.time())}-{secrets.token_hex(8)}")
        staged = f"{folder}/{path.rpartition('/')[2]}"
        try:
            for place in (folder, self._at(path).rpartition("/")[0]):
                self.files.makedirs(place, exist_ok=True)
            if isinstance(content, bytes):
                self.files.pipe_file(staged, content)
            else:
                self.files.put_file(str(content), staged)
            self.files.mv(staged, self._at(path))
        finally:
            if self.files.exists(folder):
                self.files.rm(folder, recursive=True)

    def _sweep(self) -> None:
        """Remove what killed pushes left long ago."""
        for left in self._listed(STAGING):
            moment = left.partition("-")[0]
            if moment.isdigit() and time.time() - int(moment) > ABANDONED:
                with contextlib.suppress(FileNotFoundError):  # somebody else swept it
                    self.files.rm(self._at(f"{STAGING}/{left}"), recursive=True)

    def _index(self) -> dict[str, Entry]:
        """What the index says; empty where it is missing, broken or beyond all sense."""
        try:
            data = parse(self.files.cat_file(self._at(INDEX), end=MAX_INDEX))  # one that is cut is no JSON
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(data, dict) or data.get("version") != INDEX_VERSION or not isinstance(data.get("entries"), list):
            return {}
        found = [entry_from(item) for item in data["entries"]]
        return {entry.id: entry for entry in found if entry is not None}

    def _write_index(self, entries: dict[str, Entry]) -> None:
        listed = [{**entries[id].to_json(), "names": ()} for id in sorted(entries)]
        content = json.dumps({"version": INDEX_VERSION, "entries": listed}, sort_keys=True, indent=1, ensure_ascii=False)
        with contextlib.suppress(OSError, NotImplementedError):  # a hub one may only read is listed all the same
            self._place(f"{content}\n".encode(), INDEX)
