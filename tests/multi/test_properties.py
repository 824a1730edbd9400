"""Random mixtures of kinds, ranks and sites: whatever a batch holds, each row is what it is alone, gradients included."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods import IA3, Adapter, BitFit, DoRA, HiRA, LoRA, LoReFT, NormTuning, PrefixTuning, PromptTuning, VeRA
from deltatune.multi.heads import split
from deltatune.multi.routing import Entry
from tests.conformance.cells import fresh, shake
from tests.models import output
from tests.multi.rows import all_on, batch, far, forget, naive, routed, use

WIDTH = 8


class Net(nn.Module):
    """Two maps, a norm and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 12)
        self.second = nn.Linear(12, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.second(torch.tanh(self.first(x))))
        return y


METHODS: dict[str, tuple[Any, str]] = {
    "low1": (LoRA(rank=1), "first"),
    "low3": (LoRA(rank=3), "first"),
    "low5": (LoRA(rank=5), "second"),
    "both": (LoRA(rank=5), "first"),
    "vera": (VeRA(rank=4), "first"),
    "dora": (DoRA(rank=2), "second"),
    "hira": (HiRA(rank=2), "first"),
    "scaled": (IA3(), "second"),
    "biases": (BitFit(), "first"),
    "norm": (NormTuning(), "norm"),
    "serial": (Adapter(bottleneck_dim=3), "second"),
    "edit": (LoReFT(rank=2), "second"),
}


@cache
def net() -> nn.Module:
    torch.manual_seed(0)
    backbone = Net()
    for seed, (name, (method, where)) in enumerate(METHODS.items()):
        shake(dt.attach(backbone, method, where, name=name), spread=0.2, seed=seed)
    dt.switch(backbone, None)
    return backbone


NAMED = st.sampled_from(sorted(METHODS))
ENTRY = st.one_of(st.none(), NAMED, st.lists(NAMED, min_size=2, max_size=3, unique=True))
ROWS = st.lists(ENTRY, min_size=1, max_size=9)
QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def inputs(rows: int, tokens: int) -> Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(rows * 31 + tokens))


def alone(entries: list[Entry], x: Tensor) -> list[Tensor]:
    found = []
    for i, entry in enumerate(entries):
        use(net(), entry)
        found.append(net()(x[i : i + 1])[0])
    dt.switch(net(), None)
    return found


@QUICK
@given(ROWS, st.sampled_from([1, 3, 12]), st.sampled_from([1, 2]))
@torch.no_grad()
def test_outputs(entries: list[Entry], tokens: int, factor: int) -> None:
    x = inputs(len(entries) * factor, tokens)
    with dt.route(net(), entries):
        found = [net()(x) for _ in range(3)]  # from the second on with copies that are kept
    expected = alone([entry for entry in entries for _ in range(factor)], x)
    assert max(far(one, expected) for one in found) < 1e-5


@QUICK
@given(ROWS, ROWS, st.integers(0, 8))
@torch.no_grad()
def test_no_row_knows_the_others(entries: list[Entry], others: list[Entry], place: int) -> None:
    place %= len(entries)
    changed = [*others[:place], entries[place], *others[place:]]
    place_then = min(place, len(others))
    one, other = inputs(len(entries), 3), inputs(len(changed), 3)
    other[place_then] = one[place]
    with dt.route(net(), entries):
        before = net()(one)[place]
    with dt.route(net(), changed):
        after = net()(other)[place_then]
    assert far(after[None], [before]) < 1e-5


TRAINED = st.lists(st.one_of(st.none(), st.sampled_from(sorted(METHODS))), min_size=1, max_size=6)


@settings(QUICK, max_examples=15)
@given(TRAINED, st.sampled_from([1, 12]))
def test_gradients(entries: list[Entry], tokens: int) -> None:
    backbone = net()
    x = inputs(len(entries), tokens)
    weights = torch.linspace(0.5, 1.5, WIDTH)
    expected: dict[str, Tensor] = {}
    x_gradients = []
    for i, entry in enumerate(entries):
        use(backbone, entry)
        forget(backbone)
        own = x[i : i + 1].clone().requires_grad_()
        (backbone(own).square() * weights).sum().backward()
        x_gradients.append(own.grad[0] if own.grad is not None else torch.zeros_like(own[0]))
        collect(backbone, expected)
    all_on(backbone)
    forget(backbone)
    whole = x.clone().requires_grad_()
    with dt.route(backbone, entries):
        (backbone(whole).square() * weights).sum().backward()
    found: dict[str, Tensor] = {}
    collect(backbone, found)
    dt.switch(backbone, None)
    assert whole.grad is not None
    assert far(whole.grad, x_gradients) < 1e-5
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((found.get(name, torch.zeros_like(gradient)) - gradient).abs().max()) < 1e-5 * scale, name
    assert all(name in expected or not gradient.any() for name, gradient in found.items()), "no other delta gets any"


