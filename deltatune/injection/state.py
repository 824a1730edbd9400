"""The backbone's own tensors as they were before anything was attached, whatever acts, trains or is merged now."""

from __future__ import annotations

from torch import Tensor, nn

from deltatune.injection.ledger import Ledger, ledger_of
from deltatune.injection.selections import SelectionAct
from deltatune.injection.slot import Slot, slot_of
from deltatune.injection.weights import WeightAct
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
    """``id`` of a tensor in the backbone's tree -> what stood there before the first attach, wherever that is something else.

    Deltas select a Parameter, are merged into it, or hold its effective tensor in its place for the length of a forward.
    """
    ledger = ledger_of(backbone)
    if ledger is None:
        return {}
    slots = [(module, slot) for module in modules_of(backbone).values() if (slot := slot_of(module)) is not None]
    acts = [(module, act) for module, slot in slots for act in slot.acts.values()]
    swapped = {id(owner._parameters[name]): theta for _, act in acts if isinstance(act, WeightAct) for owner, name, theta in act.swapped}
    held = [(kept.module, kept.name, kept.original) for kept in ledger.kept]
    held += [
        (module, name, choice.original) for module, act in acts if isinstance(act, SelectionAct) for name, choice in act.choices.items()
    ]
    found: dict[int, Tensor] = {}
    for module, name, original in held:
        owner, _, leaf = name.rpartition(".")
        now = module.get_submodule(owner)._parameters[leaf]
        found[id(swapped.get(id(now), now))] = original
    return found | {stand_in: found.get(id(theta), theta) for stand_in, theta in swapped.items()}


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:k]) for k in range(1, len(parts))}
