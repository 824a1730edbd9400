"""Save and load: a delta or a composition as a folder of ``delta.json`` and ``delta.safetensors``.

The same delta gives the same bytes whenever and wherever it is saved. A load checks record, tensors and backbone before it
attaches anything, and takes back what it attached if the tensors do not fit after all.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.checkpoint.fingerprint import fingerprint
from deltatune.checkpoint.folder import place_of, replacing, settle
from deltatune.checkpoint.foreign import Reading, foreign_format, format_of, load_foreign, replaced_files, save_foreign
from deltatune.checkpoint.loading import Allowed, load_composition, load_delta
from deltatune.checkpoint.record import MEMBERS, RECORD, RUN_DELTA, TENSORS, About, Origin, Record, Stored, read_record
from deltatune.checkpoint.tensors import check_storable, named, not_finite, write_tensors
from deltatune.errors import CheckpointError, Noticed
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry
from deltatune.methods.kinds import Exported, SelectionPatch, methods
from deltatune.structure.anatomy import modules_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def save(
    delta: Delta | Composition,
    folder: str | os.PathLike[str],
    *,
    format: str = "native",
    overwrite: bool = False,
    unfinished: bool = False,
    allow_nonfinite: bool = False,
    backbone_id: str | None = None,
    where: Any = None,
    layers: Any = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    template: Any = None,
    metric: str | None = None,
    score: float | None = None,
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
    data: Any = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write a delta or a composition as a folder, whole or not at all.

    Args:
        delta: an attached delta, or a composition with its members.
        folder: where to; its parents are made.
        format: ``native``, or ``peft`` for a folder that PEFT reads; that holds none of the information below.
        overwrite: replace what a folder holds of a delta, in whatever format; its other files stay.
        unfinished: it is the state of a run that goes on, so training-time parameters belong in it.
        allow_nonfinite: save NaN and infinity.
        backbone_id: alias, hub id or folder that opens the backbone again; a hub id in its config if left out.
        where: as ``attach`` was given it. This and all that follows is kept as information; see ``About``.
        layers: as ``attach`` was given it.
        task: name of the task.
        labels: names of the labels, in the order of the head's outputs.
        template: how the task's rows become text.
        metric: name of the metric that counts.
        score: its value.
        metrics: all values.
        training: settings of the run; no times and no paths, or the file differs from run to run.
        data: fingerprint of the training data.
        versions: library -> version, of the training.

    Returns:
        The folder.

    Raises:
        OutputError: the folder is not empty, or cannot be written; nothing is left half-written.
        CheckpointError: a tensor is not finite.
        Unsupported: the delta was detached, a tensor is sharded or quantised, or the format cannot hold such a delta.
        UnknownName: there is no such format.
        InvalidValue: something that is no JSON.

    Example:
        >>> import tempfile
        >>> from deltatune.injection.attach import attach
        >>> from deltatune.methods import LoRA
        >>> delta = attach(nn.Sequential(nn.Linear(4, 2)), LoRA(rank=1), where="0", name="tiny")
        >>> with tempfile.TemporaryDirectory() as place:
        ...     sorted(path.name for path in save(delta, f"{place}/tiny").iterdir())
        ['delta.json', 'delta.safetensors']
    """
    if format != "native":
        return save_foreign(delta, folder, format, overwrite=overwrite, allow_nonfinite=allow_nonfinite, backbone_id=backbone_id)
    about = About(where, layers, task, labels, template, metric, score, metrics, training, data, versions)
    origin = _origin(delta, backbone_id)
    parts = [_part(part, origin, unfinished, allow_nonfinite) for part in (delta.deltas if isinstance(delta, Composition) else [delta])]
    with replacing(folder, overwrite=overwrite, ours=replaced_files()) as fresh:
        if isinstance(delta, Composition):
            _write_composition(delta, parts, about, fresh)
        else:
            [(record, tensors)] = parts
            _write(replace(record, about=about), tensors, fresh)
    return place_of(folder)


