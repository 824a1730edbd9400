"""The index of a backbone: every site in module order, found in one walk and kept by the caller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from deltatune.errors import Unsupported
from deltatune.structure.anatomy import Anatomy, Assignment, StackPaths, has_own_parameters, modules_of
from deltatune.structure.roles import assign
from deltatune.structure.rows import heads_of
from deltatune.structure.site import DELTA_CHILD, LayerList, Site

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

BEGINNINGS = {
    "attention.output": ("query", "value", "key"),
    "cross_attention.output": ("query",),
    "feed_forward.down": ("up", "gate"),
}
"""Last projection of a sub-layer -> the projections that are given what the sub-layer is given, those of this order first."""

ALIKE = {"attention": ("query", "key", "value"), "cross_attention": ("key", "value"), "feed_forward": ("gate", "up")}
"""Sub-layer -> those of its projections that are given one and the same tensor."""

Owner = tuple[nn.Module, str, str]
"""A module, the name under which it holds a parameter, and the path of that parameter in the backbone."""


@dataclass(frozen=True)
class Stack:
    """A module that turns token ids, or their embeddings, into hidden states.

    Attributes:
        site: the stack itself.
        embedding: its token embedding; what it scales, inputs that skip it must be scaled by.
        inner: the module whose output ends the token sequence; the stack itself unless something after it reads single
            positions, as BERT's pooler does.
        inner_path: its path.
        side: ``encoder`` or ``decoder`` where the backbone has both, else empty.
        layers: how many layers it has.
        attentions: its attention modules, self and cross.
        positions: the modules that receive position ids.
    """

    site: Site
    embedding: Site
    inner: nn.Module = field(repr=False, compare=False)
    inner_path: str
    side: str
    layers: int
    attentions: tuple[Site, ...] = field(repr=False)
    positions: tuple[Site, ...] = field(repr=False)


class Index:
    """All sites of one backbone.

    Attributes:
        sites: every module and every role of it, in module order; a fused projection comes whole and in its parts.
        stacks: the token stacks; empty where the input is not text.
        depths: path of a list of layers -> number of layers.
    """

    def __init__(self, backbone: nn.Module, use_files: bool = True) -> None:
        """Walk ``backbone`` once.

        Args:
            backbone: any module.
            use_files: False infers all roles, as if no architecture were known.
        """
        self.backbone = backbone
        modules = modules_of(backbone)
        self._children = [(module, _own_children(module)) for module in modules.values()]
        anatomy = assign(modules, use_files)
        self._owners = _owners(modules)
        self._unreached = anatomy.unreached | {path for path, module in modules.items() if isinstance(module, CONTAINERS)}
        self._layer_of, self.depths = _layers(modules, anatomy)
        self._layer_lists = _layer_lists(modules, anatomy, self._layer_of, self.depths)
        self.sites: tuple[Site, ...] = _with_heads(
            [site for path, module in modules.items() for site in self._sites_at(path, module, anatomy, modules)]
        )
        self._by_key = {site.key: site for site in reversed(self.sites)}
        self._in_layer: dict[tuple[str | None, int | None, str | None], list[Site]] = {}
        for site in self.sites:
            self._in_layer.setdefault((self.layer_list(site), site.layer, site.role), []).append(site)
        self.stacks: tuple[Stack, ...] = tuple(self._stack(paths, modules) for paths in anatomy.stacks)

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> Site:
        """The site with this key; the module as a whole where a parameter or a part is not meant.

        Raises:
            KeyError: there is none.
        """
        return self._by_key[key]

    @property
    def is_current(self) -> bool:
        """No module came, went or was replaced since the walk, as by resizing the vocabulary or a new task head."""
        return all(_own_children(module) == children for module, children in self._children)

    def layer_list(self, site: Site) -> str | None:
        """Path of the list of layers in which ``site`` lies; None outside the layers."""
        found = self._layer_of.get(site.module_path)
        return found[0] if found else None

    def beginning(self, site: Site) -> Site:
        """The first projection of the sub-layer that ends at ``site``; it is given what the sub-layer is given.

        A projection that is called with other tensors, too, as DeBERTa's query is with relative positions, does not count.

        Raises:
            Unsupported: no sub-layer ends at ``site``, or it does not begin with one projection.
        """
        parts = (site.role or "").split(".")
        firsts = BEGINNINGS.get(".".join(parts[-2:]), ())
        for leaf in firsts:
            role = ".".join([*parts[:-1], leaf])
            found = [first for first in self._in_layer.get((self.layer_list(site), site.layer, role), []) if first.routable]
            if len({id(first.module) for first in found}) == 1:
                return found[0]
        if not firsts:
            ends = ", ".join(f"`{end}`" for end in BEGINNINGS)
            raise Unsupported(
                f"A patch beside a sub-layer was asked for at `{site.key}` (role {site.role}), where no sub-layer ends. Choose sites with "
                f"the roles {ends}; `find_sites` lists them."
            )
        raise Unsupported(
            f"A patch beside a sub-layer was asked for at `{site.key}`, but no single module of its layer is given what the sub-layer is "
            f"given (looked for {', '.join(firsts)}). Use a serial method there, such as Adapter, or describe the backbone in an "
            "architecture file."
        )

    def companions(self, site: Site) -> tuple[nn.Module, ...]:
        """The other modules of its layer that are given what ``site`` is given: keys and values with queries, gates with what they gate."""
        *front, part, leaf = ["", *(site.role or "").split(".")]
        leaves = ALIKE.get(part, ())
        if leaf not in leaves or site.layer is None:
            return ()
        roles = [".".join([*front[1:], part, other]) for other in leaves]
        found = [self._in_layer.get((self.layer_list(site), site.layer, role), []) for role in roles]
        alone = [sites[0] for sites in found if len(sites) == 1 and sites[0].rows is None and sites[0].parameter is None]
        return tuple(other.module for other in alone if other.module is not site.module and site in alone and other.routable)

    def owners(self, parameter: nn.Parameter) -> list[Owner]:
        """All modules that hold ``parameter``: one, or several where weights are tied."""
        found = self._owners.get(id(parameter), [])
        if not found or any(module._parameters.get(name) is not parameter for module, name, _ in found):
            self._owners = _owners(modules_of(self.backbone))  # FSDP, assign=True and deepcopy replace Parameters
            found = self._owners.get(id(parameter), [])
        return list(found)

    def reader(self, path: str, parameter: str) -> tuple[nn.Module, str]:
        """The module whose forward reads ``parameter`` of the module at ``path``, and what it calls the parameter.

        That is the module itself; or the one around it if it is never called, as ``nn.MultiheadAttention`` reads
        ``out_proj.weight``, and any module the members of its ``nn.ParameterList``.
        """
        while path in self._unreached and path:
            path, _, name = path.rpartition(".")
            parameter = f"{name}.{parameter}"
        return self.backbone.get_submodule(path), parameter

    def _sites_at(self, path: str, module: nn.Module, anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> list[Site]:
        """The module as a whole, then its parts, then the parameters it reads itself, each with its parts."""
        inside, layer = self._layer_of.get(path, (None, None))
        layers = None if inside is None else self._layer_lists[inside]
        entries = anatomy.assignments.get(path, [])
        reached = path not in self._unreached
        routable = path not in anatomy.unroutable
        sites = []
        for parameter in (None, *_raw_parameters(module, entries)):
            mine = [entry for entry in entries if entry.parameter == parameter]
            if not any(entry.rows is None for entry in mine):
                mine = [Assignment(None, parameter), *mine]
            where = path if parameter is None else f"{path}.{parameter}" if path else parameter
            tied = self._is_tied(module, parameter or "weight")
            host, read = (module, None) if parameter is None else self.reader(path, parameter)
            for entry in mine:
                sites.append(Site(where, host, entry.role, layer, entry.rows, read, tied, read is not None or reached, routable, layers))
        return sites

    def _is_tied(self, module: nn.Module, parameter: str) -> bool:
        owner: object = module
        for name in parameter.split("."):
            owner = getattr(owner, name, None)
        return isinstance(owner, nn.Parameter) and len(self._owners.get(id(owner), ())) > 1

    def _stack(self, paths: StackPaths, modules: Mapping[str, nn.Module]) -> Stack:
        below = f"{paths.entry}." if paths.entry else ""
        mine = [site for site in self.sites if site.path.startswith(below) and site.role]
        site = next(site for site in self.sites if site.path == paths.entry and (site.role or "").endswith("stack"))
        inner = paths.entry if paths.inner is None else paths.inner
        return Stack(
            site=site,
            embedding=self._embedding(paths.embedding),
            inner=modules[inner],
            inner_path=inner,
            side=(site.role or "").rpartition(".")[0],
            layers=self.depths[paths.layers],
            attentions=tuple(other for other in mine if other.leaf in ("attention", "cross_attention")),
            positions=tuple(other for other in mine if other.leaf == "position"),
        )

    def _embedding(self, path: str) -> Site:
        """The site of an embedding, which may go by another stack's path where both stacks have one and the same."""
        module = self.backbone.get_submodule(path)
        return next(site for site in self.sites if site.module is module)


