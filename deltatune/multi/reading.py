"""Reading a patch as a lane: what it is as data at one module, or that it is none and must be looped over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry
from deltatune.injection.selections import Choice, SelectionAct
from deltatune.injection.slot import slot_of
from deltatune.methods.kinds import (
    BranchInputPatch,
    BranchPatch,
    InputPatch,
    OutputPatch,
    Patch,
    SelectionPatch,
    Stochastic,
    TokenPatch,
    WeightPatch,
)
from deltatune.methods.lanes import Lane, Laned, LanedWeight
from deltatune.multi.forms.stacked import Whole
from deltatune.multi.table import LaneName
from deltatune.structure.site import Site


@dataclass(frozen=True)
class Spot:
    """One patch of a delta at one module that runs it.

    Attributes:
        delta: the delta.
        entry: of the patch.
        module: the module.
        parameter: what the module calls the patched parameter, of the weight and selection kinds.
        number: which of the delta's patches on the module.
    """

    delta: Delta
    entry: Entry
    module: nn.Module
    parameter: str
    number: int

    @property
    def patch(self) -> Patch:
        """The patch."""
        return self.entry.patch

    @property
    def site(self) -> Site:
        """Its site."""
        return self.entry.site

    @property
    def name(self) -> LaneName:
        """Name of its lane."""
        return self.delta.name, self.number

    @property
    def reads(self) -> str:
        """Whose input it calls x."""
        return "branch" if isinstance(self.patch, BranchPatch | BranchInputPatch) else "module"

    @property
    def stage(self) -> str:
        """What it acts on: ``input`` or ``output``, or ``module`` where it changes what the module is."""
        if isinstance(self.patch, SelectionPatch | WeightPatch):
            return "module"
        return "input" if isinstance(self.patch, InputPatch | BranchInputPatch) else "output"


@dataclass(frozen=True)
class Source:
    """A patch read as a lane.

    Attributes:
        lane: the data.
        site: whose rows and channels are changed.
        example: the patch itself, to be called with the tensors of others; None where the form has a formula.
    """

    lane: Lane
    site: Site
    example: nn.Module | None = None


def read(spot: Spot) -> Source | None:
    """The patch as a lane of a table at its module; None where it must be looped over."""
    reader = next(reader for kind, reader in READERS if isinstance(spot.patch, kind))
    return reader(spot)


@cache
def is_laned(kind: type[Patch]) -> bool:
    """Patches of this class say what they are as data; asked of each of them in every training forward, so it is remembered."""
    return issubclass(kind, Laned)


def check_routable(delta: Delta) -> None:
    """The delta can act in single rows of a batch.

    Raises:
        Unsupported: a part of it cannot, with the reason.
    """
    for entry in delta.entries:
        reason = _obstacle(entry)
        if reason:
            raise Unsupported(
                f"Delta `{delta.name}` ({delta.method}) cannot be routed: at `{entry.key}` {reason}. Convert it to what can "
                "(deltatune convert FOLDER --to lora --rank r, as near as that rank gets), or switch to it for whole batches."
            )


def _obstacle(entry: Entry) -> str:
    """Why a patch cannot act in single rows; empty where it can."""
    if entry.patch.unroutable:
        return entry.patch.unroutable
    if not entry.site.routable:
        return "the module's rows are no multiple of the batch's (its inputs are shared by all rows)"
    if entry.site.is_expert:
        return "rows are regrouped by expert before they get there"
    if isinstance(entry.patch, SelectionPatch) and not entry.head and entry.parameter.ndim > 1:
        return f"the whole weight {tuple(entry.parameter.shape)} is another one, and a batch reads a weight once for all rows"
    return ""


def _read_output(spot: Spot) -> Source | None:
    """Output and input patches: as they say, else their forward for all."""
    patch = spot.patch
    lane = cast(Laned, patch).lane() if is_laned(type(patch)) else None
    if lane is not None:
        return Source(lane, spot.site)
    if isinstance(patch, TokenPatch | Stochastic):
        return None
    whole = Whole(patch)
    tensors = whole.tensors()
    settings = (type(patch).__qualname__, spot.delta.method, patch.training)
    return Source(Lane("stacked", tensors, settings), spot.site, whole.example())


def _read_weight(spot: Spot) -> Source | None:
    """Weight patches of a linear map, or of an embedding that reads rows; else their host is run with the changed weight."""
    patch, module = spot.patch, spot.module
    assert isinstance(patch, WeightPatch)
    if not isinstance(patch, LanedWeight) or spot.parameter != "weight":
        return None
    theta = spot.site.part(module.get_parameter("weight"))
    lane = patch.lane_of(theta)
    if lane is None or lane.form not in _HOSTED:
        return None
    return _HOSTED[lane.form](spot, lane)


def _low_rank_at(spot: Spot, lane: Lane) -> Source | None:
    """A change B^T A^T of a matrix (out, in): a table's rows are its ``out``."""
    if isinstance(spot.module, nn.Embedding):
        if spot.site.rows is not None or type(spot.module).forward is not nn.Embedding.forward:
            return None
        scales = {other: lane.scales[name] for name, other in (("A", "B"), ("B", "A")) if name in lane.scales}
        return Source(Lane("lookup", {"A": lane.plain["B"].T, "B": lane.plain["A"].T}, scales=scales), spot.site)
    return Source(lane, spot.site) if _is_linear(spot) else None


