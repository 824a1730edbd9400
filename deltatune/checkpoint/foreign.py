"""Other people's formats: what a foreign folder is read into, and the engine that attaches it.

A ``Format`` translates names, shapes and configs, and touches no backbone: it reads a folder into a ``Foreign``, parts that
are each a method, the keys of its sites, and tensors under our names. The engine attaches the parts, checks every tensor
as for native files, and takes everything back if one does not fit. To add a format, register an instance:
``formats.register("name")(MyFormat())``, in a module that ``deltatune.checkpoint`` imports.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from deltatune.checkpoint.folder import place_of, replacing
from deltatune.checkpoint.loading import MISBUILT, Allowed, Plan, attach_plan, find, index_of, names_on
from deltatune.checkpoint.record import MEMBERS, RECORD, RUN_DELTA, TENSORS
from deltatune.checkpoint.tensors import check_storable, named, not_finite
from deltatune.errors import CheckpointError, DeltaError, InvalidValue, Unsupported
from deltatune.injection.attach import detach
from deltatune.injection.compose import Composition, compose
from deltatune.injection.delta import Delta
from deltatune.injection.ledger import check_free, ledger_of
from deltatune.methods.kinds import Method, SelectionPatch
from deltatune.registry import Registry
from deltatune.structure.index import Index

Tensors = Mapping[tuple[str, str], Tensor]
"""(key of the site, name within the patch) -> tensor. A selected parameter goes by its own name: ``("norm", "weight")``."""


@dataclass(frozen=True)
class Part:
    """One delta of a foreign folder.

    Attributes:
        label: what tells it apart from the other parts, such as ``lora``.
        method: its recipe.
        tensors: everything it is made of, in our shapes; it sits at the sites that are named there.
        shared: tensors of its shared state.
        bare: keys of sites without tensors of their own, such as those that are made from shared state alone.
        exported: it is the final form of a method that has another one while it trains.
        built: names within the patches that keep what the method builds there, such as what it read from the backbone.
    """

    label: str
    method: Method
    tensors: Tensors
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    bare: tuple[str, ...] = ()
    exported: bool | None = None
    built: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """Keys of the sites it sits at."""
        return tuple(dict.fromkeys([*(key for key, _ in self.tensors), *self.bare]))

    @property
    def flat(self) -> dict[str, Tensor]:
        """The tensors under names in one line, for errors and sizes."""
        return {f"shared.{name}": tensor for name, tensor in self.shared.items()} | _flat(self.tensors)

    def named(self, delta: Delta, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the names of the placed delta: a weight patch goes by its parameter, not by its site."""
        selected = {entry.key for entry in delta.entries if isinstance(entry.patch, SelectionPatch)}
        keys = {entry.site.key: entry.key for entry in delta.entries if not isinstance(entry.patch, SelectionPatch)}
        tensors = {}
        for (key, name), tensor in self.tensors.items():
            own = f"{key}.{name}" if key else name
            tensors[own if own in selected else f"{keys.get(key, key)}.{name}"] = tensor
        tensors |= {f"shared.{name}": tensor for name, tensor in self.shared.items()}
        kept = {key: tensor.clone() for key, tensor in delta.state_dict().items() if self.built and key.endswith(self._ends)}
        return kept | tensors | dict(heads)

    @property
    def _ends(self) -> tuple[str, ...]:
        return tuple(f".{name}" for name in self.built)


@dataclass(frozen=True)
class Foreign:
    """What a foreign folder holds, in our words.

    Attributes:
        parts: the deltas; several become a sequential composition.
        heads: tensors of the task heads, which go with the first part; the key is that of a site of role ``readout``.
        backbone_id: what the folder calls its backbone.
    """

    parts: tuple[Part, ...]
    heads: Tensors = field(default_factory=dict)
    backbone_id: str | None = None

    @property
    def flat(self) -> dict[str, Tensor]:
        """All tensors under names in one line."""
        return {name: tensor for part in self.parts for name, tensor in part.flat.items()} | _flat(self.heads)


@dataclass(frozen=True)
class Reading:
    """What a read takes though it need not.

    Attributes:
        allow_bin: weights as a pickle, read by ``torch.load(weights_only=True)`` alone.
        allow_unknown: leave out fields this version does not know, and those that only matter while it trains.
    """

    allow_bin: bool = False
    allow_unknown: bool = False


class Format(ABC):
    """How one other library stores its deltas."""

    @abstractmethod
    def recognises(self, folder: Path) -> bool:
        """Whether the folder looks like one of these; only names of files, and a record's first keys, are looked at."""

    @abstractmethod
    def read(self, folder: Path, sites: Index, reading: Reading) -> Foreign:
        """The folder in our words.

        Args:
            folder: what ``recognises`` said yes to.
            sites: of the backbone it will sit on; nothing of it is touched.
            reading: what is allowed.

        Raises:
            CheckpointError: the folder is damaged, or does not fit these sites.
            Unsupported: it holds what cannot be translated; field and value are named.
        """


@runtime_checkable
class Writing(Protocol):
    """A format that can also be written."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files a folder of it consists of."""

    def write(self, delta: Delta | Composition, folder: Path, backbone_id: str | None) -> None:
        """Write a delta or a composition into an empty folder.

        Raises:
            Unsupported: the format cannot hold it.
        """


formats: Registry[Format] = Registry("format", "formats")
"""Every foreign format by its name on the command line."""


def foreign_format(folder: str | os.PathLike[str]) -> str | None:
    """Name of the foreign format of a folder; None where it is one of ours, or nothing that is known."""
    place = place_of(folder)
    ours = any((place / below / RECORD).exists() for below in ("", RUN_DELTA))
    return None if ours else format_of(place)


