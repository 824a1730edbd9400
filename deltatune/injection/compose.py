"""Compositions: several deltas, of any kinds, acting together as one named thing; ``injection.ways`` has the formulas.

Context kinds concatenate in order whatever ``how`` says; weight kinds chain or add differences; selections always add
differences. Deltas attached one after the other act sequentially without being composed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from deltatune.errors import CheckpointError, InvalidValue, Unsupported
from deltatune.injection.delta import Budget, Delta
from deltatune.injection.freeze import refresh_gradients
from deltatune.injection.ledger import Ledger, check_free, ledger_of
from deltatune.injection.mixers import MIXERS, Mixer
from deltatune.injection.outputs import OutputAct
from deltatune.injection.refusals import check_alone, check_backbone, check_kind, check_selects_unmerged, check_unmerged
from deltatune.injection.slot import How, Slot, Term, slot_of


class Composition:
    """Handle on deltas that act together; made by ``compose`` and ``load``.

    Attributes:
        name: its name on this backbone.
        how: sequential, parallel, weighted, gated or fusion.
        weights: one per member; ones unless ``weighted``.
        enabled: it acts.
        frozen: members that it froze when it was made, and unfreezes when it is dissolved.
    """

    def __init__(self, name: str, backbone: nn.Module, members: tuple[str, ...], how: How, weights: tuple[float, ...]) -> None:
        self.name = name
        self.backbone = backbone
        self.members = members
        self.how: How = how
        self.weights = weights
        self.enabled = False
        self.frozen: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Composition({self.name!r}, {self.how}, {list(self.members)})"

    @property
    def ledger(self) -> Ledger:
        """The ledger it is entered in.

        Raises:
            Unsupported: it was dissolved.
        """
        ledger = ledger_of(self.backbone)
        if ledger is None or ledger.compositions.get(self.name) is not self:
            raise Unsupported(f"Composition `{self.name}` was dissolved. Compose its deltas again.")
        return ledger

    @property
    def deltas(self) -> list[Delta]:
        """Its members, in order."""
        return [self.ledger.delta(name) for name in self.members]

    @property
    def term(self) -> Term:
        """Its entry among what acts."""
        return Term(self.how, self.members, self.weights, self.name if self.how in MIXERS else None)

    def mixers(self) -> dict[str, Mixer]:
        """Path of the module -> the mixer there; empty unless ``how`` trains one."""
        found: dict[str, Mixer] = {}
        for path, slot in self._slots():
            if self.name in slot.mixers:
                mixer = slot.mixers[self.name]
                assert isinstance(mixer, Mixer)
                found[path] = mixer
        return found

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The mixers' parameters, then the members' ones under the members' names."""
        for path, mixer in self.mixers().items():
            for name, parameter in mixer.named_parameters():
                yield f"mixer.{path}.{name}", parameter
        for delta in self.deltas:
            for name, parameter in delta.named_parameters():
                yield f"{delta.name}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every Parameter of the mixers and of the members."""
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def mixing(self) -> Mixing:
        """Handle on what it trains besides its members."""
        return Mixing(self)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> tensor of everything: the mixers', then the members' under the members' names."""
        state = {f"mixer.{name}": tensor for name, tensor in self.mixing.state_dict().items()}
        return state | {f"{delta.name}.{name}": tensor for delta in self.deltas for name, tensor in delta.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tensors of ``state_dict``.

        Raises:
            CheckpointError: they do not fit the mixers or a member.
        """
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in ("mixer", *self.members)}
        for name, tensor in state.items():
            part, _, rest = name.partition(".")
            if part not in parts:
                raise CheckpointError(f"`{name}` fits no member of composition `{self.name}`: {', '.join(self.members)}.")
            parts[part][rest] = tensor
        self.mixing.load_state_dict(parts["mixer"])
        for delta in self.deltas:
            delta.load_state_dict(parts[delta.name])

    def penalty(self) -> Tensor:
        """The terms of the mixers and of the members that train in the loss; zero for most."""
        return sum((delta.penalty() for delta in self._training()), self.mixing.penalty())

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer over what trains, each Parameter once: the mixers, and the members that are not frozen."""
        return optimizer_groups([self.mixing, *self._training()], lr)

    def budget(self) -> Budget:
        """N, M, |delta|, their ratio and bytes of the mixers and all members."""
        budgets = [self.mixing.budget(), *(delta.budget() for delta in self.deltas)]
        n, size = budgets[0].N, sum(budget.delta for budget in budgets)
        m = n + sum(budget.M - n for budget in budgets)
        return Budget(N=n, M=m, delta=size, ratio=size / n, size_bytes=sum(budget.size_bytes for budget in budgets))

    def enable(self) -> None:
        """Let the members act together."""
        if self.enabled:
            return
        ledger = self.ledger
        for delta in self.deltas:
            check_selects_unmerged(delta)
        self.enabled = True
        ledger.terms.append(self.term)
        self._follow(True)

    def disable(self) -> None:
        """Let all members rest."""
        if not self.enabled:
            return
        ledger = self.ledger
        self.enabled = False
        ledger.terms = [term for term in ledger.terms if term != self.term]
        self._follow(False)

    def dissolve(self) -> None:
        """Forget the composition; its members stay attached, and act one after the other if it was enabled."""
        ledger = self.ledger
        enabled = self.enabled
        self.disable()
        for _, slot in self._slots():
            if self.name in slot.mixers:
                del slot.mixers[self.name]
        deltas = self.deltas
        del ledger.compositions[self.name]
        for delta in deltas:
            if delta.name in self.frozen:
                delta.unfreeze()
        if enabled:
            for delta in deltas:
                delta.enable()

    def _training(self) -> list[Delta]:
        return [delta for delta in self.deltas if delta.trainable]

    def _follow(self, enabled: bool) -> None:
        self.ledger.arrange(self.members)
        for delta in self.deltas:
            delta.enabled = enabled
            refresh_gradients(delta)
        for mixer in self.mixers().values():
            mixer.requires_grad_(enabled)

    def _slots(self) -> Iterator[tuple[str, Slot]]:
        """The slots of modules on which a member acts, once each, with the module's path."""
        seen: set[int] = set()
        for delta in self.deltas:
            for entry in delta.entries:
                slot = slot_of(entry.site.module)
                if slot is not None and id(slot) not in seen:
                    seen.add(id(slot))
                    yield entry.site.module_path, slot


class Mixing:
    """Handle on what a composition trains besides its members, its mixers; a training loop treats it like one more delta.

    Args:
        composition: the composition.
    """

    def __init__(self, composition: Composition) -> None:
        self.composition = composition

    @property
    def name(self) -> str:
        """The composition's name."""
        return self.composition.name

    def parameters(self) -> Iterator[nn.Parameter]:
        """The mixers' parameters."""
        for mixer in self.composition.mixers().values():
            yield from mixer.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The mixers' tensors."""
        mixers = self.composition.mixers()
        return {f"{path}.{name}": tensor.detach() for path, mixer in mixers.items() for name, tensor in mixer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tensors of ``state_dict``.

        Raises:
            CheckpointError: they are not those of these mixers.
        """
        own = self.state_dict()
        if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in state.items()}:
            raise CheckpointError(
                f"The tensors do not fit the mixers of composition `{self.name}`: found {sorted(state)}, needed {sorted(own)}."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def penalty(self) -> Tensor:
        """The mixers' own term in the loss; zero for most."""
        return sum((mixer.penalty() for mixer in self.composition.mixers().values()), torch.zeros(()))

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """One group for an optimizer."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def budget(self) -> Budget:
        """N, M, |delta|, their ratio and bytes of the mixers alone."""
        n = self.composition.deltas[0].budget().N
        size = sum(parameter.numel() for parameter in self.parameters())
        stored = sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())
        return Budget(N=n, M=n + size, delta=size, ratio=size / n, size_bytes=stored)


def optimizer_groups(parts: Sequence[Delta | Mixing], lr: float) -> list[dict[str, Any]]:
    """The groups of all parts, each Parameter once: two deltas may select the same one, and the last of them trains it."""
    groups, taken = [], set[int]()
    for part in parts:
        for group in part.parameter_groups(lr):
            free = [parameter for parameter in group["params"] if id(parameter) not in taken]
            taken.update(map(id, free))
            groups.append({**group, "params": free})
    return [group for group in groups if group["params"]]


def compose(
    backbone: nn.Module,
    members: Sequence[str | Delta],
    how: How = "sequential",
    *,
    weights: Sequence[float] | None = None,
    name: str | None = None,
) -> Composition:
    """Make attached deltas act together.

    Args:
        backbone: where they are attached.
        members: their names, or the deltas, in order.
        how: ``sequential``, ``parallel``, ``weighted``, ``gated`` or ``fusion``; see ``injection.ways``.
        weights: one per member, for ``weighted``.
        name: how the composition is called; the members' names joined by ``-`` if left out.

    Returns:
        The composition, enabled.

    Raises:
        UnknownName: a member is not attached.
        InvalidValue: members, weights or names that do not fit.
        Unsupported: a member is merged or composed already, or cannot be weighed by token.

    Example:
        >>> from deltatune.injection.attach import attach, detach
        >>> from deltatune.methods import IA3, LoRA
        >>> mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> a = attach(mlp, LoRA(rank=2), where="0", name="a")
        >>> b = attach(mlp, IA3(), where=["0", "2"], name="b")
        >>> compose(mlp, ["a", "b"], how="weighted", weights=[0.7, 0.3])
        Composition('a-b', weighted, ['a', 'b'])
    """
    check_backbone(backbone, "compose")
    for member in members:
        check_kind(member, (str, Delta), "compose")
    names = tuple(member.name if isinstance(member, Delta) else member for member in members)
    ledger = ledger_of(backbone)
    if ledger is None:
        raise Unsupported(f"Cannot compose {list(names)}: nothing is attached to this backbone. Attach or load the deltas first.")
    deltas = [ledger.delta(member) for member in names]
    name = "-".join(names) if name is None else name
    _check(ledger, names, deltas, how, weights, name)
    composition = Composition(name, backbone, names, how, tuple(weights) if weights is not None else (1.0,) * len(names))
    terms = list(ledger.terms)
    for delta in deltas:
        delta.disable()
    ledger.compositions[name] = composition
    try:
        if how in MIXERS:
            _add_mixers(composition, MIXERS[how])
        composition.enable()
        if how in MIXERS and MIXERS[how].freezes_members:
            _freeze_members(composition)
    except BaseException:
        composition.dissolve()
        _restore(ledger, deltas, terms)
        raise
    return composition


def _restore(ledger: Ledger, deltas: Sequence[Delta], terms: list[Term]) -> None:
    """Let what acted before act again, in its order."""
    ledger.terms = terms
    for delta in deltas:
        delta.enabled = any(delta.name in term.members for term in terms)
    ledger.arrange([delta.name for delta in deltas])
    for delta in deltas:
        refresh_gradients(delta)


def _check(ledger: Ledger, names: tuple[str, ...], deltas: list[Delta], how: How, weights: Sequence[float] | None, name: str) -> None:
    if how not in get_args(How):
        raise InvalidValue(f"compose was asked for how={how!r}; it is one of {', '.join(f'`{known}`' for known in get_args(How))}.")
    if len(names) < 2 or len(set(names)) != len(names):
        raise InvalidValue(f"compose was given {list(names)}; it takes at least two different deltas.")
    if (weights is not None) != (how == "weighted") or (weights is not None and len(weights) != len(names)):
        raise InvalidValue(
            f"compose was given weights={weights!r} for {len(names)} members and how={how!r}; "
            "`weighted` takes one weight a member, the others none."
        )
    check_free(name, ledger)
    for delta in deltas:
        check_alone(delta, "compose")
        check_unmerged(delta, "compose")


def _add_mixers(composition: Composition, kind: type[Mixer]) -> None:
    """One on each module whose output enough members edit; of a fused projection, for the whole of it.

    Raises:
        Unsupported: the module is a convolution, or there is nowhere anything to mix.
    """
    for _, slot in composition._slots():
        act = slot.acts.get(OutputAct)
        present = [member for member in composition.members if act is not None and member in act.members]
        if act is None or len(present) < kind.least:
            continue
        site = replace(act.members[present[0]][0].site, rows=None)
        if site.channel_axis != -1:
            raise Unsupported(
                f"`{site.path}` is a convolution; a {composition.how} composition weighs tokens. Compose with how='weighted'."
            )
        slot.mixers[composition.name] = kind(site.out_features, len(present)).to(site.device)
    if kind.least > 1 and not composition.mixers():
        raise Unsupported(
            f"A {composition.how} of {list(composition.members)} was asked for, but there is no module on which {kind.least} of them edit "
            "what it returns. Attach them at the same sites, or compose with how='sequential'."
        )


def _freeze_members(composition: Composition) -> None:
    """Freeze the members, but for those that only train a task head."""
    frozen = [delta for delta in composition.deltas if delta.trainable and not all(entry.head for entry in delta.entries)]
    composition.frozen = tuple(delta.name for delta in frozen)
    for delta in frozen:
        delta.freeze()
