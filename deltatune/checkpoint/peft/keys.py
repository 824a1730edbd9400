"""PEFT's names: which module a tensor belongs to, and which modules a config's targets hit."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltatune.checkpoint.foreign_files import Fields, left_over
from deltatune.checkpoint.peft.expressions import Expressions
from deltatune.checkpoint.tensors import named
from deltatune.errors import CheckpointError, Unsupported, nearest
from deltatune.structure.index import Index
from deltatune.structure.site import DELTA_CHILD, Site

ROOT = "base_model."
TUNED = "base_model.model."
"""Ahead of a path in the backbone: for prompts, and for what sits at modules."""


class Modules:
    """The modules of a backbone by the names PEFT gives them: the first of several names counts.

    Args:
        sites: of the backbone.
    """

    def __init__(self, sites: Index) -> None:
        self.sites = sites
        self.backbone = sites.backbone
        self.paths: dict[int, str] = {}
        self.first: dict[str, nn.Module] = {}
        self.all: dict[str, nn.Module] = {}
        for path, module in self.backbone.named_modules(remove_duplicate=False):
            if DELTA_CHILD in path.split("."):
                continue
            self.all[path] = module
            if id(module) not in self.paths:
                self.paths[id(module)] = path
                self.first[path] = module
        whole = [site for site in sites if site.parameter is None and site.rows is None]
        self._sites = {id(site.module): site for site in whole}

    def split(self, key: str) -> tuple[str, str] | None:
        """The path of the innermost module a key begins with, and what stands behind it; None where not even that is there."""
        words = key.split(".")
        for cut in range(len(words) - 1, 0, -1):
            if (path := ".".join(words[:cut])) in self.all:
                return path, ".".join(words[cut:])
        return None

    def site(self, path: str) -> Site:
        """The site of the module with this name, as a whole."""
        return self._sites[id(self.all[path])]

    def table(self, path: str) -> Site:
        """The site of an embedding; of one that is never called, as T5's ``shared``, that of another one with the same weight."""
        site = self.site(path)
        weight = site.module._parameters.get("weight")
        others = (other for other in self._sites.values() if other.reached and other.module._parameters.get("weight") is weight)
        return site if site.reached or weight is None else next(others, site)

    def tied_paths(self, site: Site) -> list[str]:
        """PEFT's names of all modules that hold the site's weight, the input embedding first: there PEFT begins."""
        found = [path for path, module in self.first.items() if any(own is site.weight for own in module._parameters.values())]
        embedding = getattr(self.backbone, "get_input_embeddings", lambda: None)()
        return sorted(found, key=lambda path: self.first[path] is not embedding)

    def tied_to(self, paths: Collection[str]) -> set[str]:
        """All modules that hold the weight of one of these, where it is tied."""
        sites = [site for path in paths if (site := self._sites.get(id(self.all[path]))) is not None and site.tied]
        return {other for site in sites for other in self.tied_paths(site)}

    def parameter_site(self, path: str) -> Site:
        """The site of a parameter that is read without calling a module.

        Raises:
            Unsupported: it is none.
        """
        if path not in self.sites or self.sites[path].parameter is None:
            raise Unsupported(f"`{path}` is no parameter that deltatune can reach. {nearest(path, [site.key for site in self.sites])}")
        return self.sites[path]

    def path(self, site: Site) -> str:
        """PEFT's name of the site's module.

        Raises:
            Unsupported: the site is not a whole module under one name.
        """
        if site.rows is not None:
            raise Unsupported(
                f"PEFT cannot hold a delta at `{site.key}`: that is one role of a fused projection, and PEFT knows whole modules only. "
                f"Attach to the whole projection, `{site.path}`, or save in the native format."
            )
        if sum(module is site.module for module in self.all.values()) > 1:
            raise Unsupported(
                f"PEFT cannot hold a delta at `{site.key}`: the module has several names in the backbone, and PEFT replaces it under one "
                "of them only. Save in the native format."
            )
        return self.paths[id(site.module)]


