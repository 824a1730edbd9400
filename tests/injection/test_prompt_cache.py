"""Prompts and key-value caches: every cache of ``generate``, and the mistakes that would pass unnoticed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import deltatune as dt
from deltatune.errors import InvalidValue, Unsupported
from deltatune.methods import PromptTuning
from tests.injection.by_hand import greedy, plain_eager, prompted_row_by_row
from tests.models import MODELS, tokens

DECODERS = ("gpt2", "opt", "llama", "mistral", "qwen3", "gemma3", "phi3", "gpt_neox", "bloom", "mixtral")
VIRTUAL = 5
RANDOM = PromptTuning(VIRTUAL, init="random")
SETTINGS: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


def prompted(name: str) -> tuple[Any, Any, Tensor]:
    """The model with a prompt, an independent one without, and P."""
    model, _ = MODELS[name]()
    plain = copy.deepcopy(model) if name == "bloom" else plain_eager(model)
    return model, plain, dt.attach(model, RANDOM).patches[0].P.detach()


def left_padded() -> dict[str, Tensor]:
    inputs = tokens()
    inputs["input_ids"][-1, :3] = inputs["attention_mask"][-1, :3] = 0
    return inputs


def by_hand(plain: Any, P: Tensor, inputs: dict[str, Tensor], length: int = 6) -> Tensor:
    """Greedy tokens behind [P; X] of each row, unpadded and without a cache: (batch, length)."""

    def step(ids: Tensor) -> Tensor:
        return prompted_row_by_row(plain, P, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]

    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    with torch.no_grad():
        return torch.stack([greedy(step, ids[mask], length) for ids, mask in rows])


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_equals_the_reference_by_hand(name: str, padding: bool) -> None:
    model, plain, P = prompted(name)
    inputs = left_padded() if padding else tokens()
    wanted = by_hand(plain, P, inputs)
    assert torch.equal(model.generate(**inputs, **SETTINGS)[:, -6:], wanted)
    assert torch.equal(model.generate(**inputs, **SETTINGS, use_cache=False)[:, -6:], wanted)
    assert torch.equal(model.generate(**inputs, **SETTINGS, cache_implementation="static")[:, -6:], wanted)


@pytest.mark.parametrize("name", DECODERS)
def test_beams_are_the_same_with_every_cache(name: str) -> None:
    model, _, _ = prompted(name)
    inputs = left_padded()
    beams = model.generate(**inputs, **SETTINGS, num_beams=3)
    assert torch.equal(beams, model.generate(**inputs, **SETTINGS, num_beams=3, use_cache=False))
    assert torch.equal(beams, model.generate(**inputs, **SETTINGS, num_beams=3, cache_implementation="static"))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_text_read_in_chunks(name: str, cache: str | None) -> None:
    model, plain, P = prompted(name)
    inputs = left_padded()
    found = model.generate(**inputs, **SETTINGS, prefill_chunk_size=5, cache_implementation=cache)
    assert torch.equal(found[:, -6:], by_hand(plain, P, inputs))


def test_generation_from_embeddings() -> None:
    model, plain, P = prompted("llama")
    inputs = left_padded()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **SETTINGS)
    assert torch.equal(found, by_hand(plain, P, inputs))


@pytest.mark.parametrize("where", [None, "decoder.stack", "stack"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_generates(name: str, where: str | None) -> None:
    model, inputs = MODELS[name]()
    dt.attach(model, RANDOM, where=where)
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    start = torch.tensor([model.config.decoder_start_token_id])
    settings = {key: value for key, value in SETTINGS.items() if key != "pad_token_id"}
    rows = []
    with torch.no_grad():
        for ids, mask in zip(text["input_ids"], text["attention_mask"].bool(), strict=True):
            row = ids[mask][None]
            rows.append(greedy(lambda ids, row=row: model(row, decoder_input_ids=ids, use_cache=False).logits[0], start, 6))
    wanted = torch.stack(rows)
    assert torch.equal(model.generate(**text, **settings)[:, -6:], wanted)
    assert torch.equal(model.generate(**text, **settings, cache_implementation="static")[:, -6:], wanted)
    beams = model.generate(**text, **settings, num_beams=3)
    assert torch.equal(beams, model.generate(**text, **settings, num_beams=3, use_cache=False))


def test_a_static_cache_with_windows_has_room_for_the_prompt() -> None:
    """Its windows are as long as the text at first, and longer than that with the prompt."""
    model, _ = MODELS["mistral"]()
    model.config.sliding_window = 20
    plain = plain_eager(model)
    P = dt.attach(model, RANDOM).patches[0].P.detach()
    inputs = left_padded()
    found = model.generate(**inputs, **SETTINGS, cache_implementation="static")
    assert torch.equal(found[:, -6:], by_hand(plain, P, inputs))


def test_a_static_cache_that_was_filled_before_is_enlarged_once() -> None:
    model, plain, P = prompted("llama")
    ids = tokens()["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=18)
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=8, dtype=torch.float32, device=torch.device("cpu"))
    wanted = by_hand(plain, P, tokens())
    for _ in range(2):
        assert torch.equal(model.generate(ids, **SETTINGS, past_key_values=cache)[:, -6:], wanted)
        assert cache.layers[0].max_cache_len == 18 + VIRTUAL
        cache.reset()


def test_a_compiled_step_decodes_with_a_static_cache() -> None:
    torch.compiler.reset()
    model, plain, P = prompted("llama")
    model.requires_grad_(False)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, cache = tokens()["input_ids"], StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        found = [model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)]
        for position in range(12, 16):
            found.append(step(found[-1], past_key_values=cache, position_ids=torch.full((2, 1), position)).logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(found, dim=1), by_hand(plain, P, tokens(), 5))


@pytest.mark.parametrize("mask", [True, False])
def test_steps_by_hand_need_no_positions(mask: bool) -> None:
    model, plain, P = prompted("llama")
    ids = tokens()["input_ids"]
    first = model(ids, use_cache=True)
    rest = {"attention_mask": torch.ones(2, 13, dtype=torch.long)} if mask else {}
    token = first.logits[:, -1:].argmax(-1)
    second = model(token, past_key_values=first.past_key_values, **rest)
    wanted = torch.stack(prompted_row_by_row(plain, P, {"input_ids": torch.cat([ids, token], 1), "attention_mask": torch.ones(2, 13)}))
    torch.testing.assert_close(second.logits[:, 0], wanted[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [True, False])
def test_a_filled_cache_given_to_generate_is_refused(mask: bool) -> None:
    model, _, _ = prompted("llama")
    cache = DynamicCache(config=model.config)
    text = model.generate(tokens()["input_ids"], **SETTINGS, past_key_values=cache)
    longer = torch.cat([text, tokens(seed=9)["input_ids"]], dim=1)
    rest = {"attention_mask": torch.ones_like(longer)} if mask else {}
    if mask:
        rest["attention_mask"][0, 0] = 0
    with pytest.raises(Unsupported, match=r"17 tokens of text and 5 virtual ones.*whole text and no cache"):
        model.generate(longer, **rest, **SETTINGS, past_key_values=cache)


def test_a_cache_of_another_prompt_is_an_error() -> None:
    model, inputs = MODELS["llama"]()
    plain_cache = model(**inputs, use_cache=True).past_key_values
    delta = dt.attach(model, RANDOM)
    with pytest.raises(InvalidValue, match="filled with 0 virtual tokens in front, but 5 act now"):
        model(inputs["input_ids"][:, :1], past_key_values=plain_cache)
    cache = model(**inputs, use_cache=True).past_key_values
    dt.attach(model, PromptTuning(2), name="other")
    with pytest.raises(InvalidValue, match="filled with 5 virtual tokens in front, but 7 act now"):
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    dt.detach(dt.deltas(model)[1])
    delta.disable()
    with pytest.raises(InvalidValue, match="filled with 5 virtual tokens in front, but 0 act now"):
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    delta.enable()
    assert model(inputs["input_ids"][:, :1], past_key_values=cache).logits.isfinite().all()


def test_more_padding_than_a_chunk_is_refused_in_a_static_cache() -> None:
    model, _, _ = prompted("llama")
    inputs = tokens()
    inputs["input_ids"][-1, :6] = inputs["attention_mask"][-1, :6] = 0
    with pytest.raises(Unsupported, match=r"more padding than one chunk.*prefill_chunk_size"):
        model.generate(**inputs, **SETTINGS, prefill_chunk_size=5, cache_implementation="static")
