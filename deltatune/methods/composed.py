"""Recipes made of recipes: parts that act each in its own place, as one delta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.methods.gating import Reads, below, gated, ungated
from deltatune.methods.kinds import Exported, Grouped, Method, Patch, Penalised, Phased, Prepared, Reforming, Sharing, Stepping, Surveying
from deltatune.structure.site import Site
from deltatune.structure.where import has_role


@dataclass(frozen=True)
class Part:
    """One recipe of a composed one.

    Attributes:
        method: the recipe; it acts where its default roles are.
        gate: what decides how much of its change takes effect; None where all of it does. See ``methods.gating``.
    """

    method: Method
    gate: Reads | None = None


@dataclass(frozen=True)
class Composed(Method, ABC):
    """A recipe of several parts. A subclass names them in ``parts``, and all their roles in ``where``.

    A part may have state of its own and a training-time form. One that looks at data, has a term in the loss, or acts
    between steps needs its own delta: attach such recipes as a list.
    """

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """The parts, in the order in which they act."""

    def survey(self, sites: Sequence[Site]) -> None:
        """Let every part check its own sites."""
        for part in self._checked():
            taken = [site for site in sites if has_role(site, part.method.where)]
            if taken and isinstance(part.method, Surveying):
                part.method.survey(taken)

    def share(self, sites: Sequence[Site]) -> nn.Module | None:
        """What the parts share among their sites, each for itself."""
        shared = Shares()
        for k, part in enumerate(self._checked()):
            taken = [site for site in sites if has_role(site, part.method.where)]
            state = part.method.share(taken) if taken and isinstance(part.method, Sharing) else None
            if state is not None:
                shared.add_module(str(k), state)
        return shared if len(shared._modules) else None

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """The patches of every part whose default roles hit the site."""
        found: list[Patch] = []
        for k, part in enumerate(self._checked()):
            if has_role(site, part.method.where):
                own = None if shared is None else shared._modules.get(str(k))
                patches = part.method.build(site, own)
                found += patches if part.gate is None else [gated(patch, site, part.gate) for patch in patches]
        return found

    def export(self, patches: Sequence[Patch], shared: nn.Module | None) -> None:
        """Bring every part into its final form."""
        plain = [ungated(patch) for patch in patches]
        for k, part in enumerate(self.parts):
            if isinstance(part.method, Exported):
                part.method.export(plain, None if shared is None else shared._modules.get(str(k)))

    def is_exported(self, patches: Sequence[Patch]) -> bool:
        """Every part is in its final form."""
        plain = [ungated(patch) for patch in patches]
        return all(part.method.is_exported(plain) for part in self.parts if isinstance(part.method, Exported))

    def _checked(self) -> tuple[Part, ...]:
        """The parts.

        Raises:
            Unsupported: one declares what only a delta of its own can have.
        """
        for part in self.parts:
            if isinstance(part.method, Prepared | Penalised | Stepping | Grouped | Phased):
                raise Unsupported(
                    f"{type(self).__name__} is composed with {part.method}, which takes part in the training itself. "
                    "Attach the two as a list of methods instead."
                )
        return self.parts


class Shares(nn.Module):
    """What the parts share, under their positions."""

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """Each takes the form of its tensors."""
        for name, module in self.named_children():
            if isinstance(module, Reforming):
                module.reform(below(name, state))
