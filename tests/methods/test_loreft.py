"""LoReFT: formula, an R that stays orthonormal, and edits of the first and last real tokens only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import InvalidValue, NoSite, Unsupported
from deltatune.injection.delta import Delta
from deltatune.injection.tokens import token_ranks
from deltatune.methods import LoReFT, PromptTuning
from tests.models import HIDDEN, MODELS, output, tokens

TEXT = ("bert", "deberta_v2", "modernbert", "distilbert", "mpnet", "gpt2", "llama", "mistral", "gemma3", "bloom", "phi3")


def layers_of(model: nn.Module, run: object) -> list[Tensor]:
    """What every layer returns while ``run`` is called."""
    seen: list[Tensor] = []
    layers = [site.module for site in dt.find_sites(model, "layer")]
    # the slot's hooks are registered first, so these see the edited output
    handles = [layer.register_forward_hook(lambda _, __, y: seen.append(y[0] if isinstance(y, tuple) else y)) for layer in layers]
    run()  # type: ignore[operator]
    for handle in handles:
        handle.remove()
    return seen


def gram_schmidt(A: Tensor) -> Tensor:
    rows: list[Tensor] = []
    for row in A:
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / row.norm())
    return torch.stack(rows)


def test_it_is_its_formula() -> None:
    host = nn.Sequential(nn.Linear(7, 5)).double()
    delta = dt.attach(host, LoReFT(3), where="0")
    patch = delta.patches[0].double()
    A, W, b = (patch.get_parameter(f"intervention.{name}") for name in "AWb")
    with torch.no_grad():
        A.add_(torch.randn(3, 5))
    x = torch.randn(4, 7, dtype=torch.float64)
    y = nn.functional.linear(x, host[0].weight, host[0].bias)
    R = gram_schmidt(A)
    expected = torch.stack([row + R.T @ (W @ row + b - R @ row) for row in y])
    torch.testing.assert_close(host(x), expected, atol=1e-10, rtol=1e-10)
    R = patch.intervention.R
    torch.testing.assert_close(R @ R.T, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_fresh_basis_is_its_parameter_and_training_keeps_it_orthonormal() -> None:
    model, inputs = MODELS["bert"]()
    delta = dt.attach(model, LoReFT(4))
    patch = delta.patches[0]
    torch.testing.assert_close(patch.intervention.R, patch.intervention.A, atol=1e-6, rtol=0)
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.1)
    for _ in range(3):
        output(model, inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    R = patch.intervention.R
    assert not torch.allclose(patch.intervention.A, R, atol=1e-2)
    torch.testing.assert_close(R @ R.T, torch.eye(4), atol=1e-5, rtol=0)


def test_parameters() -> None:
    model, _ = MODELS["gpt2"]()
    assert dt.attach(model, LoReFT(4)).budget().delta == 2 * (2 * 4 * HIDDEN + 4)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_edits_of_some_tokens_are_the_formula_in_double_precision(name: str) -> None:
    model, _ = MODELS[name]()
    inputs = tokens(padding=2)
    plain = copy.deepcopy(model.double())
    delta = dt.attach(model, LoReFT(4, first=2, last=3), layers=[0], head=False)
    patch = delta.patches[0].double()
    A, W, b = (patch.get_parameter(f"intervention.{letter}") for letter in "AWb")
    with torch.no_grad():
        A.add_(0.3 * torch.randn(A.shape))
    R = gram_schmidt(A)
    found, y = layers_of(model, lambda: model(**inputs))[0], layers_of(plain, lambda: plain(**inputs))[0]
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        places = mask.nonzero()[:, 0].tolist()
        for place in places:
            h = y[row, place]
            edited = h + R.T @ (W @ h + b - R @ h) if place in (*places[:2], *places[-3:]) else h
            torch.testing.assert_close(found[row, place], edited, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("name", TEXT)
def test_first_and_last_real_tokens_are_edited(name: str, side: str) -> None:
    """In the first layer, where nothing has travelled between tokens since."""
    model, _ = MODELS[name]()
    inputs = tokens()
    where = {"left": slice(0, 3), "right": slice(-3, None), "none": slice(0, 0)}[side]
    inputs["input_ids"][-1, where], inputs["attention_mask"][-1, where] = model.config.pad_token_id, 0
    plain = copy.deepcopy(model)
    delta = dt.attach(model, LoReFT(4, first=2, last=3), layers=[0])
    intervention = delta.patches[0].intervention
    found = layers_of(model, lambda: model(**inputs))[0]
    y = layers_of(plain, lambda: plain(**inputs))[0]
    everywhere = y + intervention(y)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        places = mask.nonzero()[:, 0].tolist()
        chosen = {*places[:2], *places[-3:]}
        assert len(chosen) == 5
        for place in places:
            expected = (everywhere if place in chosen else y)[row, place]
            torch.testing.assert_close(found[row, place], expected, atol=1e-5, rtol=1e-5)


def test_padding_of_a_torch_encoder() -> None:
    model, inputs = MODELS["torch_encoder"]()
    plain = copy.deepcopy(model)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 9:] = True
    delta = dt.attach(model, LoReFT(4, last=2), layers=[1])
    found = model(inputs["src"], src_key_padding_mask=padding)
    y = plain(inputs["src"], src_key_padding_mask=padding)
    everywhere = y + delta.patches[0].intervention(y)
    changed = (found - y).abs().amax(-1) > 1e-6
    assert changed.nonzero().tolist() == [[0, 10], [0, 11], [1, 7], [1, 8]]
    torch.testing.assert_close(found[changed], everywhere[changed], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_first_tokens_are_the_same_with_and_without_a_cache(name: str, cache: str | None) -> None:
    model, _ = MODELS[name]()
    dt.attach(model, LoReFT(4, first=3))
    inputs = tokens()
    inputs["attention_mask"][-1, :3] = 0
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    wanted = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(model.generate(**inputs, **settings, cache_implementation=cache), wanted)


def test_the_newest_token_is_the_last_under_a_cache() -> None:
    ranks = token_ranks(torch.zeros(2, 1, 4), {"attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]]).bool()[:, None, None]})
    assert ranks.tolist() == [[[3], [2]], [[1], [1]]]


def test_virtual_tokens_of_a_prompt_count() -> None:
    model, inputs = MODELS["gpt2"]()
    dt.attach(model, PromptTuning(3), name="prompt")
    before = output(model, inputs)
    delta = dt.attach(model, LoReFT(4, first=3), name="edit")
    assert not torch.allclose(output(model, inputs), before)
    dt.detach(delta)
    assert torch.equal(output(model, inputs), before)


def gradients(model: nn.Module, delta: Delta, inputs: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    output(model, inputs).square().sum().backward()
    return [parameter.grad for parameter in delta.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_compilation(reentrant: bool) -> None:
    torch.compiler.reset()
    model, inputs = MODELS["llama"]()
    delta = dt.attach(model, LoReFT(4, first=1, last=2))
    wanted = gradients(model, delta, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled, delta, inputs), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    model.train()
    model.config.use_cache = False
    model.enable_input_require_grads()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    for one, other in zip(gradients(model, delta, inputs), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


def test_refusals() -> None:
    model, _ = MODELS["bert"]()
    with pytest.raises(InvalidValue, match="at most 32 there"):
        dt.attach(model, LoReFT(33))
    with pytest.raises(InvalidValue, match="`first` must be at least 0"):
        LoReFT(first=-1)
    with pytest.raises(InvalidValue, match="`rank` must be greater than 0"):
        LoReFT(0)
    with pytest.raises(Unsupported, match=r"not told which tokens are padding. Choose whole layers"):
        dt.attach(model, LoReFT(2, first=1), where="feed_forward.down")
    with pytest.raises(NoSite, match="nothing to do"):
        dt.attach(model, LoReFT(2), where="attention")
    with pytest.raises(Unsupported, match="cannot be read"):
        token_ranks(torch.zeros(2, 3, 4), {"attention_mask": torch.zeros(2, 3, 3)})
    with pytest.raises(Unsupported, match="hidden states of shape"):
        token_ranks(torch.zeros(2, 4), {})
    assert not hasattr(model, "deltatune")
