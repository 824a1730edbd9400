"""``dt.combine``: one delta from several of one method, by arithmetic on what they change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.checkpoint.loading import Allowed, Plan, attach_plan
from deltatune.checkpoint.schemes import SCHEMES, Factors, Scheme, concatenated, padded, truncated
from deltatune.checkpoint.tensors import named
from deltatune.errors import InvalidValue, Unsupported, nearest
from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry, build_entries
from deltatune.injection.ledger import ledger_of
from deltatune.injection.refusals import check_alone, check_unmerged
from deltatune.injection.switching import unchanged
from deltatune.methods.kinds import Exported, Method, SelectionPatch, Sharing, methods
from deltatune.structure.site import Site

By = Literal["linear", "cat", "svd", "ties", "dare", "task_arithmetic"]
PAIRS = (("lora_A", "lora_B"), ("hira_A", "hira_B"))
"""Names of factors of which only the product B A counts."""

STARTS = ("start_A", "start_B")
"""Beside these a pair is counted from where it began, so it is no product alone."""


def combine(
    weights: Mapping[Delta | str, float],
    scheme: By = "linear",
    *,
    name: str | None = None,
    backbone: nn.Module | None = None,
    rank: int | None = None,
    density: float = 0.2,
    seed: int = 0,
    enable: bool = True,
) -> Delta:
    """A new delta from several of one method, at the same sites: tau = f(w_1 tau_1, ..., w_n tau_n).

    tau_i is what delta i changes: s B A of LoRA and its kin, theta - theta_0 of a selection, and else its tensors minus what
    a fresh delta always has there (1 for (IA)^3, 0 for most). So ``linear`` is exact for all methods whose change is linear
    in their tensors or in B A, and an average of the tensors for the others (Chronopoulou et al. 2023, arXiv:2302.07027).

    | scheme | tau |
    |---|---|
    | ``linear`` | sum_i w_i tau_i; a low-rank one keeps all ranks, and is exact |
    | ``task_arithmetic`` | the same sum under its name in the literature; negative weights forget (arXiv:2212.04089) |
    | ``cat`` | B = [w_1 s_1 B_1 ...], A = [A_1; ...]: the same sum, for low-rank methods alone |
    | ``svd`` | the nearest to the same sum of rank ``rank``, for low-rank methods alone |
    | ``ties`` | trims to ``density``, elects signs, means those that agree (arXiv:2306.01708) |
    | ``dare`` | drops all but a share ``density`` at random, rescales, adds (arXiv:2311.03099) |

    ``ties`` and ``dare`` bring low-rank changes back to ``rank``. A task head is combined linearly, whatever the scheme.

    Args:
        weights: delta, or the name of one -> its weight.
        scheme: see above.
        name: of the new delta; the scheme and the names joined if left out.
        backbone: where the names are looked up; not needed for handles.
        rank: of a low-rank result; the sum of all ranks for ``linear``, ``cat`` and ``task_arithmetic``, else the largest
            one, if left out.
        density: share of entries that ``ties`` and ``dare`` keep, in (0, 1].
        seed: of what ``dare`` drops.
        enable: the new delta acts and those it is made of rest; else it rests and nothing else changes.

    Returns:
        The new delta.

    Raises:
        InvalidValue: weights that are no numbers, an unknown scheme, a name that is taken, a density out of its range.
        Unsupported: the deltas are of several methods, sites, shapes or backbones, or the method is nothing for the scheme.
        UnknownName: no delta has that name.

    Example:
        >>> from deltatune.injection.attach import attach
        >>> from deltatune.methods import LoRA
        >>> mlp = nn.Sequential(nn.Linear(8, 4))
        >>> a, b = (attach(mlp, LoRA(rank=2), where="0", name=name) for name in "ab")
        >>> both = combine({a: 0.7, b: 0.3}, name="both")
        >>> both.method.rank, both.enabled, a.enabled
        (4, True, False)
    """
    members = _members(weights, backbone)
    way = _scheme(scheme)
    _check_arguments(weights.values(), rank, density)
    if enable:
        for member in members:
            check_alone(member, "disable")
            check_unmerged(member, "combine")
    made = Combination(members, tuple(map(float, weights.values())), way, rank, density, seed)
    made.check(scheme)
    delta = made.place(name or "-".join([scheme.replace("_", "-"), *(member.name for member in members)]))
    for resting in members if enable else [delta]:
        resting.disable()
    return delta


@dataclass(frozen=True)
class Combination:
    """What is combined, and how; see ``combine``."""

    members: list[Delta]
    weights: tuple[float, ...]
    scheme: Scheme
    rank: int | None
    density: float
    seed: int

    @property
    def first(self) -> Delta:
        """The one whose method's fields the new delta takes."""
        return self.members[0]

    def check(self, scheme: str) -> None:
        """One method, the same sites and shapes.

        Raises:
            Unsupported: they differ, and in what.
        """
        pairs = factored(self.first)
        if self.scheme.of_factors and not pairs:
            raise Unsupported(
                f"`{scheme}` combines the factors of low-rank deltas, and {self.first.method} of `{self.first.name}` has none. "
                "Use linear, ties or dare."
            )
        if self.rank is not None and not pairs:
            raise InvalidValue(f"rank={self.rank} was asked for, and {self.first.method} of `{self.first.name}` has no rank. Leave it out.")
        for other in self.members[1:]:
            self._check_pair(other, pairs)

    def _check_pair(self, other: Delta, pairs: Mapping[str, tuple[str, str]]) -> None:
        a, b = self.first, other
        if type(a.method) is not type(b.method):
            raise Unsupported(f"`{a.name}` is a {methods_name(a)} and `{b.name}` a {methods_name(b)}. Combine deltas of one method.")
        differing = [field.name for field in fields(a.method) if getattr(a.method, field.name) != getattr(b.method, field.name)]
        if differing and not pairs:
            field = differing[0]
            raise Unsupported(
                f"`{a.name}` and `{b.name}` differ in {field}: {getattr(a.method, field)!r} and {getattr(b.method, field)!r}. "
                "Their tensors mean different things; combine deltas that were made alike."
            )
        mine, theirs = a.state_dict(), b.state_dict()
        alone = sorted(mine.keys() ^ theirs.keys())
        if alone:
            raise Unsupported(
                f"`{a.name}` and `{b.name}` do not sit at the same sites, or in another form: only one of them has {named(alone)}. "
                "Attach them alike; a task head is left out by dt.load(..., head=False)."
            )
        free = {f"{key}.{part}" for key, pair in pairs.items() for part in pair} | _sparse_names(a)
        unlike = [key for key in mine if key not in free and mine[key].shape != theirs[key].shape]
        unlike += [key for key, (A, B) in pairs.items() if _outer(mine, key, A, B) != _outer(theirs, key, A, B)]
        if unlike:
            raise Unsupported(f"`{a.name}` and `{b.name}` have other shapes at {named(unlike)}. Combine deltas of the same shapes.")

    def place(self, name: str) -> Delta:
        """Attach the new delta and fill it."""
        method, exported = self._method(), None
        if isinstance(method, Exported):
            exported = method.is_exported(self.first.patches)
        heads = [entry for entry in self.first.entries if _is_head(entry)]
        sites = tuple(dict.fromkeys(entry.site for entry in self.first.entries if not _is_head(entry)))
        head_sites = tuple(dict.fromkeys(entry.site for entry in heads))
        plan = Plan(
            title=name,
            name=name,
            method=method,
            sites=sites or head_sites,
            heads=head_sites,
            tensors=self.first.state_dict(),
            exported=exported,
            named=lambda delta, _: self._state(delta),
        )
        return attach_plan(self.first.backbone, plan, Allowed(idle=True))

    def _method(self) -> Method:
        """The recipe of the new delta: the first one's, with the ranks it will have."""
        patches = [_patches(member) for member in self.members]
        ranks = {}
        for key, (A, _) in factored(self.first).items():
            own = [patch[key].state_dict()[A].shape[-2] for patch in patches]
            ranks[key] = self.rank or (sum(own) if self.scheme.grows else max(own))
        return with_ranks(self.first.method, {entry.key: entry.site for entry in self.first.entries}, ranks)

    @torch.no_grad()
    def _state(self, delta: Delta) -> dict[str, Tensor]:
        """The tensors of the new delta, which is placed and fresh."""
        states = [_united(member, self.members) for member in self.members]
        scales = [{key: _scale(patch) for key, patch in _patches(member).items()} for member in self.members]
        own = _patches(delta)
        types = {key: tensor.dtype for key, tensor in states[0].items()}
        pairs = factored(delta)
        paired = {f"{key}.{part}" for key, pair in pairs.items() for part in pair}
        kept = {key: tensor for key, tensor in states[0].items() if not tensor.is_floating_point()}
        _check_kept(kept, self.members, states)
        heads = {entry.key for entry in delta.entries if isinstance(entry.patch, SelectionPatch) and entry.patch.by_value}
        start = identity(delta)
        plain = [key for key in states[0] if key not in paired and key not in kept and key not in heads]
        taus: list[dict[str, Tensor]] = [{key: state[key].double() - _at(start, key, state[key]) for key in plain} for state in states]
        if not self.scheme.linear:
            for state, scale, tau in zip(states, scales, taus, strict=True):
                tau |= {key: torch.matmul(*_factors(state, scale[key], key, *pair)) for key, pair in pairs.items()}
        tau = self.scheme.merge(taus, self.weights, self.density, self.seed) if taus[0] else {}
        found = {key: tau[key] + _at(start, key, tau[key]) for key in plain}
        for key in heads & states[0].keys():
            found[key] = torch.stack([w * state[key].double() for w, state in zip(self.weights, states, strict=True)]).sum(0)
        for key, (A, B) in pairs.items():
            change: Factors | Tensor
            if key in tau:
                change = tau[key]
            else:
                change = concatenated(
                    [_factors(state, scale[key], key, A, B) for state, scale in zip(states, scales, strict=True)], self.weights
                )
            rank = own[key].state_dict()[A].shape[-2]
            b, a = _of_rank(change, rank)
            found |= {f"{key}.{A}": a, f"{key}.{B}": b / _scale(own[key])}
        return {key: tensor.to(types[key]) for key, tensor in found.items()} | kept


