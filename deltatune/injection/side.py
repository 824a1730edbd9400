"""How side networks run: they read the hidden states of a text stack, detached, and add to the last one.

Nothing of the stack needs a gradient for that, so no backward runs through it. The states are kept for the length of the
stack's forward, and the side network runs at its end, outside every layer: a layer that gradient checkpointing computes
anew finds nobody to give its state to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltatune.errors import Unsupported
from deltatune.injection.outputs import first_output, replace_output
from deltatune.injection.slot import Act, Term, first_input, input_names, thread_key
from deltatune.methods.kinds import Patch, SidePatch
from deltatune.structure.index import Index, Stack
from deltatune.structure.site import Site

if TYPE_CHECKING:
    from deltatune.injection.around import Around, Guest


@dataclass(frozen=True)
class RowSide:
    """Side networks of some rows of a route.

    Attributes:
        rows: their numbers.
        total: number of rows of the route.
        patches: what runs in them, by its weight.
    """

    rows: Tensor
    total: int
    patches: tuple[tuple[SidePatch, float], ...]

    def rows_of(self, batch: int) -> Tensor:
        """The same rows in a batch that holds each row of the route several times in a row."""
        factor = batch // self.total
        place = torch.arange(factor, device=self.rows.device)
        return (self.rows[:, None] * factor + place).flatten() if factor > 1 else self.rows


class SideAct(Act):
    """Runs the side networks of one text stack.

    Attributes:
        guest: who knows of routes; None while nothing was routed.
        number: by which it knows this act.
    """

    listens = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.patches: tuple[tuple[SidePatch, float], ...] = ()
        self._layers = 0
        self._is_inner = True
        self._handles: list[RemovableHandle] = []
        self._states: dict[int, dict[int, Tensor]] = {}
        self.guest: Guest | None = None
        self.number = -1

    @property
    def rows(self) -> Sequence[RowSide] | None:
        """The side networks of some rows, within a route."""
        return None if self.guest is None else self.guest.rows_of(self.number)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_states": {}}

    @classmethod
    def check(cls, index: Index, site: Site, patch: Patch) -> None:
        """Refuse what is no text stack, or one of another depth."""
        assert isinstance(patch, SidePatch)
        stack = next((stack for stack in index.stacks if stack.site.module is site.module), None)
        kind = type(site.module).__name__
        if stack is None:
            raise Unsupported(
                f"A side network was asked for at `{site.path}` ({kind}), which is no text stack. Choose one (role `stack`): "
                f"{', '.join(f'`{stack.site.path}`' for stack in index.stacks) or 'this backbone has none'}."
            )
        if stack.layers != patch.num_layers:
            raise Unsupported(
                f"A side network for {patch.num_layers} layers was asked for at `{site.path}` ({kind}), which has {stack.layers}. "
                "Choose another method for this backbone, such as LoRA."
            )

    def join(self, around: Around, backbone: nn.Module, index: Index, site: Site) -> None:
        """Listen to every layer, and to the module that ends the token sequence where that is not the stack itself."""
        stack = next(stack for stack in index.stacks if stack.site.module is site.module)
        layers = _layers(index, stack)
        self._layers, self._is_inner = len(layers), stack.inner is site.module
        self._handles = [
            layer.module.register_forward_pre_hook(partial(self.tap, number, input_names(type(layer.module))), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
        if not self._is_inner:  # ahead of a prompt's hook, which cuts its virtual tokens off
            self._handles.append(stack.inner.register_forward_hook(self.end, prepend=True))

    def leave(self, around: Around) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def arrange(self, module: nn.Module, terms: Sequence[Term], mixers: nn.ModuleDict) -> None:
        """Add up the side networks, whatever their order."""
        self.patches = ()
        for term in terms:
            self.append(module, term, mixers)

    def append(self, module: nn.Module, term: Term, mixers: nn.ModuleDict) -> None:
        """Add its side networks, by their weights."""
        for name, weight in zip(term.members, term.weights, strict=True):
            patches = [member.patch for member in self.members.get(name, [])]
            self.patches += tuple((patch, weight) for patch in patches if isinstance(patch, SidePatch))

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Begin to listen."""
        if self.patches or self.rows:
            self._states[thread_key()] = {}
        return args, kwargs

    def tap(self, number: int, names: Sequence[str], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of a layer: keep what it is given, detached."""
        states = self._states.get(thread_key())
        if states is not None:
            states[number] = first_input(args, kwargs, names).detach()

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Post-hook of the inner module: the side networks run.

        Raises:
            Unsupported: a layer was left out.
        """
        states = self._states.pop(thread_key(), None)
        if states is None:
            return output
        if len(states) != self._layers:
            raise Unsupported(f"A side network reads {self._layers} layers, but {len(states)} of them ran. Set the model's layerdrop to 0.")
        y = first_output(output)
        read = [*(states[number] for number in range(self._layers)), y.detach()]
        for patch, weight in self.patches:
            y = y + weight * patch(read)
        for side in self.rows or ():
            rows = side.rows_of(y.shape[0])
            change = sum(weight * patch([state.index_select(0, rows) for state in read]) for patch, weight in side.patches)
            y = y.index_add(0, rows, change)
        return replace_output(output, y)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The same where the stack itself ends the sequence; nothing is kept behind an error."""
        if output is not None and self._is_inner:
            return self.end(module, args, output)
        self._states.pop(thread_key(), None)
        return output


def _layers(index: Index, stack: Stack) -> list[Site]:
    """The layers of a stack, in order."""
    below = f"{stack.site.path}." if stack.site.path else ""
    return [site for site in index.sites if site.leaf == "layer" and site.path.startswith(below) and site.parameter is None]