class Stored:
    """The tensors of a PEFT folder, sorted by module, and taken out one by one.

    Args:
        tensors: by their names in the file.
        modules: of the backbone.
        file: where they stand, for errors.
        prefix: what stands ahead of a path.
    """

    def __init__(self, tensors: Mapping[str, Tensor], modules: Modules, file: Path, prefix: str) -> None:
        self.modules, self.file = modules, file
        self.shared: dict[str, Tensor] = {}
        self.at: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            found = modules.split(name.removeprefix(prefix)) if name.startswith(prefix) else None
            if found is not None:
                self.at[found[0]][found[1]] = tensor
            elif name.startswith(TUNED):
                raise CheckpointError(
                    f"`{file}` holds `{name}`, and this {type(modules.backbone).__name__} has no such module. "
                    f"{nearest(name.removeprefix(TUNED).rpartition('.')[0], modules.first)} Load the backbone it was trained on."
                )
            else:
                self.shared[name.removeprefix(ROOT)] = tensor

    def paths(self, suffixes: Collection[str]) -> list[str]:
        """Modules that have a tensor of one of these names, in the backbone's order."""
        return [path for path in self.modules.all if path in self.at and not suffixes.isdisjoint(self.at[path])]  # type: ignore[attr-defined]

    def take(self, path: str, suffixes: Collection[str]) -> dict[str, Tensor]:
        """Those of these tensors that a module has; they are gone from here then."""
        own = self.at[path]
        return {suffix: own.pop(suffix) for suffix in [*own] if suffix in suffixes}

    def take_shared(self, name: str) -> Tensor | None:
        """A tensor that belongs to no module; None where there is none."""
        return self.shared.pop(name, None)

    def end(self) -> None:
        """Nothing may be left.

        Raises:
            CheckpointError: tensors that no rule took.
        """
        rest = {f"{path}.{suffix}": tensor for path, own in self.at.items() for suffix, tensor in own.items()} | self.shared
        if rest:
            raise left_over(rest, self.file, self.modules.first)


def targets(fields: Fields, modules: Modules, expressions: Expressions) -> list[str] | None:
    """The modules that a config's ``target_modules`` hit by PEFT's rules; None where it does not say.

    A text is a regular expression for the whole path; an entry of a list is a path or its end behind a dot.
    ``exclude_modules`` has the same grammar, ``layers_to_transform`` and ``layers_pattern`` look at the first number in a path,
    and what lies in ``modules_to_save`` is never hit.
    """
    asked = fields.take("target_modules", None, str, list)
    excluded = fields.take("exclude_modules", None, str, list)
    layers = fields.take("layers_to_transform", None, int, list)
    pattern = fields.take("layers_pattern", None, str, list)
    kept = fields.peek("modules_to_save") or []
    wanted = [layers] if isinstance(layers, int) else layers or []
    if not asked or asked == "all-linear":
        return None
    return [
        path
        for path in modules.first
        if path
        and _hits(asked, path, expressions)
        and not (excluded and _hits(excluded, path, expressions))
        and not any(expressions.match(rf"(^|.*\.){name}($|\..*)", path) for name in kept)
        and (layers in (None, []) or isinstance(asked, str) or _layer(path, pattern, expressions) in wanted)
    ]


def hits(asked: Sequence[str], modules: Modules) -> set[str]:
    """The modules that a list of ``target_modules`` hits."""
    return {path for path in modules.first if path and _ends_in(asked, path)}


def _hits(asked: Any, path: str, expressions: Expressions) -> bool:
    return expressions.fits(asked, path) if isinstance(asked, str) else _ends_in(asked, path)


def _ends_in(asked: Sequence[str], path: str) -> bool:
    return path in asked or any(path.endswith(f".{entry}") for entry in asked)


def _layer(path: str, pattern: Any, expressions: Expressions) -> int | None:
    names = [pattern] if isinstance(pattern, str) else pattern or [r"[^.]*"]
    found = (expressions.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path) for name in names)
    return next((int(match.group(1)) for match in found if match), None)


def check_targets(expected: Sequence[str] | None, found: Sequence[str], file: Path) -> None:
    """The modules that are targeted must be those that have tensors.

    Raises:
        CheckpointError: tensors are missing, or PEFT itself would leave some out.
    """
    if expected is None:
        return
    missing = [path for path in expected if path not in found]
    if missing:
        raise CheckpointError(f"`{file}` has no tensors for {named(missing)}, which its config targets. Copy or save it again.")
    unexpected = [path for path in found if path not in expected]
    if unexpected:
        raise CheckpointError(f"`{file}` has tensors at {named(unexpected)}, which its config does not target. Correct `target_modules`.")


def as_targets(paths: Collection[str], modules: Modules) -> list[str] | str:
    """What ``target_modules`` must say to hit exactly these modules: a sorted list, or an expression where an end would hit more."""
    listed = sorted(paths)
    if hits(listed, modules) == set(paths):
        return listed
    return "|".join(re.escape(path) for path in listed)
