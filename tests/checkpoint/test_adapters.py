"""The adapters library's folders: what is read computes what its formulas compute, and everything else is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deltatune as dt
from deltatune.errors import CheckpointError, DeltaError, Unsupported
from deltatune.injection.delta import Delta
from tests.checkpoint.fixtures.checks import Change, check_outputs, check_refused
from tests.checkpoint.fixtures.formulas import Draw, computing
from tests.checkpoint.fixtures.write_adapters import CASES, make, write
from tests.models import MODELS, output


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_outputs(kind: str, name: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name]()
    made = make(kind, name, model)
    check_outputs(model, inputs, made, write(tmp_path / "theirs", name, made), "adapters", tmp_path / "native")


def test_safetensors_need_no_leave(tmp_path: Path) -> None:
    model, inputs = MODELS["bert"]()
    made = make("lora", "bert", model)
    with torch.no_grad(), computing(model, made):
        expected = output(model, inputs)
    dt.load(model, write(tmp_path / "theirs", "bert", made, safe=True))
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-4, rtol=1e-4)


def test_a_pickle_is_asked_for(tmp_path: Path) -> None:
    model, _ = MODELS["bert"]()
    folder = write(tmp_path / "theirs", "bert", make("lora", "bert", model))
    with pytest.raises(CheckpointError, match=r"is a pickle.*--allow-bin"):
        dt.load(model, folder)


def test_a_head_goes_with_it(tmp_path: Path) -> None:
    model, inputs = MODELS["bert"]()
    made, draw = make("double_seq_bn", "bert", model), Draw(9)
    made.values = {key: draw(*model.get_parameter(key).shape) for key in ("classifier.weight", "classifier.bias")}
    with torch.no_grad(), computing(model, made):
        expected = output(model, inputs)
    folder = write(tmp_path / "theirs", "bert", made)
    delta = dt.load(model, folder, allow_bin=True)
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(delta, Delta) and "classifier.weight" in delta.state_dict()


def test_an_lm_head_that_is_the_backbones_own_is_none(tmp_path: Path) -> None:
    model, _ = MODELS["gpt2"]()
    made = make("double_seq_bn", "gpt2", model)
    made.values = {"lm_head.weight": model.get_parameter("transformer.wte.weight").detach().clone()}
    delta = dt.load(model, write(tmp_path / "theirs", "gpt2", made), allow_bin=True)
    assert not [key for key in delta.state_dict() if key.startswith("lm_head")]  # type: ignore[union-attr]
    made.values["lm_head.weight"] += 1
    dt.detach(delta)
    with pytest.raises(Unsupported, match=r"holds a head that is none of this GPT2LMHeadModel: `lm_head.weight`"):
        dt.load(model, write(tmp_path / "other", "gpt2", made), allow_bin=True)


def test_a_flexible_head_is_left_out_when_allowed(tmp_path: Path) -> None:
    model, _ = MODELS["bert"]()
    made = make("lora", "bert", model)
    made.values = {"heads.tune.1.weight": torch.ones(3, 32)}
    folder = write(tmp_path / "theirs", "bert", made)
    with pytest.raises(Unsupported, match=r"`heads.tune.1.weight`"):
        dt.load(model, folder, allow_bin=True)
    assert len(list(dt.deltas(model))) == 0
    dt.load(model, folder, allow_bin=True, allow_unknown=True)


def test_layers_left_out_have_no_prefix(tmp_path: Path) -> None:
    model, _ = MODELS["bert"]()
    made = make("flat_prefix", "bert", model)
    made.tensors = {key: tensor[: tensor.numel() // 2] for key, tensor in made.tensors.items()}
    delta = dt.load(model, write(tmp_path / "theirs", "bert", made, leave_out=[0]), allow_bin=True, head=False)
    keys = {key.rpartition(".")[0] for key in delta.state_dict()}  # type: ignore[union-attr]
    assert keys == {"bert.encoder.layer.1.attention.self"}


def test_old_releases_trained_lora_with_a_scale_of_1(tmp_path: Path) -> None:
    model, _ = MODELS["bert"]()
    made = make("lora", "bert", model)
    for version, scale in (("1.0.1", 1.0), ("1.1.0", 2.0)):
        delta = dt.load(model, write(tmp_path / version, "bert", made, version=version), name="x", allow_bin=True)
        assert isinstance(delta, Delta)
        assert {entry.patch.scale for entry in delta.entries} == {scale}
        dt.detach(delta)


def test_a_scaled_serial_adapter_is_read_when_allowed(tmp_path: Path) -> None:
    model, inputs = MODELS["bert"]()
    made = make("double_seq_bn", "bert", model)
    folder = write(tmp_path / "theirs", "bert", made, scaling=2.0)
    with pytest.raises(CheckpointError, match=r"scaling = 2.0.*further training would not"):
        dt.load(model, folder, allow_bin=True)
    dt.load(model, folder, allow_bin=True, allow_unknown=True)
    found = output(model, inputs)
    twice, _ = MODELS["bert"]()
    for key in made.tensors:
        if ".adapter_up." in key:
            made.tensors[key] = 2 * made.tensors[key]
    dt.load(twice, write(tmp_path / "twice", "bert", made), allow_bin=True)
    assert torch.equal(output(twice, inputs), found)


def test_an_ia3_behind_the_feed_forward_network(tmp_path: Path) -> None:
    """``output_lora``: the library scales what the last matrix returns."""
    model, inputs = MODELS["bert"]()
    made, path, scale = make("ia3", "bert", model), "bert.encoder.layer.0.output.dense", 1 + Draw(9)(32, 1)
    made.tensors[f"{path}.loras.tune.lora_B"] = scale
    made.formulas[path] = lambda x, y: y * scale.view(-1)
    with torch.no_grad(), computing(model, made):
        expected = output(model, inputs)
    delta = dt.load(model, write(tmp_path / "theirs", "bert", made, output_lora=True), allow_bin=True)
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-4, rtol=1e-4)
    dt.save(delta, tmp_path / "native")
    dt.detach(delta)
    dt.load(model, tmp_path / "native")
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-4, rtol=1e-4)


REFUSED: list[tuple[str, Change, type[DeltaError], str]] = [
    ("lora", lambda c, t: c.update(architecture="reft"), Unsupported, "architecture = 'reft'"),
    ("lora", lambda c, t: c.update(use_dora=True), Unsupported, "use_dora = True"),
    ("lora", lambda c, t: c.update(use_gating=True), Unsupported, "use_gating = True"),
    ("lora", lambda c, t: c.update(vera_d=0.1), Unsupported, "vera_d = 0.1"),
    ("lora", lambda c, t: c.update(composition_mode="twist"), Unsupported, "composition_mode"),
    ("lora", lambda c, t: c.update(novelty=[1]), CheckpointError, "novelty = [1]"),
    ("lora", lambda c, t: c.update(r="four"), CheckpointError, "r = 'four'"),
    ("lora", lambda c, t: t.pop(next(iter(t))), CheckpointError, "lacks `lora_A`"),
    ("lora", lambda c, t: t.clear(), CheckpointError, "holds no LoRA"),
    ("lora", lambda c, t: t.update(stranger=torch.ones(1)), CheckpointError, "`stranger`"),
    ("lora", lambda c, t: t.update({next(iter(t)): torch.full((4, 32), torch.inf)}), CheckpointError, "NaN or infinity"),
    ("double_seq_bn", lambda c, t: c.update(original_ln_after=False), Unsupported, "original_ln_after = False"),
    ("seq_bn", lambda c, t: c.update(residual_before_ln=False), Unsupported, "original_ln_before = True with"),
    ("seq_bn", lambda c, t: c.update(is_parallel=True), Unsupported, "original_ln_before = True with"),
    ("compacter", lambda c, t: c.update(original_ln_before=True), Unsupported, "original_ln_before = True with"),
    ("compacter", lambda c, t: c.update(is_parallel=True), Unsupported, "phm_layer with is_parallel"),
    ("double_seq_bn", lambda c, t: c.update(ln_after=True), Unsupported, "ln_after = True"),
    ("double_seq_bn", lambda c, t: c.update(inv_adapter="nice"), Unsupported, "inv_adapter = 'nice'"),
    ("double_seq_bn", lambda c, t: c.update(non_linearity="mish"), Unsupported, "activation `mish`"),
    ("compacter", lambda c, t: t.pop("bert.shared_parameters.tune.phm_rule"), CheckpointError, "shared_parameters.tune.phm_rule"),
    ("compacter", lambda c, t: c.update(phm_bias=False), Unsupported, "phm_bias = False"),
    ("flat_prefix", lambda c, t: c.update(prefix_length=7), CheckpointError, "(1, 640)"),
    ("prefix", lambda c, t: c.update(use_gating=True), Unsupported, "use_gating = True"),
]


@pytest.mark.parametrize(("kind", "change", "error", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_refused(kind: str, change: Change, error: type[DeltaError], said: str, tmp_path: Path) -> None:
    model, _ = MODELS["bert"]()
    made = make(kind, "bert", model)
    change(made.config, made.tensors)
    check_refused(model, write(tmp_path / "theirs", "bert", made), error, said)


def test_a_parallel_adapter_ahead_of_a_norm_is_refused(tmp_path: Path) -> None:
    model, _ = MODELS["bert"]()
    folder = write(tmp_path / "theirs", "llama", make("par_bn", "bert", model))
    with pytest.raises(Unsupported, match=r"is_parallel = True for a `llama`"):
        dt.load(model, folder, allow_bin=True)
