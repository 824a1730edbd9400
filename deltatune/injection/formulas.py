"""What made a tensor, and how to make it anew from what its function keeps for its own backward.

    x = f(u)            f keeps u                 GELU, SiLU, a power, ...
    x = a b             both are kept where both pass a gradient; of a b with b fixed only b is, and a is made anew
    x = layer norm      keeps u, mean, 1 / deviation, weight and bias

``x.grad_fn`` is the function itself, and autograd checks the version of what it keeps whenever that is read. So nothing is guessed from
names of modules, and a function that is not listed has no formula. What has none is kept: ``injection.recompute``.
Sources: torch's ``derivatives.yaml`` says what each function keeps; the layer norm is that of ``layer_norm_kernel.cpp``, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Kept:
    """A tensor that is saved as it is; like autograd without hooks, it says so when it was changed before the backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor if tensor.is_leaf else tensor.detach()  # an output that knew its function would keep itself alive
        self.version = tensor._version

    def read(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was changed in place since the forward.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"The backward needs a tensor of shape {tuple(self.tensor.shape)} as the forward left it, but it has been modified by an "
                f"inplace operation: it is at version {self.tensor._version}, expected version {self.version}. "
                "Run the backward before the optimizer's step, or change a copy."
            )
        return self.tensor


@dataclass(frozen=True)
class Formula:
    """How to make a tensor anew.

    Attributes:
        names: the functions it goes through, the last one first.
        make: the tensor, without gradients.
    """

    names: str
    make: Callable[[], Tensor]


def unpack(saved: Any) -> Tensor:
    """The second of our hooks; ``keeps`` knows what was saved behind it by its identity."""
    return saved.read()  # type: ignore[no-any-return]


def formula_of(tensor: Tensor) -> Formula | None:
    """How to make ``tensor`` anew; None where its function keeps it anyway, cannot be followed, or did not leave it as it is now."""
    if type(tensor) is not Tensor or tensor.is_leaf or tensor._version or tensor.output_nr:
        return None
    return _followed((tensor.grad_fn, 0), RULES)


Edge = tuple[Any, int]
Rule = Callable[[Any], "Formula | None"]


def _followed(edge: Edge, rules: dict[str, Rule]) -> Formula | None:
    node, number = edge
    rule = None if node is None or number else rules.get(node.name())
    return None if rule is None else rule(node)


def keeps(node: Any, *names: str) -> bool:
    """The function keeps these tensors, in its own hands or behind our hooks: reading them twice is nobody's business."""
    return all(_kept(node, name) is not None for name in names)


def _kept(node: Any, name: str) -> Any:
    saved = getattr(node, f"_raw_saved_{name}", None)
    return None if saved is None or not _is_open(saved) else getattr(saved, "data", None)


def _is_open(saved: Any) -> bool:
    return getattr(saved, "unpack_hook", None) in (None, unpack)


def _read(node: Any, name: str) -> Tensor:
    return getattr(node, f"_saved_{name}")  # type: ignore[no-any-return]


def _function(make: Callable[[Any, Tensor], Tensor]) -> Rule:
    """f(u) of a function that keeps its input u; ``make`` is given the node, for its numbers."""

    def rule(node: Any) -> Formula | None:
        return Formula(node.name(), lambda: make(node, _read(node, "self"))) if keeps(node, "self") else None

    return rule


def _result(node: Any) -> Formula | None:
    """A function that keeps its output: worth reading only on the way to something else."""
    return Formula(node.name(), lambda: _read(node, "result")) if keeps(node, "result") else None


def _operand(node: Any, name: str, number: int) -> Formula | None:
    if keeps(node, name):
        return Formula("", lambda: _read(node, name))
    return _followed(node.next_functions[number], WAYPOINTS)


def _product(node: Any) -> Formula | None:
    a, b = _operand(node, "self", 0), _operand(node, "other", 1)
    if a is None or b is None:
        return None
    return Formula(f"{node.name()}({a.names}, {b.names})", lambda: a.make() * b.make())


def _quotient(node: Any) -> Formula | None:
    a, b = _operand(node, "self", 0), _operand(node, "other", 1)
    if a is None or b is None:
        return None
    return Formula(f"{node.name()}({a.names}, {b.names})", lambda: a.make() / b.make())


