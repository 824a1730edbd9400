"""What a review of the kernel broke: calls in odd orders, broken-off forwards, ties, names, and several deltas in one place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltatune.errors import CheckpointError, Idle, InvalidValue, UnknownName, Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import compose
from deltatune.injection.merge import merge
from deltatune.injection.outputs import OutputAct
from deltatune.injection.prefix import PrefixAct
from deltatune.injection.prompt import PromptAct
from deltatune.injection.selections import SelectionAct
from deltatune.injection.slot import Act
from deltatune.injection.state import backbone_state
from deltatune.injection.switching import deltas, disabled, switch
from deltatune.injection.weights import WeightAct
from deltatune.methods import IA3, BitFit, DiffPruning, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from deltatune.methods.addition.ia3 import ScaledInput
from deltatune.methods.kinds import Family, Kind, Method, Patch
from deltatune.structure.site import Site
from tests.conformance.cells import moved, shake
from tests.conformance.trace import trace
from tests.models import TiedMLP, gpt2, mlp, output, tied_mlp


def _broken_off(backbone: nn.Module, at: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Run a forward that Ctrl-C ends right behind ``at``; PyTorch runs no always_call hooks then."""

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    handle = at.register_forward_hook(press, prepend=True)
    with pytest.raises(KeyboardInterrupt):
        output(backbone, inputs)
    handle.remove()


def test_a_forward_broken_off_loses_no_weight() -> None:
    backbone, inputs = tied_mlp()
    assert isinstance(backbone, TiedMLP)
    before, plain = trace(backbone), output(backbone, inputs)
    delta = attach(backbone, DiffPruning(), "*")
    shake(delta)
    expected = output(backbone, inputs)
    _broken_off(backbone, backbone.second, inputs)
    assert not isinstance(backbone.second._parameters["weight"], nn.Parameter)
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in backbone_state(backbone).items())
    assert torch.equal(output(backbone, inputs), expected)
    assert isinstance(backbone.second.weight, nn.Parameter)
    _broken_off(backbone, backbone.second, inputs)
    detach(delta)
    assert trace(backbone).differences(before) == []
    assert torch.equal(output(backbone, inputs), plain)


class Recursive(nn.Module):
    """h <- tanh(h W), as often as told, by calling itself."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        x = x if depth == 1 else self(x, depth - 1)
        return torch.tanh(x @ self.W)


def test_a_module_that_calls_itself_is_swapped_once() -> None:
    backbone = nn.Sequential(Recursive()).eval()
    x = torch.randn(2, 4)
    delta = attach(backbone, DiffPruning(), "0.W")
    shake(delta)
    theta = delta.patches[0](delta.entries[0].parameter)
    expected = torch.tanh(torch.tanh(torch.tanh(x @ theta) @ theta) @ theta)
    assert torch.allclose(backbone(x), expected)
    detach(delta)


@torch.no_grad()
def test_effective_weights_do_not_depend_on_who_asked_first() -> None:
    backbone, inputs = tied_mlp()
    delta = attach(backbone, LoRA(rank=2), "first")
    shake(delta, spread=1.0)
    expected = output(copy.deepcopy(backbone), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output(backbone, inputs)
    assert torch.equal(output(backbone, inputs), expected)


class TiedAttention(nn.Module):
    """A linear map whose weight an attention reads as its ``out_proj``, without calling a module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.linear.weight = self.attention.out_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.attention(x, x, x)[0])


@torch.no_grad()
def test_a_tied_weight_acts_wherever_it_is_read() -> None:
    backbone, x = TiedAttention().eval(), torch.randn(2, 3, 8)
    before = trace(backbone)
    delta = attach(backbone, LoRA(rank=2), "linear")
    shake(delta, spread=0.3)
    found, theta = backbone(x), delta.patches[0](delta.entries[0].parameter).clone()
    detach(delta)
    assert trace(backbone).differences(before) == []
    backbone.linear.weight.copy_(theta)
    assert torch.allclose(found, backbone(x), atol=1e-6)