def load(
    backbone: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    enable: bool = True,
    head: bool = True,
    allow_foreign: bool = False,
    allow_vocabulary: bool = False,
    allow_missing: bool = False,
    allow_unexpected: bool = False,
    allow_misshapen: bool = False,
    allow_nonfinite: bool = False,
    allow_unknown: bool = False,
    allow_edited: bool = False,
    allow_idle: bool = False,
    allow_bin: bool = False,
) -> Delta | Composition:
    """Attach what a folder of ours, or of a library that ``checkpoint.foreign`` knows, holds, at the sites it was saved from.

    Args:
        backbone: the backbone the delta was trained on, a fresh instance or one with other deltas.
        folder: what ``save`` wrote, or another library, such as PEFT.
        name: how it is called here; as it was called if left out.
        enable: let it act; else it rests.
        head: take along the task head it was saved with; else the backbone's own stays, as for another task.
        allow_foreign: take another backbone than the one it was trained on.
        allow_vocabulary: take a backbone with another number of vocabulary rows.
        allow_missing: leave tensors fresh that the file lacks.
        allow_unexpected: leave out tensors of the file that have no place.
        allow_misshapen: leave tensors fresh that have another shape in the file, such as a head for other labels.
        allow_nonfinite: load NaN and infinity.
        allow_unknown: leave out keys and fields this version does not know.
        allow_edited: take a record that was edited after it was saved.
        allow_idle: take sites that a forward may never call, as in ``attach``.
        allow_bin: read another library's weights from a pickle, by ``torch.load(weights_only=True)`` alone.

    Returns:
        The delta, or the composition.

    Raises:
        CheckpointError: the folder is missing, truncated, edited, of a newer format, or does not fit; the tensors are
            named, and the backbone is as it was.
        ForeignBackbone: it was trained on another backbone; what differs is named.
        Unsupported: another library's folder holds what cannot be translated.
        InvalidValue: the name is taken.

    Example:
        >>> import tempfile
        >>> from deltatune.injection.attach import attach, detach
        >>> from deltatune.methods import LoRA
        >>> mlp = nn.Sequential(nn.Linear(4, 2))
        >>> delta = attach(mlp, LoRA(rank=1), where="0", name="tiny")
        >>> with tempfile.TemporaryDirectory() as place:
        ...     _ = save(delta, f"{place}/tiny")
        ...     detach(delta)
        ...     load(mlp, f"{place}/tiny").name
        'tiny'
    """
    allowed = Allowed(
        head=head,
        foreign=allow_foreign,
        vocabulary=allow_vocabulary,
        missing=allow_missing,
        unexpected=allow_unexpected,
        misshapen=allow_misshapen,
        nonfinite=allow_nonfinite,
        unknown=allow_unknown,
        edited=allow_edited,
        idle=allow_idle,
    )
    kind = foreign_format(folder)
    with torch.random.fork_rng(devices=[]):  # fresh patches draw numbers, which the file replaces
        if kind is not None:
            loaded = load_foreign(backbone, place_of(folder), kind, name, allowed, Reading(allow_bin, allow_unknown))
        else:
            loaded = _load(backbone, locate(folder), name, allowed)
    if not enable:
        loaded.disable()
    return loaded


def _load(backbone: nn.Module, place: Path, name: str | None, allowed: Allowed) -> Delta | Composition:
    """Attach what a folder of ours holds."""
    record = read(place, allow_unknown=allowed.unknown, allow_edited=allowed.edited)
    put = load_composition if record.is_composition else load_delta
    return put(backbone, place, record, record.name if name is None else name, allowed)


