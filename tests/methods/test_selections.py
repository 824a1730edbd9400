"""BitFit, full fine-tuning, the linear probe and trainable tokens: which parameters train, and what they change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.errors import InvalidValue, NoSite
from deltatune.injection.attach import attach
from deltatune.methods import BitFit, FullFineTuning, LinearProbe, TrainableTokens
from deltatune.methods.kinds import SelectionPatch
from deltatune.methods.specification.bitfit import AddedBias
from tests.conformance.cells import fresh, shake
from tests.models import MODELS, output

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
    linears = [path for path, module in backbone.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in path]
    with torch.no_grad():
        plain = output(backbone, inputs)
    delta = attach(backbone, BitFit())
    added = [entry.site.path for entry in delta.entries if type(entry.patch) is AddedBias]
    assert sorted(added) == sorted(path for path in linears if "router" not in path)
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


def test_the_key_bias_hardly_matters() -> None:
    """Softmax is invariant to what is added to all keys alike, so its gradient is zero."""
    backbone, inputs = fresh("bert")
    delta = attach(backbone, BitFit(), "attention.{query,key}", head=False)
    output(backbone, inputs).square().mean().backward()
    sizes = {entry.site.leaf: entry.parameter.grad.abs().max() for entry in delta.entries if entry.parameter.grad is not None}
    assert sizes["key"] < 1e-6 < 1e-3 * sizes["query"]


@pytest.mark.parametrize("model", MODELS)
def test_full_fine_tuning_trains_every_parameter_once(model: str) -> None:
    backbone, _ = fresh(model)
    everything = {id(parameter): parameter.numel() for parameter in backbone.parameters()}
    delta = attach(backbone, FullFineTuning())
    assert sorted(map(id, delta.parameters())) == sorted(everything)
    budget = delta.budget()
    assert budget.N == budget.M == budget.delta == sum(everything.values())


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
