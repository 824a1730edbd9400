"""A delta: what one ``attach`` put on a backbone, named, trainable, and saved as one artefact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import CheckpointError, Unsupported
from deltatune.injection.entries import Entry
from deltatune.injection.freeze import refresh_gradients
from deltatune.injection.ledger import Ledger, ledger_of
from deltatune.injection.refusals import check_alone, check_in_memory, check_selects_unmerged, check_unmerged
from deltatune.injection.slot import Term
from deltatune.methods.kinds import Grouped, Method, Patch, Penalised, Reforming, SelectionPatch
from deltatune.structure.anatomy import modules_of
from deltatune.structure.site import size_of


@dataclass(frozen=True)
class Budget:
    """Size of a delta, in the letters of the survey.

    Attributes:
        N: parameters of the backbone.
        M: parameters of the adapted model.
        delta: trained parameters, |delta|.
        ratio: |delta| / N.
        size_bytes: the stored tensors.
    """

    N: int
    M: int
    delta: int
    ratio: float
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.delta:,} of {self.N:,} parameters ({self.ratio:.3%}), {self.size_bytes:,} bytes"


class Delta:
    """Handle on what was attached; made by ``attach`` and ``load``.

    Attributes:
        name: its name on this backbone.
        method: its recipe.
        backbone: the model it sits on.
        entries: its patches at their places.
        enabled: it acts.
        trainable: its parameters want gradients while it is enabled.
        merged: it is folded into the backbone's weights.
    """

    def __init__(self, name: str, method: Method, backbone: nn.Module, entries: list[Entry], shared: nn.Module | None = None) -> None:
        self.name = name
        self.method = method
        self.backbone = backbone
        self.entries = entries
        self.shared_flags = {} if shared is None else {name: parameter.requires_grad for name, parameter in shared.named_parameters()}
        self.enabled = False
        self.trainable = True
        self.merged = False

    def __repr__(self) -> str:
        state = "merged" if self.merged else "enabled" if self.enabled else "disabled"
        return f"Delta({self.name!r}, {self.method}, {len(self.entries)} sites, {state})"

    @property
    def ledger(self) -> Ledger:
        """The ledger it is entered in.

        Raises:
            Unsupported: it was detached.
        """
        ledger = ledger_of(self.backbone)
        if ledger is None or ledger.deltas.get(self.name) is not self:
            raise Unsupported(f"Delta `{self.name}` was detached from its backbone. Attach or load it again.")
        return ledger

    @property
    def shared(self) -> nn.Module | None:
        """State common to its sites, if the method has any."""
        return self.ledger.shared._modules.get(self.name)

    @property
    def patches(self) -> list[Patch]:
        """Its patches, in the order of the sites, heads last."""
        return [entry.patch for entry in self.entries]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every Parameter it owns or selects, read anew at each call, under its name in delta files."""
        shared = self.shared
        if shared is not None:
            for name, parameter in shared.named_parameters():
                yield f"shared.{name}", parameter
        for entry in self.entries:
            if isinstance(entry.patch, SelectionPatch):
                yield entry.key, entry.parameter
            for name, parameter in entry.patch.named_parameters():
                yield f"{entry.key}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every Parameter it owns or selects."""
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def wants_gradients(self) -> bool:
        """It would train now: enabled, not frozen, not merged, and no control."""
        return self.enabled and self.trainable and not self.merged and self.method.trains

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Those that train when the delta is enabled and not frozen."""
        return {name: parameter for name, parameter in self.named_parameters() if self._trains(name)}

    def _trains(self, name: str) -> bool:
        return self.method.trains and self._flags().get(name, True)

    def _flags(self) -> dict[str, bool]:
        flags: dict[str, bool] = {}
        for entry in self.entries:
            flags |= {f"{entry.key}.{name}": flag for name, flag in entry.flags.items()}
        return flags | {f"shared.{name}": flag for name, flag in self.shared_flags.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> tensor of everything the delta is made of; selections by value."""
        state: dict[str, Tensor] = {}
        if self.shared is not None:
            state |= {f"shared.{name}": tensor.detach() for name, tensor in self.shared.state_dict().items()}
        for entry in self.entries:
            if isinstance(entry.patch, SelectionPatch):
                state[entry.key] = entry.choice.value(self.name, entry.parameter).detach()
            state |= {f"{entry.key}.{name}": tensor.detach() for name, tensor in entry.patch.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tensors of ``state_dict``; nothing is changed unless all of them fit.

        Raises:
            CheckpointError: tensors are missing, unexpected or misshapen.
            Unsupported: the delta is merged, so the weights would not follow, or on the meta device, where nothing can be kept.
        """
        check_unmerged(self, "load into")
        check_in_memory(self)
        reforming = {key: module for key, module in self.holders if isinstance(module, Reforming)}
        forms = {part: _form(part) for module in reforming.values() for part in module.modules()}
        try:
            for key, module in reforming.items():
                module.reform({name.removeprefix(f"{key}."): tensor for name, tensor in state.items() if name.startswith(f"{key}.")})
            self._check_fits(state)
        except BaseException:
            for part, form in forms.items():
                vars(part).clear()
                vars(part).update(form)
            raise
        with torch.no_grad():
            for entry in self.entries:
                if isinstance(entry.patch, SelectionPatch):
                    entry.choice.assign(self.name, state[entry.key], entry.parameter)
            for key, holder in self.holders:
                holder.load_state_dict({name: state[f"{key}.{name}"] for name in holder.state_dict()})
        refresh_gradients(self)  # a new form has new Parameters

    @property
    def holders(self) -> Iterator[tuple[str, nn.Module]]:
        """What holds its own tensors, under its key in delta files."""
        yield from ((entry.key, entry.patch) for entry in self.entries)
        if self.shared is not None:
            yield "shared", self.shared

    def _check_fits(self, state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        misshapen = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
        faults = [
            f"{word}: {', '.join(f'`{name}`' for name in names[:4])}{' ...' if len(names) > 4 else ''} ({len(names)})"
            for word, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
            if names
        ]
        if faults:
            raise CheckpointError(
                f"The tensors do not fit delta `{self.name}` ({self.method}): {'; '.join(faults)}. "
                "Use the state of the same method and sites."
            )

    def budget(self) -> Budget:
        """N, M, |delta|, their ratio, and bytes of the stored tensors."""
        selected = {id(entry.parameter) for entry in self.entries if isinstance(entry.patch, SelectionPatch)}
        own = {id(parameter): parameter for module in modules_of(self.backbone).values() for parameter in module.parameters(recurse=False)}
        n = sum(size_of(parameter) for parameter in own.values())
        trained = self.trained_parameters().values()
        added = sum(parameter.numel() for parameter in trained if id(parameter) not in selected)
        size = sum(parameter.numel() for parameter in trained)
        stored = sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())
        return Budget(N=n, M=n + added, delta=size, ratio=size / n, size_bytes=stored)

    def enable(self) -> None:
        """Let it act, behind what acts already; its parameters want gradients again."""
        if self.enabled:
            return
        check_alone(self, "enable")
        check_selects_unmerged(self)
        self.enabled = True
        self.ledger.append(Term("sequential", (self.name,), (1.0,)))
        refresh_gradients(self)

    def disable(self) -> None:
        """Let it rest: the backbone computes as without it, and its parameters want no gradients."""
        if not self.enabled:
            return
        check_alone(self, "disable")
        check_unmerged(self, "disable")
        self.enabled = False
        self.ledger.terms = [term for term in self.ledger.terms if term.members != (self.name,)]
        self.ledger.arrange([self.name])
        refresh_gradients(self)

    def freeze(self) -> None:
        """It acts but does not train."""
        self._set_trainable(False)

    def unfreeze(self) -> None:
        """It trains again."""
        self._set_trainable(True)

    def _set_trainable(self, trainable: bool) -> None:
        self.trainable = trainable
        for entry in self.entries:
            if isinstance(entry.patch, SelectionPatch):
                entry.choice.freeze(self.name, not trainable, entry.parameter)
        refresh_gradients(self)

    def penalty(self) -> Tensor:
        """The method's own term in the loss; zero for most."""
        if isinstance(self.method, Penalised):
            return self.method.penalty(self.patches)
        return torch.zeros(())

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer over the parameters that train."""
        parameters = self.trained_parameters()
        if isinstance(self.method, Grouped):
            return self.method.parameter_groups(parameters, lr)
        return [{"params": list(parameters.values()), "lr": lr}]


def _form(module: nn.Module) -> dict[str, Any]:
    """What ``module`` is made of now, tensors not copied: to go back to if it cannot take another form."""
    return {name: copy(value) if isinstance(value, dict | set) else value for name, value in vars(module).items()}
