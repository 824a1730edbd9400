"""Every example runs, learns what it says it learns, and leaves the backbone as it was."""

from __future__ import annotations

import ast
import importlib
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.backbones import load_backbone
from deltatune.methods import IA3, Adapter, DiffPruning, LoRA, TrainableTokens
from deltatune.methods.kinds import Method
from deltatune.tasks import load_task
from tests.project import ROOT

EXAMPLES = {
    "accelerate_loop",
    "any_module",
    "lightning_module",
    "many_jobs",
    "new_tokens",
    "plain_loop",
    "several_deltas",
    "trainer",
    "vit_digits",
}
FILES = {path.stem: path for path in (ROOT / "examples").glob("*.py") if path.stem != "demo"}  # `make demo` is a verb of its own
LINES_OF_CODE = 60

GUESS = 0.3
"""Test accuracy on BBC News that no backbone without training reaches: the commonest of five topics has 0.24."""


def example(name: str) -> Any:
    return importlib.import_module(f"examples.{name}")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_plain(backbone: nn.Module) -> None:
    """Nothing of deltatune is left: no delta, no module, no hook, nothing frozen."""
    assert dt.deltas(backbone) == []
    assert [path for path, _ in backbone.named_modules() if "deltatune" in path.split(".")] == []
    assert [path for path, module in backbone.named_modules() if module._forward_hooks or module._forward_pre_hooks] == []
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def assert_learnt_news(delta: dt.Delta, before: float, after: float, method: type[Method]) -> None:
    """A MiniLM learnt topics by this delta, and is itself again without it."""
    assert isinstance(delta.method, method)
    assert before < GUESS
    assert after > 0.6
    assert 0 < delta.budget().ratio < 0.03
    backbone = delta.backbone
    dt.detach(delta)
    torch.manual_seed(0)  # the example's own: a fresh head draws numbers
    fresh = load_backbone("minilm", auto_class="AutoModelForSequenceClassification", label_names=load_task("bbc-news").task.labels)
    assert same(dict(backbone.state_dict()), dict(fresh.state_dict()))
    assert_plain(backbone)


def test_every_example_is_tested() -> None:
    assert FILES.keys() == EXAMPLES


@pytest.mark.parametrize("name", sorted(FILES))
def test_examples_are_short_and_listed(name: str) -> None:
    source = FILES[name].read_text()
    tree = ast.parse(source)
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)]
    strings = [node.body[0] for node in documented if ast.get_docstring(node)]
    prose = {line for string in strings for line in range(string.lineno, (string.end_lineno or 0) + 1)}
    code = [line for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in prose]
    assert len(code) <= LINES_OF_CODE
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    assert f"[{name}.py]({name}.py)" in (ROOT / "examples" / "README.md").read_text()


def test_many_jobs() -> None:
    scores = example("many_jobs").main()
    assert list(scores) == [f"{name} at {lr}" for name in ("LoRA", "IA3") for lr in ("0.001", "0.005", "0.02")]
    assert max(scores.values()) > 0.6
    assert len(set(scores.values())) > 2


def test_plain_loop() -> None:
    assert_learnt_news(*example("plain_loop").main(), LoRA)


def test_plain_loop_leads_any_method_through_its_life() -> None:
    method = DiffPruning(density=0.01, penalty_weight=1e-6)
    delta, before, after = example("plain_loop").main(method, where="attention.{query,value}")
    assert after > before + 0.2
    patches = [entry.patch for entry in delta.entries if not entry.head]
    assert method.is_exported(patches)
    kept = sum(patch.values.numel() for patch in patches)
    whole = sum(entry.parameter.numel() for entry in delta.entries if not entry.head)
    assert kept == round(0.01 * whole)


def test_trainer() -> None:
    delta, before, after = example("trainer").main()
    patches = [entry.patch for entry in delta.entries if not entry.head]
    assert delta.method.is_exported(patches)
    assert_learnt_news(delta, before, after, DiffPruning)


def test_accelerate_loop() -> None:
    assert_learnt_news(*example("accelerate_loop").main(), Adapter)


# Lightning's own: how it walks containers, and that a loader on two cores has no workers.
@pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated", "ignore:The 'train_dataloader' does not have many workers"
)
def test_lightning_module() -> None:
    assert_learnt_news(*example("lightning_module").main(), IA3)


def test_vit_digits() -> None:
    vit, scores, _ = example("vit_digits").main()
    frozen, adapted = scores.values()
    assert frozen < adapted - 0.08
    assert adapted > 0.7
    assert_plain(vit)


def test_new_tokens() -> None:
    emoji = example("new_tokens")
    delta, before, after, opened = emoji.main()
    assert before < 0.6
    assert after > 0.9
    assert opened == pytest.approx(after, abs=1e-5)
    assert delta.method == TrainableTokens(tuple(emoji.tokenizer.convert_tokens_to_ids(list(emoji.MEANINGS))))
    assert delta.budget().delta == 6 * 384
    backbone = delta.backbone
    dt.detach(delta)
    fresh = load_backbone("minilm")
    before_growth = {name: tensor[: len(fresh.state_dict()[name])] for name, tensor in backbone.state_dict().items()}
    assert same(before_growth, dict(fresh.state_dict()))
    assert_plain(backbone)


def test_several_deltas() -> None:
    network, table = example("several_deltas").main()
    assert table["disabled"] == table["detached"] == table["nothing"]
    assert table["left, merged"] == pytest.approx(table["left"], abs=0.01)
    assert table["left"]["left"] > table["nothing"]["left"] + 0.2
    assert table["up"]["up"] > table["nothing"]["up"] + 0.2
    assert all(table["half of each"][view] > table["nothing"][view] + 0.1 for view in ("left", "up"))
    assert_plain(network)


def test_any_module() -> None:
    delta, before, after = example("any_module").main()
    assert after > before + 0.4
    assert {entry.site.role for entry in delta.entries} == {
        "attention.query",
        "attention.key",
        "attention.value",
        "feed_forward.up",
        "feed_forward.down",
    }
    reader = delta.backbone
    state = dt.backbone_state(reader)
    dt.detach(delta)
    assert same(dict(reader.state_dict()), state)
    assert_plain(reader)