class Listed(nn.Module):
    """y = x W_0 W_1, with both in a ``ParameterList``."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W[0] @ self.W[1]


@torch.no_grad()
@pytest.mark.parametrize("method", [LoRA(rank=2), DiffPruning(), FullFineTuning()], ids=str)
def test_members_of_a_parameter_list_are_swapped_by_their_reader(method: Method) -> None:
    backbone, x = Listed().eval(), torch.randn(2, 4)
    before, plain = trace(backbone), backbone(x)
    delta = attach(backbone, method, ["W.0", "W.1"])
    shake(delta, spread=0.3)
    assert moved(backbone(x), plain) > 1e-3
    detach(delta)
    assert trace(backbone).differences(before) == []


@pytest.mark.parametrize("name", ["train", "keys", "training", "a b", "a.b", ""])
def test_names_that_cannot_be(name: str) -> None:
    backbone, _ = mlp()
    before = trace(backbone)
    with pytest.raises(InvalidValue, match=f"`{name}` cannot name a delta"):
        attach(backbone, LoRA(rank=2), "*", name=name)
    assert trace(backbone).differences(before) == []
    pair = [attach(backbone, LoRA(rank=2), "*") for _ in range(2)]
    with pytest.raises(InvalidValue, match=f"`{name}` cannot name a delta"):
        compose(backbone, pair, name=name)
    assert all(delta.enabled for delta in pair)


def test_a_composition_is_no_delta() -> None:
    backbone, _ = mlp()
    for name in ("a", "b", "c"):
        attach(backbone, LoRA(rank=2), "*", name=name)
    compose(backbone, ["a", "b"])
    with pytest.raises(UnknownName, match=r"`a-b` is a composition, not a delta\. Name its members instead: `a`, `b`"):
        compose(backbone, ["a-b", "c"])
    with pytest.raises(UnknownName, match="Did you mean `a-b`"):
        switch(backbone, "a-b-")


def test_a_failed_composition_changes_nothing() -> None:
    backbone, _ = mlp()
    for name, method in (("a", LoRA(rank=2)), ("b", BitFit()), ("c", IA3())):
        attach(backbone, method, "*", name=name)
    first = deltas(backbone)[0]
    first.disable()
    ledger = first.ledger
    terms, wanting = list(ledger.terms), [parameter.requires_grad for parameter in backbone.parameters()]
    with pytest.raises(Unsupported, match="gated"):
        compose(backbone, ["a", "b"], "gated")
    assert ledger.terms == terms
    assert not first.enabled
    assert [parameter.requires_grad for parameter in backbone.parameters()] == wanting
    assert not ledger.compositions


def test_a_failed_switch_changes_nothing() -> None:
    backbone, _ = mlp()
    chain = [attach(backbone, LoRA(rank=2), "*", name=name) for name in ("a", "b", "c")]
    merge(chain[1])
    with pytest.raises(Unsupported, match="merged"):
        switch(backbone, "c")
    assert [delta.enabled for delta in chain] == [True, True, True]


def test_what_changes_inside_disabled_holds_afterwards() -> None:
    backbone, inputs = mlp()
    plain = output(backbone, inputs)
    gone, resting, waking = (attach(backbone, BitFit(), "*", name=name) for name in ("gone", "resting", "waking"))
    waking.disable()
    shake(resting, spread=1.0)
    with disabled(backbone):
        with disabled(backbone):
            detach(gone)
            resting.disable()
            waking.enable()
            fresh = attach(backbone, LoRA(rank=2), "*", name="fresh")
            shake(fresh)
        assert torch.equal(output(backbone, inputs), plain)
    assert [term.members for term in fresh.ledger.terms] == [("waking",), ("fresh",)]
    assert not torch.equal(output(backbone, inputs), plain)
    assert all(parameter.requires_grad for delta in (waking, fresh) for parameter in delta.parameters())


def test_a_module_that_came_later_is_found() -> None:
    backbone, _ = mlp()
    attach(backbone, LoRA(rank=2), "*", name="first")
    backbone.add_module("late", nn.Linear(3, 3))
    delta = attach(backbone, LoRA(rank=2), "late", name="second")
    assert [entry.key for entry in delta.entries] == ["late"]


@pytest.mark.parametrize("path", ["", "0"])
def test_an_attribute_of_our_name_is_refused_without_a_trace(path: str) -> None:
    backbone, _ = mlp()
    backbone.get_submodule(path).deltatune = 3  # type: ignore[assignment]
    before = trace(backbone)
    with pytest.raises(InvalidValue, match="has an attribute called `deltatune` that is not ours"):
        attach(backbone, LoRA(rank=2), "*")
    assert trace(backbone).differences(before) == []


def test_data_parallel_is_refused() -> None:
    backbone, inputs = mlp()
    with pytest.raises(Unsupported, match=r"wrapped in DataParallel already.*Attach first, then wrap"):
        attach(nn.Sequential(nn.DataParallel(backbone)), LoRA(rank=2), "*")
    attach(backbone, LoRA(rank=2), "*")
    replica = backbone.get_submodule("0")._replicate_for_data_parallel()  # type: ignore[operator]
    with pytest.raises(Unsupported, match="Use DistributedDataParallel"):
        replica(*inputs.values())


class Skipping(nn.Module):
    """Three layers, of which a training forward may skip one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(3)])
        self.skipped = 1

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            x = x if k == self.skipped else layer(x)
        return x


