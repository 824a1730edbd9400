"""The backbone's own tensors as they were before anything was attached, whatever acts, trains or is merged now."""

from __future__ import annotations

from torch import Tensor, nn

from deltatune.injection.ledger import Ledger, ledger_of
from deltatune.injection.selections import SelectionAct
from deltatune.injection.slot import Slot, slot_of
from deltatune.structure.anatomy import modules_of


def backbone_state(backbone: nn.Module) -> dict[str, Tensor]:
    """``backbone.state_dict()`` as it was before the first attach: its own names, its own bits, nothing of a delta.

    Parameters that a delta trains in place, and weights into which one is merged, are given by their originals.

    Example:
        >>> from deltatune.injection.attach import attach, detach
        >>> from deltatune.methods import BitFit
        >>> mlp = nn.Sequential(nn.Linear(4, 2))
        >>> delta = attach(mlp, BitFit(), where="0")
        >>> sorted(backbone_state(mlp))
        ['0.bias', '0.weight']
        >>> detach(delta)
    """
    ours = {path for path, module in backbone.named_modules(remove_duplicate=False) if isinstance(module, Slot | Ledger)}
    before = originals(backbone)
    state = {}
    for name, tensor in backbone.state_dict(keep_vars=True).items():
        if ours.isdisjoint(_ancestors(name)):
            state[name] = before.get(id(tensor), tensor).detach() if isinstance(tensor, Tensor) else tensor
    return state


def originals(backbone: nn.Module) -> dict[int, Tensor]:
    """``id(Parameter)`` -> its tensor before the first attach, for those that deltas select or are merged into."""
    ledger = ledger_of(backbone)
    if ledger is None:
        return {}
    found = {id(kept.module.get_parameter(kept.name)): kept.original for kept in ledger.kept}
    for module in modules_of(backbone).values():
        slot = slot_of(module)
        act = None if slot is None else slot.acts.get(SelectionAct.__name__)
        if isinstance(act, SelectionAct):
            found |= {id(module.get_parameter(name)): choice.original for name, choice in act.choices.items()}
    return found


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:k]) for k in range(1, len(parts))}