def read(folder: str | os.PathLike[str], *, allow_unknown: bool = False, allow_edited: bool = False) -> Record:
    """What a folder says about the delta it holds; no tensor is read.

    Raises:
        CheckpointError: there is no delta, or its record was truncated or edited, or is of a newer format.
    """
    place = locate(folder)
    record = read_record(place / RECORD, allow_unknown=allow_unknown, allow_edited=allow_edited)
    if not record.is_composition:
        return record
    return replace(record, member_records=tuple(_member(place, name, digest, allow_unknown) for name, digest in record.members))


def locate(folder: str | os.PathLike[str]) -> Path:
    """The folder that holds the record: this one, or ``delta`` in the folder of a run.

    Raises:
        CheckpointError: neither does.
    """
    place = place_of(folder)
    try:
        settle(place)
        if (place / RECORD).exists():
            return place
        if (place / RUN_DELTA / RECORD).exists():
            return _own_folder(place / RUN_DELTA)
        inside = sorted(str(below) for below in place.iterdir() if below.is_dir() and _holds_delta(below)) if place.is_dir() else []
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"`{folder}` cannot be read: {cause}. Check the path.") from cause
    hint = f"Deltas are in {named(inside)}." if inside else "Give a folder that dt.save or a run wrote."
    raise CheckpointError(f"There is no delta in `{folder}`: it has no `{RECORD}`. {hint}")


def _holds_delta(folder: Path) -> bool:
    return (folder / RECORD).exists() or format_of(folder) is not None


def _own_folder(folder: Path) -> Path:
    """A folder below the one that was asked for.

    Raises:
        CheckpointError: it is a link, which could lead anywhere.
    """
    if folder.is_symlink():
        raise CheckpointError(f"`{folder}` is a link; delta files are read from regular folders only. Copy its content into the folder.")
    return folder


def _member(folder: Path, name: str, digest: str, allow_unknown: bool) -> Record:
    """The record of a composition's member, as it was when the composition was saved."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise CheckpointError(f"`{folder / RECORD}` names the member `{name}`, which names no delta. Copy or save the composition again.")
    file = folder / MEMBERS / name / RECORD
    _own_folder(file.parent.parent), _own_folder(file.parent)
    record = read_record(file, allow_unknown=allow_unknown)
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest or record.is_composition:
        raise CheckpointError(f"`{file}` is not the member that `{folder / RECORD}` was saved with. Copy or save the composition again.")
    return record


def _part(delta: Delta, origin: Origin, unfinished: bool, allow_nonfinite: bool) -> tuple[Record, dict[str, Tensor]]:
    """Record and tensors of one delta; nothing is written yet."""
    tensors, differences, values = _stored(delta)
    broken = not_finite(tensors)
    if broken and not allow_nonfinite:
        raise CheckpointError(
            f"Delta `{delta.name}` holds NaN or infinity in {named(broken)}: the training diverged. Lower the learning rate, "
            "or pass allow_nonfinite=True to save it as it is."
        )
    method = delta.method
    exported = method.is_exported(delta.patches) if isinstance(method, Exported) else None
    if exported is False and not unfinished:
        warnings.warn(
            f"Delta `{delta.name}` is saved with its training-time parameters, so that training can go on. "
            "Call its method's export first for a smaller file, or pass unfinished=True.",
            Noticed,
            stacklevel=3,
        )
    sites, heads = _places(delta)
    record = Record(
        name=delta.name,
        origin=replace(origin, num_labels=origin.num_labels if any(entry.head for entry in delta.entries) else None),
        about=About(),
        stored=Stored("", tuple(sorted(differences)), tuple(sorted(values))),
        method=methods.name_of(type(method)),
        fields={field.name: getattr(method, field.name) for field in fields(method)},
        sites=sites,
        heads=heads,
        exported=exported,
    )
    return record, tensors


def _stored(delta: Delta) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors as they go into the file; the selections among them by difference, and by value.

    A head and a vocabulary hold rows that are fresh in each instance of the backbone, so they go by value.
    """
    tensors = delta.state_dict()
    check_storable(tensors)
    differences, values = [], []
    for entry in delta.entries:
        if not isinstance(entry.patch, SelectionPatch):
            continue
        value, original = tensors[entry.key], entry.choice.original
        change = value - original
        if not _is_fresh(entry) and value.dtype == torch.float32 and _same_bits(original + change, value):
            tensors[entry.key] = change
            differences.append(entry.key)
        else:
            values.append(entry.key)
    return tensors, differences, values


