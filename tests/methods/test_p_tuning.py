"""P-tuning and the embedding prefix: formula, PEFT's encoder, and an export that changes nothing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import InvalidValue
from deltatune.injection.delta import Delta
from deltatune.methods import EmbeddingPrefixTuning, Method, PTuning
from tests.models import MODELS, output, tokens

METHODS = (PTuning(5), EmbeddingPrefixTuning(5, mid_dim=16))


def shaken(delta: Delta) -> None:
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))


def lstm(E: Tensor, weights: dict[str, Tensor], end: str, backwards: bool) -> Tensor:
    """One direction of one layer, step by step: (tokens, in) -> (tokens, hidden)."""
    W, U, b = weights[f"weight_ih_{end}"], weights[f"weight_hh_{end}"], weights[f"bias_ih_{end}"] + weights[f"bias_hh_{end}"]
    h = c = E.new_zeros(U.shape[1])
    steps = []
    for x in E.flip(0) if backwards else E:
        i, f, g, o = (W @ x + U @ h + b).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append(h)
    return torch.stack(steps[::-1] if backwards else steps)


def test_an_lstm_prompt_is_its_formula() -> None:
    model, _ = MODELS["bert"]()
    delta = dt.attach(model, PTuning(4, hidden_dim=6), head=False)
    shaken(delta)
    patch = delta.patches[0].double()
    w = dict(patch.named_parameters())
    h = w["E"]
    for layer in ("l0", "l1"):
        h = torch.cat([lstm(h, w, layer, False), lstm(h, w, f"{layer}_reverse", True)], dim=1)
    P = torch.relu(h @ w["W_1"].T + w["c_1"]) @ w["W_2"].T + w["c_2"]
    assert P.shape == (4, 32)
    torch.testing.assert_close(patch(), P, atol=1e-10, rtol=1e-10)


def test_an_embedding_prefix_is_its_formula() -> None:
    model, _ = MODELS["bert"]()
    delta = dt.attach(model, METHODS[1], head=False)
    shaken(delta)
    patch = delta.patches[0].double()
    w = dict(patch.named_parameters())
    P = torch.tanh(w["layer.E"] @ w["layer.W_1"].T + w["layer.c_1"]) @ w["W_2"].T + w["c_2"]
    torch.testing.assert_close(patch(), P, atol=1e-10, rtol=1e-10)


def test_parameters_are_counted_as_peft_counts_them() -> None:
    model, _ = MODELS["gpt2"]()
    assert dt.attach(model, PTuning(5)).budget().delta == sum(p.numel() for p in peft_of(model).parameters() if p.requires_grad)
    assert dt.attach(MODELS["gpt2"]()[0], METHODS[1]).budget().delta == 5 * 16 + 16 * 17 + 32 * 17


def peft_of(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing PEFT warns about optional quantisers
        from peft import PromptEncoderConfig, get_peft_model

        settings = dict(num_virtual_tokens=5, encoder_reparameterization_type="LSTM", encoder_hidden_size=16, encoder_num_layers=2)
        bare = copy.deepcopy(model)
        if hasattr(bare, "deltatune"):
            for delta in dt.deltas(bare):
                dt.detach(delta)
        return get_peft_model(bare, PromptEncoderConfig(task_type="CAUSAL_LM", **settings)).eval()


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "qwen3", "gpt_neox"])
def test_decoders_equal_peft(name: str) -> None:
    model, _ = MODELS[name]()
    peft = peft_of(model)
    encoder = peft.prompt_encoder["default"]
    theirs_of = {"E": encoder.embedding.weight} | {key: getattr(encoder.lstm_head, key) for key, _ in encoder.lstm_head.named_parameters()}
    for k, layer in ((1, encoder.mlp_head[0]), (2, encoder.mlp_head[2])):
        theirs_of |= {f"W_{k}": layer.weight, f"c_{k}": layer.bias}
    delta = dt.attach(model, PTuning(5, hidden_dim=16))
    delta.patches[0].load_state_dict({key: tensor.detach() for key, tensor in theirs_of.items()})
    inputs = tokens(padding=3)
    mask = inputs["attention_mask"].bool()
    ours, theirs = output(model, inputs), peft(**inputs).logits[:, 5:]
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(ours) * mask[..., None]
    names = list(theirs_of)
    found = torch.autograd.grad((ours * direction).sum(), [delta.patches[0].get_parameter(key) for key in names])
    wanted = torch.autograd.grad((theirs * direction).sum(), [theirs_of[key] for key in names])
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
@pytest.mark.parametrize("method", METHODS, ids=["lstm", "mlp"])
def test_export_keeps_the_outputs_and_the_prompt_alone(method: Method, name: str) -> None:
    model, inputs = MODELS[name]()
    delta = dt.attach(model, method, head=False)
    shaken(delta)
    acting, before = output(model, inputs), delta.budget().delta
    assert not method.is_exported(delta.patches)
    for _ in range(2):
        method.export(delta.patches, delta.shared)
        assert method.is_exported(delta.patches)
        assert torch.equal(output(model, inputs), acting)
    assert [name.rpartition(".")[2] for name, _ in delta.named_parameters()] == ["P"]
    assert delta.budget().delta == 5 * 32 < before


@pytest.mark.parametrize("method", METHODS, ids=["lstm", "mlp"])
def test_both_forms_are_loaded(method: Method) -> None:
    model, inputs = MODELS["gpt2"]()
    delta = dt.attach(model, method)
    shaken(delta)
    acting, state = output(model, inputs), {key: tensor.clone() for key, tensor in delta.state_dict().items()}
    for exported in (False, True):
        if exported:
            method.export(delta.patches, None)
            state = delta.state_dict()
        twin, _ = MODELS["gpt2"]()
        other = dt.attach(twin, method)
        other.load_state_dict(state)
        assert torch.equal(output(twin, inputs), acting)
        assert method.is_exported(other.patches) is exported


def test_wrong_fields_are_named() -> None:
    for settings in ({"num_virtual_tokens": 0}, {"hidden_dim": 0}, {"num_layers": 0}):
        with pytest.raises(InvalidValue, match="must be greater than 0"):
            PTuning(**settings)
    with pytest.raises(InvalidValue, match="`mid_dim` must be greater than 0"):
        EmbeddingPrefixTuning(mid_dim=0)
