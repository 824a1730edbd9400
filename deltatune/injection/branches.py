"""How branches run: what a sub-layer was given travels from its first projection to its last, where a patch reads it.

    x -> [first projection] -> ... -> h -> [last projection] -> y
    |                                 |                         |
    +----> BranchAct ...............  F(x, h) or ............ F(x, y)

No single module sees x and y: the feed-forward network of BERT is no module of its own, and an attention may not own its
output projection. So a branch has two hosts. At the first projection a ``BranchAct`` keeps x; at the last one ``OutputAct``
runs the patch with it and lets it go. What an error leaves behind is let go at the end of the root's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltatune.errors import Unsupported
from deltatune.injection.slot import Act, Term, first_input, thread_key
from deltatune.structure.index import Index
from deltatune.structure.site import Site

if TYPE_CHECKING:
    from deltatune.injection.around import Around


class Given:
    """What the sub-layer of one patch was given, kept while the sub-layer runs; of each thread by itself."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": {}}

    def keep(self, x: Tensor) -> None:
        """The sub-layer begins."""
        self._held[thread_key()] = x

    def read(self) -> Tensor:
        """x, (..., in_features).

        Raises:
            Unsupported: the sub-layer was not entered by its first projection.
        """
        x = self._held.get(thread_key())
        if x is None:
            raise Unsupported(
                "A patch beside a sub-layer was asked to run, but the sub-layer's first projection was not called before its last one in "
                "this forward. Call the backbone, or a whole layer, rather than a part of a layer."
            )
        return x

    def drop(self) -> None:
        """The sub-layer ends."""
        self._held.pop(thread_key(), None)


class KeepingAct(Act):
    """Keeps something for patches that run later; abstract.

    Attributes:
        givens: of the patches that act.
    """

    listens = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.givens: tuple[Given, ...] = ()

    def arrange(self, module: nn.Module, terms: Sequence[Term], mixers: nn.ModuleDict) -> None:
        """Keep it for what acts, in whatever order."""
        self.givens = ()
        for term in terms:
            self.append(module, term, mixers)

    def append(self, module: nn.Module, term: Term, mixers: nn.ModuleDict) -> None:
        """Keep it for one more."""
        members = [member for name in term.members for member in self.members.get(name, ())]
        self.givens += tuple(member.given for member in members if member.given is not None)


class BranchAct(KeepingAct):
    """Keeps what the first projection of a sub-layer is given for the patches at the sub-layer's end."""

    def join(self, around: Around, backbone: nn.Module, index: Index, site: Site) -> None:
        """Be swept behind every forward of the root."""
        if around.sweep is None:
            around.sweep = Sweep(backbone)
        around.sweep.acts.append(self)

    def leave(self, around: Around) -> None:
        """Be swept no more."""
        assert around.sweep is not None
        around.sweep.acts = [act for act in around.sweep.acts if act is not self]
        if not around.sweep.acts:
            around.sweep.close()
            around.sweep = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keep x as the caller gave it, before any input patch of this module edits it."""
        if self.givens:
            x = first_input(args, kwargs, self.names)
            for given in self.givens:
                given.keep(x)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output as it is."""
        return output


class Sweep:
    """Lets go, at the end of a forward of the root, of what an error kept from its end.

    Attributes:
        acts: the acts of the root that keep something.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.acts: list[BranchAct] = []
        self._handle: RemovableHandle = backbone.register_forward_hook(self.after, always_call=True)

    def after(self, backbone: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the root, also where its forward raised."""
        if torch.compiler.is_compiling():
            return
        for act in self.acts:
            for given in act.givens:
                given.drop()

    def close(self) -> None:
        """Take the hook back."""
        self._handle.remove()