def factored(delta: Delta) -> dict[str, tuple[str, str]]:
    """Key of an entry -> names of its factors A and B, where only their product counts."""
    found = {}
    for entry in delta.entries:
        own = entry.patch.state_dict().keys()
        pair = next((pair for pair in PAIRS if own >= set(pair)), None)
        if pair is not None and own.isdisjoint(STARTS):
            found[entry.key] = pair
    return found


def with_ranks(method: Method, sites: Mapping[str, Site], ranks: Mapping[str, int]) -> Method:
    """The recipe with these ranks at these entries.

    Raises:
        Unsupported: it can say one rank for all sites only.
    """
    if not ranks:
        return method
    known = {field.name for field in fields(method)}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = tuple((sites[key].key, rank) for key, rank in ranks.items() if rank != usual)
    if others and "ranks" not in known:
        raise Unsupported(
            f"{method} has one rank for all sites, and rank {others[0][1]} is needed at `{others[0][0]}`, {usual} elsewhere. Pass rank=."
        )
    changed: dict[str, Any] = {"rank": usual} | ({"ranks": others} if "ranks" in known else {})
    return replace(method, **changed)


def identity(delta: Delta) -> dict[str, Tensor]:
    """What every fresh delta of this recipe has, whatever it draws: two fresh ones agree on it. A selection has theta_0."""
    method, ledger = delta.method, delta.ledger
    sites = tuple(dict.fromkeys(entry.site for entry in delta.entries if not _is_head(entry)))
    found: dict[str, Tensor] = {
        entry.key: entry.choice.original.double() for entry in delta.entries if isinstance(entry.patch, SelectionPatch)
    }
    drawn: list[dict[str, Tensor]] = []
    with torch.random.fork_rng(devices=[]), unchanged(delta.backbone, ledger) if method.reads_weights else nullcontext():
        for seed in (1, 2) if sites else ():
            torch.manual_seed(seed)
            shared = method.share(sites) if isinstance(method, Sharing) else None
            state = {} if shared is None else {f"shared.{name}": tensor for name, tensor in shared.state_dict().items()}
            for entry in build_entries(ledger.index(delta.backbone), method, sites, shared, delta.name):
                state |= {f"{entry.key}.{name}": tensor for name, tensor in entry.patch.state_dict().items()}
            drawn.append(state)
    for key in drawn[0] if drawn else ():
        if torch.equal(drawn[0][key], drawn[1][key]):
            found[key] = drawn[0][key].double()
    return found


