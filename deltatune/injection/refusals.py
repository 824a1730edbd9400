"""What a delta refuses in the state it is in: to act alone within a composition, to rest or change while it is merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.methods.kinds import SelectionPatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltatune.injection.delta import Delta
    from deltatune.injection.entries import Entry


def check_backbone(given: object, verb: str) -> None:
    """It is a module.

    Raises:
        InvalidValue: it is not.
    """
    if not isinstance(given, nn.Module):
        raise InvalidValue(
            f"{verb} was given {given!r:.80} ({type(given).__name__}) as its backbone. Give a torch.nn.Module; "
            "deltatune.backbones.load_backbone opens one by its name."
        )


def check_kind(given: object, kinds: type | tuple[type, ...], verb: str) -> None:
    """It is a delta, or a composition where the verb takes one.

    Raises:
        InvalidValue: it is not.
    """
    if not isinstance(given, kinds):
        wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise InvalidValue(
            f"{verb} was given {given!r:.80} ({type(given).__name__}). Give a {wanted}: what attach, load or compose returned, or one of "
            "dt.deltas(backbone)."
        )


def check_names(entries: Sequence[Entry], shared: nn.Module | None) -> None:
    """In delta files no patch goes by the name of the state that sites share.

    Raises:
        Unsupported: one does.
    """
    found = next((entry.key for entry in entries if f"{entry.key}.".startswith("shared.")), None)
    if shared is not None and found is not None:
        raise Unsupported(
            f"A patch at `{found}` would go by the name of what the method shares between its sites. Choose sites below other modules, or "
            "rename that module."
        )


def check_alone(delta: Delta, verb: str) -> None:
    """It is no member of a composition, which enables and disables its members together.

    Raises:
        Unsupported: it is one.
    """
    for composition in delta.ledger.compositions.values():
        if delta.name in composition.members:
            raise Unsupported(
                f"Delta `{delta.name}` acts within the composition `{composition.name}`. {verb.capitalize()} that, or dissolve it first."
            )


def check_unmerged(delta: Delta, verb: str) -> None:
    """It is not merged.

    Raises:
        Unsupported: it is, so the weights would not follow.
    """
    if delta.merged:
        raise Unsupported(f"Cannot {verb} delta `{delta.name}` while it is merged into the weights. Call dt.unmerge(delta) first.")


def check_in_memory(delta: Delta) -> None:
    """Its own tensors are not on the meta device.

    Raises:
        Unsupported: one of them is.
    """
    own = [entry.patch for entry in delta.entries] + ([] if delta.shared is None else [delta.shared])
    if any(tensor.is_meta for module in own for tensor in (*module.parameters(), *module.buffers())):
        raise Unsupported(
            f"Delta `{delta.name}` is on the meta device, so tensors put into it would be lost. Give the backbone memory with "
            "to_empty(device=...) and load its weights first; then dt.reset(delta), or load the delta."
        )


def check_selects_unmerged(delta: Delta) -> None:
    """It trains nothing in place that holds another delta's merged change: the two could not be told apart.

    Raises:
        Unsupported: it does.
    """
    held = {id(kept.module.get_parameter(kept.name)) for kept in delta.ledger.kept}
    entry = next((e for e in delta.entries if isinstance(e.patch, SelectionPatch) and id(e.parameter) in held), None)
    if entry is not None:
        raise Unsupported(
            f"Delta `{delta.name}` cannot train `{entry.key}` in place while another delta is merged into it. Unmerge that one first."
        )
