"""Prefix tuning as a gated parallel adapter, its three sets in an encoder-decoder, and P-tuning v2."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import InvalidValue, NoSite
from deltatune.injection.delta import Delta
from deltatune.methods import Method, PrefixTuning, PTuningV2
from tests.injection.by_hand import plain_eager, row_by_row
from tests.models import HIDDEN, LENGTH, MODELS, output, tokens

VIRTUAL = 5
STRONG = PrefixTuning(VIRTUAL, reparameterization=False, init_std=1.0)
SIDES = ("encoder.attention", "decoder.attention", "decoder.cross_attention")


def heads(x: Tensor) -> Tensor:
    """(batch, seq, hidden) -> (batch, 4 heads, seq, 8)."""
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_prefix_is_a_gated_parallel_adapter_in_every_head(name: str) -> None:
    """h <- (1 - lambda) h + lambda softmax(x W_1 + b_1) W_2, with W_1 = W_q P_k^T / sqrt(d), W_2 = P_v, lambda = the mass on P."""
    model, _ = MODELS[name]()
    inputs = tokens(padding=2)
    delta = dt.attach(model.double(), STRONG, layers=[0])
    delta.patches[0].double()
    site = delta.entries[0].site
    merged = next(found.module for found in dt.find_sites(model, "attention.output", layers=[0]))
    seen: dict[str, Tensor] = {}
    site.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    merged.register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))
    with torch.no_grad():
        model(**inputs)
    x, attention = seen["x"], site.module
    if name == "gpt2":
        q, k, v = attention.c_attn(x).split(HIDDEN, dim=-1)
        W_q, b_q = attention.c_attn.weight[:, :HIDDEN], attention.c_attn.bias[:HIDDEN]
    else:
        q, k, v = attention.query(x), attention.key(x), attention.value(x)
        W_q, b_q = attention.query.weight.T, attention.query.bias
    visible = inputs["attention_mask"].bool()[:, None, None]
    if name == "gpt2":
        visible = visible & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    P_k, P_v = delta.patches[0].P_k, delta.patches[0].P_v
    scores = (heads(q) @ heads(k).mT / 8**0.5).masked_fill(~visible, -torch.inf)
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        W_1, b_1, W_2 = W_q[:, rows] @ P_k[head].T / 8**0.5, b_q[rows] @ P_k[head].T / 8**0.5, P_v[head]
        of_prefix, of_text = (x @ W_1 + b_1).exp().sum(-1), scores[:, head].exp().sum(-1)
        mass = (of_prefix / (of_prefix + of_text))[..., None]
        h = scores[:, head].softmax(-1) @ heads(v)[:, head]
        gated = (1 - mass) * h + mass * ((x @ W_1 + b_1).softmax(-1) @ W_2)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(seen["h"][..., rows][real], gated[real], atol=1e-10, rtol=1e-10)
        assert 0.01 < mass.min() < mass.max() < 0.999


def shaken(delta: Delta) -> None:
    """Away from where it started, in double precision."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("method", [PrefixTuning(VIRTUAL, mid_dim=6), PTuningV2(VIRTUAL)], ids=lambda method: type(method).__name__)
def test_every_attention_has_its_prefix_in_double_precision(method: Method, name: str) -> None:
    """softmax(Q [P_k; K]^T / sqrt(d)) [P_v; V] row by row, with P = tanh(E W_1^T + c_1) W_2^T + c_2, or P as it is."""
    model, _ = MODELS[name]()
    inputs = tokens(padding=2)
    plain = plain_eager(model.double())
    delta = dt.attach(model, method, head=False)
    model.double()
    shaken(delta)
    prefixes: dict[str, tuple[Tensor, Tensor]] = {}
    shared = {key.removeprefix("shared."): tensor for key, tensor in delta.state_dict().items() if key.startswith("shared.")}
    for entry in delta.entries:
        w = dict(entry.patch.named_parameters())
        if isinstance(method, PrefixTuning):
            H = torch.tanh(shared["E"] @ shared["W_1"].T + shared["c_1"])
            P = H @ w["W_2"].T + w["c_2"]  # (tokens, keys and values of all heads)
            prefixes[entry.site.path] = heads(P[None, :, :HIDDEN])[0], heads(P[None, :, HIDDEN:])[0]
        else:
            prefixes[entry.site.path] = w["P_k"], w["P_v"]
    theirs = row_by_row(plain, prefixes, inputs, VIRTUAL)
    with torch.no_grad():
        ours = output(model, inputs)
    for row, wanted, mask in zip(ours, theirs, inputs["attention_mask"].bool(), strict=True):
        torch.testing.assert_close(row if name == "bert" else row[mask], wanted, atol=1e-10, rtol=1e-10)


