"""The Triton kernel of the GPU's operator; needs ``triton``, which CUDA builds of torch bring along.

    z_i = x_i W[lane_i]

A program computes a block of tokens and outputs of one row, over a part of the inputs. Where rows and outputs are few, as
in the first product of a LoRA in decoding, parts of the inputs go to programs of their own, which fills the device; the
product behind sums the parts as it reads them, so that the result does not depend on the order in which they end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

PROGRAMS = 512
"""So many fill a large device a few times over; fewer blocks are split further."""

LEAST = 256
"""Inputs of a part, at least."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def product(
    x: Any,
    W: Any,
    lanes: Any,
    z: Any,
    tokens: int,
    width: int,
    out: int,
    part: int,
    PARTS: tl.constexpr,
    TYPE: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    SKIPS: tl.constexpr,
) -> None:
    """z[split, i] = sum over p of x[p, i, :, inputs of the split] W[lane_i, those, :].

    x is (parts, rows, tokens, width), W (lanes, width, out), lanes (rows), z (splits, rows, tokens, out), all contiguous.
    """
    row, split, rows = tl.program_id(0), tl.program_id(2), tl.num_programs(0)
    columns = tl.cdiv(out, N)
    t = tl.program_id(1) // columns * T + tl.arange(0, T)
    n = tl.program_id(1) % columns * N + tl.arange(0, N)
    lane = tl.load(lanes + row)
    total = tl.zeros((T, N), dtype=tl.float32)
    if lane > 0 or not SKIPS:
        end = tl.minimum(width, (split + 1) * part)
        for first in range(split * part, end, K):
            k = first + tl.arange(0, K)
            here = (t[:, None] < tokens) & (k[None, :] < end)
            given = tl.zeros((T, K), dtype=tl.float32)
            for p in tl.static_range(PARTS):
                at = ((p * rows + row) * tokens + t[:, None]) * width + k[None, :]
                given += tl.load(x + at, mask=here, other=0.0).to(tl.float32)
            there = (k[:, None] < end) & (n[None, :] < out)
            matrix = tl.load(W + (lane * width + k[:, None]) * out + n[None, :], mask=there, other=0.0)
            if T == 1:
                sums = tl.sum(tl.trans(given).to(TYPE).to(tl.float32) * matrix.to(tl.float32), 0)
                total += sums[None, :]
            else:
                total += tl.dot(given.to(TYPE), matrix.to(TYPE), input_precision="ieee")
    place = ((split * rows + row) * tokens + t[:, None]) * out + n[None, :]
    tl.store(z + place, total.to(z.dtype.element_ty), mask=(t[:, None] < tokens) & (n[None, :] < out))


def launch(x: Tensor, W: Tensor, lanes: Tensor, dtype: torch.dtype, *, splits: bool, skips: bool) -> Tensor:
    """One product.

    Args:
        x: (parts, rows, tokens, in), whose sum over the parts is meant.
        W: (lanes, in, out).
        lanes: (rows).
        dtype: in which it is computed; sums are kept in float32.
        splits: the inputs may be divided; the result has a part each then.
        skips: lane 0 holds zeros and is not read.

    Returns:
        (splits, rows, tokens, out), of ``dtype``, or float32 with several parts.
    """
    parts, rows, tokens, width = x.shape
    out = W.shape[-1]
    T, K, N = _blocks(tokens, width, out)
    blocks = triton.cdiv(tokens, T) * triton.cdiv(out, N)
    count = min(triton.cdiv(PROGRAMS, rows * blocks), max(width // LEAST, 1)) if splits else 1
    part = triton.cdiv(triton.cdiv(width, count), K) * K
    count = triton.cdiv(width, part)
    z = torch.empty((count, rows, tokens, out), dtype=dtype if count == 1 else torch.float32, device=x.device)
    product[(rows, blocks, count)](
        x.contiguous(), W.contiguous(), lanes, z, tokens, width, out, part, PARTS=parts, TYPE=TYPES[dtype], T=T, K=K, N=N, SKIPS=skips
    )
    return z


def _blocks(tokens: int, width: int, out: int) -> tuple[int, int, int]:
    """Tokens, inputs and outputs of a block: one token as a vector, more as tiles of the tensor cores."""
    if tokens == 1:
        N = min(128, triton.next_power_of_2(out))
        return 1, min(triton.next_power_of_2(width), max(4096 // N, 16)), N
    T = min(64, max(16, triton.next_power_of_2(tokens)))
    return T, min(64, max(16, triton.next_power_of_2(width))), min(64, max(16, triton.next_power_of_2(out)))
