"""Prompts compute what the formula says, on every text stack, against references by hand and PEFT."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import InvalidValue, NoSite, Unsupported
from deltatune.methods import LoRA, PrefixTuning, PromptTuning
from tests.injection.by_hand import plain_eager, prompted_row_by_row
from tests.models import MODELS, output, tokens

DECODERS = ("gpt2", "opt", "llama", "mistral", "qwen3", "gemma3", "phi", "phi3", "gpt_neox", "bloom", "mixtral", "qwen3_moe")
ENCODERS = ("bert", "roberta", "deberta_v2", "modernbert", "distilbert", "mpnet")
SEQ2SEQ = ("t5", "bart")
TEXT = (*DECODERS, *ENCODERS, *SEQ2SEQ)
OTHERS = ("vit", "torch_encoder", "conv_net", "mlp", "tied_mlp")
FEW = ("bert", "llama", "gemma3", "t5")
VIRTUAL = 5
RANDOM = PromptTuning(VIRTUAL, init="random")


def padded(side: str, pad_token_id: int) -> dict[str, Tensor]:
    inputs = tokens()
    where = slice(0, 3) if side == "left" else slice(-3, None)
    inputs["input_ids"][-1, where], inputs["attention_mask"][-1, where] = pad_token_id, 0
    return inputs


def frozen(name: str) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = MODELS[name]()
    return model.requires_grad_(False), inputs


def test_every_architecture_is_covered() -> None:
    assert set(TEXT) | set(OTHERS) == set(MODELS)
    assert len(TEXT) == 20


@pytest.mark.parametrize("name", TEXT)
def test_outputs_keep_the_callers_length_and_its_tensors(name: str) -> None:
    model, inputs = frozen(name)
    plain = model(**inputs, output_hidden_states=True)
    given = {key: tensor.clone() for key, tensor in inputs.items()}
    delta = dt.attach(model, RANDOM, head=False)
    assert len(delta.patches) == 1
    found = model(**inputs, output_hidden_states=True)
    assert found.logits.shape == plain.logits.shape
    assert not torch.allclose(found.logits, plain.logits)
    for key in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        if key in plain:
            assert [state.shape for state in found[key]] == [state.shape for state in plain[key]]
    assert all(torch.equal(inputs[key], tensor) for key, tensor in given.items())
    as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], found.logits)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_equal_the_reference_by_hand(name: str, side: str) -> None:
    model, _ = MODELS[name]()
    plain = plain_eager(model) if name != "bloom" else copy.deepcopy(model)
    delta = dt.attach(model, RANDOM)
    P = delta.patches[0].P
    inputs = tokens() if side == "none" else padded(side, 0)
    counted = {} if name in ("opt", "bloom") or side != "left" else {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    ours = output(model, inputs | counted)
    theirs = prompted_row_by_row(plain, P, inputs)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[mask], torch.cat(theirs), atol=1e-5, rtol=1e-5)

    direction = torch.randn_like(ours) * mask[..., None]
    (found,) = torch.autograd.grad((ours * direction).sum(), P)
    (wanted,) = torch.autograd.grad((torch.cat(theirs) * direction[mask]).sum(), P)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "qwen3", "gpt_neox"])
def test_decoders_equal_peft(name: str) -> None:
    model, _ = MODELS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PromptTuningConfig, get_peft_model

        peft = get_peft_model(copy.deepcopy(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)).eval()
    delta = dt.attach(model, RANDOM)
    P, weight = delta.patches[0].P, peft.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        P.copy_(weight)
    inputs = padded("right", 0)
    ours, theirs = output(model, inputs), peft(**inputs).logits[:, VIRTUAL:]
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(ours) * mask[..., None]
    (found,) = torch.autograd.grad((ours * direction).sum(), P)
    (wanted,) = torch.autograd.grad((theirs * direction).sum(), weight)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_equal_the_reference_by_hand(name: str) -> None:
    """The hidden states of each row alone; unpadded, so the tables and relative positions of the model's own apply."""
    model, inputs = MODELS[name]()
    base, plain = model.base_model, copy.deepcopy(model.base_model)
    P = dt.attach(model, RANDOM).patches[0].P
    ours = base(**inputs).last_hidden_state
    for row, ids, mask in zip(ours, inputs["input_ids"], inputs["attention_mask"], strict=True):
        real = ids[mask.bool()]
        text = plain.get_input_embeddings()(real)
        theirs = plain(inputs_embeds=torch.cat([P, text])[None]).last_hidden_state[0, VIRTUAL:]
        torch.testing.assert_close(row[: len(real)], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["roberta", "mpnet", "deberta_v2"])
