"""Assigns a role to each place of a backbone: from an architecture file where one is known, by inference elsewhere.

Each module belongs to the nearest enclosing model that says what it is (``config.model_type``), so that a known encoder
inside an unknown one keeps its exact roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from deltatune.structure.anatomy import Anatomy, Assignment, StackPaths, has_own_parameters, output_rows
from deltatune.structure.architecture import Architecture, Entry, ends_with
from deltatune.structure.architectures import known
from deltatune.structure.inference import infer
from deltatune.structure.rows import RULES, Heads, heads_of
from deltatune.structure.site import Rows

SIDES = ("encoder", "decoder")
UNSIDED = ("lm_head", "readout")


def assign(modules: Mapping[str, nn.Module], use_files: bool = True) -> Anatomy:
    """The roles of all ``modules`` (path -> module, from ``modules_of``).

    Args:
        modules: the walked backbone.
        use_files: False infers everything, as if no architecture were known.
    """
    anatomy = Anatomy()
    described: dict[str, Architecture | None] = {}
    unknown: dict[str, nn.Module] = {}
    for path, module in modules.items():
        architecture = _architecture(path, module, described) if use_files else None
        described[path] = architecture
        if architecture is None:
            unknown[path] = module
        else:
            _apply(architecture, path, module, modules, anatomy)
    if unknown:
        infer(unknown, anatomy)
    _push_down_readouts(modules, anatomy)
    _add_sides(anatomy)
    return anatomy


def _architecture(path: str, module: nn.Module, described: Mapping[str, Architecture | None]) -> Architecture | None:
    """The architecture that describes ``module``: its own config's, else its parent's."""
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    if isinstance(model_type, str) and model_type:
        return known(model_type)
    return described.get(path.rpartition(".")[0]) if path else None


def _apply(architecture: Architecture, path: str, module: nn.Module, modules: Mapping[str, nn.Module], anatomy: Anatomy) -> None:
    """What the file says about one module."""
    entries = [] if isinstance(module, nn.Identity) else architecture.lookup(path)  # ModernBERT leaves out its first norm so
    for entry in entries:
        if entry.parameter is None or _has_parameter(module, entry.parameter):
            anatomy.add(path, entry.role, entry.parameter, _rows(entry, path, module, modules))
    for stack in architecture.stacks:
        layers = f"{path}.{stack.layers}" if path else stack.layers
        if isinstance(modules.get(layers), nn.ModuleList):
            below = f"{path}." if path else ""
            inner = below + stack.inner if stack.inner else None
            anatomy.stacks.append(StackPaths(path, layers, below + stack.embedding, inner))
            anatomy.add(path, "stack")
    if any(ends_with(path, pattern) for pattern in architecture.unreached):
        anatomy.unreached.add(path)
    if any(ends_with(path, pattern) for pattern in architecture.unroutable):
        anatomy.unroutable.add(path)


def _has_parameter(module: nn.Module, parameter: str) -> bool:
    owner: object = module
    for name in parameter.split("."):
        owner = getattr(owner, name, None)
    return isinstance(owner, nn.Parameter)


def _rows(entry: Entry, path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Rows | None:
    if entry.rows is None:
        return None
    weight = getattr(module, entry.parameter or "weight")
    parent = modules[path.rpartition(".")[0]]
    heads = heads_of(parent) or Heads(1, 1)
    return RULES[entry.rows](output_rows(module, weight.shape), entry.parts, heads)[entry.part]


def _push_down_readouts(modules: Mapping[str, nn.Module], anatomy: Anatomy) -> None:
    """A head of several modules becomes one readout per module that owns parameters."""
    for head in anatomy.paths("readout"):
        del anatomy.assignments[head]
        for path, module in modules.items():
            if f"{path}.".startswith(f"{head}.") and has_own_parameters(module):
                anatomy.assignments[path] = [Assignment("readout")]


def side(path: str) -> str | None:
    """The first component of ``path`` that is ``encoder`` or ``decoder``."""
    return next((component for component in path.split(".") if component in SIDES), None)


def _add_sides(anatomy: Anatomy) -> None:
    """Put ``encoder.`` or ``decoder.`` in front of the roles where layers lie below both names."""
    if not {side(path) for path in anatomy.paths("layer")} >= set(SIDES):
        return
    for path, entries in anatomy.assignments.items():
        if (where := side(path)) is not None:
            anatomy.assignments[path] = [
                replace(entry, role=f"{where}.{entry.role}") if entry.role and entry.role not in UNSIDED else entry for entry in entries
            ]
