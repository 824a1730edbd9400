"""PEFT's folders: ``adapter_config.json`` beside ``adapter_model.safetensors``, read and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from deltatune.checkpoint.foreign import Foreign, Format, Part, Reading, formats
from deltatune.checkpoint.foreign_files import Fields, read_json, read_weights, weights_file
from deltatune.checkpoint.peft.config import CONFIG, HARMLESS, PICKLE, WEIGHTS, base_fields, task_of, write_config
from deltatune.checkpoint.peft.expressions import Expressions
from deltatune.checkpoint.peft.extras import (
    add_default_heads,
    is_extra,
    read_biases,
    read_rows,
    read_saved,
    write_extra,
    write_heads,
)
from deltatune.checkpoint.peft.keys import Modules, Stored, as_targets, check_targets, targets
from deltatune.checkpoint.peft.tuner import Content, Output, Tuner, tuners
from deltatune.checkpoint.tensors import write_tensors
from deltatune.errors import CheckpointError, Unsupported
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.injection.ledger import ledger_of
from deltatune.structure.index import Index, index


class PeftFormat(Format):
    """Folders of the PEFT library, one adapter each."""

    files = (CONFIG, WEIGHTS, PICKLE)

    def recognises(self, folder: Path) -> bool:
        """It has a config that names a type of PEFT's; other libraries write the same file name."""
        file = folder / CONFIG
        try:
            return file.is_file() and "peft_type" in read_json(file)
        except CheckpointError:
            return not any((folder / other).exists() for other in ("pytorch_adapter.bin", "adapter.safetensors"))

    def read(self, folder: Path, sites: Index, reading: Reading) -> Foreign:
        """The type's parts, then what trains beside it."""
        config = read_json(folder / CONFIG)
        fields = Fields(config, folder / CONFIG, HARMLESS)
        kind = config.get("peft_type")
        tuner = _tuner(kind, folder)
        file = weights_file(folder, WEIGHTS, PICKLE, allow_bin=reading.allow_bin)
        modules = Modules(sites)
        content = Content(fields, Stored(read_weights(file), modules, file, tuner.prefix), modules, Expressions(folder / CONFIG))
        parts, heads = self._parts(tuner, content)
        fields.end(allow_unknown=reading.allow_unknown)
        content.stored.end()
        name = config.get("base_model_name_or_path")
        return Foreign(tuple(parts), heads, name if isinstance(name, str) else None)

    def _parts(self, tuner: Tuner, content: Content) -> tuple[list[Part], Any]:
        tied = content.fields.take("ensure_weight_tying", False)
        expected = targets(content.fields, content.modules, content.expressions) if tuner.targeted else None
        parts = [*tuner.read(content), *read_biases(content), *read_rows(content)]
        if expected is not None and tied:  # then PEFT's targets name the input embedding alone
            expected += [path for path in content.found if path in content.modules.tied_to(expected) and path not in expected]
        check_targets(expected, content.found, content.stored.file)
        whole, heads = read_saved(content)
        return [*parts, *whole], heads

    def write(self, delta: Delta | Composition, folder: Path, backbone_id: str | None) -> None:
        """One type, and what trains beside it."""
        deltas = _members(delta)
        backbone: nn.Module = delta.backbone
        main = [member for member in deltas if not is_extra(member)] or deltas[:1]
        kind = _kind(main)
        tuner = tuners[kind]
        ledger = ledger_of(backbone)
        output = Output(Modules(index(backbone) if ledger is None else ledger.index(backbone)))
        tuner.write(main, output)
        heads = write_heads(deltas, output, tuner.prefix)
        for member in deltas:
            if member not in main:
                write_extra(member, output, tuner.biased)
        task = task_of(backbone, heads)
        add_default_heads(output, task)
        foreign = sorted(output.config.keys() - tuner.fields.keys() - {"task_type"})
        if foreign:
            raise Unsupported(f"PEFT cannot hold `{delta.name}`: its type {kind} has no `{foreign[0]}`. Save in the native format.")
        own = {"target_modules": as_targets(output.paths, output.modules)} if tuner.targeted else {}
        config = {**base_fields(backbone, task, backbone_id), **tuner.fields, "peft_type": kind, **own, **output.config}
        write_tensors(folder / WEIGHTS, output.tensors)
        write_config(folder / CONFIG, config)


def _tuner(kind: Any, folder: Path) -> Tuner:
    if not isinstance(kind, str) or kind not in tuners:
        raise Unsupported(
            f"`{folder / CONFIG}` has peft_type = {kind!r}, which deltatune has no method for. It reads {', '.join(tuners)}. "
            "Merge the delta with PEFT, or convert it to LoRA there."
        )
    return tuners[kind]


def _members(delta: Delta | Composition) -> list[Delta]:
    """The deltas that go into one folder.

    Raises:
        Unsupported: they act together in a way that PEFT has not.
    """
    if isinstance(delta, Delta):
        return [delta]
    if delta.how not in ("sequential", "parallel"):
        raise Unsupported(f"PEFT cannot hold `{delta.name}`: it is a {delta.how} composition. Save its members one by one, or merge them.")
    return delta.deltas


def _kind(deltas: list[Delta]) -> str:
    """The PEFT type that holds these deltas.

    Raises:
        Unsupported: there is none, or they are of several.
    """
    found = {kind for delta in deltas for kind in tuners if type(delta.method) in tuners[kind].methods}
    lacking = [delta for delta in deltas if not any(type(delta.method) in tuners[kind].methods for kind in tuners)]
    if lacking:
        able = sorted({kind.__name__ for name in tuners for kind in tuners[name].methods})
        raise Unsupported(
            f"PEFT cannot hold `{lacking[0].name}`: it has no type for {type(lacking[0].method).__name__}. It holds {', '.join(able)}. "
            "Save in the native format."
        )
    if len(found) > 1:
        raise Unsupported(f"PEFT holds one type in a folder, and these are {', '.join(sorted(found))}. Save the members one by one.")
    return found.pop()


formats.register("peft")(PeftFormat())
