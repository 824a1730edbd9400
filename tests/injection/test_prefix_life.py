"""What surrounds a prefix: no trace, copies, shared configs, compilation, checkpointing, precision, composition, export."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection import attention
from deltatune.methods import LoRA, PrefixTuning
from tests.injection.by_hand import plain_eager, row_by_row
from tests.models import MODELS, output, tokens

STRONG = PrefixTuning(5, reparameterization=False, init_std=1.0)
SMALL = PrefixTuning(5, mid_dim=16)
FEW = ("bert", "llama", "gemma3", "t5", "vit")


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {path: (len(module._forward_pre_hooks), len(module._forward_hooks)) for path, module in model.named_modules()}


def frozen(name: str) -> tuple[Any, dict[str, Tensor]]:
    """Frozen as attach freezes it: sdpa chooses another kernel where T5's table of positions wants gradients."""
    model, inputs = MODELS[name]()
    return model.requires_grad_(False), inputs


@pytest.mark.parametrize("name", FEW)
def test_a_disabled_prefix_leaves_the_very_bits_and_a_detached_one_no_trace(name: str) -> None:
    model, inputs = frozen(name)
    plain, before, config = output(model, inputs), hooks(model), model.config
    held = [(path, module.config) for path, module in model.named_modules() if hasattr(module, "config")]
    values = copy.deepcopy(vars(config))
    delta = dt.attach(model, STRONG)
    acting = output(model, inputs)
    assert not torch.allclose(acting, plain)
    delta.disable()
    assert torch.equal(output(model, inputs), plain)
    delta.enable()
    assert torch.equal(output(model, inputs), acting)
    with dt.disabled(model):
        assert torch.equal(output(model, inputs), plain)
    dt.detach(delta)
    assert torch.equal(output(model, inputs), plain)
    assert hooks(model) == before
    assert model.config is config
    assert vars(config) == values
    assert all(model.get_submodule(path).config is kept for path, kept in held)


def test_prefixes_are_detached_in_any_order() -> None:
    model, inputs = MODELS["bert"]()
    plain, before, config = output(model, inputs), hooks(model), model.config
    first = dt.attach(model, STRONG, name="first")
    alone = output(model, inputs)
    second = dt.attach(model, PrefixTuning(3, reparameterization=False), layers=[1], name="second")
    assert not torch.allclose(output(model, inputs), alone)
    dt.detach(first)
    dt.detach(dt.attach(model, STRONG, name="third"))
    dt.detach(second)
    assert torch.equal(output(model, inputs), plain)
    assert hooks(model) == before
    assert model.config is config


def test_another_model_of_the_same_config_object_is_not_affected() -> None:
    model, inputs = MODELS["llama"]()
    torch.manual_seed(1)
    other = type(model)(model.config).eval()
    plain = output(other, inputs)
    delta = dt.attach(model, STRONG)
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(output(other, inputs), plain)
    dt.detach(delta)
    assert model.config is other.config


def test_what_is_set_on_the_config_meanwhile_outlives_the_prefix() -> None:
    model, _ = MODELS["llama"]()
    config = model.config
    delta = dt.attach(model, STRONG)
    model.config.pad_token_id = 7
    model.config.use_cache = False
    dt.detach(delta)
    assert model.config is config
    assert (config.pad_token_id, config.use_cache, config._attn_implementation) == (7, False, "sdpa")


def test_an_attention_implementation_set_meanwhile_is_an_error_not_a_plain_forward() -> None:
    model, inputs = MODELS["llama"]()
    delta = dt.attach(model, STRONG)
    model.set_attn_implementation("eager")
    with pytest.raises(Unsupported, match=r"set to `eager` while prefixes act.*attach or load them again"):
        model(**inputs)
    dt.detach(delta)
    assert output(model, inputs).isfinite().all()


@pytest.mark.parametrize("name", FEW)
def test_a_deep_copy_and_a_pickle_are_independent(name: str) -> None:
    model, inputs = frozen(name)
    delta = dt.attach(model, STRONG, head=False)
    acting = output(model, inputs)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.zero_()
    delta.disable()
    for twin in copies:
        assert torch.equal(output(twin, inputs), acting)
        assert twin.config is not model.config
        dt.detach(dt.deltas(twin)[0])
        assert not hasattr(twin, "deltatune")
    assert torch.equal(output(model, inputs), output(copies[0], inputs))


