"""The GPU's operator equals the others: as it runs where there is a GPU, by Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch

from deltatune.multi.lanes import Lanes
from deltatune.multi.operators.fused import Fused
from deltatune.multi.operators.segment import Segment
from deltatune.multi.picks import Picks

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative to the largest entry."""


def agrees(tokens: int, width: int, rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens * width)
    x = torch.randn(5, tokens, width, generator=generator).to(DEVICE, dtype)
    A, B = (torch.randn(4, *shape, generator=generator).to(DEVICE, dtype) / shape[0] ** 0.5 for shape in ((width, rank), (rank, 37)))
    A[0] = B[0] = 0
    lanes = Lanes({"A": A, "B": B}, Picks((1, 0, 3, 3, 2), torch.device(DEVICE)))
    for found, wanted in (
        (Fused().matrix(x, lanes, "A"), Segment().matrix(x.float(), lanes, "A")),
        (Fused().pair(x, lanes, "A", "B"), Segment().pair(x.float(), lanes, "A", "B")),
    ):
        assert found.dtype == dtype and found.shape == wanted.shape
        assert float((found.float() - wanted).abs().max()) <= BOUNDS[dtype] * float(wanted.abs().max())
    assert not Fused().pair(x, lanes, "A", "B")[1].any()


@pytest.mark.parametrize(("width", "rank"), [(48, 4), (1100, 16)], ids=["narrow", "parted"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_it_equals_the_batched_product(tokens: int, width: int, rank: int) -> None:
    agrees(tokens, width, rank, torch.float32)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_keeps_to_its_precision(tokens: int, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and tokens > 1 and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies no tiles of bfloat16")
    agrees(tokens, 96, 8, dtype)


def test_the_zero_lane_of_a_single_product_is_read() -> None:
    x, W = torch.ones(2, 1, 3, device=DEVICE), torch.ones(2, 3, 2, device=DEVICE)
    lanes = Lanes({"W": W}, Picks((0, 1), torch.device(DEVICE)))
    assert (Fused().matrix(x, lanes, "W") == 3).all()