def test_a_layer_skipped_twice_in_training_is_not_idle() -> None:
    backbone, x = Skipping().train(), torch.randn(2, 3, 8)
    attach(backbone, LoRA(rank=2), "feed_forward.up")
    for _ in range(3):
        backbone(x)
    backbone.eval()
    with pytest.raises(Idle, match=r"layers\.1\.linear1"):
        backbone(x)


def test_a_state_that_does_not_fit_leaves_the_form_as_it_was() -> None:
    backbone, inputs = mlp()
    delta = attach(backbone, DiffPruning(), "*")
    shake(delta)
    before, expected = {name: tensor.shape for name, tensor in delta.state_dict().items()}, output(backbone, inputs)
    with pytest.raises(CheckpointError, match="missing"):
        delta.load_state_dict({"0.weight.values": torch.zeros(3), "0.weight.index": torch.arange(3)})
    assert {name: tensor.shape for name, tensor in delta.state_dict().items()} == before
    assert torch.equal(output(backbone, inputs), expected)
    assert all(parameter.requires_grad for parameter in delta.parameters())


def test_a_new_form_trains_no_more_than_the_old_one() -> None:
    backbone, _ = mlp()
    sparse = attach(backbone, DiffPruning(density=0.1), "*", name="sparse")
    sparse.method.export(sparse.patches, None)  # type: ignore[attr-defined]
    resting = attach(backbone, DiffPruning(density=0.1), "*", name="resting")
    resting.disable()
    resting.load_state_dict(sparse.state_dict())
    assert not any(parameter.requires_grad for parameter in resting.parameters())


@dataclass(frozen=True)
class ScaledInputs(Method):
    """(IA)^3 at the input, anywhere."""

    family: ClassVar[Family] = "addition"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("*",)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        return [ScaledInput(site.in_features)]


def test_the_input_of_a_fused_projection_belongs_to_all_its_roles() -> None:
    backbone, _ = gpt2()
    before = trace(backbone)
    with pytest.raises(Unsupported, match="the roles of a fused projection share one input"):
        attach(backbone, ScaledInputs(), "attention.query")
    assert trace(backbone).differences(before) == []


ACTING = {
    OutputAct: LoRA(rank=2),
    SelectionAct: BitFit(),
    WeightAct: DiffPruning(),
    PrefixAct: PrefixTuning(num_virtual_tokens=2),
    PromptAct: PromptTuning(num_virtual_tokens=2),
}


@pytest.mark.parametrize("step", ["__init__", "add", "join", "append"])
@pytest.mark.parametrize("act", ACTING, ids=lambda act: act.__name__)
def test_an_attach_that_fails_half_way_leaves_no_trace(act: type[Act], step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, inputs = gpt2()
    before, plain = trace(backbone), output(backbone, inputs)
    original, calls = getattr(act, step), []

    def fail_once(*arguments: Any, **options: Any) -> Any:
        calls.append(step)
        if len(calls) == (1 if act is PromptAct else 2):  # a model has one stack
            raise MemoryError(step)
        return original(*arguments, **options)

    monkeypatch.setattr(act, step, fail_once)
    with pytest.raises(MemoryError, match=step):
        attach(backbone, ACTING[act])
    monkeypatch.undo()
    assert trace(backbone).differences(before) == []
    assert torch.equal(output(backbone, inputs), plain)
    attach(backbone, ACTING[act])


class Checkpointed(nn.Module):
    """Two linear maps, the first one checkpointed."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_draws_of_an_earlier_forward_are_not_mixed_up(reentrant: bool) -> None:
    backbone, x = Checkpointed(reentrant).train(), torch.randn(3, 4, requires_grad=True)
    attach(backbone, DiffPruning(), "first")
    with pytest.raises(Unsupported, match=r"repeat one of 2 forwards.*Join the batches into one forward"):
        (backbone(x) + backbone(x)).sum().backward()
    for _ in range(2):
        backbone(x).sum().backward()
    for _ in range(2):
        backbone.second(backbone.first(x)).sum().backward()  # nothing to repeat
    with torch.no_grad():
        backbone(x)
    backbone(x).sum().backward()
    switch(backbone, None)
    (backbone(x) + backbone(x)).sum().backward()


def test_resting_deltas_draw_nothing() -> None:
    backbone, inputs = tied_mlp()
    backbone.train()
    attach(backbone, DiffPruning(), "*")
    with disabled(backbone):
        torch.manual_seed(0)
        output(backbone, inputs)
        found = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(1))


def test_what_was_quantised_meanwhile_is_detached_from() -> None:
    backbone, _ = mlp()
    delta = attach(backbone, LoRA(rank=2), "0")
    backbone.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    detach(delta)
    assert not backbone.get_parameter("codes").requires_grad
    assert backbone.get_parameter("0.weight").requires_grad
