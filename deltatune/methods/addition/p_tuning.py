"""P-tuning: virtual tokens that an LSTM makes from free vectors (Liu et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.methods.addition.made_prompt import MadePrompt, are_exported, export_prompts
from deltatune.methods.addition.text_stack import table_shape, token_embedding
from deltatune.methods.checks import positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.structure.site import Site


@methods.register("p-tuning")
@dataclass(frozen=True)
class PTuning(Method):
    """X <- [P; X] with P = ReLU(h W_1^T + c_1) W_2^T + c_2 and h = BiLSTM(E), E: (num_virtual_tokens, hidden) ~ N(0, 1).

    Trains E, the LSTM and the MLP; ``export`` keeps P: (num_virtual_tokens, hidden) alone. h: (num_virtual_tokens,
    2 hidden_dim), W_1: (2 hidden_dim, 2 hidden_dim), W_2: (hidden, 2 hidden_dim). The LSTM starts uniform in
    +-1 / sqrt(hidden_dim), as torch's own, the MLP in +-1 / sqrt(2 hidden_dim). All virtual tokens stand in front of the text.

    Args:
        num_virtual_tokens: p.
        hidden_dim: width of the LSTM in each direction; half the backbone's if left out.
        num_layers: of the LSTM.
        seen_by_decoder: the decoder behind an encoder attends to the encoder's outputs at the virtual tokens, too, so that
            these stay in the outputs; else they are cut off.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "soft prompt"
    kind: ClassVar[Kind] = "context"
    where: ClassVar[tuple[str, ...]] = ("stack", "!decoder.stack?")
    identity: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 2e-2
    source: ClassVar[str] = "arXiv:2103.10385"

    num_virtual_tokens: int = 20
    hidden_dim: int | None = None
    num_layers: int = 2
    seen_by_decoder: bool = False

    def __post_init__(self) -> None:
        positive(self, "num_virtual_tokens", "num_layers", *([] if self.hidden_dim is None else ["hidden_dim"]))

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One prompt a text stack."""
        return [LSTMPrompt(table_shape(token_embedding(site))[1], self)]

    def export(self, patches: Sequence[Patch], shared: nn.Module | None) -> None:
        """Replace the LSTM and the MLP by the P they make."""
        export_prompts(patches)

    def is_exported(self, patches: Sequence[Patch]) -> bool:
        """Every prompt holds its P."""
        return are_exported(patches)


class LSTMPrompt(MadePrompt):
    """P = MLP(BiLSTM(E)); the LSTM's weights are bare parameters in the order of ``nn.LSTM``."""

    def __init__(self, width: int, method: PTuning) -> None:
        super().__init__()
        self.hidden_dim, self.num_layers = method.hidden_dim or max(1, width // 2), method.num_layers
        self.seen_by_decoder = method.seen_by_decoder
        both = 2 * self.hidden_dim
        self.E = nn.Parameter(torch.randn(method.num_virtual_tokens, width))
        for name, shape in _lstm_shapes(width, self.hidden_dim, self.num_layers).items():
            self.register_parameter(name, _uniform(*shape, fan_in=self.hidden_dim))
        self.W_1, self.c_1 = _uniform(both, both, fan_in=both), _uniform(both, fan_in=both)
        self.W_2, self.c_2 = _uniform(width, both, fan_in=both), _uniform(width, fan_in=both)

    def make(self) -> Tensor:
        """E (tokens, width) -> h (tokens, 2 hidden_dim) -> P (tokens, width)."""
        weights: list[Tensor] = [self.get_parameter(name) for name in _lstm_shapes(self.E.shape[1], self.hidden_dim, self.num_layers)]
        start = self.E.new_zeros(2 * self.num_layers, 1, self.hidden_dim)
        train = True  # cuDNN has no backward in evaluation mode
        with torch.autocast(self.E.device.type, enabled=False):  # processors without bfloat16 units have no such LSTM under autocast
            h = torch.lstm(self.E[None], (start, start), weights, True, self.num_layers, 0.0, train, True, True)[0][0]
        return F.linear(torch.relu(F.linear(h, self.W_1, self.c_1)), self.W_2, self.c_2)


def _lstm_shapes(width: int, hidden_dim: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights of a bidirectional LSTM, as ``torch.lstm`` takes them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for end in (f"l{layer}", f"l{layer}_reverse"):
            shapes[f"weight_ih_{end}"] = (4 * hidden_dim, 2 * hidden_dim if layer else width)
            shapes[f"weight_hh_{end}"] = (4 * hidden_dim, hidden_dim)
            shapes[f"bias_ih_{end}"] = shapes[f"bias_hh_{end}"] = (4 * hidden_dim,)
    return shapes


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in)))
