"""What a PEFT type is: how its config becomes methods and its tensors ours, and back. One small registered class per type."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.foreign_files import Fields
from deltatune.checkpoint.peft.expressions import Expressions
from deltatune.checkpoint.peft.keys import Modules, Stored
from deltatune.errors import CheckpointError, Unsupported
from deltatune.injection.delta import Delta
from deltatune.methods.kinds import Method, SelectionPatch
from deltatune.registry import Registry
from deltatune.structure.site import Site

INNER = "base_layer."
"""Ahead of the tensors of what PEFT wrapped before."""

Recipe = Callable[[str, dict[str, Tensor]], Method]
"""(path of a module, PEFT's tensors there) -> the method there; it may fold into a tensor what our method has no field for."""


@dataclass
class Content:
    """An opened PEFT folder, from which a type takes what it knows.

    Attributes:
        fields: of the config.
        stored: the tensors.
        modules: of the backbone.
        expressions: of the config.
        found: paths of the modules at which the type found its tensors.
        added: path of a module -> what the type adds to all that it returns.
    """

    fields: Fields
    stored: Stored
    modules: Modules
    expressions: Expressions
    found: list[str] = field(default_factory=list)
    added: dict[str, Tensor] = field(default_factory=dict)

    def places(self, suffixes: Collection[str]) -> Iterator[tuple[str, Site, dict[str, Tensor]]]:
        """(path, site, tensors) of everything that has tensors of these names: whole modules, and ``target_parameters``.

        Of several such parameters of one module, PEFT wraps the one registered last outermost.
        """
        asked = self.fields.take("target_parameters", [], list)
        for path in self.stored.paths(suffixes):
            held = self.modules.all[path]._parameters
            names = [name for name in held if any(_ends(f"{path}.{name}", str(entry)) for entry in asked)]
            for depth, name in enumerate(reversed(names)):
                wrapped = {f"{INNER * depth}{suffix}": suffix for suffix in suffixes}
                theirs = {wrapped[key]: tensor for key, tensor in self.stored.take(path, wrapped).items()}
                yield f"{path}.{name}", self.modules.parameter_site(f"{path}.{name}"), theirs
            if not names:
                self.found.append(path)
                yield path, self.modules.site(path), self.stored.take(path, suffixes)


@dataclass
class Output:
    """A PEFT folder that is being made.

    Attributes:
        modules: of the backbone.
        tensors: under their names in the file.
        paths: of the modules they sit at.
        config: fields that are not as by default.
        heads: paths of the task heads in it.
        scales: path of a module -> what the type multiplies a bias of its own by; empty where it has none.
    """

    modules: Modules
    tensors: dict[str, Tensor] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    heads: set[str] = field(default_factory=set)
    scales: dict[str, float] = field(default_factory=dict)

    def add(self, prefix: str, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Tensors at one module.

        Raises:
            Unsupported: there are such tensors already.
        """
        for suffix, tensor in tensors.items():
            name = f"{prefix}{path}.{suffix}" if path else f"{prefix}{suffix}"
            if name in self.tensors:
                raise Unsupported(f"PEFT cannot hold two deltas of one type at `{path}`. Save them one by one, or in the native format.")
            self.tensors[name] = tensor


class Tuner(ABC):
    """One PEFT type.

    Class attributes:
        methods: ours that it can hold.
        prefix: ahead of paths in its files.
        fields: its config fields beside those of every config, with what PEFT writes where nothing was set.
        targeted: its config names its modules in ``target_modules``.
        biased: what ``bias`` says where the biases of the targets train, too.
    """

    methods: ClassVar[tuple[type[Method], ...]]
    prefix: ClassVar[str]
    fields: ClassVar[Mapping[str, Any]]
    targeted: ClassVar[bool] = True
    biased: ClassVar[str] = ""

    @abstractmethod
    def read(self, content: Content) -> list[Part]:
        """The parts in an opened folder; what is taken of fields and tensors is gone from there.

        Raises:
            CheckpointError: it does not fit the backbone.
            Unsupported: a field that cannot be translated.
        """

    @abstractmethod
    def write(self, deltas: Sequence[Delta], output: Output) -> None:
        """Put deltas of its methods into a folder.

        Raises:
            Unsupported: PEFT cannot hold them.
        """


@dataclass(frozen=True)
class Placed:
    """What goes to one module, or to one raw parameter.

    Attributes:
        path: PEFT's name of the place.
        site: the place.
        method: what sits there.
        theirs: PEFT's tensors.
    """

    path: str
    site: Site
    method: Method
    theirs: Mapping[str, Tensor]

    @property
    def owner(self) -> str:
        """Path of the module that has the tensors."""
        return self.path if self.site.parameter is None else self.path.rpartition(".")[0]


LAYERS: Mapping[str, Any] = {
    "exclude_modules": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "target_modules": None,
}
"""Fields of most types that say where they sit."""


class SiteTuner(Tuner):
    """A type whose tensors sit at modules, each for itself.

    Class attributes:
        selects: its method lets parameters of the backbone train in place.
    """

    selects: ClassVar[bool] = False

    @abstractmethod
    def suffixes(self) -> frozenset[str]:
        """Names of its tensors behind a path."""

    @abstractmethod
    def recipe(self, content: Content) -> Recipe:
        """Read the config."""

    @abstractmethod
    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's tensors at a site, under our names in the patch and in our shapes."""

    @abstractmethod
    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors at a site, under PEFT's names and in its shapes."""

    @abstractmethod
    def check(self, site: Site, method: Method) -> None:
        """Refuse what PEFT computes otherwise, or not at all, at such a site.

        Raises:
            Unsupported: it would not give the same outputs.
        """

    @abstractmethod
    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """Set the config's fields for what sits at each path."""

    @abstractmethod
    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """The parts, given the tensors by method."""

    def read(self, content: Content) -> list[Part]:
        """One part per method that the config asks for somewhere."""
        recipe = self.recipe(content)
        groups: dict[Method, dict[tuple[str, str], Tensor]] = {}
        stored = (Placed(path, site, recipe(path, theirs), theirs) for path, site, theirs in content.places(self.suffixes()))
        for place in self.joined(stored, content):
            self.check(place.site, place.method)
            tensors = {(place.site.key, name): tensor for name, tensor in self.ours(place.site, place.method, place.theirs).items()}
            groups.setdefault(place.method, {}).update(tensors)
        if not groups:
            raise CheckpointError(f"`{content.stored.file}` holds none of the tensors of its type. Copy or save it again.")
        return self.gathered(groups, content)

    def joined(self, stored: Iterable[Placed], content: Content) -> Iterable[Placed]:
        """What several of PEFT's places are together here, as one of them; each for itself, unless a type says otherwise."""
        return stored

    def spread(self, place: Placed, output: Output) -> Iterable[Placed]:
        """The places of PEFT's that one of ours is; the same one, unless a type says otherwise."""
        return [place]

    def write(self, deltas: Sequence[Delta], output: Output) -> None:
        """The tensors of every patch, and the config."""
        placed = [one for delta in deltas for place in self._placed(delta, output) for one in self.spread(place, output)]
        for place in placed:
            depth = 0
            if place.site.parameter is not None:
                outer = [*output.modules.all[place.owner]._parameters]
                outer = outer[outer.index(place.site.parameter) + 1 :]
                depth = sum(other.owner == place.owner and other.site.parameter in outer for other in placed)
            output.add(self.prefix, place.owner, {f"{INNER * depth}{suffix}": tensor for suffix, tensor in place.theirs.items()})
        output.paths += [place.path for place in placed if place.site.parameter is None]
        parameters = sorted(place.path for place in placed if place.site.parameter is not None)
        if parameters:
            output.config["target_parameters"] = parameters
        self.config({place.path: place for place in placed}, output)

    def _placed(self, delta: Delta, output: Output) -> Iterator[Placed]:
        state = delta.state_dict()
        for entry in delta.entries:
            if entry.head:
                continue
            site, patch = entry.site, entry.patch
            if site.parameter is not None and ("." in site.parameter or "target_parameters" not in self.fields):
                raise cannot(delta, f"it changes `{site.path}`, a parameter that PEFT cannot reach there")
            self.check(site, delta.method)
            path = output.modules.path(site) if site.parameter is None else site.path
            own = {patch.parameter: state[entry.key]} if isinstance(patch, SelectionPatch) else patch.state_dict()
            yield Placed(path, site, delta.method, self.theirs(site, delta.method, {key: tensor.detach() for key, tensor in own.items()}))


def one_part(label: str, groups: Mapping[Method, dict[tuple[str, str], Tensor]]) -> list[Part]:
    """A part for each method, numbered from the second on."""
    return [Part(label if k == 0 else f"{label}-{k + 1}", method, tensors) for k, (method, tensors) in enumerate(groups.items())]


def only(values: Iterable[Any], what: str) -> Any:
    """The one value of all modules.

    Raises:
        Unsupported: there are several.
    """
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise Unsupported(f"PEFT has one {what} for all modules of a folder, and here are several: {listed}. Save the members one by one.")
    return found[0]


def patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """``rank_pattern`` or ``alpha_pattern`` for values by path: those that are not the default.

    Its keys are expressions for the end of a path, so a path that is the end of another one is anchored.
    """
    found = {path: value for path, value in sorted(values.items()) if value != default}
    ends = {path for path in found if any(other.endswith(f".{path}") for other in values)}
    return {f"^{re.escape(path)}" if path in ends else path: value for path, value in found.items()}


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under other names."""
    return {names[name]: tensor for name, tensor in tensors.items()}


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """The names the other way round."""
    return {new: old for old, new in names.items()}


def whole(value: float) -> float | int:
    """A scale as PEFT writes it: whole ones as integers."""
    return int(value) if float(value).is_integer() else value


def stored_transposed(placed: Mapping[str, Placed]) -> bool:
    """``fan_in_fan_out``: the modules are transformers' ``Conv1D``; it says nothing of raw parameters."""
    modules = [place.site for place in placed.values() if place.site.parameter is None]
    return bool(modules) and all(site.transposed for site in modules)


def commonest(values: Mapping[str, Any]) -> Any:
    """The value that most modules have; of several, the first."""
    listed = list(values.values())
    return max(dict.fromkeys(listed), key=listed.count)


def traits(site: Site) -> set[str]:
    """What sets a module apart that PEFT treats in ways of its own: see the members."""
    module = site.module
    found = {"embedding"} if isinstance(module, nn.Embedding) else set()
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        found |= {"convolution", f"{len(module.kernel_size)}d"}
        found |= {"grouped"} if module.groups > 1 else set()
        found |= {"dilated"} if any(step > 1 for step in module.dilation) else set()
        found |= {"padded otherwise"} if module.padding_mode != "zeros" else set()
        found |= {"wide kernel"} if any(size > 1 for size in module.kernel_size) else set()
    elif isinstance(module, nn.MultiheadAttention):
        found |= {"attention"}
    elif site.transposed:
        found |= {"transposed"}
    if site.tied:
        found |= {"tied"}
    return found


def refuse_traits(site: Site, method: Method, kind: str, *refused: str) -> None:
    """Refuse sites where PEFT computes otherwise than the formula, or refuses itself.

    Raises:
        Unsupported: the site has one of the traits.
    """
    bad = sorted(traits(site) & set(refused))
    if bad:
        raise Unsupported(
            f"{method} at `{site.key}` ({type(site.module).__name__}: {', '.join(bad)}) is not PEFT's {kind}: that has no such modules, or "
            "computes something else there. Keep it in the native format, or train it anew."
        )


def cannot(delta: Delta, why: str) -> Unsupported:
    """The error for a delta that PEFT cannot hold."""
    return Unsupported(f"PEFT cannot hold `{delta.name}` ({delta.method}): {why}. Save it in the native format.")


tuners: Registry[Tuner] = Registry("PEFT type", "peft_types")
"""Every PEFT type we read and write, by its ``peft_type``."""


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")