def index(backbone: nn.Module) -> Index:
    """Index ``backbone``; the result stays true until its modules change."""
    return Index(backbone)


def _own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    return {name: child for name, child in module._modules.items() if name != DELTA_CHILD}


def _owners(modules: Mapping[str, nn.Module]) -> dict[int, list[Owner]]:
    owners: dict[int, list[Owner]] = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name, f"{path}.{name}" if path else name))
    return owners


def _raw_parameters(module: nn.Module, entries: list[Assignment]) -> list[str]:
    """Names of the parameters that are sites of their own: neither weight nor bias, or read from a module never called."""
    own = [name for name, parameter in module._parameters.items() if parameter is not None and name not in ("weight", "bias")]
    own = [name for name in own if not name.endswith("bias")]
    return list(dict.fromkeys([*own, *(entry.parameter for entry in entries if entry.parameter)]))


def _layers(modules: Mapping[str, nn.Module], anatomy: Anatomy) -> tuple[dict[str, tuple[str, int]], dict[str, int]]:
    """Path -> (list of layers, number of the layer) for all that lies in a layer, and the length of each list."""
    layers = {
        path for path, entries in anatomy.assignments.items() if any((entry.role or "").rpartition(".")[2] == "layer" for entry in entries)
    }
    inside: dict[str, tuple[str, int]] = {}
    depths: dict[str, int] = {}
    for path in modules:
        parent, _, name = path.rpartition(".")
        if path in layers and name.isdigit():
            inside[path] = (parent, int(name))
            depths[parent] = depths.get(parent, 0) + 1
        elif parent in inside:
            inside[path] = inside[parent]
    return inside, depths


