"""Lending: a delta's own patches placed in a second tree of the same model, where many deltas share one forward.

The *twin* holds the very same patches, so what one learns, the other has. Parameters that the delta selects in place stay
in its own tree: the twin reads them there, and gradients reach them there. A twin acts in routes only.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from deltatune.injection.attach import install, remove
from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry
from deltatune.injection.ledger import check_free, open_ledger
from deltatune.methods.kinds import SelectionPatch


def lend(delta: Delta, host: nn.Module, name: str) -> Delta:
    """Put a delta's patches into another tree, too; random draws stay the caller's, because each delta has its own.

    Args:
        delta: attached to its own tree.
        host: a tree with the same modules under the same paths, whose frozen tensors are the same.
        name: how the twin is called there.

    Returns:
        The twin.

    Raises:
        InvalidValue: the name is taken.
    """
    ledger = open_ledger(host)
    check_free(name, ledger)
    paths = {id(module): path for path, module in delta.backbone.named_modules()}

    def there(module: nn.Module) -> nn.Module:
        return host.get_submodule(paths[id(module)])

    entries = [
        Entry(
            name,
            replace(own.site, module=there(own.site.module)),
            own.patch,
            tuple(replace(place, module=there(place.module)) for place in own.hosts),
            own.head,
            own.flags,
            own.number,
        )
        for own in delta.entries
    ]
    twin = Delta(name, delta.method, host, entries, delta.shared)
    if delta.shared is not None:
        ledger.shared[name] = delta.shared
    ledger.deltas[name] = twin
    for entry, own in zip(entries, delta.entries, strict=True):
        install(host, ledger, entry)
        if isinstance(entry.patch, SelectionPatch):
            entry.choice.values[name] = own.parameter
    twin.enabled = True  # no term names it, so outside of routes it rests
    return twin


def reclaim(twin: Delta) -> None:
    """Take a twin off its tree; the delta it was lent from stays as it is."""
    twin.enabled = False
    remove(twin)
