"""Ladder side tuning: formula, identity at the start, and no gradient in the backbone, whatever runs it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import InvalidValue, NoSite, Unsupported
from deltatune.injection.delta import Delta
from deltatune.methods import LadderSideTuning, LoRA, PromptTuning
from tests.models import HIDDEN, MODELS, output, tokens

SMALL = LadderSideTuning(4, expansion=2)


def attached(name: str, method: LadderSideTuning = SMALL) -> tuple[Any, dict[str, Tensor], Delta]:
    model, inputs = MODELS[name]()
    delta = dt.attach(model, method, head=False)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model, inputs, delta


def by_hand(patch: Any, states: list[Tensor]) -> Tensor:
    """The formula, token by token."""
    g = 1 / (1 + (-patch.alpha).exp())
    rows = []
    for at in torch.cartesian_prod(*map(torch.arange, states[0].shape[:2])).tolist():
        h = [state[at[0], at[1]] for state in states]
        s = patch.W_down[0] @ h[0]
        for i in range(len(h) - 1):
            u = g[i] * s + (1 - g[i]) * (patch.W_down[i + 1] @ h[i + 1])
            normed = (u - u.mean()) / (u.var(correction=0) + 1e-5).sqrt()
            s = u + patch.W_2[i] @ nn.functional.gelu(patch.W_1[i] @ normed + patch.b_1[i]) + patch.b_2[i]
        rows.append(patch.W_up @ s)
    return torch.stack(rows).view_as(states[0])


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_it_is_its_formula(name: str) -> None:
    model, inputs, delta = attached(name)
    model.double()
    delta.patches[0].double()
    stack = delta.entries[0].site.module
    seen: dict[str, Any] = {}
    hook = stack.register_forward_hook(lambda _, args, kwargs, out: seen.update(args=args, kwargs=kwargs, out=out[0]), with_kwargs=True)
    output(model, inputs)
    hook.remove()
    delta.disable()
    with torch.no_grad():
        plain = stack(*seen["args"], **{**seen["kwargs"], "use_cache": False, "output_hidden_states": True})
    delta.enable()
    states = [*plain.hidden_states[:2], plain.last_hidden_state]  # two layers
    expected = plain.last_hidden_state + by_hand(delta.patches[0], states)
    torch.testing.assert_close(seen["out"], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart"])
def test_a_fresh_ladder_is_the_identity(name: str) -> None:
    model, inputs = MODELS[name]()
    with torch.no_grad():
        plain = output(model, inputs)
        delta = dt.attach(model, SMALL, head=False)
        assert torch.equal(output(model, inputs), plain)
    assert delta.budget().delta == 3 * 4 * HIDDEN + 2 * (8 * 4 + 8 + 4 * 8 + 4) + 2 + HIDDEN * 4


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta_v2", "gpt2", "llama", "mixtral", "t5", "bart"])
def test_no_activation_of_the_backbone_needs_a_gradient(name: str) -> None:
    model, inputs, delta = attached(name)
    layers = [site.module for site in dt.find_sites(model, "layer")]
    inside = [module for layer in layers for module in layer.modules()]
    needed: list[bool] = []
    for module in inside:
        module.register_forward_hook(
            lambda _, __, out: needed.extend(t.requires_grad for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
        )
    output(model, inputs).square().sum().backward()
    assert len(needed) > len(layers) and not any(needed)
    assert all(parameter.grad.abs().max() > 0 for parameter in delta.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # a re-entrant checkpoint without anything to do
@pytest.mark.parametrize("inputs_need_gradients", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing(name: str, reentrant: bool, inputs_need_gradients: bool) -> None:
    model, inputs, delta = attached(name)
    output(model, inputs).square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in delta.parameters()]
    model.zero_grad()
    for layer in (site.module for site in dt.find_sites(model, "layer")):
        layer.training = True  # layers checkpoint in training mode only; their dropouts stay in evaluation mode
    model.config.use_cache = False
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if inputs_need_gradients:
        model.enable_input_require_grads()
    loss = output(model, inputs).square().sum()
    with torch.no_grad():
        output(model, {"input_ids": inputs["input_ids"].flip(1)})  # another forward between the two passes
    loss.backward()
    for parameter, grad in zip(delta.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-5)


def test_it_compiles_whole() -> None:
    torch.compiler.reset()
    model, inputs, _ = attached("bert")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(compiled, inputs), output(model, inputs), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


def test_generation_with_and_without_a_cache() -> None:
    for name in ("gpt2", "t5"):
        model, _, _ = attached(name)
        settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(model.generate(**tokens(), **settings), model.generate(**tokens(), **settings, use_cache=False))


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("first", ["prompt", "ladder"])
def test_a_prompt_beside_it_in_either_order(name: str, first: str) -> None:
    model, inputs = MODELS[name]()
    recipes = {"prompt": PromptTuning(3, init_ids=(7, 8, 9)), "ladder": SMALL}
    placed = {key: dt.attach(model, recipes[key], name=key, head=False) for key in (first, *(recipes.keys() - {first}))}
    alone = output(model, inputs)
    with torch.no_grad():
        placed["ladder"].patches[0].W_up.fill_(0.1)
    together = output(model, inputs)
    assert together.shape == alone.shape
    assert not torch.allclose(together, alone)
    placed["ladder"].disable()
    torch.testing.assert_close(output(model, inputs), alone, atol=1e-6, rtol=1e-6)


def test_two_ladders_and_lora_add_up_and_leave_without_a_trace() -> None:
    model, inputs = MODELS["gpt2"]()
    plain = output(model, inputs)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    placed = [dt.attach(model, recipe) for recipe in (SMALL, LoRA(rank=2), SMALL)]
    with torch.no_grad():
        for delta in placed:
            for parameter in delta.parameters():
                parameter.add_(0.1)
    together = output(model, inputs)
    together.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for delta in placed for parameter in delta.parameters())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, inputs), together)
        for delta in dt.deltas(twin):
            dt.detach(delta)
        assert torch.equal(output(twin, inputs), plain)
    for delta in (placed[1], placed[0], placed[2]):
        dt.detach(delta)
    assert torch.equal(output(model, inputs), plain)
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()] == hooks


def test_an_error_within_the_forward_keeps_nothing() -> None:
    model, inputs, delta = attached("bert")
    act = next(act for act in delta.entries[0].site.module.deltatune.acts.values() if hasattr(act, "tap"))
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 999))
    assert not act._states
    output(model, inputs)
    assert not act._states


def test_refusals() -> None:
    with pytest.raises(InvalidValue, match="`side_dim` must be greater than 0"):
        LadderSideTuning(0)
    with pytest.raises(NoSite):
        dt.attach(MODELS["vit"]()[0], SMALL)
    model, _ = MODELS["bert"]()
    with pytest.raises(Unsupported, match=r"no text stack. Choose one \(role `stack`\): `bert`"):
        dt.attach(model, SMALL, where="bert.encoder")
    with pytest.raises(Unsupported, match="no hidden_size or no list of layers"):
        dt.attach(model, SMALL, where="classifier")
    model, inputs, _ = attached("bart")
    model.model.decoder.layers[0].register_forward_pre_hook(lambda *_: None)
    model.model.decoder.layerdrop, model.model.decoder.training = 1.0, True
    with pytest.raises(Unsupported, match=r"reads 2 layers, but 0 of them ran. Set the model's layerdrop to 0"):
        output(model, inputs)