@pytest.mark.slow
def test_a_pickle_works_in_a_fresh_process(tmp_path: Path) -> None:
    model, inputs = MODELS["t5"]()
    dt.attach(model, STRONG)
    torch.save((model, inputs, output(model, inputs)), tmp_path / "model.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); model, inputs, wanted = torch.load(sys.argv[1], weights_only=False);"
        "found = model(**inputs).logits; assert torch.equal(found, wanted), (found - wanted).abs().max();"
        "import deltatune as dt; dt.detach(dt.deltas(model)[0]); assert not torch.equal(model(**inputs).logits, wanted)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    found = output(model, inputs)
    (found * torch.randn_like(found)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FEW)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, inputs = MODELS[name]()
    model.config.use_cache = False
    dt.attach(model, SMALL)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    checkpointed = copy.deepcopy(model)
    if reentrant:
        checkpointed.enable_input_require_grads()
    checkpointed.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    found, wanted = gradients(checkpointed, inputs), gradients(model, inputs)
    assert found.keys() == wanted.keys()
    assert any("W_2" in key for key in wanted)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_it_compiles_whole(name: str) -> None:
    torch.compiler.reset()
    model, inputs = frozen(name)
    delta = dt.attach(model, SMALL, head=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    acting, found = output(model, inputs), output(compiled, inputs)
    torch.testing.assert_close(found, acting, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(acting.square().sum(), list(delta.parameters()), allow_unused=True)
    for one, other in zip(torch.autograd.grad(found.square().sum(), list(delta.parameters()), allow_unused=True), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_attaching_and_disabling_after_compilation_are_seen() -> None:
    torch.compiler.reset()
    model, inputs = frozen("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        plain = output(compiled, inputs)
        delta = dt.attach(model, SMALL)
        assert not torch.allclose(output(compiled, inputs), plain)
        torch.testing.assert_close(output(compiled, inputs), output(model, inputs), atol=1e-5, rtol=1e-5)
        delta.disable()
        torch.testing.assert_close(output(compiled, inputs), plain, atol=1e-5, rtol=1e-5)


def test_a_compiled_step_decodes_with_a_static_cache() -> None:
    from transformers import StaticCache

    torch.compiler.reset()
    model, _ = frozen("llama")
    dt.attach(model, STRONG)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, cache = tokens()["input_ids"], StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        found = [model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)]
        for position in range(12, 16):
            found.append(step(found[-1], past_key_values=cache, position_ids=torch.full((2, 1), position)).logits[:, -1:].argmax(-1))
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, -5:]
    assert torch.equal(torch.cat(found, dim=1), wanted)


def test_training_mode_differs_by_dropout_only() -> None:
    model, inputs = MODELS["bert"]()
    delta = dt.attach(model, STRONG)
    model.train()
    torch.manual_seed(5)
    first = output(model, inputs)
    torch.manual_seed(6)
    second = output(model, inputs)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    assert all(
        parameter.grad is None for path, parameter in model.named_parameters() if "deltatune" not in path and "classifier" not in path
    )


def test_a_backbone_in_bfloat16_keeps_its_type_and_the_prefix_its_own() -> None:
    model, inputs = MODELS["llama"]()
    exact = copy.deepcopy(model)
    dt.attach(exact, STRONG)
    model.to(torch.bfloat16)
    delta = dt.attach(model, STRONG)
    delta.load_state_dict(dt.deltas(exact)[0].state_dict())
    found = output(model, inputs)
    assert found.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in delta.parameters()} == {torch.float32}
    assert (found.float() - output(exact, inputs)).abs().mean() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        automatic = output(exact, inputs)
    assert (automatic.float() - output(exact, inputs)).abs().mean() < 0.05


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_an_offloaded_backbone(name: str) -> None:
    from accelerate import cpu_offload

    model, inputs = MODELS[name]()
    delta = dt.attach(model, SMALL, head=False)
    wanted, state = output(model, inputs), delta.state_dict()
    dt.detach(delta)
    cpu_offload(model, execution_device=torch.device("cpu"))  # its weights wait elsewhere, and are on "meta" meanwhile
    delta = dt.attach(model, SMALL, head=False)
    delta.load_state_dict(state)
    found = output(model, inputs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    found.square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in delta.named_parameters())


@pytest.mark.parametrize("name", ["bert", "gpt2", "mistral", "t5"])
def test_prefixes_of_different_lengths_concatenate_in_order(name: str) -> None:
    model, inputs = MODELS[name]()
    plain = plain_eager(model)
    first = dt.attach(model, STRONG, name="first", head=False)
    second = dt.attach(model, PrefixTuning(2, reparameterization=False, init_std=1.0), name="second", head=False)
    prefixes = {
        one.site.path: (torch.cat([one.patch.P_k, other.patch.P_k], dim=1), torch.cat([one.patch.P_v, other.patch.P_v], dim=1))
        for one, other in zip(first.entries, second.entries, strict=True)
    }
    wanted = row_by_row(plain, prefixes, inputs, 7)
    for row, theirs in zip(output(model, inputs), wanted, strict=True):
        torch.testing.assert_close(row[: len(theirs)], theirs, atol=1e-5, rtol=1e-5)
    second.disable()
    alone = {entry.site.path: (entry.patch.P_k, entry.patch.P_v) for entry in first.entries}
    for row, theirs in zip(output(model, inputs), row_by_row(plain_eager(MODELS[name]()[0]), alone, inputs, 5), strict=True):
        torch.testing.assert_close(row[: len(theirs)], theirs, atol=1e-5, rtol=1e-5)


def test_a_prefix_and_lora_act_together() -> None:
    model, inputs = MODELS["llama"]()
    lora = dt.attach(model, LoRA(rank=2), name="lora")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(0.1)
    alone = output(model, inputs)
    prefix = dt.attach(model, STRONG, name="prefix")
    both = output(model, inputs)
    lora.disable()
    only_prefix = output(model, inputs)
    assert not torch.allclose(both, alone)
    assert not torch.allclose(both, only_prefix)
    lora.enable()
    prefix.disable()
    assert torch.equal(output(model, inputs), alone)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_export_drops_the_mlp_and_keeps_the_outputs(name: str) -> None:
    model, inputs = MODELS[name]()
    method = PrefixTuning(5, mid_dim=16)
    delta = dt.attach(model, method, head=False)
    training = delta.budget().delta
    acting = output(model, inputs)
    assert not method.is_exported(delta.patches)
    method.export(delta.patches, delta.shared)
    assert method.is_exported(delta.patches)
    assert torch.equal(output(model, inputs), acting)
    heads, length, head_dim = delta.patches[0].shape
    assert sum(parameter.numel() for parameter in delta.parameters()) == len(delta.patches) * 2 * heads * length * head_dim < training
    assert {name.rpartition(".")[2] for name, _ in delta.named_parameters()} == {"P_k", "P_v"}
    method.export(delta.patches, delta.shared)
    assert torch.equal(output(model, inputs), acting)


def test_the_mlp_is_shared_by_all_sites_and_trained_once() -> None:
    model, inputs = MODELS["llama"]()
    delta = dt.attach(model, PrefixTuning(5, mid_dim=16))
    names = [name for name, _ in delta.named_parameters()]
    assert names[:3] == ["shared.E", "shared.W_1", "shared.c_1"]
    assert [name.rpartition(".")[2] for name in names[3:]] == ["W_2", "c_2"] * 2
    output(model, inputs).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in delta.parameters())
    made = delta.patches[1]()
    hidden = torch.tanh(delta.shared.E @ delta.shared.W_1.T + delta.shared.c_1)
    flat = hidden @ delta.patches[1].W_2.T + delta.patches[1].c_2  # (virtual, 2 * heads * head_dim)
    torch.testing.assert_close(torch.stack([part.transpose(0, 1) for part in made], dim=1).reshape(5, -1), flat)


@pytest.mark.parametrize("field", ["num_virtual_tokens", "mid_dim", "init_std"])
def test_fields_must_be_positive(field: str) -> None:
    with pytest.raises(InvalidValue, match=f"`{field}` must be greater than 0"):
        PrefixTuning(**{field: 0})


def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """A flash kernel's contract: a mask (batch, keys) or none, causality aligned to the last key, and its own name in the config."""
    assert module.config._attn_implementation == "flash_test"
    assert mask is None or mask.ndim == 2
    queries, keys = query.shape[2], key.shape[2]
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    visible = visible if mask is None else visible & mask[:, None, None].bool()
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    made = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=kwargs["scaling"])
    return made.transpose(1, 2), None