def _dropout(node: Any) -> Formula | None:
    """x = u mask / (1 - p)."""
    u = _followed(node.next_functions[0], WAYPOINTS)
    if u is None or not keeps(node, "result1") or node._saved_p >= 1:
        return None
    return Formula(f"{node.name()}({u.names})", lambda: u.make() * _read(node, "result1") * (1 / (1 - node._saved_p)))


def _cast(node: Any) -> Formula | None:
    """A change of type; one of device is a journey, and no cheap one."""
    before = node.next_functions[0][0]
    u = _followed(node.next_functions[0], WAYPOINTS)
    if u is None or before._input_metadata[0].device != node._input_metadata[0].device:
        return None
    return Formula(f"{node.name()}({u.names})", lambda: u.make().to(node._input_metadata[0].dtype))


def _shaped(rules: Callable[[], dict[str, Rule]]) -> Rule:
    """The same numbers in another shape, in the same order."""

    def rule(node: Any) -> Formula | None:
        u = _followed(node.next_functions[0], rules())
        return None if u is None else Formula(u.names, lambda: u.make().reshape(list(node._input_metadata[0].shape)))

    return rule


def _layer_norm(node: Any) -> Formula | None:
    """x = (u - mean) (1 / deviation) weight + bias; None where half precision rounded the moments."""
    fixed = [name for name in ("weight", "bias") if _kept(node, name) is not None]
    is_open = all(_is_open(getattr(node, f"_raw_saved_{name}")) for name in ("weight", "bias"))
    if not is_open or not keeps(node, "input", "result1", "result2"):
        return None
    moment = _kept(node, "result1")
    if getattr(moment, "tensor", moment).dtype not in (torch.float32, torch.float64):
        return None

    def make() -> Tensor:
        mean = _read(node, "result1")
        x = (_read(node, "input").to(mean.dtype) - mean).mul_(_read(node, "result2"))
        weight, bias = (_read(node, name).to(mean.dtype) if name in fixed else None for name in ("weight", "bias"))
        if weight is not None:
            x = x * weight if bias is None else torch.addcmul(bias, x, weight)
        elif bias is not None:
            x = x + bias
        return x.to(node._input_metadata[0].dtype)

    return Formula(node.name(), make)


SHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1")

RULES: dict[str, Rule] = {
    "GeluBackward0": _function(lambda node, u: F.gelu(u, approximate=node._saved_approximate)),
    "SiluBackward0": _function(lambda _, u: F.silu(u)),
    "MishBackward0": _function(lambda _, u: F.mish(u)),
    "HardswishBackward0": _function(lambda _, u: F.hardswish(u)),
    "HardsigmoidBackward0": _function(lambda _, u: F.hardsigmoid(u)),
    "HardtanhBackward0": _function(lambda node, u: F.hardtanh(u, node._saved_min_val, node._saved_max_val)),
    "LeakyReluBackward0": _function(lambda node, u: F.leaky_relu(u, node._saved_negative_slope)),
    "EluBackward0": _function(
        lambda node, u: torch.ops.aten.elu(u, node._saved_alpha, node._saved_scale, node._saved_input_scale)  # selu, too
    ),
    "CeluBackward0": _function(lambda node, u: F.celu(u, node._saved_alpha)),
    "SoftplusBackward0": _function(lambda node, u: F.softplus(u, node._saved_beta, node._saved_threshold)),
    "PowBackward0": _function(lambda node, u: torch.pow(u, node._saved_exponent)),
    "MulBackward0": _product,
    "DivBackward0": _quotient,
    "NativeDropoutBackward0": _dropout,
    "NativeLayerNormBackward0": _layer_norm,
    "ToCopyBackward0": _cast,
    **{name: _shaped(lambda: RULES) for name in SHAPES},
}
"""Functions by the name that autograd gives them. A name that another torch spells otherwise has no formula here, and costs memory only."""

WAYPOINTS: dict[str, Rule] = {
    **RULES,
    **dict.fromkeys(("ReluBackward0", "TanhBackward0", "SigmoidBackward0"), _result),
    **{name: _shaped(lambda: WAYPOINTS) for name in SHAPES},
}
"""What a formula may go through, but not begin with: an output that is kept anyway."""