def format_of(folder: Path) -> str | None:
    """Name of the foreign format a folder has; None if it looks like none of them."""
    return next((name for name in formats if formats[name].recognises(folder)), None)


def replaced_files() -> tuple[str, ...]:
    """Names of all that a folder can hold of a delta that is written here, in any format.

    What replaces a delta replaces these, or the folder would hold two, and which of them is read would be a guess.
    """
    written = [formats[name] for name in formats]
    return (RECORD, TENSORS, MEMBERS, *(file for format in written if isinstance(format, Writing) for file in format.files))


def save_foreign(
    delta: Delta | Composition,
    folder: str | os.PathLike[str],
    kind: str,
    *,
    overwrite: bool,
    allow_nonfinite: bool,
    backbone_id: str | None,
) -> Path:
    """Write a delta or a composition in a foreign format, whole or not at all.

    Raises:
        UnknownName: there is no such format.
        Unsupported: the format cannot be written, or cannot hold such a delta.
        CheckpointError: a tensor is not finite.
        OutputError: the folder is not empty, or cannot be written.
    """
    writer = formats[kind]
    if not isinstance(writer, Writing):
        able = [name for name in formats if isinstance(formats[name], Writing)]
        raise Unsupported(f"Deltas are read from `{kind}`, not written to it. Save as native or {', '.join(able)}.")
    tensors = delta.state_dict()
    check_storable(tensors)
    broken = not_finite(tensors)
    if broken and not allow_nonfinite:
        raise CheckpointError(f"`{delta.name}` holds NaN or infinity in {named(broken)}. Train again, or pass allow_nonfinite=True.")
    with replacing(folder, overwrite=overwrite, ours=replaced_files()) as fresh:
        writer.write(delta, fresh, backbone_id)
    return place_of(folder)


def load_foreign(backbone: nn.Module, folder: Path, kind: str, name: str | None, allowed: Allowed, reading: Reading) -> Delta | Composition:
    """Read a foreign folder and attach what it holds: one delta, or a sequential composition of several.

    Args:
        backbone: where to.
        folder: the folder.
        kind: name of the format.
        name: how it is called here; as the folder if left out.
        allowed: what is taken though it does not fit.
        reading: what a read takes.

    Raises:
        CheckpointError: it is damaged or does not fit; the tensors are named, and the backbone is as it was.
        Unsupported: it holds what cannot be translated.
        InvalidValue: the name is taken.
    """
    name = _name(folder) if name is None else name
    check_free(name, ledger_of(backbone))
    sites = index_of(backbone)
    return attach_foreign(backbone, read_foreign(sites, folder, kind, reading, allow_nonfinite=allowed.nonfinite), sites, name, allowed)


def read_foreign(sites: Index, folder: Path, kind: str, reading: Reading, *, allow_nonfinite: bool = False) -> Foreign:
    """What a foreign folder holds; the backbone is not touched.

    Raises:
        CheckpointError: it is damaged, or holds NaN or infinity.
        Unsupported: it holds what cannot be translated.
    """
    try:
        found = formats[kind].read(folder, sites, reading)
    except DeltaError:
        raise
    except MISBUILT as cause:
        raise CheckpointError(f"`{folder}` says what makes no sense to {kind}: {cause}. It was edited; copy it again.") from cause
    broken = not_finite(found.flat)
    if broken and not allow_nonfinite:
        raise CheckpointError(f"`{folder}` holds NaN or infinity in {named(broken)}. Train again, or pass allow_nonfinite=True.")
    return found


def attach_foreign(backbone: nn.Module, found: Foreign, sites: Index, name: str, allowed: Allowed) -> Delta | Composition:
    """Attach what a format read, or leave nothing behind; see ``load_foreign``."""
    if not found.parts:
        raise CheckpointError(f"`{name}` holds no delta{' but a task head alone' if found.heads else ''}. Check the folder.")
    plans = _plans(backbone, found, sites, name, allowed)
    placed: list[Delta] = []
    try:
        for plan in plans:
            placed.append(attach_plan(backbone, plan, allowed))
        return placed[0] if len(placed) == 1 else compose(backbone, placed, name=name)
    except BaseException:
        for delta in reversed(placed):
            detach(delta)
        raise


def _plans(backbone: nn.Module, found: Foreign, sites: Index, name: str, allowed: Allowed) -> list[Plan]:
    """Everything that can be checked without touching the backbone."""
    several = len(found.parts) > 1
    heads = found.heads if allowed.head else {}
    plans: list[Plan] = []
    for k, part in enumerate(found.parts):
        own = _flat(heads) if k == 0 else {}
        called = f"{name}-{part.label}" if several else name
        if called in names_on(backbone) or any(called == plan.name for plan in plans):
            raise InvalidValue(f"`{called}` is the name of a delta here already. Load `{name}` under another name.")
        plans.append(
            Plan(
                title=called,
                name=called,
                method=part.method,
                sites=find(sites, called, part.sites),
                heads=find(sites, called, dict.fromkeys(key for key, _ in heads)) if own else (),
                tensors=part.flat | own,
                exported=part.exported,
                named=lambda delta, _, part=part, own=own: part.named(delta, own),  # type: ignore[misc]
            )
        )
    return plans


def _flat(tensors: Tensors) -> dict[str, Tensor]:
    return {f"{key}.{name}" if key else name: tensor for (key, name), tensor in tensors.items()}


def _name(folder: Path) -> str:
    """A name for what a folder holds, after the folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-") or "delta"
