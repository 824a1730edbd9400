"""Flat: what a tenant trains as one vector a group, in its row of a ground; AdamW takes one pass over it, not several a tensor.

The numbers are those of the plain optimiser, and so is what a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from deltatune.multi.ground import Ground
from deltatune.training.flat import MOMENTS, joined, views

FASTER = {"fused": True, "foreach": False}
"""Settings of a group that change how it is computed, and not what."""


class Flat:
    """Makes an optimiser step over vectors, of which the Parameters and their gradients are views.

    Args:
        optimizer: whose groups and moments are taken over; its schedule goes on with the same groups.
        ground: with rows of as many numbers.

    Attributes:
        row: of the ground.
        vectors: one a group.
    """

    def __init__(self, optimizer: AdamW, ground: Ground) -> None:
        self.optimizer, self.ground, self.row = optimizer, ground, -1
        self.groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        self._plain = [{name: group[name] for name in FASTER} for group in optimizer.param_groups]
        self.vectors: list[nn.Parameter] = []
        own = [parameter for group in self.groups for parameter in group]
        values, gradients = joined([parameter.detach() for parameter in own]), joined([_gradient(parameter) for parameter in own])
        for group, parameters, part in zip(optimizer.param_groups, self.groups, self._parts(values), strict=True):
            self.vectors.append(self._vector(group, parameters, part))
        ground.enter(self, values, gradients)

    @staticmethod
    def fits(optimizer: AdamW) -> bool:
        """Every Parameter has a gradient and has taken as many steps, and all are of one kind: a vector cannot leave some of them out."""
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        plain = all(type(p.data) is Tensor and p.grad is not None and not p.grad.is_sparse for p in own)
        taken = {float(state["step"]) if (state := optimizer.state.get(p)) else 0.0 for p in own}
        return plain and len(taken) == 1 and len({(p.dtype, p.device) for p in own}) == 1

    @staticmethod
    def new_ground(optimizer: AdamW) -> Ground:
        """A ground for it and others of its shape."""
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return Ground(sum(parameter.numel() for parameter in own), own[0].detach())

    @staticmethod
    def shape(optimizer: AdamW) -> Hashable:
        """Tenants that agree in it can share a ground."""
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return own[0].dtype, own[0].device, tuple(parameter.shape for parameter in own)

    def _parts(self, row: Tensor) -> tuple[Tensor, ...]:
        """Of a row, what belongs to each group."""
        return torch.split(row, [sum(parameter.numel() for parameter in own) for own in self.groups])

    def _vector(self, group: dict[str, Any], own: Sequence[nn.Parameter], values: Tensor) -> nn.Parameter:
        """What the optimiser steps in place of a group's Parameters."""
        vector = nn.Parameter(values)
        states = [self.optimizer.state.pop(parameter, {}) for parameter in own]
        if states[0]:
            moments = {name: joined([state[name] for state in states]) for name in MOMENTS}
            self.optimizer.state[vector] = {"step": states[0]["step"].to(values.device), **moments}
        group |= {"params": [vector], **FASTER}
        return vector

    def settle(self, row: int) -> None:
        """Everything lies in that row of the ground from now on."""
        self.row = row
        values, gradients = self._parts(self.ground.values[row]), self._parts(self.ground.gradients[row])
        for vector, own, its_values, its_gradients in zip(self.vectors, self.groups, values, gradients, strict=True):
            vector.data, vector.grad = its_values, its_gradients
            for parameter, value, gradient in zip(own, views(its_values, own), views(its_gradients, own), strict=True):
                parameter.data, parameter.grad = value, gradient

    def clear(self) -> None:
        """Gradients are zero again."""
        self.ground.gradients[self.row].zero_()

    def clip(self, largest: float) -> Tensor:
        """Norm of the gradients, which are clipped to the largest that is allowed."""
        gradients = self.ground.gradients[self.row]
        norm: Tensor = torch.linalg.vector_norm(gradients)
        share = largest / (float(norm) + 1e-6) if largest else 1.0
        if share < 1:
            gradients.mul_(share)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """As the plain optimiser has it."""
        state: dict[int, dict[str, Tensor]] = {}
        groups, number = [], 0
        for group, vector, own, plain in zip(self.optimizer.param_groups, self.vectors, self.groups, self._plain, strict=True):
            held = self.optimizer.state[vector]
            moments = {name: views(held[name], own) for name in MOMENTS} if held else {}
            numbers = range(number, number + len(own))
            for k, place in enumerate(numbers if held else ()):
                state[place] = {"step": held["step"].to("cpu", copy=True), **{name: moments[name][k].clone() for name in MOMENTS}}
            groups.append({**group, **plain, "params": list(numbers)})
            number += len(own)
        return {"state": state, "param_groups": groups}

    def release(self) -> None:
        """Each Parameter has memory of its own again, and the row is the ground's."""
        for own in self.groups:
            for parameter in own:
                parameter.data, parameter.grad = parameter.data.clone(), None
        for vector in self.vectors:
            vector.data, vector.grad = vector.data.clone(), None
        self.ground.leave(self)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
