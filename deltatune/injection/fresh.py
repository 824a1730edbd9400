"""Starting over: a delta with the tensors of a fresh one."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from deltatune.injection.delta import Delta
from deltatune.injection.entries import build_entries
from deltatune.injection.refusals import check_unmerged
from deltatune.injection.switching import unchanged
from deltatune.methods.kinds import SelectionPatch, Sharing


def reset(delta: Delta) -> None:
    """Draw a delta's tensors anew, in place, as ``attach`` would; what it selects goes back to the backbone's own values.

    A delta attached on the meta device needs it once ``to_empty`` has given it memory: what is there then is undefined.

    Raises:
        Unsupported: it is detached or merged, or still on the meta device.

    Example:
        >>> from deltatune.injection.attach import attach
        >>> from deltatune.methods import LoRA
        >>> with torch.device("meta"):
        ...     mlp = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> delta = attach(mlp, LoRA(rank=1), where="0")
        >>> _ = mlp.to_empty(device="cpu")
        >>> reset(delta)
        >>> float(delta.state_dict()["0.lora_B"].abs().sum())
        0.0
    """
    check_unmerged(delta, "reset")
    method, backbone, ledger = delta.method, delta.backbone, delta.ledger
    sites = list(dict.fromkeys(entry.site for entry in delta.entries if not (entry.head and isinstance(entry.patch, SelectionPatch))))
    shared = method.share(sites) if isinstance(method, Sharing) else None
    with unchanged(backbone, ledger) if method.reads_weights else nullcontext():
        built = {entry.key: entry.patch for entry in build_entries(ledger.index(backbone), method, sites, shared, delta.name)}
    pairs: list[tuple[str, nn.Module, nn.Module]] = [
        (entry.key, built[entry.key], entry.patch) for entry in delta.entries if not isinstance(entry.patch, SelectionPatch)
    ]
    if shared is not None and delta.shared is not None:
        pairs.append(("shared", shared, delta.shared))
    state = {entry.key: entry.choice.original for entry in delta.entries if isinstance(entry.patch, SelectionPatch)}
    delta.load_state_dict(state | {f"{key}.{name}": tensor for key, new, _ in pairs for name, tensor in new.state_dict().items()})
    with torch.no_grad():
        for _, new, old in pairs:
            for name, buffer in old.named_buffers():  # those that files do not hold, too
                buffer.copy_(new.get_buffer(name))
