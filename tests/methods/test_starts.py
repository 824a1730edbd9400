"""How fresh tensors are spread: what every sub-family draws at random, and what it leaves at zero."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import Tensor, nn

from deltatune.injection.attach import attach
from deltatune.methods import (
    Adapter,
    Compacter,
    InvertibleAdapter,
    LadderSideTuning,
    LowRankAdapter,
    Method,
    MultiHeadParallelAdapter,
    ParallelAdapter,
    PHMAdapter,
    PrefixTuning,
    PTuning,
    PTuningV2,
    ScaledParallelAdapter,
)

D = 192
"""Hidden size: large enough for the spread of a draw to be told within a few percent."""


def uniform(bound: float) -> tuple[float, float]:
    """(standard deviation, largest entry) of U(-bound, bound)."""
    return bound / math.sqrt(3), bound


def glorot(rows: int, columns: int) -> tuple[float, float]:
    return uniform(math.sqrt(6 / (rows + columns)))


def normal(deviation: float) -> tuple[float, float]:
    return deviation, 6 * deviation


ZERO = (0.0, 0.0)
KAIMING = uniform(1 / math.sqrt(D))
DENSE = {"bottleneck.D.W": normal(0.01), "bottleneck.D.b": ZERO, "bottleneck.U.W": ZERO, "bottleneck.U.b": ZERO}
BESIDE = {"bottleneck.D.W": KAIMING, "bottleneck.D.b": ZERO, "bottleneck.U.W": ZERO, "bottleneck.U.b": ZERO}

CASES: list[tuple[Method, dict[str, tuple[float, float]]]] = [
    (Adapter(), DENSE),
    (Adapter(init_std=0.1), DENSE | {"bottleneck.D.W": normal(0.1), "bottleneck.U.W": normal(0.1)}),
    (InvertibleAdapter(), {"F.D.W": normal(0.01), "F.U.W": ZERO, "G.D.W": normal(0.01), "G.U.W": ZERO}),
    (ParallelAdapter(), BESIDE),
    (ScaledParallelAdapter(), BESIDE),
    (MultiHeadParallelAdapter(bottleneck_dim=16), {"W_d": KAIMING, "b_d": ZERO, "W_u": ZERO, "b_u": ZERO}),
    (
        LowRankAdapter(reduction=4, rank=24),  # r = 48
        {"D.s": glorot(48, 24), "D.t": glorot(D, 24), "U.s": ZERO, "U.t": glorot(48, 24), "D.b": ZERO, "U.b": ZERO},
    ),
    (
        PHMAdapter(n=12, reduction=2),  # r = 96, B_i: (8, 16) and (16, 8)
        {"D.A": normal(12**-0.5), "U.A": normal(12**-0.5), "D.B": glorot(8, 16), "U.B": ZERO, "D.b": ZERO, "U.b": ZERO},
    ),
    (
        Compacter(n=12, reduction=2, rank=4),
        {"shared.A": normal(12**-0.5), "D.s": glorot(8, 4), "D.t": glorot(16, 4), "U.s": ZERO, "U.t": glorot(8, 4), "U.b": ZERO},
    ),
    (
        PrefixTuning(20, mid_dim=64),
        {"E": normal(1), "W_1": uniform(1 / 8), "c_1": ZERO, "W_2": uniform(1 / 8), "c_2": ZERO},
    ),
    (PrefixTuning(20, reparameterization=False), {"P_k": normal(0.02), "P_v": normal(0.02)}),
    (PTuningV2(20), {"P_k": normal(1), "P_v": normal(1)}),
    (
        PTuning(20, hidden_dim=50),
        {
            "E": normal(1),
            **{f"{name}_{end}": uniform(50**-0.5) for name in ("weight_ih", "weight_hh", "bias_ih") for end in ("l0", "l1_reverse")},
            **dict.fromkeys(("W_1", "c_1", "W_2", "c_2"), uniform(0.1)),
        },
    ),
    (
        LadderSideTuning(side_dim=48, expansion=4),
        {"W_down": KAIMING, "W_1": uniform(48**-0.5), "W_2": uniform(D**-0.5), "W_up": ZERO, "alpha": ZERO, "b_1": ZERO, "b_2": ZERO},
    ),
]


def backbone() -> nn.Module:
    sizes = dict(hidden_size=D, intermediate_size=D, num_hidden_layers=1, num_attention_heads=4, vocab_size=20, max_position_embeddings=8)
    return transformers.BertModel(transformers.BertConfig(**sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "spreads"), CASES, ids=lambda value: str(value) if isinstance(value, Method) else "")
def test_the_spread_of_a_start(method: Method, spreads: dict[str, tuple[float, float]]) -> None:
    torch.manual_seed(11)
    state = attach(backbone(), method).state_dict()
    for name, (deviation, most) in spreads.items():
        found = [tensor for key, tensor in state.items() if key == name or key.endswith(f".{name}")]
        assert found, f"no tensor is called {name}: {sorted(state)}"
        for tensor in found:
            check(name, tensor, deviation, most)


def check(name: str, tensor: Tensor, deviation: float, most: float) -> None:
    """The mean is 0 and the deviation as named, each within five standard errors of a draw of this size."""
    error = deviation / math.sqrt(tensor.numel())
    assert abs(float(tensor.mean())) <= 5 * error, name
    assert abs(float(tensor.square().mean().sqrt()) - deviation) <= 5 * error, f"{name}: {float(tensor.std())}, not {deviation}"
    assert float(tensor.abs().max()) <= most * (1 + 1e-6), name