def methods_name(delta: Delta) -> str:
    """The registered name of its method."""
    return methods.name_of(type(delta.method))


def _members(weights: Mapping[Delta | str, float], backbone: nn.Module | None) -> list[Delta]:
    if not isinstance(weights, Mapping) or not weights:
        raise InvalidValue(f"combine was given {weights!r:.80}. Give deltas with their weights: dt.combine({{a: 0.7, b: 0.3}}).")
    found = []
    for key in weights:
        if isinstance(key, Delta):
            found.append(key)
            continue
        ledger = ledger_of(backbone) if backbone is not None else None
        if ledger is None:
            raise InvalidValue(f"combine was given the name {key!r}, and no backbone with deltas to look it up on. Pass backbone=.")
        found.append(ledger.delta(key))
    if len({id(delta.backbone) for delta in found}) > 1:
        raise Unsupported("combine was given deltas on several backbones. Save them and load them onto one.")
    twice = next((name for name, count in Counter(delta.name for delta in found).items() if count > 1), None)
    if twice is not None:
        raise InvalidValue(f"combine was given `{twice}` twice, by its name and by its handle. Add up its weights.")
    for delta in found:
        _ = delta.ledger  # it is attached
    return found


def _scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise InvalidValue(f"No scheme is called `{name}`. {nearest(str(name), SCHEMES)}")
    return SCHEMES[name]


