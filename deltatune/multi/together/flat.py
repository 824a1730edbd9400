"""Flat: what a tenant trains as one vector, of which its Parameters are views: AdamW takes a few operations, not a few a tensor.

The numbers are those of the plain optimiser, and so is what a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


class Flat:
    """Makes an optimiser step over vectors, one a group.

    Args:
        optimizer: whose groups and moments are taken over; its schedule goes on with the same groups.
    """

    def __init__(self, optimizer: AdamW) -> None:
        self.optimizer = optimizer
        self.groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        self.vectors = [self._joined(group, own) for group, own in zip(optimizer.param_groups, self.groups, strict=True)]

    @staticmethod
    def fits(optimizer: AdamW) -> bool:
        """Every Parameter has a gradient, and all of a group are of one kind: a vector cannot leave some of them out."""
        groups = [group["params"] for group in optimizer.param_groups]
        alike = all(len({(p.dtype, p.device) for p in own}) == 1 for own in groups)
        return alike and all(type(p.data) is Tensor and p.grad is not None and not p.grad.is_sparse for own in groups for p in own)

    def _joined(self, group: dict[str, Any], own: Sequence[nn.Parameter]) -> nn.Parameter:
        with torch.no_grad():
            vector = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in own]))
            vector.grad = torch.cat([_gradient(parameter).flatten() for parameter in own])
        states = [self.optimizer.state.pop(parameter, {}) for parameter in own]
        if states[0]:
            joined = {name: torch.cat([state[name].flatten() for state in states]) for name in MOMENTS}
            self.optimizer.state[vector] = {"step": states[0]["step"], **joined}
        group["params"] = [vector]
        for parameter, values, gradients in zip(own, _views(vector.data, own), _views(vector.grad, own), strict=True):
            parameter.data = values
            parameter.grad = gradients
        return vector

    def clear(self) -> None:
        """Gradients are zero again."""
        for vector in self.vectors:
            assert vector.grad is not None
            vector.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """As the plain optimiser has it."""
        state: dict[int, dict[str, Tensor]] = {}
        groups, number = [], 0
        for group, vector, own in zip(self.optimizer.param_groups, self.vectors, self.groups, strict=True):
            held = self.optimizer.state[vector]
            moments = {name: _views(held[name], own) for name in MOMENTS} if held else {}
            numbers = range(number, number + len(own))
            for k, place in enumerate(numbers if held else ()):
                state[place] = {"step": held["step"].clone(), **{name: moments[name][k].clone() for name in MOMENTS}}
            groups.append({**{name: value for name, value in group.items() if name != "params"}, "params": list(numbers)})
            number += len(own)
        return {"state": state, "param_groups": groups}

    def release(self) -> None:
        """Each Parameter has memory of its own again."""
        for own in self.groups:
            for parameter in own:
                parameter.data = parameter.data.clone()
                parameter.grad = None


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _views(vector: Tensor, own: Sequence[nn.Parameter]) -> list[Tensor]:
    parts = torch.split(vector, [parameter.numel() for parameter in own])
    return [part.view(parameter.shape) for part, parameter in zip(parts, own, strict=True)]
