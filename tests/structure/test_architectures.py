"""Every architecture: each role resolves with the expected count and shapes, from its file or by inference."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from deltatune.structure import architectures as files
from deltatune.structure.architectures import architectures, known
from deltatune.structure.index import Index
from deltatune.structure.site import Rows
from tests.models import FEED_FORWARD, HEADS, HIDDEN, KEY_VALUE_HEADS, LABELS, LAYERS, MODELS, VOCABULARY

H, F, V = HIDDEN, FEED_FORWARD, VOCABULARY
KV = HIDDEN // HEADS * KEY_VALUE_HEADS
Expected = dict[str, tuple[int, int | None, int | None]]
"""Role -> (count, in_features, out_features); None where a role has no linear shape."""


def attention(side: str = "", kind: str = "attention", kv: int = H) -> Expected:
    shapes = {"query": (H, H), "key": (H, kv), "value": (H, kv), "output": (H, H)}
    return {f"{side}{kind}": (LAYERS, None, None)} | {f"{side}{kind}.{leaf}": (LAYERS, *shape) for leaf, shape in shapes.items()}


def feed_forward(side: str = "", gated: bool = False, width: int = F, count: int = LAYERS) -> Expected:
    roles: Expected = {f"{side}feed_forward.up": (count, H, width), f"{side}feed_forward.down": (count, width, H)}
    return roles | ({f"{side}feed_forward.gate": (count, H, width)} if gated else {})


def stack(norms: int, side: str = "", positions: int = 1) -> Expected:
    roles: Expected = {f"{side}stack": (1, None, None), f"{side}layer": (LAYERS, None, None), f"{side}norm": (norms, None, None)}
    return roles | {f"{side}embedding": (1, V, H)} | ({f"{side}position": (positions, None, None)} if positions else {})


def readouts(count: int) -> Expected:
    return {"readout": (count, H, None)}


LM_HEAD: Expected = {"lm_head": (1, H, V)}
EXPECTED: dict[str, Expected] = {
    "bert": stack(5) | attention() | feed_forward() | readouts(1),
    "roberta": stack(5) | attention() | feed_forward() | readouts(2),
    "deberta_v2": stack(6, positions=0) | attention() | feed_forward() | readouts(2),
    "modernbert": stack(6) | attention() | feed_forward(gated=True) | readouts(1),
    "distilbert": stack(5) | attention() | feed_forward() | readouts(2),
    "mpnet": stack(5) | attention() | feed_forward() | readouts(2),
    "gpt2": stack(5) | attention() | feed_forward() | LM_HEAD,
    "opt": stack(5) | attention() | feed_forward() | LM_HEAD,
    "llama": stack(5) | attention(kv=KV) | feed_forward(gated=True) | LM_HEAD,
    "mistral": stack(5) | attention(kv=KV) | feed_forward(gated=True) | LM_HEAD,
    "qwen3": stack(9) | attention(kv=KV) | feed_forward(gated=True) | LM_HEAD,
    "gemma3": stack(13) | attention(kv=KV) | feed_forward(gated=True) | LM_HEAD,
    "phi": stack(3) | attention() | feed_forward() | LM_HEAD,
    "phi3": stack(5) | attention(kv=KV) | feed_forward(gated=True) | LM_HEAD,
    "gpt_neox": stack(5) | attention() | feed_forward() | LM_HEAD,
    "bloom": stack(6, positions=0) | attention() | feed_forward(width=4 * H) | LM_HEAD,
    "mixtral": stack(5) | attention(kv=KV) | {"experts.gate": (2, H, F), "experts.up": (2, H, F), "experts.down": (2, F, H)} | LM_HEAD,
    "qwen3_moe": stack(9)
    | attention(kv=KV)
    | feed_forward(gated=True, count=1)
    | {"experts.gate": (1, H, 24), "experts.up": (1, H, 24), "experts.down": (1, 24, H)}
    | LM_HEAD,
    "t5": stack(5, "encoder.", 0)
    | stack(7, "decoder.", 0)
    | attention("encoder.")
    | attention("decoder.")
    | attention("decoder.", "cross_attention")
    | feed_forward("encoder.")
    | feed_forward("decoder.")
    | LM_HEAD,
    "bart": stack(5, "encoder.")
    | stack(7, "decoder.")
    | attention("encoder.")
    | attention("decoder.")
    | attention("decoder.", "cross_attention")
    | feed_forward("encoder.")
    | feed_forward("decoder.")
    | LM_HEAD,
    "vit": {"layer": (2, None, None), "norm": (5, None, None), "embedding": (1, 3, H)} | attention() | feed_forward() | readouts(1),
    "torch_encoder": {"layer": (2, None, None), "norm": (4, None, None)} | attention() | feed_forward(),
    "conv_net": {"norm": (1, None, None), "readout": (1, 16, LABELS)},
    "mlp": {},
    "tied_mlp": {},
}
KNOWN = [
    name
    for name in MODELS
    if name not in {"distilbert", "mpnet", "phi", "gpt_neox", "bloom", "torch_encoder", "conv_net", "mlp", "tied_mlp"}
]
HELD_BACK = [name for name in MODELS if name not in KNOWN]

Roles = dict[tuple[str, str], tuple[int, ...] | None]


def roles(model: nn.Module, use_files: bool = True) -> Roles:
    """(Key of the site, role) -> its rows."""
    return {(site.key, site.role): numbers(site.rows) for site in Index(model, use_files) if site.role is not None}


def numbers(rows: Rows | None) -> tuple[int, ...] | None:
    if rows is None:
        return None
    return tuple(range(rows.start, rows.stop)) if isinstance(rows, slice) else tuple(rows.tolist())


def test_every_backbone_has_an_expectation() -> None:
    assert set(EXPECTED) == set(MODELS)
    assert len(MODELS) == 25
    assert len(KNOWN) == 16


@pytest.mark.parametrize("use_files", [True, False], ids=["file", "inferred"])
@pytest.mark.parametrize("name", MODELS)
def test_every_role_resolves(name: str, use_files: bool) -> None:
    model, _ = MODELS[name]()
    index = Index(model, use_files)
    assert Counter(site.role for site in index if site.role) == {role: count for role, (count, _, _) in EXPECTED[name].items()}
    for site in index:
        if site.role is None:
            continue
        _, width_in, width_out = EXPECTED[name][site.role]
        assert width_in is None or site.in_features == width_in, site
        assert width_out is None or site.out_features == width_out, site


@pytest.mark.parametrize("name", KNOWN)
def test_inference_agrees_with_the_file(name: str) -> None:
    model, _ = MODELS[name]()
    assert known(model.config.model_type) is not None
    assert roles(model) == roles(model, use_files=False)


@pytest.mark.parametrize("name", HELD_BACK)
def test_held_back_architectures_have_no_file(name: str) -> None:
    model, _ = MODELS[name]()
    config = getattr(model, "config", None)
    assert config is None or known(config.model_type) is None


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("mlp", "tied_mlp", "conv_net")])
def test_layers_are_counted_within_their_stack(name: str) -> None:
    model, _ = MODELS[name]()
    index = Index(model)
    assert set(index.depths.values()) == {LAYERS}
    for site in index:
        leaf = (site.role or "").removeprefix("encoder.").removeprefix("decoder.").partition(".")[0]
        if leaf in ("attention", "cross_attention", "feed_forward", "experts", "layer"):
            numbers = [int(part) for part in site.path.split(".") if part.isdigit()]
            assert site.layer == numbers[0]
        if leaf in ("readout", "lm_head", "stack", "embedding"):
            assert site.layer is None


STACKS = {
    name: 0 if name in ("vit", "torch_encoder", "conv_net", "mlp", "tied_mlp") else 2 if name in ("t5", "bart") else 1 for name in MODELS
}


@pytest.mark.parametrize("use_files", [True, False], ids=["file", "inferred"])
@pytest.mark.parametrize("name", MODELS)
def test_stacks(name: str, use_files: bool) -> None:
    model, inputs = MODELS[name]()
    stacks = Index(model, use_files).stacks
    assert len(stacks) == STACKS[name]
    called: dict[str, int] = {}
    for stack in stacks:
        for module in {stack.site.module, stack.embedding.module, stack.inner}:
            module.register_forward_hook(lambda module, args, output: called.update({str(id(module)): 1}))
    with torch.no_grad():
        model(**inputs)
    for stack in stacks:
        assert {str(id(stack.site.module)), str(id(stack.embedding.module)), str(id(stack.inner))} <= set(called)
        assert stack.layers == LAYERS
        assert len(stack.attentions) == (2 * LAYERS if stack.side == "decoder" else LAYERS)
        assert stack.side == ("" if len(stacks) == 1 else stack.site.path.rpartition(".")[2])
        assert isinstance(stack.embedding.module, nn.Embedding)


def test_the_pooler_of_bert_lies_behind_the_end_of_the_sequence() -> None:
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=99)
    model = transformers.BertModel(config)
    (stack,) = Index(model).stacks
    assert (stack.site.path, stack.inner_path) == ("", "encoder")
    assert Index(model, use_files=False).stacks[0].inner_path == "encoder"


@pytest.mark.parametrize("model_type", ["qwen2", "xlm-roberta", "camembert", "mt5", "mbart"])
def test_the_other_models_of_a_family(model_type: str) -> None:
    tiny = {"hidden_size": 32, "d_model": 32, "num_hidden_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"num_attention_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 99, "intermediate_size": 48, "d_ff": 48, "d_kv": 8, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config_class = transformers.CONFIG_MAPPING[model_type]
    plain = config_class()
    config = config_class(**{key: value for key, value in (tiny | heads | sizes).items() if hasattr(plain, key)})
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert known(model_type) is not None
    by_file = roles(model)
    assert by_file == roles(model, use_files=False)
    assert sum(role.removeprefix("encoder.") == "attention.query" for _, role in by_file) == 2


def test_every_file_is_registered_short_and_without_logic() -> None:
    names = [module.name for module in pkgutil.iter_modules(files.__path__)]
    assert list(architectures) == sorted(names)
    assert len(names) == 13
    for name in names:
        module = importlib.import_module(f"{files.__name__}.{name}")
        assert architectures[name] is module.ARCHITECTURE
        text = Path(module.__file__ or "").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 45
        assert not any(word in text for word in ("def ", "lambda", "if ", " for "))


def test_no_model_type_is_described_twice() -> None:
    described = Counter(model_type for name in architectures for model_type in architectures[name].model_types)
    assert max(described.values()) == 1
    assert len(described) == 21


def test_a_third_party_registers_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltatune.structure.architecture import Architecture

    model, _ = MODELS["phi"]()
    monkeypatch.setattr(architectures, "_entries", dict(architectures._entries))
    architectures.register("phi")(Architecture(model_types=("phi",), sites={"attention.query": "self_attn.q_proj"}))
    found = Index(model)
    assert Counter(site.role for site in found if site.role) == {"attention.query": 2}


def test_a_known_encoder_inside_an_unknown_model_keeps_its_roles() -> None:
    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = MODELS["bert"]()[0].bert
            self.classifier = nn.Linear(HIDDEN, 2)

    found = roles(Scorer())
    assert found["text.encoder.layer.1.attention.self.query", "attention.query"] is None
    assert found["classifier", "readout"] is None
    assert found["text", "stack"] is None
