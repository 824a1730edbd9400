"""The table: every type that is read and written, with a config of PEFT's for each of three architectures."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests.conformance.cells import fresh
from tests.models import Example, output, tokens

MODELS = ("bert", "llama", "t5")
LINEARS = {"bert": ["query", "value"], "llama": ["q_proj", "down_proj"], "t5": ["q", "wi"]}
SCALED = {"bert": ["key", "value", "0.output.dense", "1.output.dense"], "llama": ["k_proj", "down_proj"], "t5": ["k", "v", "wo"]}
INPUTS = {"bert": ["0.output.dense", "1.output.dense"], "llama": ["down_proj"], "t5": ["wo"]}
NORMS = {"bert": ["LayerNorm"], "llama": ["input_layernorm", "norm"], "t5": ["layer_norm"]}
TABLES = {"bert": ["word_embeddings"], "llama": ["embed_tokens"], "t5": ["shared"]}
TASKS = {"bert": "FEATURE_EXTRACTION", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class Case:
    """One config of PEFT's on one backbone.

    Attributes:
        name: of the settings.
        model: of the backbone.
        config: makes PEFT's config.
        virtual: tokens that PEFT's outputs have ahead of ours.
        lost: fields of the config that we cannot give back, because they only say how a stored tensor came to be.
        spare: PEFT stores what nothing reads: of an encoder-decoder's prompts the second half, of its prefixes every second pair if the
            layers are even.
    """

    name: str
    model: str
    config: Callable[[], Any] = field(repr=False, compare=False)
    virtual: int = 0
    lost: frozenset[str] = frozenset()
    spare: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.model}"

    def build(self) -> Example:
        """The backbone and its inputs; PEFT reads BERT's pooled state at a virtual token, so prompts have BERT without a head."""
        model, inputs = fresh(self.model)
        return (getattr(model, "bert", model) if self.is_prompt else model), inputs

    @property
    def is_prompt(self) -> bool:
        """PEFT calls it prompt learning."""
        return bool(self.config().is_prompt_learning)


def over(name: str, config: Callable[..., Any], targets: Mapping[str, Sequence[str] | str] = LINEARS, **settings: Any) -> list[Case]:
    """One case per backbone that has such targets."""
    known = {key: settings.pop(key) for key in ("virtual", "lost") if key in settings}
    return [
        Case(name, model, lambda model=model, asked=asked: config(target_modules=asked, **settings), **known)  # type: ignore[misc]
        for model, asked in targets.items()
    ]


def prompts(name: str, config: Callable[..., Any], **settings: Any) -> list[Case]:
    """One case per backbone."""
    known: dict[str, Any] = {key: settings.pop(key) for key in ("lost", "virtual") if key in settings}
    return [
        Case(
            name,
            model,
            lambda model=model: config(task_type=TASKS[model], num_virtual_tokens=4, **settings),  # type: ignore[misc]
            spare=model == "t5",
            **known | ({"virtual": 0} if model == "t5" else {}),
        )
        for model in MODELS
    ]


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 3, **settings})


def adalora(**settings: Any) -> Any:
    return peft.AdaLoraConfig(**{"init_r": 4, "target_r": 2, "tinit": 100, "tfinal": 300, "total_step": 1000, "lora_alpha": 3, **settings})


def ia3(target_modules: list[str]) -> Any:
    model = next(model for model in MODELS if SCALED[model] == target_modules)
    return peft.IA3Config(target_modules=target_modules, feedforward_modules=INPUTS[model])


ENCODER = frozenset({"encoder_reparameterization_type", "encoder_hidden_size", "encoder_dropout", "prefix_projection", "init_weights"})