def _with_heads(sites: list[Site]) -> tuple[Site, ...]:
    """The sites, those of an attention's projections with its number of heads."""

    def place(site: Site, role: str) -> tuple[str | None, int | None, str]:
        return site.layer_list.path if site.layer_list else None, site.layer, role

    attentions = {place(site, site.role): heads_of(site.module) for site in sites if site.role and site.leaf.endswith("attention")}
    found = [attentions.get(place(site, (site.role or "").rpartition(".")[0])) for site in sites]
    return tuple(site if heads is None else replace(site, heads=heads.query) for site, heads in zip(sites, found, strict=True))


def _layer_lists(
    modules: Mapping[str, nn.Module], anatomy: Anatomy, layer_of: Mapping[str, tuple[str, int]], depths: Mapping[str, int]
) -> dict[str, LayerList]:
    """What is known of each list of layers, by its path."""
    sizes: dict[str, dict[int, int]] = {path: {} for path in depths}
    for path, (inside, _) in layer_of.items():
        sizes[inside] |= {id(tensor): tensor.numel() for tensor in modules[path]._parameters.values() if tensor is not None}
    sides = {
        path.rpartition(".")[0]: (entry.role or "").rpartition(".")[0]
        for path in layer_of
        for entry in anatomy.assignments.get(path, [])
        if (entry.role or "").rpartition(".")[2] == "layer"
    }
    return {path: LayerList(path, depth, sum(sizes[path].values()), sides.get(path, "")) for path, depth in depths.items()}


def has_weights(site: Site) -> bool:
    """Whether ``site`` has a role or holds parameters itself: what listings show."""
    return site.role is not None or site.parameter is not None or has_own_parameters(site.module)
