"""AdamW for many small tensors: one pass over one vector, of which the Parameters are views.

A tensor a time costs as many calls as there are tensors; 10,000 biases take longer to be called for than to be computed
(``benchmarks/many_tensors.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors as flatten_dense_tensors
from torch.optim.adamw import AdamW, adamw

MOMENTS = ("exp_avg", "exp_avg_sq")
FEWEST, LARGEST = 32, 2**16
"""Fewer tensors, or larger ones on average, are no gain: their gradients would be copied for nothing."""


@dataclass
class Vector:
    """The Parameters of one group, side by side.

    Attributes:
        parameters: in the group's order.
        values: (n,), of which they are views.
        places: their addresses.
        moments: (n,) each, by name.
        step: how many steps were taken.
    """

    parameters: list[nn.Parameter]
    values: Tensor
    places: list[int]
    moments: dict[str, Tensor]
    step: Tensor

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter], states: Sequence[dict[str, Any]]) -> Vector:
        """The Parameters become views of it, with what their states hold."""
        values = joined([parameter.detach() for parameter in parameters])
        if states[0]:
            moments, step = {name: joined([state[name] for state in states]) for name in MOMENTS}, states[0]["step"].to("cpu", copy=True)
        else:
            moments, step = {name: torch.zeros_like(values) for name in MOMENTS}, torch.zeros((), dtype=torch.float32)
        own = cls(list(parameters), values, [], moments, step.to(values.device))
        for parameter, view in zip(parameters, views(values, parameters), strict=True):
            parameter.data = view
        own.places = [parameter.data_ptr() for parameter in parameters]
        return own

    def holds(self, parameters: Sequence[nn.Parameter]) -> bool:
        """These are its Parameters, and they lie here still."""
        same = len(parameters) == len(self.parameters) and all(map(is_, parameters, self.parameters))
        return same and [parameter.data_ptr() for parameter in parameters] == self.places

    def gradient(self) -> Tensor | None:
        """Theirs, side by side; None where one is missing or of another kind."""
        gradients = [parameter.grad for parameter in self.parameters]
        if any(gradient is None or gradient.is_sparse for gradient in gradients):
            return None
        found: Tensor = flatten_dense_tensors(gradients)  # type: ignore[no-untyped-call]
        return found if found.dtype == self.values.dtype else None

    def states(self) -> list[dict[str, Tensor]]:
        """As the plain optimiser has them, in memory of their own."""
        moments = {name: views(moment, self.parameters) for name, moment in self.moments.items()}
        return [
            {"step": self.step.to("cpu", copy=True), **{name: parts[k].clone() for name, parts in moments.items()}}
            for k in range(len(self.parameters))
        ]


class FlatAdamW(AdamW):
    """AdamW; where there are many small Parameters it keeps them side by side, and takes all of a group at once.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        theta <- theta - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay theta)

    The numbers are those of ``torch.optim.AdamW``, and so is what ``state_dict`` holds. Parameters without a gradient in some step,
    sparse gradients, and groups of several types or devices go the plain way.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._vectors: list[Vector | None] = [None] * len(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of every group."""
        if closure is not None:
            self.release()
            return super().step(closure)
        rest = []
        for number, group in enumerate(self.param_groups):
            vector = self._vector(number)
            gradient = None if vector is None else vector.gradient()
            if vector is None or gradient is None:
                self._let_go(number)
                rest.append(group)
                continue
            beta1, beta2 = group["betas"]
            first, second = (vector.moments[name] for name in MOMENTS)
            adamw(
                [vector.values], [gradient], [first], [second], [], [vector.step],
                foreach=False, capturable=False, differentiable=False, fused=True, grad_scale=None, found_inf=None, has_complex=False,
                amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                maximize=False,
            )  # fmt: skip
        if rest:
            self._step_plainly(rest)
        return None

    def _step_plainly(self, groups: list[dict[str, Any]]) -> None:
        """A tensor a time, of these groups."""
        whole, self.param_groups = self.param_groups, groups
        try:
            super().step()
        finally:
            self.param_groups = whole

    def _vector(self, number: int) -> Vector | None:
        """Of a group, made if its Parameters can lie side by side."""
        parameters, vector = self.param_groups[number]["params"], self._vectors[number]
        if vector is not None and vector.holds(parameters):
            return vector
        self._let_go(number)
        states = [self.state.get(parameter, {}) for parameter in parameters]
        if not _fits(parameters) or len({float(state["step"]) if state else 0.0 for state in states}) > 1:
            return None
        made = self._vectors[number] = Vector.of(parameters, states)
        for parameter in parameters:
            self.state.pop(parameter, None)
        return made

    def _let_go(self, number: int) -> None:
        """The Parameters of a group have states, and memory, of their own again."""
        vector, self._vectors[number] = self._vectors[number], None
        if vector is None:
            return
        for parameter, state in zip(vector.parameters, vector.states(), strict=True):
            self.state[parameter] = state
            parameter.data = parameter.data.clone()

    def release(self) -> None:
        """Every Parameter has memory of its own again."""
        for number in range(len(self._vectors)):
            self._let_go(number)

    def state_dict(self) -> dict[str, Any]:
        """As that of ``torch.optim.AdamW``."""
        self.release()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same."""
        self.release()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self.release()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._vectors = [None] * len(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more group."""
        super().add_param_group(param_group)
        if hasattr(self, "_vectors"):
            self._vectors.append(None)


def _fits(parameters: Sequence[nn.Parameter]) -> bool:
    """Many small plain tensors of one kind, each with a gradient: what never has one would keep the others from lying flat."""
    count = len(parameters)
    if count < FEWEST or sum(parameter.numel() for parameter in parameters) > LARGEST * count:
        return False
    first = parameters[0]
    return (
        all(
            type(parameter.data) is Tensor
            and parameter.dtype == first.dtype
            and parameter.device == first.device
            and parameter.is_contiguous()
            and parameter.grad is not None
            and not parameter.grad.is_sparse
            and parameter.grad.dtype == first.dtype
            for parameter in parameters
        )
        and first.is_floating_point()
    )


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All their numbers, one behind the other."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def views(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Of a vector, what belongs to each of them, in its shape."""
    parts = torch.split(vector, [parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
