"""BitFit, full fine-tuning, the linear probe and trainable tokens: which parameters train, and what they change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import TrainableTokensConfig
from torch import nn

from deltatune.errors import InvalidValue, NoSite
from deltatune.injection.attach import attach
from deltatune.injection.merge import merge
from deltatune.methods import (
    BitFit,
    FullFineTuning,
    LastLayer,
    LastLayers,
    LinearProbe,
    Method,
    PartialBitFit,
    SelectiveModules,
    TrainableTokens,
)
from deltatune.methods.kinds import SelectionPatch
from deltatune.methods.specification.bitfit import AddedBias, BiasRows
from tests.conformance.cells import fresh, shake
from tests.methods.oracle import compare_with_peft
from tests.models import HIDDEN, LAYERS, MODELS, output

WITH_EVERY_BIAS = ("bert", "roberta", "distilbert", "mpnet", "opt", "bart", "vit", "torch_encoder", "conv_net", "mlp", "tied_mlp")
WITHOUT_BIAS = ("llama", "mistral", "t5", "phi3", "qwen3", "gemma3", "mixtral")


@pytest.mark.parametrize("model", WITH_EVERY_BIAS)
def test_bitfit_trains_every_bias_in_place(model: str) -> None:
    backbone, _ = fresh(model)
    biases = {name for name, _ in backbone.named_parameters() if name.endswith("bias")}
    delta = attach(backbone, BitFit(), head=False)
    assert {name for name, parameter in backbone.named_parameters() if parameter.requires_grad} == biases
    assert all(type(patch) is SelectionPatch for patch in delta.patches)


@pytest.mark.parametrize("model", WITHOUT_BIAS)
def test_bitfit_adds_zero_biases_where_there_are_none(model: str) -> None:
    backbone, inputs = fresh(model)
    bare = [path for path, module in backbone.named_modules() if isinstance(module, nn.Linear) or "Norm" in type(module).__name__]
    with torch.no_grad():
        plain = output(backbone, inputs)
    delta = attach(backbone, BitFit())
    added = [entry.site.path for entry in delta.entries if type(entry.patch) is AddedBias]
    assert sorted(added) == sorted(path for path in bare if "lm_head" not in path)
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)
    with pytest.raises(NoSite, match=r"nothing to do"):
        attach(fresh(model)[0], BitFit(add_missing=False))


def test_bitfit_by_the_formula() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4, bias=False)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    own = [backbone[0].bias.detach().clone(), backbone[1].bias.detach().clone()]
    delta = attach(backbone, BitFit(), "*")
    backbone.double()
    assert len(delta.entries) == 3
    shake(delta, spread=0.6)
    changes = dict(delta.named_parameters())
    b_0, b_1, b_2 = changes["0.bias"], changes["1.bias"], changes["2.b"]
    assert not torch.equal(b_0, own[0])
    h = x @ backbone[0].weight.T + b_0
    h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, unbiased=False, keepdim=True) + 1e-5) * backbone[1].weight + b_1
    torch.testing.assert_close(backbone(x), h @ backbone[2].weight.T + b_2, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("model", ["gpt2", "gpt_neox", "bloom", "torch_encoder"])
def test_a_role_s_share_of_a_fused_bias_trains_and_merges(model: str) -> None:
    backbone, inputs = fresh(model)
    with torch.no_grad():
        plain = output(backbone, inputs)
    delta = attach(backbone, PartialBitFit(), "attention.value", head=False)
    assert all(type(patch) is BiasRows for patch in delta.patches)
    assert delta.budget().delta == LAYERS * HIDDEN
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)
        shake(delta)
        expected = output(backbone, inputs)
        merge(delta)
        torch.testing.assert_close(output(backbone, inputs), expected)
    site = delta.entries[0].site
    changes = [
        tensor - fresh(model)[0].get_parameter(name) for name, tensor in backbone.named_parameters() if tensor.shape == (3 * HIDDEN,)
    ]
    assert all(change.count_nonzero() == HIDDEN for change in changes)
    assert site.rows_of(changes[0], 0).count_nonzero() == HIDDEN


def test_convolutions_and_norms_get_biases_too() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv1d(4, 2, 1, bias=False))
    delta = attach(backbone, BitFit(), ["0", "1"])
    assert [patch.b.shape for patch in delta.patches if isinstance(patch, AddedBias)] == [(4,), (2,)]
    images = torch.randn(2, 3, 5, 5)
    plain = backbone[0](images)
    shake(delta)
    (b, _) = delta.parameters()
    torch.testing.assert_close(backbone[0](images), plain + b[:, None, None])
    llama, inputs = fresh("llama")
    delta = attach(llama, BitFit(), "norm")
    assert delta.budget().delta == (2 * LAYERS + 1) * HIDDEN
    shake(delta)
    with torch.no_grad():
        assert not torch.equal(output(llama, inputs), output(*fresh("llama")))


@pytest.mark.parametrize("model", ["bert", "opt", "gpt2", "bart"])
def test_the_key_bias_changes_nothing(model: str) -> None:
    """q . (k + b) = q . k + q . b, the same for every key, which softmax does not see: no gradient, and no effect."""
    backbone, inputs = fresh(model)
    backbone.double()
    plain = output(backbone, inputs).detach()
    key = attach(backbone, BitFit(), "attention.key", head=False, name="key")
    query = attach(backbone, BitFit(), "attention.query", head=False, name="query")
    output(backbone, inputs).square().mean().backward()
    idle, moving = (torch.stack([p.grad.abs().max() for p in delta.parameters() if p.grad is not None]) for delta in (key, query))
    assert len(idle) == len(moving) > 0
    assert idle.max() < 1e-12 < 1e-6 < moving.max()
    with torch.no_grad():
        shake(key, spread=2.0)
        torch.testing.assert_close(output(backbone, inputs), plain, atol=1e-10, rtol=1e-10)
        shake(query, spread=2.0)
        assert not torch.allclose(output(backbone, inputs), plain, atol=1e-3)


@pytest.mark.parametrize("model", ["bert", "llama", "phi3", "t5", "mixtral", "modernbert"])
def test_partial_bitfit_trains_two_kinds(model: str) -> None:
    backbone, _ = fresh(model)
    delta = attach(backbone, PartialBitFit(), head=False)
    assert {entry.site.leaf for entry in delta.entries} == ({"query"} if model == "mixtral" else {"query", "up"})
    with_bias = {id(entry.parameter) for entry in delta.entries if isinstance(entry.patch, SelectionPatch)}
    assert bool(with_bias) == (model == "bert")


@pytest.mark.parametrize("model", MODELS)
def test_full_fine_tuning_trains_every_parameter_once(model: str) -> None:
    backbone, _ = fresh(model)
    everything = {id(parameter): parameter.numel() for parameter in backbone.parameters()}
    delta = attach(backbone, FullFineTuning())
    assert sorted(map(id, delta.parameters())) == sorted(everything)
    budget = delta.budget()
    assert budget.N == budget.M == budget.delta == sum(everything.values())


def below(*starts: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(starts)


CHOSEN: list[tuple[Method, Callable[[str], bool]]] = [
    (FullFineTuning(), below("")),
    (LastLayer(), below("bert.encoder.layer.1.", "classifier.")),
    (LastLayers(portion=0.5), below("bert.encoder.layer.1.", "classifier.")),
    (LastLayers(portion=1.0), below("bert.encoder.", "classifier.")),
    (LinearProbe(), below("classifier.")),
    (PartialBitFit(), lambda name: name.endswith(("query.bias", "intermediate.dense.bias")) or name.startswith("classifier.")),
    (
        SelectiveModules(budget=0.25, seed=1),
        below(
            "bert.encoder.layer.0.attention.self.value.",
            "bert.encoder.layer.1.attention.self.value.",
            "bert.encoder.layer.1.intermediate.dense.",
            "classifier.",
        ),
    ),
]


@pytest.mark.parametrize(("method", "chosen"), CHOSEN, ids=lambda value: str(value) if isinstance(value, Method) else "")
def test_what_is_selected_acts_by_the_formula(method: Method, chosen: Callable[[str], bool]) -> None:
    """theta_i' = theta_i + delta_i for i in W and theta_i' = theta_i for all others: outputs, and gradients of W alone."""
    backbone, inputs = fresh("bert")
    thetas = {name: parameter.detach().clone().requires_grad_() for name, parameter in backbone.double().named_parameters()}
    plain = copy.deepcopy(backbone)
    delta = attach(backbone, method)
    W = {name for name in thetas if chosen(name)}
    assert {name for name, parameter in backbone.named_parameters() if parameter.requires_grad} == W
    generator = torch.Generator().manual_seed(5)
    changes = {name: 0.1 * torch.randn(thetas[name].shape, generator=generator, dtype=torch.float64) for name in sorted(W)}
    with torch.no_grad():
        for name, change in changes.items():
            backbone.get_parameter(name).add_(change)
    changed = {name: theta + changes[name] if name in W else theta for name, theta in thetas.items()}
    expected = torch.func.functional_call(plain, changed, (), inputs).logits
    found = output(backbone, inputs)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name in W:
        gradient, by_hand = backbone.get_parameter(name).grad, thetas[name].grad
        torch.testing.assert_close(gradient, by_hand, atol=1e-10, rtol=1e-10, msg=name)
    assert delta.budget().delta == sum(thetas[name].numel() for name in W)


@pytest.mark.parametrize(("model", "names"), [("bert", ["classifier.bias", "classifier.weight"]), ("vit", None), ("roberta", None)])
def test_a_probe_trains_the_head_and_nothing_else(model: str, names: list[str] | None) -> None:
    backbone, inputs = fresh(model)
    delta = attach(backbone, LinearProbe())
    trained = sorted(name for name, parameter in backbone.named_parameters() if parameter.requires_grad)
    assert trained == (names or sorted(f"classifier.{name}" for name, _ in backbone.get_submodule("classifier").named_parameters()))
    features: list[bool] = []
    backbone.get_submodule("classifier").register_forward_pre_hook(lambda _, args: features.append(args[0].requires_grad))
    output(backbone, inputs).square().mean().backward()
    assert features == [False]
    assert all(parameter.grad is not None for parameter in delta.parameters())


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2", "t5"])
def test_trainable_tokens_change_their_rows_only(model: str) -> None:
    backbone, inputs = fresh(model)
    ids = (int(inputs["input_ids"][0, 2]), 99)
    delta = attach(backbone, TrainableTokens(token_ids=ids), head=False)
    shake(delta, spread=0.5)
    with torch.no_grad():
        found = output(backbone, inputs)
        plain, _ = fresh(model)
        embeddings = {
            id(module.weight): module.weight for module in (plain.get_input_embeddings(), plain.get_output_embeddings()) if module
        }  # type: ignore[operator]
        rows = [patch.e for patch in delta.patches]  # type: ignore[union-attr]
        assert len(rows) == len(embeddings)
        for weight, e in zip(embeddings.values(), rows, strict=True):
            weight[list(ids)] = e
        torch.testing.assert_close(found, output(plain, inputs), atol=1e-5, rtol=1e-5)
    assert delta.budget().delta == 2 * 32 * len(rows)


def test_token_ids_are_checked() -> None:
    for ids in ((), (3, 3), (-1,)):
        with pytest.raises(InvalidValue):
            attach(fresh("llama")[0], TrainableTokens(token_ids=ids))
    with pytest.raises(InvalidValue, match=r"token 101, but `.*` has 101 rows\. Resize the vocabulary first"):
        attach(fresh("llama")[0], TrainableTokens(token_ids=(101,)))


def test_trainable_tokens_by_the_formula() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).double()
    delta = attach(backbone, TrainableTokens(token_ids=(7, 2)), "0")
    backbone.double()
    shake(delta, spread=0.7)
    (e,) = delta.parameters()
    E = backbone[0].weight.detach().clone()
    E[7], E[2] = e[0], e[1]
    ids = torch.tensor([[2, 0, 7], [8, 7, 7]])
    expected = E[ids] @ backbone[1].weight.T + backbone[1].bias
    torch.testing.assert_close(backbone(ids), expected, atol=1e-10, rtol=1e-10)
    merge(delta)
    torch.testing.assert_close(backbone(ids), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("model", "table"), [("bert", "bert.embeddings.word_embeddings"), ("llama", "model.embed_tokens")])
def test_trainable_tokens_equal_peft(model: str, table: str) -> None:
    backbone, inputs = fresh(model)
    ids = inputs["input_ids"][0, :3].unique().tolist()
    config = TrainableTokensConfig(token_indices=ids, target_modules=[table.rpartition(".")[2]])
    name = f"{table}.trainable_tokens_delta.default"
    compare_with_peft(backbone, inputs, TrainableTokens(token_ids=tuple(ids)), table, config, lambda _: name)