def _is_fresh(entry: Entry) -> bool:
    return entry.head or entry.site.leaf in ("embedding", "lm_head")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def _places(delta: Delta) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys of the sites the method builds for, and of the heads that train in full.

    Only heads: then the method may have built for them, and ``place`` is given them as both.
    """
    trained = [entry for entry in delta.entries if entry.head and isinstance(entry.patch, SelectionPatch)]
    covered = {id(entry.parameter) for entry in trained}
    heads: dict[str, str] = {}
    for entry in sorted(trained, key=lambda entry: len(entry.site.path)):
        own = {id(parameter) for module in modules_of(entry.site.module).values() for parameter in module._parameters.values()}
        if own - {id(None)} <= covered and not _is_within(entry, heads):
            heads[entry.site.path] = entry.site.key
    built = [entry for entry in delta.entries if entry not in trained or not _is_within(entry, heads)]
    sites = tuple(dict.fromkeys(entry.site.key for entry in built))
    return sites or tuple(heads.values()), tuple(heads.values())


def _is_within(entry: Entry, paths: Iterable[str]) -> bool:
    return any(f"{entry.site.path}.".startswith(f"{path}.") for path in paths)


def _origin(delta: Delta | Composition, backbone_id: str | None) -> Origin:
    """Where the delta comes from."""
    backbone = delta.backbone
    config = getattr(backbone, "config", None)
    hub_id = str(getattr(config, "name_or_path", ""))
    if backbone_id is None and HUB_ID.fullmatch(hub_id):
        backbone_id = hub_id
    labels = getattr(config, "num_labels", None)
    return Origin(backbone_id, dtype_of(backbone), labels if isinstance(labels, int) else None, fingerprint(backbone))


def dtype_of(backbone: nn.Module) -> str:
    """Type of the backbone's first floating-point parameter of its own."""
    own = (parameter for module in modules_of(backbone).values() for parameter in module._parameters.values() if parameter is not None)
    return next((str(parameter.dtype).removeprefix("torch.") for parameter in own if parameter.is_floating_point()), "float32")


def _write(record: Record, tensors: Mapping[str, Tensor], folder: Path) -> str:
    """Both files of one delta; returns the SHA-256 of the record."""
    folder.mkdir(parents=True, exist_ok=True)
    assert record.stored is not None
    stored = replace(record.stored, sha256=write_tensors(folder / TENSORS, tensors))
    content = replace(record, stored=stored).to_bytes()
    (folder / RECORD).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _write_composition(composition: Composition, parts: list[tuple[Record, dict[str, Tensor]]], about: About, folder: Path) -> None:
    """The members below ``members``, and on top how they act together, with the tensors of the mixers.

    The samples that let an error name a strange tensor stand on top alone; members have the digests of all tensors.
    """
    members = tuple((part.name, _write(_without_samples(part), tensors, folder / MEMBERS / part.name)) for part, tensors in parts)
    origins = [part.origin for part, _ in parts]
    origin = next((origin for origin in origins if origin.num_labels is not None), origins[0])
    mixers = composition.mixing.state_dict()
    stored = Stored(write_tensors(folder / TENSORS, mixers)) if mixers else None
    whole = Record(composition.name, origin, about, stored, how=composition.how, weights=composition.weights, members=members)
    (folder / RECORD).write_bytes(whole.to_bytes())


def _without_samples(record: Record) -> Record:
    return replace(record, origin=replace(record.origin, fingerprint=replace(record.origin.fingerprint, samples={})))