CASES: list[Case] = [
    *over("lora", lora),
    *over("lora-dropout", lora, lora_dropout=0.1),
    *over("rslora", lora, use_rslora=True),
    *over("dora", lora, use_dora=True),
    *over("lora-patterns", lora, rank_pattern={"q_proj|query|q": 2}, alpha_pattern={"q_proj|query|q": 5}),
    *over("lora-ranks", lora, rank_pattern={"q_proj|query|q": 2}),
    *over("lora-layers", lora, layers_to_transform=[1]),
    *over("lora-excluded", lora, exclude_modules=r".*\.0\..*"),
    *over("lora-gaussian", lora, init_lora_weights="gaussian", lost=frozenset({"init_lora_weights"})),
    *over("lora-expression", lora, {model: r".*\.1\..*(" + "|".join(ends) + ")" for model, ends in LINEARS.items()}),
    *over("adalora", adalora),
    *over("ia3", ia3, SCALED),
    *over("loha", peft.LoHaConfig, r=3, alpha=5),
    *over("loha-patterns", peft.LoHaConfig, r=3, alpha=5, rank_pattern={"q_proj|query|q": 2}, alpha_pattern={"q_proj|query|q": 1}),
    *over("lokr", peft.LoKrConfig, r=1, alpha=2),
    *over("lokr-whole", peft.LoKrConfig, r=64, alpha=2, decompose_factor=4),
    *over("lokr-both", peft.LoKrConfig, r=1, alpha=2, decompose_both=True),
    *over("oft", peft.OFTConfig, oft_block_size=4),
    *over("oft-exact", peft.OFTConfig, oft_block_size=4, use_cayley_neumann=False),
    *over("oft-shared", peft.OFTConfig, oft_block_size=4, block_share=True),
    *over("vera", peft.VeraConfig, r=4),
    *over("vera-seed", peft.VeraConfig, r=4, projection_prng_key=7, vera_dropout=0.1),
    *over("norms", peft.LNTuningConfig, NORMS),
    *over("hira", peft.HiraConfig, r=4),
    *over("miss", peft.MissConfig, r=4),
    *over("miss-mini", peft.MissConfig, r=4, init_weights="mini", mini_r=8),
    *over("shira", peft.ShiraConfig, r=2, random_seed=5),
    *over("shira-unseeded", peft.ShiraConfig, r=2),
    *prompts("prompt", peft.PromptTuningConfig, virtual=4),
    *prompts("p-tuning", peft.PromptEncoderConfig, virtual=4, encoder_hidden_size=8, lost=ENCODER),
    *prompts("p-tuning-lstm", peft.PromptEncoderConfig, virtual=4, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"),
    *prompts("prefix", peft.PrefixTuningConfig),
    *prompts("prefix-projection", peft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=8, lost=ENCODER),
    *over("tokens", peft.TrainableTokensConfig, TABLES, token_indices=tokens()["input_ids"][0, :3].tolist()),
]


def theirs(case: Case, backbone: nn.Module) -> Any:
    """PEFT's model around a copy of the backbone, with everything that trains moved away from its start."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by names that are going away
        model: Any = peft.get_peft_model(copy.deepcopy(backbone), case.config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def reopened(backbone: nn.Module, folder: Path) -> Any:
    """A folder as PEFT opens it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(backbone), str(folder)).eval()


def save(model: Any, folder: Path) -> None:
    """As PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))


@torch.no_grad()
def result(model: Any, inputs: dict[str, Tensor], virtual: int = 0) -> Tensor:
    """The main output, without virtual tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it leaves token types out
        return output(model, inputs)[:, virtual:] if virtual else output(model, inputs)


def meaning(folder: Path) -> dict[str, Any]:
    """A config with lists in order."""
    read = json.loads((folder / "adapter_config.json").read_text())
    return {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in read.items()}


WHERE = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules"})
"""Fields that say where: ours name the modules in full."""

TASK = frozenset({"task_type", "auto_mapping"})
"""Ours follows from the backbone's class."""


def sized(config: dict[str, Any], paths: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Module -> its rank and alpha by PEFT's rules."""
    from peft.utils.other import get_pattern_key

    found = {}
    for path in paths:
        pair = []
        for pattern, default in (("rank_pattern", config.get("r")), ("alpha_pattern", config.get("lora_alpha", config.get("alpha")))):
            asked = config.get(pattern) or {}
            pair.append(asked.get(get_pattern_key(list(asked), path), default))
        found[path] = (pair[0], pair[1])
    return found
