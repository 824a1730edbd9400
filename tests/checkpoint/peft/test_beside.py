"""What trains beside a type, and every kind of module: ours opens PEFT's folder, PEFT opens ours, and the weights are the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deltatune as dt
from deltatune.errors import CheckpointError, DeltaError, Unsupported
from deltatune.methods import BitFit, LoRA
from tests.checkpoint.peft.cases import Case, adalora, lora, meaning, reopened, result, save, theirs
from tests.conformance.cells import fresh, shake
from tests.methods.oracles.hosts import HOSTS
from tests.models import Example, tokens

IDS = tokens()["input_ids"][0, :3].tolist()

Config = Callable[[], Any]

BESIDE: dict[str, tuple[str, Config, tuple[str, ...]]] = {
    "head": ("bert", lambda: lora(target_modules=["query"], task_type="SEQ_CLS"), ()),
    "head-ia3": ("bert", lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[], task_type="SEQ_CLS"), ()),
    "head-prefix": ("bert", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"), ()),
    "modules": ("bert", lambda: lora(target_modules=["query"], modules_to_save=["classifier", "pooler"]), ("modules",)),
    "modules-llama": ("llama", lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]), ("modules",)),
    "biases": ("bert", lambda: lora(target_modules=["query"], bias="lora_only"), ("bias",)),
    "all-biases": ("bert", lambda: lora(target_modules=["query"], bias="all"), ("bias",)),
    "biases-oft": ("bert", lambda: peft.OFTConfig(oft_block_size=4, target_modules=["query"], bias="oft_only"), ("bias",)),
    "biases-vera": ("bert", lambda: peft.VeraConfig(r=4, target_modules=["query"], bias="vera_only"), ("bias",)),
    "biases-miss": ("bert", lambda: peft.MissConfig(r=4, target_modules=["query"], bias="MiSS_only"), ("bias",)),
    "biases-adalora": ("bert", lambda: adalora(target_modules=["query"], bias="lora_only"), ("bias",)),
    "tokens": ("llama", lambda: lora(target_modules=["q_proj"], trainable_token_indices=IDS), ("tokens",)),
    "tokens-two-tables": (
        "llama",
        lambda: lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": IDS, "lm_head": IDS[:1]}),
        ("tokens", "tokens-2"),
    ),
    "tokens-tied": ("gpt2", lambda: lora(target_modules=["c_fc"], trainable_token_indices=IDS, fan_in_fan_out=True), ("tokens",)),
    "tokens-t5": ("t5", lambda: lora(target_modules=["q"], trainable_token_indices={"shared": IDS}), ("tokens",)),
    "everything": (
        "bert",
        lambda: lora(
            target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["pooler"], bias="lora_only", trainable_token_indices=IDS
        ),
        ("bias", "tokens", "modules"),
    ),
    "tokens-alone-tied": ("gpt2", lambda: peft.TrainableTokensConfig(token_indices=IDS), ()),
    "conv1d-gpt2": ("gpt2", lambda: lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), ()),
    "embedding-bert": ("bert", lambda: lora(target_modules=["word_embeddings", "query"]), ()),
}


@pytest.mark.parametrize("name", BESIDE)
def test_beside_a_type(name: str, tmp_path: Path) -> None:
    model, config, parts = BESIDE[name]
    _both_ways(fresh(model), config, tmp_path, parts)


PLACES: list[tuple[str, str]] = [
    *(("lora", host) for host in ("conv1d", "conv2d", "conv3d", "conv2d-strided", "embedding", "embedding-padding", "transposed")),
    *(("dora", host) for host in ("conv1d", "conv2d", "conv3d", "embedding")),
    *(("hira", host) for host in ("conv1d", "conv2d-strided", "conv3d", "embedding", "transposed")),
    *(("loha", host) for host in ("conv1d", "conv2d", "conv2d-grouped")),
    *(("lokr", host) for host in ("conv1d", "conv2d", "conv2d-strided")),
    *(("lokr-whole", host) for host in ("conv2d", "conv2d-strided")),
    *(("adalora", host) for host in ("conv2d", "transposed")),
    *(("oft", host) for host in ("conv2d-1x1", "embedding")),
    ("vera", "transposed"),
]
KINDS: dict[str, Callable[[list[str]], Any]] = {
    "lora": lambda targets: lora(target_modules=targets),
    "dora": lambda targets: lora(target_modules=targets, use_dora=True),
    "hira": lambda targets: peft.HiraConfig(r=3, target_modules=targets),
    "loha": lambda targets: peft.LoHaConfig(r=3, target_modules=targets),
    "lokr": lambda targets: peft.LoKrConfig(r=1, target_modules=targets),
    "lokr-whole": lambda targets: peft.LoKrConfig(r=8, target_modules=targets),
    "adalora": lambda targets: adalora(target_modules=targets),
    "oft": lambda targets: peft.OFTConfig(oft_block_size=2, target_modules=targets),
    "vera": lambda targets: peft.VeraConfig(r=3, target_modules=targets),
}


@pytest.mark.parametrize(("kind", "host"), PLACES)
def test_every_kind_of_module(kind: str, host: str, tmp_path: Path) -> None:
    _both_ways(HOSTS[host].build(), lambda: KINDS[kind](list(HOSTS[host].targets)), tmp_path)


@pytest.mark.parametrize("host", ["raw-kernel", "raw-stack"])
def test_raw_parameters(host: str, tmp_path: Path) -> None:
    _both_ways(HOSTS[host].build(), lambda: lora(target_modules=[], target_parameters=list(HOSTS[host].parameters)), tmp_path)


def test_two_raw_parameters_of_one_module(tmp_path: Path) -> None:
    """PEFT nests one inside the other."""
    both = ["inner.kernel", "inner.stack"]
    config = lambda: lora(target_modules=[], target_parameters=both, rank_pattern={"inner.kernel": 2})  # noqa: E731
    _both_ways(HOSTS["raw-kernel"].build(), config, tmp_path)
    assert meaning(tmp_path / "ours")["target_parameters"] == both


@pytest.mark.parametrize(
    ("kind", "host", "words"),
    [
        ("lora", "conv2d-grouped", "grouped"),
        ("lora", "conv2d-circular", "padded otherwise"),
        ("lora", "attention", "attention"),
        ("lokr-whole", "conv1d", "wrong axes"),
        ("oft", "conv2d", "wide kernel"),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_where_peft_computes_otherwise(kind: str, host: str, words: str, tmp_path: Path) -> None:
    """Neither way: PEFT's folder is refused, and so is ours."""
    from deltatune.methods import OFT, LoKr, LoRA

    backbone, _ = HOSTS[host].build()
    save(theirs(Case(kind, host, lambda: KINDS[kind](list(HOSTS[host].targets))), backbone), tmp_path / "theirs")
    with pytest.raises(Unsupported, match=words):
        dt.load(backbone, tmp_path / "theirs", name="read")
    ours = {"lora": LoRA(rank=2), "lokr-whole": LoKr(rank=8), "oft": OFT(block_size=2)}[kind]
    delta = dt.attach(backbone, ours, HOSTS[host].where, head=False)
    with pytest.raises(Unsupported, match="PEFT"):
        dt.save(delta, tmp_path / "ours", format="peft")
    assert not (tmp_path / "ours").exists()