def _decomposed_at(spot: Spot, lane: Lane) -> Source | None:
    return Source(lane, spot.site) if _is_linear(spot) else None


_HOSTED: dict[str, Callable[[Spot, Lane], Source | None]] = {"low-rank": _low_rank_at, "decomposed": _decomposed_at}
"""Forms in which weight patches come, and what hosts of them there are."""


def _is_linear(spot: Spot) -> bool:
    """The module is one linear map, whose weight is the patched one."""
    return Site(spot.site.path, spot.module).is_linear and spot.parameter == "weight"


def _read_selection(spot: Spot) -> Source | None:
    """Selections: biases, gains, task heads; else their host is run with the selected value."""
    name, module, value = spot.parameter, spot.module, Selected(spot)
    own = value.original()
    site = Site(spot.site.path, module)
    if name == "bias" and own.ndim == 1 and (_is_linear_map(module) or site.is_norm) and not spot.entry.head:
        return Source(Lane("shift", {"b": value() - own}), site)
    if name == "weight" and site.is_norm:
        return Source(Lane("norm", {"gamma": value() - own}), site)
    if name == "weight" and spot.entry.head and site.is_linear:
        return _affine(spot, value, site)
    if name == "bias" and spot.entry.head and site.is_linear:
        weight = next((other for other in _beside(spot) if other.parameter == "weight"), None)
        return Source(Lane("shift", {"b": value() - own}), site) if weight is None else NOTHING
    return None


def _affine(spot: Spot, value: Selected, site: Site) -> Source:
    """A head's weight, and the bias that is selected with it."""
    W = value()
    bias = next((Selected(other)() for other in _beside(spot) if other.parameter == "bias"), None)
    if bias is None:
        own = spot.module._parameters.get("bias")
        bias = W.new_zeros(site.out_features) if own is None else own.detach()
    return Source(Lane("affine", {"W": W if site.transposed else W.T, "b": bias}), site)


def _beside(spot: Spot) -> list[Spot]:
    """The other selections of the delta at the same module."""
    found = []
    for entry in spot.delta.entries:
        if isinstance(entry.patch, SelectionPatch) and entry is not spot.entry and entry.hosts[0].module is spot.module:
            found.append(Spot(spot.delta, entry, spot.module, entry.hosts[0].parameter, -1))
    return found


def _is_linear_map(module: nn.Module) -> bool:
    return Site("", module).is_linear or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


class Selected:
    """The value that a delta selects for a parameter, with a way back for its gradient."""

    def __init__(self, spot: Spot) -> None:
        host = spot.entry.hosts[0]
        slot = slot_of(host.module)
        assert slot is not None
        act = slot.acts[SelectionAct]
        assert isinstance(act, SelectionAct)
        self.choice: Choice = act.choices[host.parameter]
        self.name, self.trains = spot.delta.name, spot.delta.wants_gradients
        self.theta = host.module.get_parameter(host.parameter)

    def original(self) -> Tensor:
        """The backbone's own."""
        return self.choice.original

    def __call__(self) -> Tensor:
        """The value; its gradient goes to the parameter while the delta is live there, and waits for that else.

        What a lent delta selects lives in its own tree, and is trained there.
        """
        own = self.choice.value(self.name, self.theta)
        if isinstance(own, nn.Parameter) and self.trains and torch.is_grad_enabled():
            return own
        value = own.detach()
        if not (self.trains and torch.is_grad_enabled()):
            return value
        value = value.clone().requires_grad_()
        value.register_hook(partial(_receive, self.choice, self.name, self.theta))  # type: ignore[no-untyped-call]
        return value


def _receive(choice: Choice, name: str, theta: Tensor, gradient: Tensor) -> None:
    """Add to the gradient of one delta's selection."""
    if choice.live == name:
        theta.grad = gradient.clone() if theta.grad is None else theta.grad + gradient
        return
    held = choice.gradients.get(name)
    choice.gradients[name] = gradient.clone() if held is None else held + gradient


NOTHING: Any = Source(Lane("nothing", {}), Site("", nn.Identity()))
"""Read together with another patch."""

READERS: tuple[tuple[type[Patch], Callable[[Spot], Source | None]], ...] = (
    (SelectionPatch, _read_selection),
    (WeightPatch, _read_weight),
    (OutputPatch, _read_output),
    (InputPatch, _read_output),
    (BranchInputPatch, _read_output),
)
"""How each kind of patch is read; what has no entry keeps its own act."""
