"""The lean way of a low-rank change on one linear map: the same numbers with fewer passes over x and y.

    x', h = x, A x^T                  ahead of the module, which is given x'
    y <- y + h^T (s B)^T             behind it, added in place
    dL/dx = dL/dx' + (dL/dh)^T A      backward, added in place to what the module has computed

The plain way, a patch's own ``forward``, makes a tensor of y's size for the product, one for the scaled product and one for the
sum, and backward two of x's and y's size. It stays the definition: whatever the lean way cannot do exactly runs plainly
(compiled code, autocast, transforms of ``torch.func``, other hooks on the module that might keep y, dropout, several steps).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.module import _global_forward_hooks

from deltatune.injection.slot import Member
from deltatune.methods.kinds import LowRank


class Shrink(torch.autograd.Function):
    """x -> x, A x^T for x (..., in) and A (r, in).

    What is small is kept with its few rows outermost, (r, tokens): products of that shape are up to four times as fast.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """x itself, as a view, and h (r, tokens)."""
        ctx.save_for_backward(x, A)
        return x.view_as(x), A @ _flat(x).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the module gave back for x, and in place what h adds."""
        g_x, g_h = gradients
        x, A = ctx.saved_tensors
        g_A = g_h @ _flat(x) if ctx.needs_input_grad[1] else None
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            return g_x + (g_h.T @ A).view_as(g_x), g_A
        return _flat(g_x).addmm_(g_h.T, A).view_as(g_x), g_A  # on a copy where it is not contiguous


class Expand(torch.autograd.Function):
    """y -> y + h^T B, in place, for y (..., out), h (r, tokens) and B (r, out)."""

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """y, changed."""
        ctx.save_for_backward(h, B)
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(h.T, B)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradient goes through; h's and B's are small."""
        (g_y,) = gradients
        h, B = ctx.saved_tensors
        flat = _flat(g_y)
        return g_y, B @ flat.T, h @ flat if ctx.needs_input_grad[2] else None


def _flat(x: Tensor) -> Tensor:
    """(..., width) -> (tokens, width)."""
    return x.reshape(-1, x.shape[-1])


class Lean:
    """One low-rank change on one linear map.

    Args:
        member: the patch.
        patch: the same, with its factors.
    """

    def __init__(self, member: Member, patch: LowRank) -> None:
        self.member, self.patch = member, patch

    @classmethod
    def of(cls, module: nn.Module, member: Member) -> Lean | None:
        """None where the module's output may be somebody else's, or is made of it in parts."""
        plain = type(module) is nn.Linear or (member.site.transposed and member.site.is_linear)
        if not plain or member.given is not None or member.site.rows is not None or not isinstance(member.patch, LowRank):
            return None
        return cls(member, member.patch)

    def factors(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """A (r, in) and B (out, r) in x's type, and s; None where the module has to run plainly."""
        found = None if is_watched(module) else self.patch.factors()
        if found is None:
            return None
        A, B, s = found
        return (A, B, s) if A.dtype == B.dtype == x.dtype else (A.to(x.dtype), B.to(x.dtype), s)


def is_special(x: Tensor) -> bool:
    """This forward is compiled, traced, transformed or under autocast: it runs plainly, whatever the module."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return True
    return torch._C._functorch.maybe_current_level() is not None or torch._C._get_tracing_state() is not None


def is_watched(module: nn.Module) -> bool:
    """Somebody else may keep its output, or asks for the gradient of its input."""
    return len(module._forward_hooks) > 1 or bool(_global_forward_hooks) or bool(module._backward_hooks or module._backward_pre_hooks)


def before(lean: Lean, module: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """What the module is to be given, and h with (s B)^T for ``after``; None where the module runs plainly."""
    factors = lean.factors(module, x)
    if factors is None:
        return x, None
    A, B, s = factors
    turned = (s * B).T.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        x, h = Shrink.apply(x, A)  # type: ignore[no-untyped-call]
    else:
        h = A @ _flat(x).T
    return x, (h, turned)


def after(y: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
    """y + h^T (s B)^T."""
    h, turned = kept
    return Expand.apply(y, h, turned)  # type: ignore[no-any-return, no-untyped-call]