def test_pissa(tmp_path: Path) -> None:
    """PEFT's folder counts from the singular vectors of the weight; ours goes out as a LoRA of twice the rank."""
    for alpha in (4, 8):
        backbone, inputs = fresh("bert")
        asked = partial(lora, target_modules=["query"], lora_alpha=alpha, init_lora_weights="pissa")
        model = theirs(Case("pissa", "bert", asked), backbone)
        save(model, tmp_path / f"theirs{alpha}")
        expected = result(model, inputs)
        delta = dt.load(backbone, tmp_path / f"theirs{alpha}", name="read")
        assert isinstance(delta, dt.Delta) and type(delta.method).__name__ == "PiSSA"
        torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-5)
        dt.save(delta, tmp_path / f"ours{alpha}", format="peft")
        dt.detach(delta)
        config = meaning(tmp_path / f"ours{alpha}")
        assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 8, True)
        torch.testing.assert_close(result(reopened(backbone, tmp_path / f"ours{alpha}"), inputs), expected, atol=1e-5, rtol=1e-5)
        dt.load(backbone, tmp_path / f"ours{alpha}", name="again")
        torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-5)


def goes_there_and_back(backbone: nn.Module, inputs: Any, expected: torch.Tensor, folder: Path, refused: str) -> None:
    """PEFT's ``theirs`` is read once that is asked for in so many words, and computes the same; so does ours, read by PEFT."""
    with pytest.raises(CheckpointError, match=refused):
        dt.load(backbone, folder / "theirs", name="read")
    delta = dt.load(backbone, folder / "theirs", name="read", allow_unknown=True)
    torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-5)
    dt.save(delta, folder / "ours", format="peft")
    dt.detach(delta)
    torch.testing.assert_close(result(reopened(backbone, folder / "ours"), inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("stable", "alpha"), [(False, 4), (True, 8)])
def test_olora(stable: bool, alpha: int, tmp_path: Path) -> None:
    """PEFT takes the first rows and columns of W = Q R off the weight; both factors are there to be had again."""
    backbone, inputs = fresh("bert")
    asked = partial(lora, target_modules=["query"], lora_alpha=alpha, init_lora_weights="olora", use_rslora=stable)
    model = theirs(Case("olora", "bert", asked), backbone)
    save(model, tmp_path / "theirs")
    expected = result(model, inputs)
    goes_there_and_back(backbone, inputs, expected, tmp_path, r"'olora', which is read as a LoRA of twice the rank.*allow_unknown")


@pytest.mark.filterwarnings("ignore")  # PEFT asks transformers by names that are going away
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_peft_converted_is_a_plain_lora(start: str, tmp_path: Path) -> None:
    """``path_initial_model_for_weight_conversion``."""
    backbone, inputs = fresh("bert")
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(copy.deepcopy(backbone), lora(target_modules=["query"], init_lora_weights=start))
    model.peft_config["default"].init_lora_weights = True
    save(model, tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    expected = result(model.eval(), inputs)
    delta = dt.load(backbone, tmp_path / "theirs", name="read")
    assert isinstance(delta, dt.Delta) and type(delta.method).__name__ == "LoRA"
    torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"query|q_proj": 5}}, {"bias": "lora_only"}])
