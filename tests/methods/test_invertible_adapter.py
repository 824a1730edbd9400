"""Invertible adapters: the coupling, its inverse, and stacks of a language and a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.checkpoint.format import load, save
from deltatune.errors import InvalidValue, NoSite, Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import compose
from deltatune.methods import Adapter, InvertibleAdapter, PfeifferAdapter
from deltatune.methods.addition.invertible_adapter import Coupling
from tests.conformance.cells import fresh, shake
from tests.conformance.trace import trace
from tests.methods.test_budgets import bert_base
from tests.models import VOCABULARY, output


def half(h: Tensor, phi: dict[str, Tensor]) -> Tensor:
    """F or G by hand."""
    return (h @ phi["D.W"].T + phi["D.b"]).clamp(min=0) @ phi["U.W"].T + phi["U.b"]


@pytest.mark.parametrize("width", [6, 7])
def test_the_formula_in_double_precision(width: int) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Embedding(11, width)).double()
    ids = torch.arange(10).view(2, 5)
    delta = attach(backbone, InvertibleAdapter(), "0")
    assert torch.equal(backbone(ids), backbone[0].weight[ids]), "fresh: the identity"
    backbone.double()
    shake(delta, spread=0.8)
    state = delta.state_dict()
    F, G = ({name.removeprefix(f"shared.{width}.{letter}."): t for name, t in state.items() if f".{letter}." in name} for letter in "FG")
    cut = width - width // 2
    e_1, e_2 = backbone[0].weight[ids][..., :cut], backbone[0].weight[ids][..., cut:]
    o_1 = e_1 + half(e_2, F)
    expected = torch.cat([o_1, e_2 + half(o_1, G)], dim=-1)
    torch.testing.assert_close(backbone(ids), expected, atol=1e-10, rtol=1e-10)
    assert delta.shared is not None
    coupling = delta.shared.get_submodule(str(width))
    assert isinstance(coupling, Coupling)
    torch.testing.assert_close(coupling.inverse(expected), backbone[0].weight[ids], atol=1e-10, rtol=1e-10)


def test_the_lm_head_sees_the_inverse() -> None:
    backbone, inputs = fresh("llama")
    delta = attach(backbone, InvertibleAdapter(), head=False)
    shake(delta, spread=0.5)
    assert delta.shared is not None
    coupling: Any = delta.shared.get_submodule("32")
    seen: list[Tensor] = []
    handle = backbone.get_submodule("model.norm").register_forward_hook(lambda _, args, y: seen.append(y))
    logits = output(backbone, inputs)
    handle.remove()
    torch.testing.assert_close(logits, coupling.inverse(seen[0]) @ backbone.get_submodule("lm_head").weight.T)  # type: ignore[operator]
    assert logits.shape[-1] == VOCABULARY


def test_one_coupling_for_both_sides_of_t5_and_its_head() -> None:
    backbone, inputs = fresh("t5")
    delta = attach(backbone, InvertibleAdapter(), head=False)
    assert [entry.site.key for entry in delta.entries] == ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
    assert {name.split(".")[1] for name, _ in delta.named_parameters()} == {"32"}
    output(backbone, inputs).square().sum().backward()
    assert delta.budget().delta == 2 * (2 * 16 * 8 + 8 + 16)


def test_counts_of_mad_x() -> None:
    """F and G: 384 -> 192 -> 384."""
    assert attach(bert_base(), InvertibleAdapter(), head=False).budget().delta == 2 * (2 * 384 * 192 + 192 + 384)


def test_a_task_is_stacked_on_a_language_and_the_language_is_exchanged(tmp_path: Path) -> None:
    """MAD-X: [invertible and Pfeiffer adapters of a language] below the adapters of a task; the task is kept, the language changes."""
    backbone, inputs = fresh("bert")
    before = trace(backbone)

    def language(name: str, seed: int) -> list[Any]:
        parts = [
            attach(backbone, InvertibleAdapter(), name=f"{name}-inv", head=False),
            attach(backbone, PfeifferAdapter(reduction=4), name=f"{name}-layers", head=False),
        ]
        for k, part in enumerate(parts):
            shake(part, spread=0.3, seed=seed + k)
            part.freeze()
            part.disable()
        return parts

    english, quechua = language("en", 1), language("qu", 5)
    task = attach(backbone, Adapter(bottleneck_dim=4), name="ner", head=False)
    shake(task, spread=0.3, seed=9)
    task.disable()
    english_stack = compose(backbone, [*english, task], name="en-ner")
    down = backbone.get_submodule("bert.encoder.layer.0.output.dense")
    seen: list[tuple[Tensor, Tensor]] = []
    handle = down.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    in_english = output(backbone, inputs)
    handle.remove()
    (h, y), (low, high) = seen[0], (entry_at(english[1], down), entry_at(task, down))
    plain = nn.functional.linear(h, down.weight, down.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(y, high(h, low(h, plain)), msg="the language first, the task above it")
    in_english.square().sum().backward()
    assert all(parameter.grad is None for part in english for parameter in part.parameters())
    assert all(parameter.grad is not None for parameter in task.parameters())
    save(english_stack, tmp_path / "en-ner", unfinished=True)
    english_stack.dissolve()
    for part in (*english, task):
        part.disable()
    quechua_stack = compose(backbone, [*quechua, task], name="qu-ner")
    assert (output(backbone, inputs) - in_english).abs().max() > 1e-3
    other, _ = fresh("bert")
    load(other, tmp_path / "en-ner")
    torch.testing.assert_close(output(other, inputs), in_english)
    quechua_stack.dissolve()
    for part in (*english, *quechua, task):
        detach(part)
    assert trace(backbone).differences(before) == []


def entry_at(delta: Any, module: nn.Module) -> Any:
    return next(entry.patch for entry in delta.entries if entry.site.module is module)


def test_refusals() -> None:
    with pytest.raises(Unsupported, match="the width is 1, which has no halves"):
        attach(nn.Sequential(nn.Linear(3, 1)), InvertibleAdapter(), "0", head=False)
    backbone, _ = fresh("torch_encoder")
    with pytest.raises(NoSite, match="matches `embedding`"):
        attach(backbone, InvertibleAdapter())
    with pytest.raises(InvalidValue, match=r"InvertibleAdapter\(reduction=0\) was asked for; `reduction`"):
        InvertibleAdapter(reduction=0)