@pytest.fixture
def flash_llama() -> Any:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("flash_test", flash)
    AttentionMaskInterface.register("flash_test", flash_attention_mask)
    model, _ = MODELS["llama"]()
    model.config._attn_implementation_internal = "flash_test"  # its setter would look for a flash library
    return model


def test_a_flash_kernel_sees_its_own_name_and_a_longer_mask(flash_llama: Any) -> None:
    reference, _ = MODELS["llama"]()
    delta = dt.attach(flash_llama, STRONG)
    other = dt.attach(reference, STRONG)
    other.load_state_dict(delta.state_dict())
    assert flash_llama.config._attn_implementation == "deltatune_flash_test"
    inputs = tokens()
    torch.testing.assert_close(output(flash_llama, inputs), output(reference, inputs), atol=1e-5, rtol=1e-5)
    inputs["attention_mask"][-1, :3] = 0
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(output(flash_llama, inputs)[mask], output(reference, inputs)[mask], atol=1e-5, rtol=1e-5)


def test_a_flash_kernel_would_hide_the_prefix_behind_a_window() -> None:
    query = key = torch.zeros(1, 1, 6, 4)
    with pytest.raises(Unsupported, match=r"window of 8 tokens.*attn_implementation='sdpa'"):
        attention._refuse(True, key, 3, {"sliding_window": 8})
    attention._refuse(True, key, 2, {"sliding_window": 8})
    attention._refuse(False, query, 3, {"sliding_window": 8})
    with pytest.raises(Unsupported, match=r"packed sequences.*pad instead"):
        attention._refuse(True, key, 3, {"cu_seq_lens_q": torch.zeros(2)})
    with pytest.raises(Unsupported, match="paged cache"):
        attention._refuse(False, key, 3, {"cache": object()})


def test_a_missing_mask_that_means_causal_becomes_a_mask() -> None:
    query, key = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    extended = attention.extend_mask(None, query, key, 2, causal=True)
    assert extended is not None
    assert extended[0, 0].tolist() == [[True, True, True, False, False], [True, True, True, True, False], [True] * 5]
    assert attention.extend_mask(None, query, key, 2, causal=False) is None
