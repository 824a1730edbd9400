"""Output and input patches: whatever a module is given and returns, and in whatever order they act."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import compose
from deltatune.methods import LoRA
from deltatune.methods.kinds import Family, InputPatch, Kind, Method, OutputPatch, Patch
from deltatune.structure.site import Site


class Pair(NamedTuple):
    """What a module may return."""

    hidden: Tensor
    note: str


RETURNS: dict[str, Any] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, "note"),
    "list": lambda y: [y, "note"],
    "named tuple": lambda y: Pair(y, "note"),
    "model output": lambda y: BaseModelOutput(last_hidden_state=y, hidden_states=(y,)),
}


class Talkative(nn.Linear):
    """A linear map that takes its input under a keyword and returns more than a tensor."""

    def __init__(self, returned: str) -> None:
        super().__init__(4, 3)
        self.returned = returned

    def forward(self, flag: bool | None = None, hidden: Tensor | None = None) -> Any:  # type: ignore[override]
        assert flag is None or flag is True
        assert hidden is not None
        return RETURNS[self.returned](super().forward(hidden))


class Caller(nn.Module):
    """Calls it by keyword."""

    def __init__(self, returned: str) -> None:
        super().__init__()
        self.inner = Talkative(returned)

    def forward(self, x: Tensor) -> Any:
        return self.inner(flag=True, hidden=x)


@dataclass(frozen=True)
class Affine(Method):
    """x <- x + shift, then y <- scale * y: both ends of a module at once."""

    family: ClassVar[Family] = "addition"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("*",)
    identity: ClassVar[bool] = False

    shift: float = 0.0
    scale: float = 1.0

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        return [Shifted(self.shift), Scaled(self.scale)] if site.is_linear else []


class Shifted(InputPatch):
    """x + shift."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Scaled(OutputPatch):
    """scale * y + sum(x)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale * y + x.sum(-1, keepdim=True)


def _first(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize("returned", RETURNS)
def test_keywords_and_structured_outputs(returned: str) -> None:
    torch.manual_seed(0)
    backbone = Caller(returned)
    x = torch.randn(2, 4)
    plain = backbone(x)
    delta = attach(backbone, Affine(shift=0.5, scale=3.0), "inner")
    found = backbone(x)
    assert type(found) is type(plain)
    W, b = backbone.inner.weight, backbone.inner.bias
    torch.testing.assert_close(_first(found), 3 * ((x + 0.5) @ W.T + b) + x.sum(-1, keepdim=True))
    if returned in ("tuple", "list", "named tuple"):
        assert found[1] == "note"
    if returned == "model output":
        torch.testing.assert_close(found.hidden_states[0], (x + 0.5) @ W.T + b)
    detach(delta)
    assert torch.equal(_first(backbone(x)), _first(plain))


def _linear(*recipes: Method) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(4, 3))
    for k, recipe in enumerate(recipes):
        attach(backbone, recipe, "0", name=f"d{k}")
    return backbone, torch.randn(2, 4)


def test_steps_nest_the_last_is_the_outermost() -> None:
    """g_1(x) = s_1 f(x + a_1) + sum(x); g_2(x) = s_2 g_1(x + a_2) + sum(x)."""
    backbone, x = _linear(Affine(0.5, 3.0), Affine(-2.0, 0.7))
    f = nn.functional.linear
    W, b = backbone[0].weight, backbone[0].bias

    def g_1(x: Tensor) -> Tensor:
        return 3.0 * f(x + 0.5, W, b) + x.sum(-1, keepdim=True)

    expected = 0.7 * g_1(x - 2.0) + x.sum(-1, keepdim=True)
    torch.testing.assert_close(backbone(x), expected)


@pytest.mark.parametrize("how", ["parallel", "weighted"])
def test_input_patches_side_by_side_see_the_same_input(how: str) -> None:
    """y + sum_i w_i (F_i(f, x) - y), where each F_i edits the input for itself."""
    backbone, x = _linear(Affine(0.5, 3.0), Affine(-2.0, 0.7), LoRA(rank=2))
    weights = [0.4, -1.5, 2.0] if how == "weighted" else [1.0, 1.0, 1.0]
    compose(backbone, ["d0", "d1", "d2"], how, weights=weights if how == "weighted" else None)  # type: ignore[arg-type]
    W, b = backbone[0].weight, backbone[0].bias
    with torch.no_grad():
        A, B = (parameter.normal_() for parameter in list(backbone[0].deltatune.patches["d2"].parameters()))

    def f(x: Tensor) -> Tensor:
        return x @ W.T + b

    y, s = f(x), x.sum(-1, keepdim=True)
    members = [3.0 * f(x + 0.5) + s, 0.7 * f(x - 2.0) + s, y + 8.0 * (x @ A.T) @ B.T]
    expected = y + sum(w * (member - y) for w, member in zip(weights, members, strict=True))
    torch.testing.assert_close(backbone(x), expected, atol=1e-5, rtol=1e-5)


def test_a_group_around_another_step() -> None:
    """The composition acts on what an earlier delta made of the module."""
    backbone, x = _linear(Affine(0.5, 3.0), Affine(-2.0, 0.7), Affine(1.0, 2.0))
    compose(backbone, ["d1", "d2"], "parallel")
    W, b = backbone[0].weight, backbone[0].bias

    def g(x: Tensor) -> Tensor:
        return 3.0 * ((x + 0.5) @ W.T + b) + x.sum(-1, keepdim=True)

    y, s = g(x), x.sum(-1, keepdim=True)
    expected = y + (0.7 * g(x - 2.0) + s - y) + (2.0 * g(x + 1.0) + s - y)
    torch.testing.assert_close(backbone(x), expected, atol=1e-5, rtol=1e-5)


def test_inputs_are_never_written() -> None:
    backbone, x = _linear(Affine(0.5, 3.0), LoRA(rank=2))
    kept = x.clone()
    backbone(x)
    assert torch.equal(x, kept)


def test_interleaved_rows_of_a_fused_projection() -> None:
    """GPT-NeoX keeps query, key and value of each head together: the query of head h is rows 3 h d to 3 h d + d."""
    from tests.conformance.cells import fresh

    backbone, _ = fresh("gpt_neox")
    fused = backbone.get_submodule("gpt_neox.layers.0.attention.query_key_value")
    x = torch.randn(2, 3, 32)
    plain = fused(x)
    delta = attach(backbone, LoRA(rank=2, alpha=2), "attention.query", layers=0)
    (patch,) = delta.patches
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.normal_()
    change = (fused(x) - plain).view(2, 3, 4, 3, 8)  # (batch, seq, heads, query|key|value, head_dim)
    torch.testing.assert_close(change[..., 0, :].reshape(2, 3, 32), x @ patch.lora_A.T @ patch.lora_B.T, atol=1e-4, rtol=1e-4)  # type: ignore[operator]
    assert not change[..., 1:, :].any()
