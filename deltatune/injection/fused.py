"""Low-rank changes of linear maps that are given the same tensor, in one autograd function.

    y_i = x (W_i + s_i B_i A_i)^T + b_i            folded, where there are more tokens than the maps are wide
    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T        else, with one product of x and all A
    dL/dx = sum_i g_i W_i'                         summed in place, not map by map
    dL/dA_i = s_i (g_i B_i)^T x,   dL/dB_i = s_i g_i^T (x A_i^T)

Folding puts the change into a copy of the weight, r passes over the weight instead of some over all tokens; the copy lives for one
product. So the forward and the gradient of x cost what they cost without a change. The modules themselves are asked about no rows.
Queries, keys and values go together, and gates with what they gate: the first one that is called computes for all, the others find
their output if they are given the same tensor. ``injection.lean`` runs what does not qualify, and the plain path the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.compiled.library import is_compiled
from deltatune.errors import Unsupported
from deltatune.injection.lean import Lean
from deltatune.injection.slot import slot_of, thread_key

EXACT = (torch.float32, torch.float64)
"""Types in which the sum of a weight and a small change loses nothing that matters."""
RANKS = (4, 8, 16)
"""Of the compiled loops."""
ROWS = 512
"""Rows of wide gradients that a CPU reads several times while they are in its cache."""


@dataclass(frozen=True)
class Operands:
    """One map and its change: W (out, in), b (out,) or None, A (r, in), B (out, r), s."""

    W: Tensor
    b: Tensor | None
    A: Tensor
    B: Tensor
    s: float

    @property
    def widest(self) -> int:
        """The larger of the map's sides."""
        return max(self.W.shape)


def outputs_of(x: Tensor, maps: Sequence[Operands], folded: bool) -> Sequence[Tensor]:
    """Every map's y, by the compiled loops where there are any: they are an autograd function themselves."""
    if has_loops(x, maps):
        W, b, A, B, s = zip(*((one.W, one.b, one.A, one.B, one.s) for one in maps), strict=True)
        return torch.ops.deltatune.low_rank(x, W, b, A, B, s, folded)  # type: ignore[no-any-return]
    tensors = (tensor for one in maps for tensor in (one.W, one.b, one.A, one.B))
    return Fused.apply(x, folded, tuple(one.s for one in maps), *tensors)  # type: ignore[no-any-return, no-untyped-call]


def has_loops(x: Tensor, maps: Sequence[Operands]) -> bool:
    """There are compiled loops for these shapes and types; they are for x that the backward reads."""
    fits = x.is_cpu and all(one.W.dtype == one.A.dtype == torch.float32 and one.A.shape[0] in RANKS for one in maps)
    return fits and x.dtype == torch.float32 and any(one.A.requires_grad for one in maps) and is_compiled()


class Fused(torch.autograd.Function):
    """x, folded, all s, (W, b, A, B) of each map -> its y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, folded: bool, scales: Sequence[float], *operands: Tensor | None) -> tuple[Tensor, ...]:
        """Every map's output."""
        fours: Any = zip(*[iter(operands)] * 4, strict=True)
        maps = [Operands(W, b, A, B, s) for (W, b, A, B), s in zip(fours, scales, strict=True)]
        learns_A = any(ctx.needs_input_grad[5::4])
        h = None if learns_A and folded else _joined(maps) @ _rows(x).T  # (r of all, tokens)
        ctx.folded, ctx.scales, ctx.shape, ctx.like = folded, scales, x.shape, x.new_empty(0)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if learns_A else None, h, *(tensor for one in maps for tensor in (one.W, one.A, one.B)))
        if folded:
            return tuple(_linear(x, _merged(one), one.b) for one in maps)
        assert h is not None
        outputs = [_linear(x, one.W, one.b) for one in maps]
        for y, part, one in zip(outputs, torch.split(h, [len(one.A) for one in maps]), maps, strict=True):
            _rows(y).addmm_(part.T, _turned(one))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """What x, each b, each A and each B get."""
        x, h, *tensors = ctx.saved_tensors
        maps = [Operands(W, None, A, B, s) for (W, A, B), s in zip(zip(*[iter(tensors)] * 3, strict=True), ctx.scales, strict=True)]
        flat = [None if g is None else _rows(g) for g in gradients]
        needed = ctx.needs_input_grad
        biases = [g.sum(0) if g is not None and needed[4 + 4 * k] else None for k, g in enumerate(flat)]
        twice = torch.is_grad_enabled()  # a gradient of the gradient is wanted
        g_x, g_A, g_B = _written_out(x, maps, flat) if twice else _at_once(ctx, x, h, maps, flat)
        ours = [
            entry
            for k, gradient in enumerate(gradients)
            for entry in ((None,) * 4 if gradient is None else (None, biases[k], g_A[k], g_B[k]))
        ]
        return (g_x.view(ctx.shape) if g_x is not None and needed[0] else None, None, None, *ours)