@pytest.mark.parametrize(("name", "targets"), [("bert", ["query", "0.output.dense"]), ("llama", ["q_proj", "down_proj"])])
def test_a_bias_behind_the_second_factor(name: str, targets: list[str], settings: dict[str, Any], tmp_path: Path) -> None:
    """``lora_bias`` is a bias of the module: its own, or one that it gets."""
    backbone, inputs = fresh(name)
    plain = result(backbone, inputs)
    model = theirs(Case("lora-bias", name, lambda: lora(target_modules=targets, lora_bias=True, **settings)), backbone)
    save(model, tmp_path / "theirs")
    expected = result(model, inputs)
    both = dt.load(backbone, tmp_path / "theirs", name="read")
    assert isinstance(both, dt.Composition) and both.members[-1] == "read-bias"
    torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-5)
    dt.save(both, tmp_path / "native")
    dt.save(both, tmp_path / "ours", format="peft")
    written = meaning(tmp_path / "ours")
    assert (written["bias"], written["lora_bias"]) == (("lora_only", False) if name == "bert" else ("none", True))
    torch.testing.assert_close(result(reopened(fresh(name)[0], tmp_path / "ours"), inputs), expected, atol=1e-5, rtol=1e-5)
    dt.detach(both)
    assert result(backbone, inputs).equal(plain)
    dt.load(backbone, tmp_path / "native")
    torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_biases_where_only_some_modules_have_one(tmp_path: Path) -> None:
    """What trained of a module's own is its difference; a module whose bias does not train gets zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
    x = torch.randn(2, 4)
    linear = ["0", "1", "2"]
    members = [dt.attach(model, LoRA(rank=2, alpha=3), linear, name="lora"), dt.attach(model, BitFit(), linear[:2], name="bias")]
    for member in members:
        shake(member)
    both = dt.compose(model, members)
    expected = model(x)
    dt.save(both, tmp_path / "ours", format="peft")
    assert meaning(tmp_path / "ours")["lora_bias"] and meaning(tmp_path / "ours")["bias"] == "none"
    dt.detach(both)
    torch.testing.assert_close(reopened(model, tmp_path / "ours")(x), expected)
    dt.load(model, tmp_path / "ours", name="again")
    torch.testing.assert_close(model(x), expected)


def test_added_biases_that_peft_has_no_place_for(tmp_path: Path) -> None:
    backbone, _ = fresh("llama")
    recipes: list[tuple[Any, Any, Any]] = [(LoRA(rank=2), "q_proj", "k_proj"), (LoRA(rank=2), "embed_tokens", "q_proj")]
    for method, where, biased in recipes:
        members = [dt.attach(backbone, method, where, name="lora"), dt.attach(backbone, BitFit(), biased, name="bias")]
        both = dt.compose(backbone, members)
        with pytest.raises(Unsupported, match="adds a bias"):
            dt.save(both, tmp_path / "ours", format="peft")
        assert not (tmp_path / "ours").exists()
        dt.detach(both)


@pytest.mark.parametrize(
    ("config", "host"),  # PEFT's own LoKr fails on a Conv1d
    [
        (peft.LoHaConfig, "conv1d"),
        *((config, host) for config in (peft.LoHaConfig, peft.LoKrConfig) for host in ("conv2d", "conv2d-strided")),
    ],
)
def test_effective_convolutions(config: Any, host: str, tmp_path: Path) -> None:
    """Three factors, the middle one with the kernel, are two matrices."""
    backbone, inputs = HOSTS[host].build()
    asked = lambda: config(r=1, alpha=2, target_modules=list(HOSTS[host].targets), use_effective_conv2d=True)  # noqa: E731
    model = theirs(Case("effective", host, asked), backbone)
    save(model, tmp_path / "theirs")
    expected = result(model, inputs)
    assert any(key.endswith(("_t1", "_t2")) for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    goes_there_and_back(backbone, inputs, expected, tmp_path, r"use_effective_conv2d = True.*allow_unknown")


def test_a_pruned_adalora(tmp_path: Path) -> None:
    """PEFT leaves out what its mask dropped; some modules keep nothing."""
    backbone, inputs = fresh("bert")
    model = theirs(Case("adalora", "bert", lambda: adalora(target_modules=["query"])), backbone)
    layers = [f"bert.encoder.layer.{k}.attention.self.query.lora_E.default" for k in range(2)]
    model.peft_config["default"].rank_pattern = {layers[0]: [True, False, True, True], layers[1]: [False, False, True, False]}
    model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, model.peft_config["default"].rank_pattern)
    expected = result(model, inputs)
    save(model, tmp_path / "theirs")
    delta = dt.load(backbone, tmp_path / "theirs", name="read")
    assert isinstance(delta, dt.Delta) and delta.method.is_exported(delta.patches)  # type: ignore[attr-defined]
    assert [tensor.shape[0] for name, tensor in delta.state_dict().items() if name.endswith("Lambda")] == [3, 1]
    torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-5)
    dt.save(delta, tmp_path / "ours", format="peft")
    dt.detach(delta)
    assert [(folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "theirs",)] == [
        (tmp_path / "ours" / "adapter_model.safetensors").read_bytes()
    ]
    torch.testing.assert_close(result(reopened(backbone, tmp_path / "ours"), inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_vera_without_its_projection(tmp_path: Path) -> None:
    """A and B come from the seed; stored ones must be those."""
    backbone, inputs = fresh("bert")
    case = Case("vera", "bert", lambda: peft.VeraConfig(r=4, target_modules=["query"], save_projection=False, projection_prng_key=3))
    model = theirs(case, backbone)
    save(model, tmp_path / "theirs")
    delta = dt.load(backbone, tmp_path / "theirs", name="read")
    torch.testing.assert_close(result(backbone, inputs), result(model, inputs), atol=1e-5, rtol=1e-5)
    dt.detach(delta)
    text = (tmp_path / "theirs" / "adapter_config.json").read_text()
    other = theirs(Case("vera", "bert", lambda: peft.VeraConfig(r=4, target_modules=["query"])), backbone)
    save(other, tmp_path / "other")
    (tmp_path / "other" / "adapter_config.json").write_text(text)
    with pytest.raises(Unsupported, match="projection_prng_key = 3"):
        dt.load(backbone, tmp_path / "other", name="read")


def test_a_changed_table_below_an_embedding_comes_along(tmp_path: Path) -> None:
    """PEFT stores the whole table of a targeted embedding; it is left out where it is the backbone's own."""
    backbone, inputs = fresh("llama")
    save(theirs(Case("lora", "llama", lambda: lora(target_modules=["embed_tokens"])), backbone), tmp_path / "same")
    assert isinstance(dt.load(backbone, tmp_path / "same", name="same"), dt.Delta)
    grown: Any = fresh("llama")[0]
    with torch.no_grad():
        grown.model.embed_tokens.weight[3:] += 0.1
    model = theirs(Case("lora", "llama", lambda: lora(target_modules=["embed_tokens"])), grown)
    save(model, tmp_path / "other")
    plain, _ = fresh("llama")
    assert isinstance(dt.load(plain, tmp_path / "other", name="other"), dt.Composition)
    torch.testing.assert_close(result(plain, inputs), result(model, inputs), atol=1e-5, rtol=1e-5)


