"""Prompts of an encoder whose outputs at virtual tokens the decoder sees: the formula, generation, compositions and rows."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import deltatune as dt
from deltatune.errors import Unsupported
from deltatune.methods import EmbeddingPrefixTuning, PromptTuning, PTuning
from tests.models import MODELS

SEEN = PromptTuning(5, init="random", seen_by_decoder=True)
HIDDEN = PromptTuning(3, init="random")
SETTINGS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def padded(name: str) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = MODELS[name]()
    inputs["input_ids"][-1, -3:], inputs["attention_mask"][-1, -3:] = model.config.pad_token_id, 0
    return model.requires_grad_(False), inputs


def by_hand(plain: Any, P: Tensor, inputs: dict[str, Tensor], seen: list[bool] | None = None) -> Tensor:
    """Logits of the plain model over [P; X]; the decoder's mask leaves out what it does not see."""
    embeds = plain.get_input_embeddings()(inputs["input_ids"])
    batch, virtual = len(embeds), len(P)
    joined = torch.cat([P.expand(batch, -1, -1), embeds], 1)
    mask = torch.cat([torch.ones(batch, virtual, dtype=torch.long), inputs["attention_mask"]], 1)
    states = plain.get_encoder()(inputs_embeds=joined, attention_mask=mask)
    mask[:, :virtual] = torch.ones(virtual) if seen is None else torch.tensor(seen)
    return plain(encoder_outputs=states, attention_mask=mask, decoder_input_ids=inputs["decoder_input_ids"]).logits


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("method", [SEEN, PTuning(4, seen_by_decoder=True), EmbeddingPrefixTuning(4, mid_dim=8, seen_by_decoder=True)])
def test_outputs_and_gradients_equal_the_reference_by_hand(name: str, method: Any) -> None:
    model, inputs = padded(name)
    plain = copy.deepcopy(model)
    delta = dt.attach(model, method)
    P = delta.patches[0]()
    wanted = by_hand(plain, P, inputs)
    found = model(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    (cut,) = (dt.attach(copy.deepcopy(plain), HIDDEN).patches,)
    assert not cut[0].seen_by_decoder
    parameters = list(delta.parameters())
    direction = torch.randn_like(found)
    ours = torch.autograd.grad((found * direction).sum(), parameters)
    theirs = torch.autograd.grad((wanted * direction).sum(), parameters)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_without_a_mask_all_is_seen() -> None:
    model, inputs = MODELS["t5"]()
    del inputs["attention_mask"]
    plain = copy.deepcopy(model)
    P = dt.attach(model, SEEN).patches[0].P
    wanted = by_hand(plain, P, inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})
    torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_beside_a_prompt_that_is_hidden(order: list[int]) -> None:
    """Each is seen or hidden as it would be alone."""
    model, inputs = padded("t5")
    plain = copy.deepcopy(model)
    methods = [SEEN, HIDDEN]
    deltas = [dt.attach(model, methods[k], name=f"p{k}") for k in order]
    P = torch.cat([delta.patches[0].P for delta in deltas])
    seen = [methods[k].seen_by_decoder for k in order for _ in range(methods[k].num_virtual_tokens)]
    torch.testing.assert_close(model(**inputs).logits, by_hand(plain, P, inputs, seen), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_it_generates(name: str) -> None:
    model, inputs = padded(name)
    plain = copy.deepcopy(model)
    P = dt.attach(model, SEEN).patches[0].P
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    ids = torch.full((len(text["input_ids"]), 1), model.config.decoder_start_token_id)
    for _ in range(5):
        logits = by_hand(plain, P, text | {"decoder_input_ids": ids})[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    settings = SETTINGS | {"forced_bos_token_id": None, "forced_eos_token_id": None}
    assert torch.equal(model.generate(**text, **settings), ids)
    assert torch.equal(model.generate(**text, **settings, cache_implementation="static"), ids)
    beams = model.generate(**text, **settings, num_beams=3)
    assert torch.equal(beams, model.generate(**text, **settings, num_beams=3, use_cache=False))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_with_prompts_of_their_own(name: str) -> None:
    model, inputs = padded(name)
    singles = []
    methods = {"seen": SEEN, "short": PromptTuning(2, init="random", seen_by_decoder=True), "hidden": HIDDEN, "none": None}
    for key, method in methods.items():
        if method is not None:
            dt.attach(model, method, name=key)
    for key, method in methods.items():
        dt.switch(model, key if method is not None else None)
        singles.append(model(**inputs).logits)
    batch = {key: tensor.repeat(2, *(1,) * (tensor.ndim - 1)) for key, tensor in inputs.items()}
    with dt.route(model, ["seen", "hidden", "short", None]):
        found = model(**batch).logits
    for k in range(4):
        torch.testing.assert_close(found[k], singles[[0, 2, 1, 3][k]][k % 2], atol=1e-5, rtol=1e-5)


def test_it_leaves_no_trace_and_can_be_copied() -> None:
    model, inputs = padded("t5")
    plain = model(**inputs).logits
    delta = dt.attach(model, SEEN)
    found = model(**inputs).logits
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, found)
    delta.disable()
    assert torch.equal(model(**inputs).logits, plain)
    dt.detach(delta)
    assert torch.equal(model(**inputs).logits, plain)
    assert not model.decoder._forward_pre_hooks


@pytest.mark.parametrize(("name", "where"), [("bert", None), ("llama", None), ("t5", "decoder.stack")])
def test_where_no_decoder_is_behind_it_is_refused(name: str, where: str | None) -> None:
    model, _ = MODELS[name]()
    with pytest.raises(Unsupported, match="no encoder with a decoder behind it"):
        dt.attach(model, SEEN, where=where)
    assert not dt.deltas(model)


def test_it_compiles_whole() -> None:
    torch.compiler.reset()
    model, inputs = padded("t5")
    dt.attach(model, SEEN)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected)


def test_generation_is_that_of_peft() -> None:
    """PEFT's prompts are ahead of the padding, and ours too where it is on the right."""
    model, inputs = padded("t5")
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)).eval()
        with torch.no_grad():
            theirs.prompt_encoder["default"].embedding.weight.mul_(2)
            dt.attach(model, SEEN).patches[0].P.copy_(theirs.prompt_encoder["default"].embedding.weight[:5])
        wanted = theirs.generate(**text, **SETTINGS)
    assert torch.equal(model.generate(**text, **SETTINGS), wanted)
