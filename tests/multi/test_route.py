"""Routed rows are what each of them is alone: outputs, gradients, and nothing from one row to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import CheckpointError, InvalidValue, UnknownName, Unsupported
from deltatune.methods import IA3, Adapter, BitFit, FullFineTuning, LoRA, NormTuning, PrefixTuning, PromptTuning
from deltatune.multi.heads import split
from deltatune.multi.routing import Entry
from tests.conformance.cells import fresh, shake
from tests.models import output
from tests.multi.rows import all_on, batch, far, forget, naive, routed, row, use

RECIPES: dict[str, tuple[Any, ...]] = {
    "bert": (LoRA(rank=2), LoRA(rank=5), IA3(), BitFit(), Adapter(bottleneck_dim=3), PrefixTuning(3, reparameterization=False)),
    "llama": (LoRA(rank=2), LoRA(rank=5), IA3(), NormTuning(), Adapter(bottleneck_dim=3), PromptTuning(2)),
}
NAMES = ("low", "high", "scaled", "chosen", "bottle", "virtual")
MIXED: list[Entry] = ["low", None, "scaled", "chosen", ["low", "scaled"], "high", "bottle", None, "virtual", ["virtual", "high"], "low"]


def attached(model: str) -> nn.Module:
    backbone, _ = fresh(model)
    for k, (name, method) in enumerate(zip(NAMES, RECIPES[model], strict=True)):
        shake(dt.attach(backbone, method, name=name), seed=k)
    dt.switch(backbone, None)
    return backbone


@pytest.fixture(scope="module", params=["bert", "llama"])
def backbone(request: pytest.FixtureRequest) -> nn.Module:
    return attached(request.param)


@torch.no_grad()
def test_rows_are_what_they_are_alone(backbone: nn.Module) -> None:
    inputs = batch(len(MIXED))
    expected, plain = naive(backbone, MIXED, inputs), output(backbone, inputs)
    found = routed(backbone, MIXED, inputs)
    assert far(found, expected) < 1e-5
    for i, entry in enumerate(MIXED):
        assert (far(found[i : i + 1], plain[i : i + 1]) < 1e-5) == (entry is None), entry
    assert torch.equal(output(backbone, inputs), plain), "the route is over"


@torch.no_grad()
def test_a_row_does_not_know_the_others(backbone: nn.Module) -> None:
    inputs = batch(4, padding=False)
    found = routed(backbone, ["low", "bottle", None, "scaled"], inputs)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][1:] = other["input_ids"][1:].flip(1)
    again = routed(backbone, ["low", "virtual", "high", "chosen"], other)
    assert far(again[:1], found[:1]) < 1e-5


@torch.no_grad()
def test_rows_in_another_order(backbone: nn.Module) -> None:
    inputs = batch(len(MIXED))
    found = routed(backbone, MIXED, inputs)
    order = torch.randperm(len(MIXED), generator=torch.Generator().manual_seed(1))
    again = routed(backbone, [MIXED[i] for i in order], {name: value[order] for name, value in inputs.items()})
    assert far(again, found[order].unbind()) < 1e-5


def gradients(backbone: nn.Module) -> dict[tuple[str, str], Tensor]:
    found = {}
    for delta in dt.deltas(backbone):
        for name, parameter in delta.trained_parameters().items():
            if parameter.grad is not None and "classifier" not in name:  # which several deltas select, see below
                found[delta.name, name] = parameter.grad.clone()
    return found


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_gradients_are_those_of_the_rows_alone(model: str) -> None:
    backbone = attached(model)
    names = [name for name in NAMES if name != "chosen"]  # what is selected in place has its own test
    for delta in dt.deltas(backbone):
        if delta.name == "chosen":
            dt.detach(delta)
    entries: list[Entry] = [*names, None, ["low", "scaled"], "high"]
    inputs = batch(len(entries))
    weights = torch.linspace(0.5, 1.5, len(entries))
    expected: dict[tuple[str, str], Tensor] = {}
    for i, entry in enumerate(entries):
        use(backbone, entry)
        if entry is None:
            continue
        forget(backbone)
        (weights[i] * output(backbone, row(inputs, i)).square().sum()).backward()
        for key, gradient in gradients(backbone).items():
            expected[key] = expected.get(key, 0) + gradient
    all_on(backbone)
    forget(backbone)
    with dt.route(backbone, entries):
        found = output(backbone, inputs)
        (weights @ found.square().flatten(1).sum(1)).backward()
    own = gradients(backbone)
    assert own.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        assert float((own[key] - value).abs().max()) < 1e-5 * scale, key


def test_a_selection_gets_the_gradient_of_its_rows_back() -> None:
    backbone, _ = fresh("bert")
    biases = dt.attach(backbone, BitFit(), name="biases")
    shake(biases)
    dt.attach(backbone, LoRA(rank=2), name="low", head=False)
    inputs = batch(3)
    expected = {}
    dt.switch(backbone, "biases")
    output(backbone, row(inputs, 1)).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in biases.trained_parameters().items() if parameter.grad is not None}
    forget(backbone)
    with dt.route(backbone, ["low", "biases", None]):
        output(backbone, inputs)[1].square().sum().backward()
    found = {name: parameter.grad for name, parameter in biases.trained_parameters().items() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) < 1e-5 * scale, name


@torch.no_grad()
def test_heads_differ_per_row() -> None:
    backbone, _ = fresh("roberta")
    for k, name in enumerate(("one", "two")):
        shake(dt.attach(backbone, LoRA(rank=2), name=name), seed=k, spread=0.3)
    entries: list[Entry] = ["one", "two", None, "one"]
    inputs = batch(4, padding=False)
    inputs["input_ids"] = inputs["input_ids"].clamp_min(5)
    assert far(routed(backbone, entries, inputs), naive(backbone, entries, inputs)) < 1e-5


@torch.no_grad()
def test_compositions_route() -> None:
    backbone = attached("bert")
    dt.compose(backbone, ["low", "bottle"], how="weighted", weights=[0.5, 2.0], name="weighed").disable()
    dt.compose(backbone, ["scaled", "high"], name="chain").disable()
    entries: list[Entry] = ["weighed", "chain", None, "chosen"]
    inputs = batch(4)
    assert far(routed(backbone, entries, inputs), naive(backbone, entries, inputs)) < 1e-5


@torch.no_grad()
def test_what_was_trained_meanwhile_is_seen() -> None:
    backbone = attached("llama")
    inputs = batch(2)
    before = routed(backbone, ["low", "high"], inputs)
    shake(next(delta for delta in dt.deltas(backbone) if delta.name == "low"), spread=0.2, seed=11)
    after = routed(backbone, ["low", "high"], inputs)
    assert far(after[1:], before[1:].unbind()) < 1e-6
    assert far(after[:1], before[:1].unbind()) > 1e-3
    assert far(after, naive(backbone, ["low", "high"], inputs)) < 1e-5


@torch.no_grad()
def test_adding_removing_and_growing() -> None:
    backbone, _ = fresh("llama")
    names = [f"d{k}" for k in range(11)]  # the table of four lanes grows twice
    for k, name in enumerate(names):
        shake(dt.attach(backbone, LoRA(rank=2), name=name), seed=k)
    dt.switch(backbone, None)
    inputs = batch(11)
    assert far(routed(backbone, names, inputs), naive(backbone, names, inputs)) < 1e-5
    bank = dt.bank(backbone)
    for name in names[::2]:
        bank.remove(name)
    assert "d0" not in bank and len(bank) == 5
    dt.detach(next(delta for delta in dt.deltas(backbone) if delta.name == "d1"))
    rest = [name for name in names if name != "d1"] + [None]
    assert far(routed(backbone, rest, inputs), naive(backbone, rest, inputs)) < 1e-5


@torch.no_grad()
def test_detaching_leaves_no_trace() -> None:
    backbone, inputs = fresh("bert")
    modules, plain = dict(backbone.named_modules()).keys(), output(backbone, inputs)
    for name in ("a", "b"):
        shake(dt.attach(backbone, LoRA(rank=2), name=name))
    routed(backbone, ["a", "b"], inputs)
    for delta in dt.deltas(backbone):
        dt.detach(delta)
    assert dict(backbone.named_modules()).keys() == modules
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in backbone.modules())
    assert torch.equal(output(backbone, inputs), plain)


@torch.no_grad()
def test_refusals(backbone: nn.Module) -> None:
    with pytest.raises(UnknownName, match="nobody"), dt.route(backbone, ["nobody"]):
        pass
    with pytest.raises(InvalidValue, match="one entry per row"), dt.route(backbone, []):
        pass
    with pytest.raises(InvalidValue, match="names a delta twice"), dt.route(backbone, [["low", "low"]]):
        pass
    with pytest.raises(InvalidValue, match=r"route of 3 rows .* a batch of 4"), dt.route(backbone, ["low", None, "high"]):
        output(backbone, batch(4))
    assert far(routed(backbone, ["low"], batch(1)), naive(backbone, ["low"], batch(1))) < 1e-5, "nothing is left behind an error"


def test_full_differences_are_refused_with_a_way_out() -> None:
    backbone, _ = fresh("mlp")
    dt.attach(backbone, FullFineTuning(), name="whole")
    reason = r"a batch reads a weight once for all rows.*deltatune convert FOLDER --to lora"
    with pytest.raises(Unsupported, match=reason), dt.route(backbone, ["whole"]):
        pass


@torch.no_grad()
def test_heads_of_other_sizes_come_back_with_their_labels() -> None:
    backbone, _ = fresh("bert")
    for k, name in enumerate(("three", "five")):
        shake(dt.attach(backbone, LoRA(rank=2), name=name, head=False), seed=k)
    inputs = batch(4)
    generator = torch.Generator().manual_seed(2)
    head = {"weight": torch.randn(5, 32, generator=generator), "bias": torch.randn(5, generator=generator)}
    dt.bank(backbone).head("five", head)
    dt.switch(backbone, None)
    rows = split(routed(backbone, ["five", "three", None, "five"], inputs))
    assert [len(one) for one in rows] == [5, 3, 3, 5]
    own = naive(backbone, ["five", "three", None, "five"], inputs)
    assert far(rows[1][None], own[1:2]) < 1e-5 and far(rows[2][None], own[2:3]) < 1e-5
    dt.switch(backbone, "five")
    hidden = backbone.bert(**row(inputs, 3)).pooler_output  # type: ignore[operator, union-attr]
    assert far(rows[3][None], [torch.nn.functional.linear(hidden, head["weight"], head["bias"])[0]]) < 1e-5
    with pytest.raises(InvalidValue, match="Give the tensors `bias`, `weight`"):
        dt.bank(backbone).head("three", {"dense": head["weight"]})
    for delta in dt.deltas(backbone):
        dt.detach(delta)
    assert all("deltatune" not in module._modules for module in backbone.modules())


@torch.no_grad()
@pytest.mark.parametrize("format", ["native", "peft"])
def test_heads_of_other_sizes_come_from_files(format: str, tmp_path: Path) -> None:
    """Each delta trained on a backbone with as many labels as its task, all routed on one."""
    generator, inputs, wanted = torch.Generator().manual_seed(3), batch(3), []
    backbone, _ = fresh("bert")
    for row_number, labels in enumerate((5, 2)):
        own, _ = fresh("bert")
        own.classifier = nn.Linear(32, labels)
        own.config.num_labels = labels
        delta = dt.attach(own, LoRA(rank=2), name=f"d{labels}")
        for parameter in delta.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        dt.save(delta, tmp_path / f"d{labels}", format=format)
        wanted.append(own(**row(inputs, row_number)).logits[0])
        dt.load(backbone, tmp_path / f"d{labels}", name=f"d{labels}", head=False, enable=False)
        dt.bank(backbone).head(f"d{labels}", tmp_path / f"d{labels}")
    rows = split(routed(backbone, ["d5", "d2", None], inputs))
    assert all(far(found[None], [own]) < 1e-5 for found, own in zip(rows, wanted, strict=False))
    assert [len(one) for one in rows] == [5, 2, 3]
    dt.bank(backbone).remove("d5")
    dt.bank(backbone).head("d5", tmp_path / "d5")
    assert [len(one) for one in split(routed(backbone, ["d2", "d5", "d2"], inputs))] == [2, 5, 2]


@torch.no_grad()
def test_what_others_keep_of_an_output_is_not_overwritten() -> None:
    backbone, _ = fresh("mlp")
    kept: list[Tensor] = []
    first = backbone[0]  # type: ignore[index]
    handle = first.register_forward_hook(lambda module, args, y: kept.append(y))
    shake(dt.attach(backbone, LoRA(rank=2), "0", name="a"))
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with dt.route(backbone, ["a", None]):
        backbone(x)
    assert torch.equal(kept[0], torch.nn.functional.linear(x, first.weight, first.bias))
    handle.remove()


def test_copies_made_without_gradients_serve_with_them() -> None:
    backbone, _ = fresh("mlp")
    for k in range(20):
        delta = dt.attach(backbone, LoRA(rank=4), "0", name=f"d{k}")
        with torch.no_grad():
            shake(delta, seed=k)
        delta.freeze()
    x = torch.randn(20, 1, 32, generator=torch.Generator().manual_seed(0))
    names = [f"d{k}" for k in range(20)]
    found = []
    for before in (0, 3):
        own = x.clone().requires_grad_()
        with dt.route(backbone, names):
            with torch.inference_mode():
                for _ in range(before):
                    backbone(x)
            backbone(own).square().sum().backward()
        found.append(own.grad)
    torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
def test_what_is_no_head_is_refused(tmp_path: Path) -> None:
    backbone, _ = fresh("bert")
    delta = dt.attach(backbone, LoRA(rank=2), name="a", head=False)
    dt.save(delta, tmp_path / "a")
    with pytest.raises(CheckpointError, match="holds no task head"):
        dt.bank(backbone).head("a", tmp_path / "a")
    with pytest.raises(InvalidValue, match=r"weight \(5, 31\).*Give a weight \(labels, 32\)"):
        dt.bank(backbone).head("a", {"weight": torch.zeros(5, 31), "bias": torch.zeros(5)})
    with pytest.raises(InvalidValue, match=r"bias \(4,\)"):
        dt.bank(backbone).head("a", {"weight": torch.zeros(5, 32), "bias": torch.zeros(4)})
    dt.detach(delta)
    assert all("deltatune" not in module._modules for module in backbone.modules())
