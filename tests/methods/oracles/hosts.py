"""The module kinds of the oracle table: small backbones, where a method goes in them, and what PEFT calls the places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.conformance.cells import fresh
from tests.models import Example

BATCH, WIDTH, HIDDEN, LABELS, ROWS = 3, 12, 16, 5, 23


@dataclass(frozen=True)
class Host:
    """A backbone and the places in it.

    Attributes:
        name: as in the test's id.
        build: a fresh backbone and its inputs; the same weights every time.
        where: our entries, which hit exactly the places.
        targets: PEFT's ``target_modules``.
        parameters: PEFT's ``target_parameters``.
        renamed: path of a site of ours -> path of PEFT's layer, where the two differ.
    """

    name: str
    build: Callable[[], Example] = field(repr=False, compare=False)
    where: tuple[str, ...]
    targets: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Images(nn.Module):
    """One convolution, and a classifier of its channels."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.conv = convolution
        self.out = nn.Linear(HIDDEN, LABELS)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(images)).flatten(2).mean(-1))


class Words(nn.Module):
    """An embedding table and a classifier."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, WIDTH, padding_idx)
        self.out = nn.Linear(WIDTH, LABELS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embedding(ids)))


class Attention(nn.Module):
    """``nn.MultiheadAttention``, which reads its parameters itself, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.out = nn.Linear(WIDTH, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x, x, x, need_weights=False)[0])


class Raw(nn.Module):
    """A matrix and a stack of matrices that are read without calling a module; ``is_transposed`` stacks hold (in, out)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 3)
        self.stack = nn.Parameter(torch.randn(3, HIDDEN, LABELS) / 3)
        if not is_transposed:
            self.stack = nn.Parameter(self.stack.detach().mT.contiguous())
        self.is_transposed = is_transposed

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.kernel.mT)
        return torch.einsum("bi,eio->beo", h, self.stack if self.is_transposed else self.stack.mT)


class Owner(nn.Module):
    """Something around raw parameters: PEFT does not take those of the root."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def _example(build: Callable[[], nn.Module], name: str, *shape: int) -> Callable[[], Example]:
    def make() -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inputs = {name: torch.randint(ROWS, shape) if name == "ids" else torch.randn(shape)}
            return build().eval(), inputs

    return make


def _mlp(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=bias), nn.Tanh(), nn.Linear(HIDDEN, LABELS, bias=bias))


def _transposed() -> nn.Module:
    return nn.Sequential(Conv1D(HIDDEN, WIDTH), nn.Tanh(), Conv1D(LABELS, HIDDEN))


def _conv(name: str, build: Callable[[], nn.Module], *size: int) -> Host:
    return Host(name, _example(lambda: Images(build()), "images", BATCH, 4, *size), ("conv",), ("conv",))


def _model(name: str, *targets: str) -> Host:
    return Host(name, lambda: fresh(name), tuple(f"re:.*\\.{target}" for target in targets), targets)


CONVOLUTIONS = (
    _conv("conv1d", lambda: nn.Conv1d(4, HIDDEN, 3), 9),
    _conv("conv2d", lambda: nn.Conv2d(4, HIDDEN, 3), 6, 6),
    _conv("conv3d", lambda: nn.Conv3d(4, HIDDEN, 2), 4, 4, 4),
    _conv("conv2d-1x1", lambda: nn.Conv2d(4, HIDDEN, 1, bias=False), 5, 5),
    _conv("conv2d-strided", lambda: nn.Conv2d(4, HIDDEN, (3, 2), stride=2, padding=1), 6, 6),
    _conv("conv2d-dilated", lambda: nn.Conv2d(4, HIDDEN, 3, dilation=2), 7, 7),
    _conv("conv2d-circular", lambda: nn.Conv2d(4, HIDDEN, 3, padding=1, padding_mode="circular"), 5, 5),
    _conv("conv1d-grouped", lambda: nn.Conv1d(4, HIDDEN, 3, groups=2), 9),
    _conv("conv2d-grouped", lambda: nn.Conv2d(4, HIDDEN, 3, groups=2), 6, 6),
    _conv("conv2d-depthwise", lambda: nn.Conv2d(4, HIDDEN, 3, groups=4), 6, 6),
)
LINEARS = (
    Host("mlp", _example(_mlp, "input", BATCH, WIDTH), ("0", "2"), ("0", "2")),
    Host("mlp-no-bias", _example(lambda: _mlp(False), "input", BATCH, WIDTH), ("0", "2"), ("0", "2")),
    Host("mlp-sequence", _example(_mlp, "input", BATCH, 4, WIDTH), ("0",), ("0",)),
    Host("transposed", _example(_transposed, "input", BATCH, 4, WIDTH), ("0", "2"), ("0", "2")),
    _model("bert", "query", "value"),
    _model("gpt2", "c_attn", "c_proj", "c_fc"),
    _model("llama", "q_proj", "v_proj", "down_proj"),
    _model("t5", "q", "v", "wi"),
)
EMBEDDINGS = (
    Host("embedding", _example(Words, "ids", BATCH, 7), ("embedding",), ("embedding",)),
    Host("embedding-padding", _example(lambda: Words(3), "ids", BATCH, 40), ("embedding",), ("embedding",)),
)
ATTENTION = Host(
    "attention",
    _example(Attention, "x", BATCH, 5, WIDTH),
    ("attn.in_proj_weight", "attn.out_proj.weight"),
    ("attn",),
    renamed={"attn.in_proj_weight": "attn", "attn.out_proj.weight": "attn.base_layer.out_proj"},
)
RAW = tuple(
    Host(
        f"raw-{parameter}{'-transposed' * transposed}",
        _example(lambda transposed=transposed: Owner(Raw(transposed)), "x", BATCH, WIDTH),  # type: ignore[misc]
        (f"inner.{parameter}",),
        parameters=(f"inner.{parameter}",),
        renamed={f"inner.{parameter}": "inner"},
    )
    for parameter, transposed in (("kernel", False), ("stack", False), ("stack", True))
)
HOSTS = {host.name: host for host in (*LINEARS, *CONVOLUTIONS, *EMBEDDINGS, ATTENTION, *RAW)}