def test_encoders_padded_on_the_left_equal_unpadded_ones(name: str) -> None:
    model, _ = MODELS[name]()
    dt.attach(model, RANDOM)
    inputs = padded("left", model.config.pad_token_id)
    found = model.base_model(**inputs).last_hidden_state[-1, 3:]
    alone = model.base_model(inputs["input_ids"][-1:, 3:]).last_hidden_state[0]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet"])
def test_a_pooler_reads_the_first_token_of_the_text(name: str) -> None:
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(MODELS[name]()[0].config).eval()
    assert model.pooler is not None
    dt.attach(model, RANDOM)
    found = model(**tokens())
    assert found.last_hidden_state.shape[1] == 12
    torch.testing.assert_close(found.pooler_output, model.pooler(found.last_hidden_state))


def test_token_types_grow_with_the_prompt() -> None:
    model, inputs = MODELS["bert"]()
    plain = copy.deepcopy(model.bert)
    P = dt.attach(model, RANDOM).patches[0].P
    types = torch.ones_like(inputs["input_ids"])
    found = model.bert(inputs["input_ids"][:1], token_type_ids=types[:1]).last_hidden_state
    embeds = torch.cat([P[None], plain.get_input_embeddings()(inputs["input_ids"][:1])], dim=1)
    longer = torch.cat([torch.zeros(1, VIRTUAL, dtype=torch.long), types[:1]], dim=1)
    wanted = plain(inputs_embeds=embeds, token_type_ids=longer).last_hidden_state[:, VIRTUAL:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_given_embeddings_equal_given_ids(name: str) -> None:
    model, inputs = MODELS[name]()
    dt.attach(model, RANDOM)
    rest = {key: tensor for key, tensor in inputs.items() if key != "input_ids"}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(model(inputs_embeds=embeds, **rest).logits, output(model, inputs), atol=1e-6, rtol=1e-6)


def test_the_loss_counts_the_first_token_of_the_text_as_without_a_prompt() -> None:
    model, inputs = MODELS["llama"]()
    dt.attach(model, RANDOM)
    ids = inputs["input_ids"]
    found = model(**inputs, labels=ids)
    wanted = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found.loss, wanted)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_the_encoder_of_an_encoder_decoder_equals_the_reference_by_hand(name: str) -> None:
    from transformers.modeling_outputs import BaseModelOutput

    model, inputs = MODELS[name]()
    plain = copy.deepcopy(model)
    delta = dt.attach(model, RANDOM)
    assert [entry.site.role for entry in delta.entries if not entry.head] == ["encoder.stack"]
    encoder, found = plain.get_encoder(), output(model, inputs)
    for i, mask in enumerate(inputs["attention_mask"]):
        text = encoder.get_input_embeddings()(inputs["input_ids"][i, mask.bool()])
        states = encoder(inputs_embeds=torch.cat([delta.patches[0].P, text])[None]).last_hidden_state[:, VIRTUAL:]
        wanted = plain(encoder_outputs=BaseModelOutput(states), decoder_input_ids=inputs["decoder_input_ids"][i : i + 1]).logits
        torch.testing.assert_close(found[i], wanted[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_decoder_of_an_encoder_decoder_takes_a_prompt_too(name: str) -> None:
    model, inputs = MODELS[name]()
    plain = copy.deepcopy(model)
    delta = dt.attach(model, RANDOM, where="decoder.stack")
    text = plain.get_decoder().get_input_embeddings()(inputs["decoder_input_ids"])
    embeds = torch.cat([delta.patches[0].P[None].expand(2, -1, -1), text], dim=1)
    wanted = plain(inputs["input_ids"], attention_mask=inputs["attention_mask"], decoder_inputs_embeds=embeds).logits[:, VIRTUAL:]
    torch.testing.assert_close(output(model, inputs), wanted, atol=1e-5, rtol=1e-5)


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {path: (len(module._forward_pre_hooks), len(module._forward_hooks)) for path, module in model.named_modules()}


@pytest.mark.parametrize("name", FEW)
def test_a_disabled_prompt_leaves_the_very_bits_and_a_detached_one_no_trace(name: str) -> None:
    model, inputs = frozen(name)
    plain, before, config = output(model, inputs), hooks(model), model.config
    delta = dt.attach(model, RANDOM)
    acting = output(model, inputs)
    delta.disable()
    assert torch.equal(output(model, inputs), plain)
    delta.enable()
    assert torch.equal(output(model, inputs), acting)
    dt.detach(delta)
    assert torch.equal(output(model, inputs), plain)
    assert hooks(model) == before
    assert model.config is config


def test_prompts_of_different_lengths_concatenate_in_order() -> None:
    model, inputs = MODELS["mistral"]()
    plain = plain_eager(model)
    first = dt.attach(model, RANDOM, name="first")
    second = dt.attach(model, PromptTuning(2, init="random"), name="second")
    P = torch.cat([first.patches[0].P, second.patches[0].P])
    torch.testing.assert_close(output(model, inputs), torch.stack(prompted_row_by_row(plain, P, inputs)), atol=1e-5, rtol=1e-5)
    first.disable()
    wanted = torch.stack(prompted_row_by_row(plain, second.patches[0].P, inputs))
    torch.testing.assert_close(output(model, inputs), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_prompt_a_prefix_and_lora_act_together(name: str) -> None:
    model, inputs = MODELS[name]()
    names = {"lora": LoRA(rank=2), "prefix": PrefixTuning(4, reparameterization=False, init_std=1.0), "prompt": RANDOM}
    deltas = {key: dt.attach(model, method, name=key, head=False) for key, method in names.items()}
    with torch.no_grad():
        for parameter in deltas["lora"].parameters():
            parameter.add_(0.1)
    together = output(model, inputs)
    assert together.shape == MODELS[name]()[0](**inputs).logits.shape
    for delta in deltas.values():
        delta.disable()
        assert not torch.allclose(output(model, inputs), together)
        delta.enable()
    torch.testing.assert_close(output(model, inputs), together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_a_deep_copy_and_a_pickle_are_independent(name: str) -> None:
    model, inputs = frozen(name)
    delta = dt.attach(model, RANDOM, head=False)
    acting = output(model, inputs)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        delta.patches[0].P.zero_()
    for twin in copies:
        assert torch.equal(output(twin, inputs), acting)
        dt.detach(dt.deltas(twin)[0])
        assert not hasattr(twin, "deltatune")
    assert not torch.equal(output(model, inputs), acting)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FEW)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, inputs = MODELS[name]()
    model.config.use_cache = False
    P = dt.attach(model, RANDOM, head=False).patches[0].P
    model.train()
    torch.manual_seed(3)
    found = output(model, inputs)
    direction = torch.randn_like(found)
    (wanted,) = torch.autograd.grad((found * direction).sum(), P)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(3)
    (output(model, inputs) * direction).sum().backward()
    torch.testing.assert_close(P.grad, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_it_compiles_whole(name: str) -> None:
    torch.compiler.reset()
    model, inputs = frozen(name)
    P = dt.attach(model, RANDOM, head=False).patches[0].P
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    acting, found = output(model, inputs), output(compiled, inputs)
    torch.testing.assert_close(found, acting, atol=1e-5, rtol=1e-5)
    (one,), (other,) = (torch.autograd.grad(result.square().sum(), P) for result in (found, acting))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_backbone_in_bfloat16_keeps_its_type_and_the_prompt_its_own() -> None:
    model, inputs = MODELS["llama"]()
    model.to(torch.bfloat16)
    delta = dt.attach(model, RANDOM)
    assert delta.patches[0].P.dtype == torch.float32
    found = output(model, inputs)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    assert delta.patches[0].P.grad.dtype == torch.float32
    assert model.float() is model


def test_an_offloaded_backbone_gives_its_embeddings_to_a_fresh_prompt() -> None:
    from accelerate import cpu_offload

    model, inputs = MODELS["llama"]()
    table = model.get_input_embeddings().weight.clone()
    cpu_offload(model, execution_device=torch.device("cpu"))
    P = dt.attach(model, PromptTuning(3, init_ids=(7, 8, 9))).patches[0].P
    assert torch.equal(P, table[7:10])
    output(model, inputs).square().sum().backward()
    assert P.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["vit", "torch_encoder", "conv_net"])
def test_a_backbone_without_text_has_no_site(name: str) -> None:
    with pytest.raises(NoSite):
        dt.attach(MODELS[name]()[0], RANDOM)


def test_a_module_that_is_no_text_stack_is_refused() -> None:
    model, _ = MODELS["bert"]()
    with pytest.raises(Unsupported, match=r"`bert.encoder`"):
        dt.attach(model, RANDOM, where="bert.encoder")
    assert not hasattr(model, "deltatune")


def test_packed_sequences_are_refused() -> None:
    model, _ = MODELS["llama"]()
    dt.attach(model, RANDOM)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with pytest.raises(Unsupported, match=r"packed sequences.*PrefixTuning"):
        model(tokens()["input_ids"][:1], position_ids=positions)


def test_a_custom_mask_is_refused() -> None:
    model, inputs = MODELS["llama"]()
    dt.attach(model, RANDOM)
    with pytest.raises(Unsupported, match=r"cannot read \(\(2, 1, 12, 12\)\).*\(batch, seq\), or none"):
        model(inputs["input_ids"], attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "opt"])
def test_a_table_of_positions_that_is_too_short_is_named(name: str) -> None:
    model, inputs = MODELS[name]()
    delta = dt.attach(model, PromptTuning(53))
    with pytest.raises(InvalidValue, match=r"12 tokens of text and 53 virtual ones need 65 positions, but `.*` has 64"):
        output(model, inputs)
    dt.detach(delta)
    dt.attach(model, PromptTuning(52))
    assert output(model, inputs).isfinite().all()


@pytest.mark.parametrize("name", ["gemma3", "t5"])
def test_a_prompt_starts_from_embeddings_as_the_stack_makes_them(name: str) -> None:
    model, _ = MODELS[name]()
    embedding = model.get_input_embeddings()
    P = dt.attach(model, PromptTuning(6, init_ids=(7, 9), init_vocabulary=20)).patches[0].P
    assert torch.equal(P[:2], embedding(torch.tensor([7, 9])))
    frequent = embedding(torch.arange(20))
    assert all((frequent == row).all(-1).any() for row in P[2:])


def test_a_random_prompt_stays_in_its_range() -> None:
    model, _ = MODELS["bert"]()
    P = dt.attach(model, PromptTuning(50, init="random", init_range=0.25)).patches[0].P
    assert P.shape == (50, 32)
    assert 0.2 < P.abs().max() <= 0.25


def test_wrong_fields_are_named() -> None:
    with pytest.raises(InvalidValue, match="`num_virtual_tokens` must be greater than 0"):
        PromptTuning(0)
    with pytest.raises(InvalidValue, match=r"`init` is one of `vocabulary`, `random`, `labels`, `text`"):
        PromptTuning(init="words")
    with pytest.raises(InvalidValue, match="3 tokens for 2 virtual ones"):
        PromptTuning(2, init_ids=(1, 2, 3))
    with pytest.raises(InvalidValue, match="outside the vocabulary of 101"):
        dt.attach(MODELS["bert"]()[0], PromptTuning(2, init_ids=(500,)))
