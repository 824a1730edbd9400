"""Merge a delta into the backbone's weights, checked; unmerge restores the exact bits.

The weights before the first merge are kept, and each change of what is merged is computed from them anew, so deltas
can be unmerged in any order. A tied weight is one Parameter, so it is merged once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import Unsupported
from deltatune.injection.branches import BranchAct
from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry
from deltatune.injection.freeze import refresh_gradients
from deltatune.injection.ledger import Ledger
from deltatune.injection.outputs import put_rows
from deltatune.injection.refusals import check_alone, check_kind
from deltatune.injection.slot import Member, slot_of
from deltatune.injection.tokens import TokensAct
from deltatune.injection.weights import run_weight
from deltatune.methods.kinds import BranchInputPatch, Commuting, InputPatch, Mergeable, OutputPatch, Patch, SelectionPatch, WeightPatch
from deltatune.structure.site import is_packed

PROBES = 8

Target = tuple[nn.Module, str]
"""A module, and the name under which it holds a parameter."""


@dataclass
class Kept:
    """A parameter of the backbone as it was before anything was merged into it.

    Attributes:
        module: its owner.
        name: what the owner calls it.
        original: its bits.
        version: the Parameter's version counter when a merge wrote it last; None in a copy, whose counters begin anew.
    """

    module: nn.Module
    name: str
    original: Tensor
    version: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "version": None}

    @property
    def was_written(self) -> bool:
        """By something else than a merge, as far as that can be known."""
        return self.version is not None and self.version != self.parameter._version

    @property
    def parameter(self) -> nn.Parameter:
        """The Parameter, as it is now."""
        return self.module.get_parameter(self.name)


def merge(delta: Delta, *, keep: bool = False) -> int:
    """Fold a delta into the weights, so that the backbone computes it at no cost: W' = W + s B A, for LoRA.

    Args:
        delta: an enabled delta whose kinds can merge: weight and selection kinds, and output kinds on linear maps.
        keep: for good: the weights stay as they are then, and the delta is gone.

    Returns:
        Bytes kept for ``unmerge``; 0 with ``keep``.

    Raises:
        Unsupported: a patch cannot be expressed as a weight, does not commute with one that acts inside it, or the
            merged weight fails its check; nothing is changed then.
    """
    check_kind(delta, Delta, "merge")
    ledger = delta.ledger
    check_alone(delta, "merge")
    if delta.merged:
        raise Unsupported(f"Delta `{delta.name}` is merged already. Unmerge it before merging it again.")
    if not delta.enabled or ledger.resting:
        raise Unsupported(f"Delta `{delta.name}` is disabled, so there is nothing to merge. Enable it first.")
    ledger.arrange([delta.name])  # ends what Ctrl-C broke off, so that the weights are in their places
    for entry in delta.entries:
        _check(ledger, entry)
    _check_unwritten(ledger, delta, "merged")
    if keep:
        _check_not_shared(ledger, delta)
    delta.merged = True
    try:
        kept = _write(ledger, delta)
    except BaseException:
        delta.merged = False
        raise
    ledger.arrange([delta.name])
    refresh_gradients(delta)
    if keep:
        _make_permanent(ledger, delta)
        return 0
    return kept


def unmerge(delta: Delta, *, discard: bool = False) -> None:
    """Take a delta out of the weights again; the last one restores their exact bits.

    Args:
        delta: a merged delta.
        discard: lose what was written into the weights since they were merged, as by ``load_state_dict``.

    Raises:
        Unsupported: it is not merged, one that does not commute with it is merged on top, or the weights were written
            since by something else.
    """
    check_kind(delta, Delta, "unmerge")
    ledger = delta.ledger
    if not delta.merged:
        raise Unsupported(f"Delta `{delta.name}` is not merged. Merge it first.")
    ledger.arrange([delta.name])
    for entry in delta.entries:
        _check_on_top(ledger, entry)
    if not discard:
        _check_unwritten(ledger, delta, "unmerged")
    delta.merged = False
    _write(ledger, delta, check=False)
    ledger.arrange([delta.name])
    refresh_gradients(delta)


def _targets(entry: Entry) -> dict[int, Target]:
    """The parameters a merge of this entry writes: ``id`` -> an owner and its name for it. A tied one is one, whoever owns it."""
    module = entry.site.module
    if isinstance(entry.patch, SelectionPatch):
        return {}
    if isinstance(entry.patch, WeightPatch):
        owner, _, name = entry.patch.parameter.rpartition(".")
        return {id(entry.parameter): (module.get_submodule(owner), name)}
    own = {name: tensor for name in ("weight", "bias") if (tensor := module._parameters.get(name)) is not None}
    return {id(tensor): (module, name) for name, tensor in own.items()}


def _check(ledger: Ledger, entry: Entry) -> None:
    patch, module = entry.patch, entry.site.module
    if isinstance(patch, SelectionPatch):
        return
    if isinstance(patch, OutputPatch | InputPatch | BranchInputPatch):
        flat = entry.site.is_linear or (
            isinstance(patch, OutputPatch) and isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        )
        if not isinstance(patch, Mergeable) or not flat:
            raise Unsupported(
                f"Delta `{entry.delta}` cannot be merged: {type(patch).__name__} at `{entry.key}` is no change of a weight. "
                "Keep it attached, or train a method that merges, such as LoRA or (IA)^3."
            )
        if "weight" not in module._parameters:
            raise Unsupported(
                f"Delta `{entry.delta}` cannot be merged: the weight of `{entry.key}` is no Parameter but computed from others, as by "
                "weight_norm. Remove the parametrization first (torch.nn.utils.parametrize), or keep the delta attached."
            )
        if entry.site.tied:
            raise Unsupported(
                f"Delta `{entry.delta}` cannot be merged: it acts on `{entry.key}` alone, but that weight is tied to other modules."
            )
    elif not isinstance(patch, WeightPatch):
        raise Unsupported(
            f"Delta `{entry.delta}` cannot be merged: {type(patch).__name__} at `{entry.key}` adds virtual positions, "
            "not weights. Keep it attached."
        )
    for owner, name in _targets(entry).values():
        theta = owner.get_parameter(name)
        if theta.is_meta or is_packed(theta):
            raise Unsupported(
                f"Delta `{entry.delta}` cannot be merged into `{entry.key}`: its `{name}` is quantised, sharded or offloaded. "
                "Load the backbone in full precision, on one device."
            )
    mixed = {name for term in ledger.terms if term.mixer is not None for name in term.members}  # what mixers weigh must not change
    for inner in _others(ledger, entry, before=True, merged=False):
        if inner.delta in mixed or not _commute(inner.patch, patch):
            raise Unsupported(
                f"Delta `{entry.delta}` cannot be merged first: {type(inner.patch).__name__} acts inside it at `{entry.key}` "
                "and the two do not commute. Merge in the order in which they act."
            )


def _check_on_top(ledger: Ledger, entry: Entry) -> None:
    if isinstance(entry.patch, SelectionPatch):
        return  # it is in the weights whether merged or not
    for outer in _others(ledger, entry, before=False, merged=True):
        if not _commute(outer.patch, entry.patch):
            raise Unsupported(
                f"Delta `{entry.delta}` cannot be unmerged first: {type(outer.patch).__name__} is merged on top of it at `{entry.key}` "
                "and the two do not commute. Unmerge in the reverse order."
            )


def _check_unwritten(ledger: Ledger, delta: Delta, verb: str) -> None:
    """Nothing but merges wrote the weights: starting from the kept bits would lose it."""
    targets = {key for entry in delta.entries for key in _targets(entry)}
    for kept in ledger.kept:
        if id(kept.parameter) in targets and kept.was_written:
            raise Unsupported(
                f"Delta `{delta.name}` cannot be {verb}: the `{kept.name}` of a {type(kept.module).__name__} was written since a delta was "
                "merged into it, as by load_state_dict, and that would be lost. Unmerge ahead of loading weights; to lose what was "
                "written, call dt.unmerge(delta, discard=True) on what is merged."
            )


def _others(ledger: Ledger, entry: Entry, *, before: bool, merged: bool) -> list[Member]:
    """Patches of other acting deltas at the same module that come before (or after) this one, merged or not."""
    order = [name for term in ledger.terms for name in term.members]
    rank = order.index(entry.delta)
    slot = slot_of(entry.site.module)
    assert slot is not None
    found: list[Member] = []
    for kind, act in slot.acts.items():
        if kind in (BranchAct, TokensAct):
            continue  # they change nothing themselves
        for name, members in act.members.items():
            other = ledger.deltas[name]
            if name == entry.delta or name not in order or other.merged != merged:
                continue
            for member in members:
                inner = order.index(name) < rank
                if isinstance(member.patch, WeightPatch) != isinstance(entry.patch, WeightPatch):
                    inner = isinstance(member.patch, WeightPatch)  # weights are read inside the module
                if inner == before and isinstance(member.patch, OutputPatch | InputPatch | BranchInputPatch | WeightPatch):
                    found.append(member)
    return found


def _commute(a: Patch, b: Patch) -> bool:
    return isinstance(a, Commuting) and isinstance(b, Commuting) and a.commutes == b.commutes


def _write(ledger: Ledger, delta: Delta, *, check: bool = True) -> int:
    """Compute every parameter this delta touches from its kept bits and all merged deltas, and write them at once.

    Returns:
        Bytes of the originals of what is written.
    """
    merged = [ledger.deltas[name] for term in ledger.terms for name in term.members if ledger.deltas[name].merged]
    entries = [entry for other in merged for entry in other.entries]
    targets = _reach(delta, entries)
    known = {id(kept.parameter): kept.original for kept in ledger.kept}
    originals = {key: known[key] if key in known else owner.get_parameter(name).detach() for key, (owner, name) in targets.items()}
    values = dict(originals)
    for entry in sorted(entries, key=lambda entry: not isinstance(entry.patch, WeightPatch)):  # weights act inside the module
        own = {name: key for key, (_, name) in _targets(entry).items()}
        if own and values.keys() >= set(own.values()):
            _fold(entry, values, own, check=check)
    changed = {key: target for key, target in targets.items() if not torch.equal(values[key], originals[key])}
    if check:
        _check_not_selected(ledger, delta, changed.values())
    kept = [Kept(owner, name, known.get(key, originals[key].clone())) for key, (owner, name) in changed.items()]
    with torch.no_grad():
        for key, (owner, name) in targets.items():
            if key in known or key in changed:
                owner.get_parameter(name).copy_(values[key])
    for item in kept:
        item.version = item.parameter._version
    ledger.kept = [other for other in ledger.kept if id(other.parameter) not in targets] + kept
    return sum(item.original.numel() * item.original.element_size() for item in kept)


def _reach(delta: Delta, merged: Sequence[Entry]) -> dict[int, Target]:
    """The parameters this delta touches, and those that merged patches hold together with one of them, as a weight and its bias."""
    targets = {key: target for entry in delta.entries for key, target in _targets(entry).items()}
    pairs = [pair for entry in merged if len(pair := _targets(entry)) > 1]
    for pair in pairs:
        if targets.keys() & pair.keys():
            targets = {**pair, **targets}
    return targets


def _check_not_selected(ledger: Ledger, delta: Delta, changed: Iterable[Target]) -> None:
    """Refuse to merge into what a delta trains in place: its change and the merged one could not be told apart."""
    selected = {
        id(entry.parameter): entry
        for other in ledger.deltas.values()
        if other.enabled
        for entry in other.entries
        if isinstance(entry.patch, SelectionPatch)
    }
    found = next((entry for owner, name in changed if (entry := selected.get(id(owner.get_parameter(name)))) is not None), None)
    if found is not None:
        raise Unsupported(
            f"Delta `{delta.name}` cannot be merged: it would change `{found.key}`, which delta `{found.delta}` trains in place. "
            f"Disable `{found.delta}`, or merge it for good first (keep=True)."
        )


@torch.no_grad()
def _fold(entry: Entry, values: dict[int, Tensor], own: dict[str, int], *, check: bool) -> None:
    """Replace values[...] of one entry's parameters by their merged form, computed in float32 at least and rounded once."""
    patch = entry.patch
    training = patch.training
    patch.eval()
    try:
        if isinstance(patch, WeightPatch):
            (key,) = own.values()
            theta = values[key]
            member = Member(entry.delta, entry.site, patch)
            merged = run_weight(member, _wide(theta)).to(theta.dtype)
            if check:
                _check_close(entry, merged, run_weight(member, theta.double()), 1.0)
            values[key] = merged
        else:
            weight, bias = values[own["weight"]], values[own["bias"]] if "bias" in own else None
            new_weight, new_bias = _merge_linear(entry, weight, bias)
            if check:
                _probe(entry, weight, bias, new_weight, new_bias)
            values[own["weight"]] = new_weight
            if new_bias is not None:
                values[own["bias"]] = new_bias
    finally:
        patch.train(training)


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or more where it has more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _merge_linear(entry: Entry, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One output or input patch folded into (weight, bias) as stored, on its rows only."""
    site, patch = entry.site, entry.patch
    assert isinstance(patch, Mergeable)
    flat = weight.mT if site.transposed else weight
    part, part_bias = site.rows_of(flat, 0), None if bias is None else site.rows_of(bias, 0)
    new, new_bias = patch.merge(_wide(part).reshape(part.shape[0], -1), None if part_bias is None else _wide(part_bias))
    new = new.reshape(part.shape).to(weight.dtype)
    if site.rows is not None:
        new = put_rows(flat, site.rows, new, 0)
    if new_bias is not None and bias is not None:
        new_bias = new_bias.to(bias.dtype)
        new_bias = new_bias if site.rows is None else put_rows(bias, site.rows, new_bias, 0)
    return (new.mT if site.transposed else new), new_bias


def _probe(entry: Entry, weight: Tensor, bias: Tensor | None, new_weight: Tensor, new_bias: Tensor | None) -> None:
    """Random inputs through the merged map and through the patched one must agree to rounding."""
    site, patch = entry.site, entry.patch
    generator = torch.Generator().manual_seed(0)
    flat, new = (weight.mT, new_weight.mT) if site.transposed else (weight, new_weight)
    flat, new = _wide(site.rows_of(flat, 0)), _wide(site.rows_of(new, 0))
    b = None if bias is None else _wide(site.rows_of(bias, 0))
    new_b = None if new_bias is None else _wide(site.rows_of(new_bias, 0))
    if isinstance(site.module, nn.Embedding):
        ids = torch.randint(flat.shape[0], (PROBES,), generator=generator).to(flat.device)
        scale = float(getattr(site.module, "embed_scale", 1.0))
        _check_close(entry, scale * new[ids], patch(ids, scale * flat[ids]), 1.0, dtype=weight.dtype)
        return
    flat, new = flat.reshape(flat.shape[0], -1), new.reshape(new.shape[0], -1)
    x = torch.randn(PROBES, flat.shape[1], generator=generator).to(flat)
    expected = F.linear(patch(x), flat, b) if isinstance(patch, InputPatch) else patch(x, F.linear(x, flat, b))
    _check_close(entry, F.linear(x, new, new_b), expected, flat.shape[1] ** 0.5, dtype=weight.dtype)


def _check_close(entry: Entry, found: Tensor, expected: Tensor, growth: float, *, dtype: torch.dtype | None = None) -> None:
    eps = torch.finfo(dtype or found.dtype).eps
    scale = float(expected.abs().max()) + 1.0
    error = float((found.double() - expected.double()).abs().max())
    if not error <= 64 * eps * growth * scale:
        raise Unsupported(
            f"Merging delta `{entry.delta}` at `{entry.key}` was checked and failed: the merged weight is off by {error:.2e}, "
            f"where rounding explains {64 * eps * growth * scale:.2e}. The weights are as they were. Are all of the delta's tensors finite?"
        )


def _check_not_shared(ledger: Ledger, delta: Delta) -> None:
    targets = {key for entry in delta.entries for key in _targets(entry)}
    for other in ledger.deltas.values():
        if other is not delta and other.merged and any(targets & _targets(entry).keys() for entry in other.entries):
            raise Unsupported(
                f"Delta `{delta.name}` cannot be merged for good while `{other.name}` is merged into the same weights. Unmerge that first."
            )


def _make_permanent(ledger: Ledger, delta: Delta) -> None:
    """Forget the bits before the merge, and the delta with them."""
    from deltatune.injection.attach import detach  # attaching knows how to take apart

    targets = {key for entry in delta.entries for key in _targets(entry)}
    changed = {id(kept.parameter) for kept in ledger.kept} & targets
    ledger.kept = [kept for kept in ledger.kept if id(kept.parameter) not in changed]
    for other in ledger.deltas.values():  # selections that rest now must come back on top of the new weight
        for entry in other.entries:
            if isinstance(entry.patch, SelectionPatch) and id(entry.parameter) in changed:
                entry.choice.move(entry.parameter.detach())
    for entry in delta.entries:
        if isinstance(entry.patch, SelectionPatch):
            entry.choice.make_original(delta.name, entry.parameter)
    delta.merged = False
    detach(delta)