Gradients = tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]


def _at_once(ctx: Any, x: Tensor | None, h: Tensor | None, maps: Sequence[Operands], gradients: Sequence[Tensor | None]) -> Gradients:
    """Every gradient, block by block of rows where the gradients are wider than x."""
    needed, like, x = ctx.needs_input_grad, ctx.like, None if x is None else _rows(x)
    tokens, width = ctx.shape.numel() // ctx.shape[-1], ctx.shape[-1]
    wide = like.device.type == "cpu" and sum(one.W.shape[0] for one in maps) > width
    joined = _joined(maps)  # (r of all, in)
    weights = [_merged(one) if ctx.folded and needed[0] else one.W for one in maps]
    turned = [_turned(one) for one in maps]
    ranks = [len(one.A) for one in maps]
    g_x = like.new_empty(tokens, width) if needed[0] else None
    g_A = None if x is None else like.new_zeros(joined.shape)
    g_B = [  # (r, out): products with few rows are faster than those with few columns
        like.new_zeros(one.shape) if g is not None and needed[6 + 4 * k] else None
        for k, (one, g) in enumerate(zip(turned, gradients, strict=True))
    ]
    for rows in _blocks(tokens, ROWS if wide else tokens):
        block = None if x is None else x[rows]
        small = _small(h, joined, block, rows)
        u = like.new_zeros(len(joined), rows.stop - rows.start)
        begun = False
        for part, part_u, sB, weight, whole, into in zip(
            torch.split(small, ranks), torch.split(u, ranks), turned, weights, gradients, g_B, strict=True
        ):
            if whole is None:
                continue
            g = whole[rows]
            if into is not None:
                into.addmm_(part, g)
            torch.mm(sB, g.T, out=part_u)
            if g_x is not None:
                g_x[rows].addmm_(g, weight, beta=int(begun))
                begun = True
        if g_x is not None and not ctx.folded:
            g_x[rows].addmm_(u.T, joined)
        if g_A is not None and block is not None:
            g_A.addmm_(u, block)
    of_A = [None] * len(maps) if g_A is None else g_A.split(ranks)
    of_B = [None if one is None else s * one.T for one, s in zip(g_B, ctx.scales, strict=True)]
    return (g_x if any(g is not None for g in gradients) else None), of_A, of_B


def _small(h: Tensor | None, joined: Tensor, block: Tensor | None, rows: slice) -> Tensor:
    """A x^T of some rows, of all maps: kept by the forward, or made anew of x, which it kept instead."""
    if h is not None:
        return h[:, rows]
    assert block is not None
    return joined @ block.T


def _written_out(x: Tensor | None, maps: Sequence[Operands], gradients: Sequence[Tensor | None]) -> Gradients:
    """The same as formulas that autograd can follow."""
    if x is None:
        raise Unsupported("A gradient of a gradient was asked for where A is fixed and x was not kept. Let A train, as LoRA does.")
    flat = _rows(x)
    pairs = list(zip(maps, gradients, strict=True))
    sums = [g @ one.W + one.s * (g @ one.B) @ one.A for one, g in pairs if g is not None]
    g_x = sum(sums[1:], start=sums[0]) if sums else None
    g_A = [None if g is None else one.s * (g @ one.B).T @ flat for one, g in pairs]
    g_B = [None if g is None else one.s * g.T @ (flat @ one.A.T) for one, g in pairs]
    return g_x, g_A, g_B