def test_without_the_head(tmp_path: Path) -> None:
    backbone: Any = fresh("bert")[0]
    own = backbone.classifier.weight.detach().clone()
    save(theirs(Case("head", "bert", lambda: lora(target_modules=["query"], task_type="SEQ_CLS")), backbone), tmp_path / "theirs")
    dt.load(backbone, tmp_path / "theirs", name="read", head=False)
    assert backbone.classifier.weight.equal(own)
    with pytest.raises(DeltaError, match="read"):
        dt.load(backbone, tmp_path / "theirs", name="read")


def _both_ways(example: Example, config: Config, folder: Path, parts: tuple[str, ...] = ()) -> None:
    backbone, inputs = example
    plain = result(backbone, inputs)
    model = theirs(Case("", "", config), backbone)
    save(model, folder / "theirs")
    expected = result(model, inputs)
    assert (expected - plain).abs().max() > 1e-5, "it does something"
    delta = dt.load(backbone, folder / "theirs", name="read")
    if parts:
        assert isinstance(delta, dt.Composition)
        assert tuple(member.removeprefix("read-") for member in delta.members[1:]) == parts
    else:
        assert isinstance(delta, dt.Delta)
    torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-5)
    dt.save(delta, folder / "ours", format="peft")
    dt.detach(delta)
    files = [part / "adapter_model.safetensors" for part in (folder / "theirs", folder / "ours")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert result(backbone, inputs).equal(plain)
    torch.testing.assert_close(result(reopened(backbone, folder / "ours"), inputs), expected, atol=1e-5, rtol=1e-5)


def test_what_a_config_saves_must_be_there(tmp_path: Path) -> None:
    backbone, _ = fresh("bert")
    save(theirs(Case("lora", "bert", lambda: lora(target_modules=["query"])), backbone), tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(file.read_text().replace('"modules_to_save": null', '"modules_to_save": ["classifier"]'))
    with pytest.raises(CheckpointError, match="lacks `classifier`"):
        dt.load(backbone, tmp_path / "theirs", name="read")