def copied(delta: Delta, whole: Delta) -> None:
    """Give a delta the prefixes that another has at the same sites."""
    values = {entry.key: entry.patch for entry in whole.entries}
    for entry in delta.entries:
        entry.patch.load_state_dict(values[entry.key].state_dict())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder_and_cross_prefixes_are_chosen_by_where(name: str) -> None:
    model, inputs = MODELS[name]()
    whole = dt.attach(model, STRONG, name="whole")
    together = output(model, inputs)
    whole.disable()
    plain, states = output(model, inputs), model.get_encoder()(inputs["input_ids"]).last_hidden_state
    parts = [dt.attach(model, STRONG, where=side, name=side.replace(".", "_")) for side in SIDES]
    assert [[entry.site.role for entry in part.entries] for part in parts] == [[side] * 2 for side in SIDES]
    for part in parts:
        copied(part, whole)
    torch.testing.assert_close(output(model, inputs), together, atol=1e-5, rtol=1e-5)
    for part, side in zip(parts, SIDES, strict=True):
        for other in parts:
            other.enable() if other is part else other.disable()
        assert not torch.allclose(output(model, inputs), plain)
        same = torch.equal(model.get_encoder()(inputs["input_ids"]).last_hidden_state, states)
        assert same is not side.startswith("encoder")
    with pytest.raises(NoSite):
        dt.attach(MODELS["bert"]()[0], STRONG, where="cross_attention")


@pytest.mark.parametrize("side", SIDES)
def test_one_set_alone_equals_the_reference_by_hand(side: str) -> None:
    model, inputs = MODELS["t5"]()
    plain = plain_eager(model)
    delta = dt.attach(model, STRONG, where=side)
    prefixes = {site.path: (torch.zeros(4, 0, 8), torch.zeros(4, 0, 8)) for site in dt.find_sites(model, "attention")}
    prefixes |= {entry.site.path: (entry.patch.P_k, entry.patch.P_v) for entry in delta.entries}
    assert len(prefixes) == 6
    theirs = row_by_row(plain, prefixes, inputs, VIRTUAL)
    ours = output(model, inputs)
    for row, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(row[: len(wanted)], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reparameterization", [False, True])
def test_p_tuning_v2_drops_parts_of_its_prompts_in_training_only(reparameterization: bool) -> None:
    model, inputs = MODELS["bert"]()
    method = PTuningV2(50, dropout=0.5, reparameterization=reparameterization, mid_dim=8)
    delta = dt.attach(model, method, head=False)
    patch = delta.patches[0]
    P_k = patch()[0]
    assert torch.equal(P_k, patch()[0])
    dropped = patch.train()()[0]
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * P_k[kept])
    patch.eval()
    acting = output(model, inputs)
    assert method.is_exported(delta.patches) is not reparameterization
    method.export(delta.patches, delta.shared)
    assert method.is_exported(delta.patches)
    assert torch.equal(output(model, inputs), acting)
    assert delta.budget().delta == 2 * 2 * 50 * HIDDEN


def test_p_tuning_v2_reaches_every_layer_and_counts_as_peft_does() -> None:
    model, inputs = MODELS["llama"]()
    plain = plain_eager(model)
    delta = dt.attach(model, PTuningV2(VIRTUAL))
    prefixes = {entry.site.path: (entry.patch.P_k, entry.patch.P_v) for entry in delta.entries}
    assert delta.budget().delta == VIRTUAL * 2 * 2 * 2 * 8  # tokens, layers, keys and values, heads, width
    theirs = row_by_row(plain, prefixes, {"input_ids": inputs["input_ids"]}, VIRTUAL)
    torch.testing.assert_close(output(model, inputs), torch.stack(theirs), atol=1e-5, rtol=1e-5)


def test_wrong_fields_are_named() -> None:
    with pytest.raises(InvalidValue, match="`dropout` must be at least 0 and less than 1"):
        PTuningV2(dropout=1.0)
    for kind in (PTuningV2, PrefixTuning):
        for field in ("num_virtual_tokens", "mid_dim", "init_std"):
            with pytest.raises(InvalidValue, match=f"`{field}` must be greater than 0"):
                kind(**{field: 0})
    assert isinstance(PrefixTuning().share(dt.find_sites(MODELS["bert"]()[0], "attention").sites), nn.Module)