def _joined(maps: Sequence[Operands]) -> Tensor:
    """All A one below the other, (r of all, in)."""
    return maps[0].A if len(maps) == 1 else torch.cat([one.A for one in maps])


def _turned(one: Operands) -> Tensor:
    """(s B)^T, its rows one behind the other: torch's products with few rows are faster then."""
    return (one.s * one.B).T.contiguous()


def _merged(one: Operands) -> Tensor:
    """W + s B A."""
    return torch.addmm(one.W, one.B, one.A, alpha=one.s)


def _rows(x: Tensor) -> Tensor:
    """(..., width) -> (tokens, width)."""
    return x.reshape(-1, x.shape[-1])


def _linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x W^T + b, and no view to autograd: a view that was made within a function of ours could not be changed in place behind it."""
    y = F.linear(x, W, b)
    return torch.ops.aten._unsafe_view.default(y, y.shape)  # type: ignore[no-any-return]


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, max(1, size))]


@dataclass(frozen=True)
class Ready:
    """An output that another map's call has computed: of x, as it was then."""

    x: Tensor
    version: int
    y: Tensor


Partner = Callable[[nn.Module], "tuple[Lean, Sharing] | None"]


class Sharing:
    """Which modules are given what one module is given, and its output once one of them has computed it.

    Attributes:
        others: the modules.
        is_shared: False once this module was given something else than another one of them.
        ready: outputs that wait, of each thread.
    """

    def __init__(self) -> None:
        self.others: tuple[nn.Module, ...] = ()
        self.is_shared = True
        self.ready: dict[int, Ready] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ready": {}}

    def output(self, way: Lean, module: nn.Module, x: Tensor, partner: Partner) -> Tensor | None:
        """The module's output with its change; None where the module has to run.

        Args:
            way: the change.
            module: the linear map.
            x: what it is given.
            partner: what acts on another module, and its share in this.
        """
        ready = self.ready.pop(thread_key(), None)
        if ready is not None:
            if ready.x is x and ready.version == x._version:
                return ready.y
            self.is_shared = False
        mine = operands_of(way, module, x)
        if mine is None:
            return None
        others = self._partners(x, partner) if self.is_shared else []
        maps = [mine, *(found for _, found in others)]
        tokens = x.numel() // max(1, x.shape[-1])
        folded = x.dtype in EXACT and tokens >= max(one.widest for one in maps)
        if not (folded or others or has_loops(x, maps)):
            return None
        outputs = outputs_of(x, maps, folded)
        for (sharing, _), output in zip(others, outputs[1:], strict=True):
            sharing.ready[thread_key()] = Ready(x, x._version, output)
        return outputs[0]

    def _partners(self, x: Tensor, partner: Partner) -> list[tuple[Sharing, Operands]]:
        found = []
        for module in self.others:
            pair = partner(module)
            operands = None if pair is None else operands_of(pair[0], module, x)
            if pair is not None and pair[1].is_shared and operands is not None:
                found.append((pair[1], operands))
        return found


def operands_of(way: Lean, module: nn.Module, x: Tensor) -> Operands | None:
    """What a map's output is made of; None where it has to be the module itself that makes it."""
    if not isinstance(module, nn.Linear) or not torch.is_grad_enabled() or not _is_bare(module):
        return None
    W, b = module.weight, module.bias
    plain = type(W) in (nn.Parameter, Tensor) and not W.requires_grad
    if not plain or (W.dtype, W.device) != (x.dtype, x.device) or (b is not None and b.dtype != x.dtype):
        return None
    factors = way.factors(module, x)
    if factors is None or not any(tensor.requires_grad for tensor in (x, *factors[:2])):
        return None
    return Operands(W, b, *factors)


def _is_bare(module: nn.Module) -> bool:
    """A linear map that nothing but one act of ours looks at."""
    slot = slot_of(module)
    alone = slot is not None and sum(act.listens for act in slot.acts.values()) == 1
    return alone and type(module) is nn.Linear and len(module._forward_pre_hooks) == 1 and "forward" not in vars(module)