def _check_arguments(weights: Any, rank: int | None, density: float) -> None:
    for weight in weights:
        if not isinstance(weight, int | float) or isinstance(weight, bool) or weight - weight != 0:
            raise InvalidValue(f"combine was given the weight {weight!r}. Weights are finite numbers.")
    if not 0 < density <= 1:
        raise InvalidValue(f"combine was given density={density!r}. It is a share, greater than 0 and at most 1.")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise InvalidValue(f"combine was given rank={rank!r}. It is a whole number of at least 1.")


def _is_head(entry: Entry) -> bool:
    """A task head that trains in full, beside what the method builds."""
    return entry.head and isinstance(entry.patch, SelectionPatch)


def _outer(state: Mapping[str, Tensor], key: str, A: str, B: str) -> tuple[int, ...]:
    """Shape of B A."""
    return (*state[f"{key}.{B}"].shape[:-1], state[f"{key}.{A}"].shape[-1])


def _scale(patch: nn.Module) -> float:
    return float(getattr(patch, "scale", 1.0))


def _patches(delta: Delta) -> dict[str, nn.Module]:
    return {entry.key: entry.patch for entry in delta.entries}


def _factors(state: Mapping[str, Tensor], scale: float, key: str, A: str, B: str) -> Factors:
    """s B and A of one site, in double precision."""
    return scale * state[f"{key}.{B}"].double(), state[f"{key}.{A}"].double()


def _of_rank(change: Factors | Tensor, rank: int) -> Factors:
    """Factors of that rank; those that are small enough stay as they are."""
    if isinstance(change, Tensor) or change[1].shape[-2] > rank:
        return truncated(change, rank)
    return padded(change, rank)


def _at(start: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    """Where the tensor starts; 0 where it starts anywhere."""
    found = start.get(key)
    return found.to(like.device) if found is not None and found.shape == like.shape else torch.zeros((), dtype=torch.float64)


def _sparse(delta: Delta) -> list[str]:
    """Keys of the entries that hold values at positions of a flat parameter, both stored."""
    return [entry.key for entry in delta.entries if {"index", "values"} == entry.patch.state_dict().keys()]


def _sparse_names(delta: Delta) -> set[str]:
    return {f"{key}.{part}" for key in _sparse(delta) for part in ("index", "values")}


def _united(delta: Delta, members: Sequence[Delta]) -> dict[str, Tensor]:
    """The state of a delta, where sparse values stand at the positions of all members together, and are 0 at those of others."""
    state = dict(delta.state_dict())
    for key in _sparse(delta):
        index = state[f"{key}.index"]
        union = torch.unique(torch.cat([member.state_dict()[f"{key}.index"] for member in members]))
        values = state[f"{key}.values"].new_zeros(len(union))
        values[torch.searchsorted(union, index)] = state[f"{key}.values"]
        state |= {f"{key}.index": union, f"{key}.values": values}
    return state


def _check_kept(kept: Mapping[str, Tensor], members: Sequence[Delta], states: Sequence[Mapping[str, Tensor]]) -> None:
    """Masks, positions and the like are no numbers to add: they must agree."""
    for member, state in zip(members[1:], states[1:], strict=True):
        unlike = [key for key, tensor in kept.items() if not torch.equal(tensor, state[key])]
        if unlike:
            raise Unsupported(
                f"`{members[0].name}` and `{member.name}` have other masks at {named(unlike)}, and masks cannot be added. "
                "Let both act: dt.compose(backbone, [...])."
            )
