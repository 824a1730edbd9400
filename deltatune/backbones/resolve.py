"""From a name to weights: alias, installed package, local folder or hub id, in this order of preference."""

from __future__ import annotations

import functools
import os
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

from deltatune.backbones.catalogue import Backbone, backbones, catalogued
from deltatune.backbones.gguf import converted_from
from deltatune.backbones.variants import MARK, Variant, parted
from deltatune.errors import InvalidValue, MissingExtra, UnknownName, nearest


@dataclass(frozen=True)
class Resolved:
    """Where a backbone's weights come from.

    Attributes:
        name: what opens the same backbone again: the alias, the hub id, or the folder's absolute path.
        source: what transformers' ``from_pretrained`` takes, a folder or a hub id; None while ``gguf`` awaits conversion.
        gguf: the GGUF file, or the chunks of one, that has to be converted first.
        backbone: the catalogue's entry, where there is one.
        variant: what is made from these weights, where that is a control.
    """

    name: str
    source: str | None
    gguf: tuple[Path, ...] = ()
    backbone: Backbone | None = None
    variant: Variant = field(default_factory=Variant)


def resolve(name: str | os.PathLike[str]) -> Resolved:
    """Find what ``name`` stands for.

    An alias, or a hub id that has one, is read from its package where that is installed and from the hub otherwise. A
    folder or GGUF file that exists is taken as it is, but a package's own folder or file, and what was converted from
    it, go by the alias, so that ``config.name_or_path`` of a loaded backbone leads back to its name. Anything else with
    one ``/`` is a hub id. Behind an ``@`` stands a variant: ``minilm@layers=3`` has the three lowest layers,
    ``minilm@random`` the same shape with random weights.

    Raises:
        UnknownName: a short name the catalogue does not have; the nearest are named.
        InvalidValue: a folder without a ``config.json``, or a variant that does not exist.
    """
    asked, variant = parted(os.fspath(name))
    found = _resolved(asked)
    return replace(found, name=f"{found.name}{MARK}{variant}", variant=variant) if str(variant) else found


def _resolved(asked: str) -> Resolved:
    path = Path(asked).expanduser()
    entry = catalogued(asked) or _owner(path)
    if entry is None and path.is_dir():
        return Resolved(str(path.resolve()), _checked(path))
    if entry is None and path.suffix == ".gguf" and path.is_file():
        return Resolved(str(path.resolve()), None, gguf=(path.resolve(),))
    if entry is not None:
        return _from_entry(entry)
    if path.is_absolute() or asked.startswith((".", "~")) or asked.count("/") != 1:
        kind = "folder" if "/" in asked else "backbone"
        hint = "Check the path." if kind == "folder" else nearest(asked, backbones)
        raise UnknownName(
            f"No {kind} is called `{asked}`. {hint} A backbone is an alias, a local folder, or a hub id such as `google-t5/t5-base`."
        )
    return Resolved(asked, asked)


def backbone_id(name: str | os.PathLike[str]) -> str:
    """The name that a delta file stores for its backbone: alias, hub id or absolute folder.

    >>> backbone_id("sentence-transformers/all-MiniLM-L6-v2")
    'minilm'
    """
    return resolve(name).name


@functools.cache
def hub_answers() -> bool:
    """Whether the hub's host can be reached; asked once, because the hub's own client retries for most of a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():  # then the host is the proxy's to find
        return True
    host = urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


def unreachable(resolved: Resolved, cause: Exception) -> MissingExtra | UnknownName:
    """The error for a hub id that could not be read, with the way out that fits."""
    entry = resolved.backbone
    first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    if entry is not None and entry.packages:
        return MissingExtra(
            f"The backbone `{resolved.name}` is not installed, and its hub id `{entry.hub_id}` could not be read ({first}). "
            f"Install it: {entry.install}"
        )
    packaged = ", ".join(f"`{alias}`" for alias in backbones if backbones[alias].packages)
    return UnknownName(
        f"The hub id `{resolved.source}` is not in the local hub cache and could not be read from the hub ({first}). "
        f"Check the name and the network, download it elsewhere and give the folder, or use a packaged backbone: {packaged}."
    )


def _owner(path: Path) -> Backbone | None:
    """The entry whose package holds this folder or file, or from whose package it was converted."""
    if not path.is_absolute():
        return None
    alias = converted_from(path)
    if alias is not None and alias in backbones:
        return backbones[alias]
    return next((backbones[alias] for alias in backbones if path in backbones[alias].files), None)


def _from_entry(entry: Backbone) -> Resolved:
    files = entry.files
    if not files:
        return Resolved(entry.name, entry.hub_id, backbone=entry)
    if entry.format == "gguf":
        return Resolved(entry.name, None, gguf=files, backbone=entry)
    return Resolved(entry.name, str(files[0]), backbone=entry)


def _checked(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise InvalidValue(
            f"The folder `{folder}` is not a backbone: it has no `config.json` (found: {found}). Give one written by `save_pretrained`."
        )
    return str(folder.resolve())
