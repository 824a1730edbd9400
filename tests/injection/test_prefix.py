"""Prefixes compute what the formula says, on every architecture, against a hand-written reference and PEFT."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import InvalidValue, NoSite, Unsupported
from deltatune.injection.delta import Delta
from deltatune.methods import LoRA, Method, PrefixTuning, PromptTuning, UniPELT
from tests.injection.by_hand import Prefixes, greedy, plain_eager, row_by_row
from tests.models import KEY_VALUE_HEADS, MODELS, output, tokens

REFUSED = ("deberta_v2", "mpnet", "bloom", "torch_encoder")
WITHOUT_ATTENTION = ("conv_net", "mlp", "tied_mlp")
PREFIXED = tuple(name for name in MODELS if name not in REFUSED + WITHOUT_ATTENTION)
DECODERS = ("gpt2", "opt", "llama", "mistral", "gemma3", "phi3", "gpt_neox")
ORACLE = ("bert", "roberta", "gpt2", "opt", "llama", "qwen3", "phi", "phi3", "gpt_neox")
VIRTUAL = 5
STRONG = PrefixTuning(VIRTUAL, reparameterization=False, init_std=1.0)


def prefixes_of(delta: Delta) -> Prefixes:
    return {entry.site.path: (entry.patch.P_k, entry.patch.P_v) for entry in delta.entries if not entry.head}


def padded(side: str, pad_token_id: int) -> dict[str, Tensor]:
    inputs = tokens()
    where = slice(0, 3) if side == "left" else slice(-3, None)
    inputs["input_ids"][-1, where], inputs["attention_mask"][-1, where] = pad_token_id, 0
    return inputs


def counted(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With position ids that count real tokens, as ``generate`` gives them."""
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def test_every_architecture_is_prefixed_or_refused() -> None:
    assert len(PREFIXED) == 18
    assert set(PREFIXED) | set(REFUSED) | set(WITHOUT_ATTENTION) == set(MODELS)


@pytest.mark.parametrize("name", PREFIXED)
def test_outputs_and_gradients_equal_the_reference_by_hand(name: str) -> None:
    model, inputs = MODELS[name]()
    plain = plain_eager(model)
    delta = dt.attach(model, STRONG, head=False)
    prefixes = prefixes_of(delta)
    ours = output(model, inputs)
    theirs = row_by_row(plain, prefixes, inputs, VIRTUAL)
    length = [row.shape[0] for row in theirs]
    assert sum(length) > 0
    torch.testing.assert_close(torch.cat([row[:n] for row, n in zip(ours, length, strict=True)]), torch.cat(theirs), atol=1e-5, rtol=1e-5)

    parameters = list(delta.parameters())
    directions = [torch.randn_like(row) for row in theirs]
    found = torch.autograd.grad(sum((row[:n] * g).sum() for row, n, g in zip(ours, length, directions, strict=True)), parameters)
    wanted = torch.autograd.grad(sum((row * g).sum() for row, g in zip(theirs, directions, strict=True)), parameters)
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    model, _ = MODELS[name]()
    plain = plain_eager(model)
    delta = dt.attach(model, STRONG)
    inputs = padded(side, model.config.pad_token_id)
    with torch.no_grad():
        ours = output(model, counted(inputs) if side == "left" and name != "opt" else inputs)
        theirs = row_by_row(plain, prefixes_of(delta), inputs, VIRTUAL)
    for row, mask, wanted in zip(ours, inputs["attention_mask"], theirs, strict=True):
        torch.testing.assert_close(row[mask.bool()], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PREFIXED)
def test_eager_and_sdpa_agree(name: str) -> None:
    model, inputs = MODELS[name]()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    delta = dt.attach(model, STRONG, head=False)
    other = dt.attach(eager, STRONG, head=False)
    other.load_state_dict(delta.state_dict())
    assert delta.entries[0].site.module.config._attn_implementation == "deltatune_sdpa"
    assert other.entries[0].site.module.config._attn_implementation == "deltatune_eager"
    torch.testing.assert_close(output(model, inputs), output(eager, inputs), atol=1e-5, rtol=1e-5)