def collect(backbone: nn.Module, into: dict[str, Tensor]) -> None:
    for delta in dt.deltas(backbone):
        for name, parameter in delta.named_parameters():
            if parameter.grad is not None:
                into[f"{delta.name}.{name}"] = into.get(f"{delta.name}.{name}", 0) + parameter.grad


TEXT: dict[str, Any] = {"low": LoRA(rank=2), "scaled": IA3(), "bottle": Adapter(bottleneck_dim=3), "chosen": BitFit()}
TEXT |= {name: PrefixTuning(length, reparameterization=False) for name, length in (("prefix", 2), ("longer", 3))}
TEXT["prompt"] = PromptTuning(2)
HEADLESS = {"low", "scaled"}
"""They get heads of 5 labels of their own."""


@cache
def text_net(composed: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    backbone, _ = fresh("bert")
    methods = TEXT | ({f"in-{name}": TEXT[name] for name in ("bottle", "prefix", "chosen", "low")} if composed else {})
    for seed, (name, method) in enumerate(methods.items()):
        shake(dt.attach(backbone, method, name=name, head=name.removeprefix("in-") not in HEADLESS), seed=seed)
    if composed:
        dt.compose(backbone, ["in-bottle", "in-prefix"], name="chain").disable()
        dt.compose(backbone, ["in-low", "in-chosen"], how="weighted", weights=[0.5, 2.0], name="weighed").disable()
    draw = torch.Generator().manual_seed(3)
    head = {"weight": torch.randn(5, 32, generator=draw), "bias": torch.randn(5, generator=draw)}
    for name in HEADLESS:
        dt.bank(backbone).head(name, head)
    dt.switch(backbone, None)
    return backbone, head


MIXED = st.one_of(st.none(), st.sampled_from([*TEXT, "chain", "weighed"]), st.just(["longer", "prompt"]), st.just(["prompt", "bottle"]))


@settings(QUICK, max_examples=12)
@given(st.lists(MIXED, min_size=1, max_size=6), st.sampled_from([4, 9]))
@torch.no_grad()
def test_compositions_virtual_tokens_and_heads(entries: list[Entry], length: int) -> None:
    backbone, head = text_net(composed=True)
    inputs = batch(len(entries), length=length)
    expected = naive(backbone, entries, inputs)
    rows = split(routed(backbone, entries, inputs))
    for place, (entry, row) in enumerate(zip(entries, rows, strict=True)):
        if isinstance(entry, str) and entry in HEADLESS:
            use(backbone, entry)
            own = {name: value[place : place + 1] for name, value in inputs.items()}
            hidden = backbone.bert(**own).pooler_output  # type: ignore[operator, union-attr]
            expected[place] = nn.functional.linear(hidden, head["weight"], head["bias"])[0]
            dt.switch(backbone, None)
        assert far(row[None], [expected[place]]) < 1e-5, entry


CHOSEN = st.sampled_from(["chosen", "bottle", "low", "prefix", "prompt"])


@settings(QUICK, max_examples=8)
@given(st.lists(st.one_of(st.none(), CHOSEN), min_size=1, max_size=4))
def test_gradients_of_selections_and_virtual_tokens(entries: list[Entry]) -> None:
    backbone, _ = text_net(composed=False)
    inputs = batch(len(entries))
    expected: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for place, entry in enumerate(entries):
        use(backbone, entry)
        forget(backbone)
        if entry is not None:
            hidden(backbone, {name: value[place : place + 1] for name, value in inputs.items()}).square().sum().backward()
            collect_of(backbone, expected)
    all_on(backbone)
    forget(backbone)
    with dt.route(backbone, entries):
        output_of = hidden(backbone, inputs).square().sum()
        if output_of.requires_grad:
            output_of.backward()
    collect_of(backbone, found)
    dt.switch(backbone, None)
    forget(backbone)
    scale = max((float(gradient.abs().max()) for gradient in expected.values()), default=1.0)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < 1e-5 * scale, name
    assert all(name in expected or not gradient.any() for name, gradient in found.items())


def hidden(backbone: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Below the head, which is another one for each."""
    kept: list[Tensor] = []
    handle = backbone.bert.pooler.register_forward_hook(lambda module, args, y: kept.append(y))  # type: ignore[union-attr]
    output(backbone, inputs)
    handle.remove()
    return kept[0]


def collect_of(backbone: nn.Module, into: dict[str, Tensor]) -> None:
    """Gradients of what is one delta's alone: heads are several deltas'."""
    own: dict[str, Tensor] = {}
    for delta in dt.deltas(backbone):
        grads = {name: parameter.grad for name, parameter in delta.named_parameters() if "classifier" not in name}
        own |= {f"{delta.name}.{name}": gradient for name, gradient in grads.items() if gradient is not None}
    for name, gradient in own.items():
        into[name] = into.get(name, 0) + gradient
