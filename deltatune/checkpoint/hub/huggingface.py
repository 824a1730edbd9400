"""A hub on the Hugging Face Hub: one model repository a delta, one commit a version, and its id as the tag of that commit.

``hf://owner/name`` is one repository, ``hf://owner`` all of an owner's that carry the tag ``deltatune``.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.checkpoint.hub.card import LIBRARY
from deltatune.checkpoint.hub.entry import Entry, named_entries
from deltatune.checkpoint.hub.manifest import ID, MANIFEST, MAX_MANIFEST, Parcel, unpack
from deltatune.checkpoint.hub.shelf import Held, Shelf, check_name, pick, reached, refuse_move, shelves
from deltatune.checkpoint.record import TENSORS
from deltatune.errors import CheckpointError, InvalidValue, OutputError, UnknownName, missing_extra

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

LOCATION = re.compile(r"hf://([A-Za-z0-9][\w.-]*)(?:/([A-Za-z0-9][\w.-]*))?/?")
CARD = "README.md"


@shelves.register("hf")
class RepositoryShelf(Shelf):
    """Repositories on the Hugging Face Hub; see the module's text."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        parts = LOCATION.fullmatch(location)
        if parts is None:
            raise InvalidValue(
                f"`{location}` is no place on the Hugging Face Hub. Write hf://OWNER/NAME, or hf://OWNER for all of an owner's."
            )
        self.owner, self.name = parts[1], parts[2]

    @property
    def api(self) -> HfApi:
        """The Hub's interface; it reads the user's token where one is stored.

        Raises:
            MissingExtra: huggingface_hub is not installed.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError as cause:
            raise missing_extra("huggingface_hub", "train") from cause
        return HfApi(library_name=LIBRARY)

    def put(self, parcel: Parcel, card: bytes, name: str | None, overwrite: bool) -> None:
        """Commit a delta and tag the commit with its id; see ``Shelf``."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        repository, api, id = self._repository(name), self.api, parcel.manifest.id
        with reached(f"hf://{repository}", "written", OutputError):
            api.create_repo(repository, repo_type="model", exist_ok=True)
            head = api.model_info(repository)
            old = self._manifest(head, repository)
            if old is not None and old.id != id and not overwrite:
                raise refuse_move(self.location, repository, old.id)
            commit = head.sha
            if old is None or old.id != id:
                content = {CARD: card, MANIFEST: parcel.manifest.to_bytes()}
                operations: list[Any] = [CommitOperationAdd(file, data) for file, data in content.items()]
                operations += [CommitOperationAdd(file, str(parcel.folder / file)) for file in sorted(parcel.manifest.sums)]
                gone = set() if old is None else old.sums.keys() - parcel.manifest.sums.keys()
                operations += [CommitOperationDelete(file) for file in sorted(gone)]
                message = f"Delta {parcel.record.name}: {id[:12]}"
                commit = api.create_commit(repository, operations, commit_message=message, parent_commit=head.sha).oid
            api.create_tag(repository, tag=id, revision=commit, exist_ok=True)

    def find(self, wanted: str | None) -> Held:
        """The delta of that name or id; see ``Shelf``."""
        repository = f"{self.owner}/{self.name}" if self.name else ""
        if not repository and wanted is None:
            raise InvalidValue(f"Which delta of `{self.location}`? Give its name; `deltatune hub list` shows what there is.")
        if not repository or wanted in (self.name, None):
            return self._held(repository or self._repository(wanted), None)
        with reached(f"hf://{repository}", "read"):
            tags = [tag.name for tag in self.api.list_repo_refs(repository).tags]
        return self._held(repository, pick(str(wanted), filter(ID.fullmatch, tags), [self.name], self.location))

    def copy(self, held: Held, file: str, target: Path) -> None:
        """Bring one file to a path; see ``Shelf``."""
        repository, revision = _parts(held)
        with reached(f"{held.place}/{file}", "read"):
            shutil.copyfile(self.api.hf_hub_download(repository, file, revision=revision), target)

    def parameters(self, held: Held) -> int:
        """How many numbers the tensor files hold; see ``Shelf``."""
        repository, revision = _parts(held)
        count = 0
        for name in held.manifest.sums:
            if name.endswith(TENSORS):
                with reached(f"{held.place}/{name}", "read"):
                    header = self.api.parse_safetensors_file_metadata(repository, name, revision=revision)
                count += sum(header.parameter_count.values())
        return count

    def entries(self) -> list[Entry]:
        """The owner's deltas, read from their records; see ``Shelf``."""
        with reached(self.location, "read"):
            listed = (
                [f"{self.owner}/{self.name}"]
                if self.name
                else [model.id for model in self.api.list_models(author=self.owner, filter=LIBRARY)]
            )
        held = [self._held(repository, None) for repository in listed]
        names = {one.name: one.id for one in held}
        return named_entries({one.id: self.describe(one) for one in held}, names)

    def _repository(self, name: str | None) -> str:
        """The repository a name stands for.

        Raises:
            InvalidValue: it is none of this location, or none is named.
        """
        if self.name:
            if name not in (None, self.name):
                raise InvalidValue(
                    f"`{self.location}` is one delta and takes no other name (`{name}`). Leave it out, or use hf://{self.owner}."
                )
            return f"{self.owner}/{self.name}"
        if name is None:
            raise InvalidValue(f"A delta in `{self.location}` needs a name, which becomes that of its repository. Give one.")
        return f"{self.owner}/{check_name(name)}"

    def _manifest(self, info: ModelInfo, repository: str) -> Any:
        """The manifest at one revision; None where the repository holds no delta."""
        if not any(file.rfilename == MANIFEST for file in info.siblings or ()):
            return None
        path = Path(self.api.hf_hub_download(repository, MANIFEST, revision=info.sha))
        with path.open("rb") as file:
            content = file.read(MAX_MANIFEST)
        return unpack(content, hashlib.sha256(content).hexdigest(), f"hf://{repository}/{MANIFEST}")

    def _held(self, repository: str, id: str | None) -> Held:
        with reached(f"hf://{repository}", "read"):
            info = self.api.model_info(repository, revision=id, files_metadata=True)
            manifest = self._manifest(info, repository)
        if manifest is None:
            raise UnknownName(
                f"`hf://{repository}` holds no delta that deltatune pushed: it has no `{MANIFEST}`. Push one, or choose another."
            )
        if id not in (None, manifest.id):
            raise CheckpointError(f"The tag {id} of `hf://{repository}` does not hold the delta of that id. Push the delta again.")
        sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or () if file.rfilename in manifest.sums}
        return Held(manifest.id, repository.partition("/")[2], f"hf://{repository}@{info.sha}", manifest, sizes)


def _parts(held: Held) -> tuple[str, str]:
    """Repository and revision of a held delta."""
    repository, _, revision = held.place.removeprefix("hf://").partition("@")
    return repository, revision