def peft_of(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing PEFT warns about optional quantisers
        from peft import PrefixTuningConfig, get_peft_model

        task = "CAUSAL_LM" if type(model).__name__.endswith("LM") or "LMHead" in type(model).__name__ else "SEQ_CLS"
        return get_peft_model(copy.deepcopy(model), PrefixTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL)).eval()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ORACLE)
def test_outputs_and_gradients_equal_peft(name: str, side: str) -> None:
    model, _ = MODELS[name]()
    peft = peft_of(model)
    weight = peft.prompt_encoder["default"].embedding.weight  # (virtual, layers * 2 * heads * head_dim)
    delta = dt.attach(model, STRONG, head=False)
    heads, _, head_dim = delta.patches[0].shape
    table = weight.detach().view(VIRTUAL, -1, heads, head_dim).permute(1, 2, 0, 3)  # (layers * 2, heads, virtual, head_dim)
    with torch.no_grad():
        for entry in delta.entries:
            entry.patch.P_k.copy_(table[2 * entry.site.layer])
            entry.patch.P_v.copy_(table[2 * entry.site.layer + 1])
    inputs = tokens() if side == "none" else padded(side, model.config.pad_token_id)
    ours, theirs = output(model, inputs), peft(**inputs).logits
    if ours.ndim == 2 and side == "left":
        ours, theirs = ours[:1], theirs[:1]  # the head of the padded row reads padding
    mask = inputs["attention_mask"].bool() if ours.ndim == 3 else ...
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=1e-5)

    direction = torch.randn_like(ours) * (inputs["attention_mask"][..., None] if ours.ndim == 3 else 1)
    (wanted,) = torch.autograd.grad((theirs * direction).sum(), weight)
    (ours * direction).sum().backward()
    wanted = wanted.view(VIRTUAL, -1, heads, head_dim).permute(1, 2, 0, 3)
    assert wanted.abs().max() > 1e-3
    for entry in delta.entries:
        torch.testing.assert_close(entry.patch.P_k.grad, wanted[2 * entry.site.layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entry.patch.P_v.grad, wanted[2 * entry.site.layer + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_generation_equals_repeated_forwards_over_unpadded_rows(name: str) -> None:
    model, _ = MODELS[name]()
    dt.attach(model, STRONG)
    inputs = padded("left", 0)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        wanted = torch.stack(
            [
                greedy(lambda ids: model(ids, use_cache=False).logits[0], ids[mask.bool()], 6)
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
        )
    assert torch.equal(model.generate(**inputs, **settings)[:, -6:], wanted)
    assert torch.equal(model.generate(**inputs, **settings, use_cache=False)[:, -6:], wanted)
    assert torch.equal(model.generate(**inputs, **settings, cache_implementation="static")[:, -6:], wanted)
    assert torch.equal(model.generate(**inputs, **settings, prefill_chunk_size=5)[:, -6:], wanted)
    beams = model.generate(**inputs, **settings, num_beams=3)
    assert torch.equal(beams, model.generate(**inputs, **settings, num_beams=3, use_cache=False))
    assert torch.equal(beams, model.generate(**inputs, **settings, num_beams=3, cache_implementation="static"))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_generates_with_all_its_prefixes(name: str) -> None:
    model, inputs = MODELS[name]()
    delta = dt.attach(model, STRONG)
    assert len(delta.patches) == 6  # encoder self, decoder self, decoder cross, in two layers
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    start = torch.tensor([model.config.decoder_start_token_id])
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        rows = []
        for i, mask in enumerate(text["attention_mask"].bool()):
            row = text["input_ids"][i : i + 1, mask]
            rows.append(greedy(lambda ids, row=row: model(row, decoder_input_ids=ids, use_cache=False).logits[0], start, 6))
    wanted = torch.stack(rows)
    assert torch.equal(model.generate(**text, **settings)[:, -6:], wanted)
    assert torch.equal(model.generate(**text, **settings, cache_implementation="static")[:, -6:], wanted)
    beams = model.generate(**text, **settings, num_beams=3)
    assert torch.equal(beams, model.generate(**text, **settings, num_beams=3, use_cache=False))


def test_prefix_columns_are_seen_through_sliding_windows() -> None:
    model, inputs = MODELS["mistral"]()
    assert inputs["input_ids"].shape[1] > model.config.sliding_window
    delta = dt.attach(model, STRONG)
    (grad,) = torch.autograd.grad(output(model, inputs)[:, -1].sum(), delta.patches[-1].P_v)
    assert grad.abs().max() > 1e-3


def test_packed_sequences_each_see_the_prefix() -> None:
    model, _ = MODELS["llama"]()
    dt.attach(model, STRONG)
    ids = tokens()["input_ids"][:1]
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits[0]
    alone = torch.cat([model(part, use_cache=False).logits[0] for part in (ids[:, :7], ids[:, 7:])])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_a_mask_of_four_dimensions_is_extended() -> None:
    model, inputs = MODELS["llama"]()
    dt.attach(model, STRONG)
    mask = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12)
    float_mask = torch.zeros(2, 1, 12, 12).masked_fill(~mask, torch.finfo(torch.float32).min)
    wanted = output(model, inputs)
    torch.testing.assert_close(model(inputs["input_ids"], attention_mask=mask).logits, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(inputs["input_ids"], attention_mask=float_mask).logits, wanted, atol=1e-5, rtol=1e-5)


def test_grouped_attention_has_one_prefix_per_key_value_head() -> None:
    model, _ = MODELS["llama"]()
    assert dt.attach(model, STRONG).patches[0].P_k.shape == (KEY_VALUE_HEADS, VIRTUAL, 8)


def test_layers_without_a_prefix_keep_their_attention() -> None:
    model, inputs = MODELS["llama"]()
    plain = plain_eager(model)
    delta = dt.attach(model, STRONG, layers=[1])
    empty = torch.zeros(KEY_VALUE_HEADS, 0, 8)
    prefixes = {"model.layers.0.self_attn": (empty, empty)} | prefixes_of(delta)
    theirs = row_by_row(plain, prefixes, {"input_ids": inputs["input_ids"]}, VIRTUAL)
    torch.testing.assert_close(output(model, inputs), torch.stack(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_attention_off_the_interface_is_refused_before_anything_is_touched(name: str) -> None:
    model, _ = MODELS[name]()
    children = [path for path, _ in model.named_modules()]
    with pytest.raises(Unsupported, match=r"does not run on transformers' attention interface.*LoRA"):
        dt.attach(model, STRONG)
    assert [path for path, _ in model.named_modules()] == children


@pytest.mark.parametrize("method", [STRONG, UniPELT()], ids=["prefix-tuning", "unipelt"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_advised_where_no_prefix_can_enter_attaches(name: str, method: Method) -> None:
    model, _ = MODELS[name]()
    with pytest.raises(Unsupported, match=r"A prefix .*was asked for at .*transformers' attention interface") as refused:
        dt.attach(model, method)
    advice = str(refused.value).partition("another method for this backbone, such as ")[2]
    advised = [kind for kind in (PromptTuning, LoRA) if kind.__name__ in advice]
    assert LoRA in advised
    for kind in advised:
        dt.detach(dt.attach(model, kind()))


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_without_attention_there_is_no_site(name: str) -> None:
    with pytest.raises(NoSite, match="attention"):
        dt.attach(MODELS[name]()[0], STRONG)


def test_flex_attention_is_refused() -> None:
    model, _ = MODELS["llama"]()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(Unsupported, match=r"`flex_attention`.*attn_implementation='sdpa'"):
        dt.attach(model, STRONG)


def test_an_attention_with_a_loop_of_its_own_is_refused() -> None:
    model, _ = MODELS["gpt2"]()
    model.config.reorder_and_upcast_attn = True
    model.set_attn_implementation("eager")
    with pytest.raises(Unsupported, match="reorder_and_upcast_attn"):
        dt.attach(model, STRONG)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "opt", "bart"])
def test_a_table_of_positions_that_is_too_short_is_named(name: str) -> None:
    model, inputs = MODELS[name]()
    dt.attach(model, PrefixTuning(53, reparameterization=False))
    with pytest.raises(InvalidValue, match=r"has 6\d positions. Truncate the text, or use fewer virtual tokens."):
        output(model, inputs)
    fits, _ = MODELS[name]()
    dt.attach(fits, PrefixTuning(52, reparameterization=False))
    assert output(fits, inputs).isfinite().all()
