"""Everything by which a model could tell that a delta had been on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = tuple(
    name
    for name in vars(nn.Module())
    if "hooks" in name and name not in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
)
OWN = ("_parameters", "_buffers", "_modules", *HOOKS)


@dataclass
class Trace:
    """A model's objects and bits at one moment; ``==`` compares objects by identity and tensors by their bits."""

    modules: list[tuple[str, int, type]]
    parameters: list[tuple[str, int, bool]]
    hooks: list[tuple[str, str, tuple[int, ...]]]
    attributes: list[tuple[str, frozenset[str], bool]]
    configs: list[tuple[int, dict[str, Any], str | None]]
    tensors: dict[str, Tensor]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and not self.differences(other)

    def differences(self, other: Trace) -> list[str]:
        """What is not the same, in words."""
        found = [
            f"{what}: {sorted(set(map(str, a)) ^ set(map(str, b)))[:4]}"
            for what in ("modules", "parameters", "hooks", "attributes", "configs")
            if (a := getattr(self, what)) != (b := getattr(other, what))
        ]
        if list(self.tensors) != list(other.tensors):
            return [*found, f"names of tensors: {sorted(self.tensors.keys() ^ other.tensors.keys())[:4]}"]
        return found + [f"bits of {name}" for name, tensor in self.tensors.items() if not torch.equal(tensor, other.tensors[name])]


def trace(model: nn.Module) -> Trace:
    """What ``model`` is now."""
    named = list(model.named_modules(remove_duplicate=False))
    configs = {id(config): config for _, module in named if (config := vars(module).get("config")) is not None}
    return Trace(
        modules=[(path, id(module), type(module)) for path, module in named],
        parameters=[(path, id(tensor), tensor.requires_grad) for path, tensor in model.named_parameters(remove_duplicate=False)],
        hooks=[(path, kind, tuple(map(id, getattr(module, kind).values()))) for path, module in named for kind in HOOKS],
        attributes=[(path, frozenset(vars(module)), module.training) for path, module in named],
        configs=[(key, config.to_dict(), getattr(config, "_attn_implementation", None)) for key, config in configs.items()],
        tensors={name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
        | {f"buffer {name}": tensor.clone() for name, tensor in model.named_buffers()},
    )
