"""What does it cost to save, load and inspect a delta, in seconds and bytes, beside PEFT in the same run?

Every registered method is saved and loaded on one random BERT; where PEFT has the type, both libraries take turns on the
same shapes, and what is quoted is the median of the paired ratios (ours / theirs; below 1 is better). ``thousand`` loads one
LoRA 1,000 times onto one backbone; bar: the last loads cost at most 1.5 times the first. PEFT loads fewer, because its time grows.

``files.py --rounds 3 --methods lora,ia3 --loads 50`` is a quick look.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from paired import interleave, ratio, report, timed
from safetensors import safe_open
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import deltatune as dt
from deltatune.checkpoint import read
from deltatune.checkpoint.header import read_header
from deltatune.errors import DeltaError
from deltatune.methods import LoRA, methods
from deltatune.methods.kinds import Exported, Method

ROUNDS, LOADS, PEFT_LOADS, WINDOW = 15, 1000, 60, 20
BAR = 1.5
QUERY_VALUE: dict[str, Any] = {"target_modules": ["query", "value"]}
TOKENS: dict[str, Any] = {"task_type": "SEQ_CLS", "num_virtual_tokens": 20}

PEERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=8, lora_alpha=16, **QUERY_VALUE),
    "dora": lambda: peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, **QUERY_VALUE),
    "adalora": lambda: peft.AdaLoraConfig(init_r=12, target_r=8, total_step=100, **QUERY_VALUE),
    "vera": lambda: peft.VeraConfig(r=256, **QUERY_VALUE),
    "hira": lambda: peft.HiraConfig(r=8, **QUERY_VALUE),
    "loha": lambda: peft.LoHaConfig(r=8, **QUERY_VALUE),
    "lokr": lambda: peft.LoKrConfig(r=8, **QUERY_VALUE),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=32, **QUERY_VALUE),
    "miss": lambda: peft.MissConfig(r=8, **QUERY_VALUE),
    "shira": lambda: peft.ShiraConfig(r=8, **QUERY_VALUE),
    "ia3": lambda: peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "norm-tuning": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
    "trainable-tokens": lambda: peft.TrainableTokensConfig(token_indices=list(range(100)), target_modules=["word_embeddings"]),
    "prefix-tuning": lambda: peft.PrefixTuningConfig(**TOKENS),
    "prompt-tuning": lambda: peft.PromptTuningConfig(**TOKENS),
    "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=128, **TOKENS),
}
"""Our method -> PEFT's type with the shapes of our defaults, or near them."""

SETTINGS: dict[str, dict[str, Any]] = {
    "trainable-tokens": {"token_ids": tuple(range(100))},
    "prompt-tuning": {"num_virtual_tokens": 20},
    "p-tuning": {"num_virtual_tokens": 20},
    "prefix-tuning": {"reparameterization": False},
}
"""Fields without a default, and those that make both libraries store the same."""


def backbone() -> nn.Module:
    """The same random BERT every time."""
    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=2000, **size)).eval()


def size_of(folder: Path) -> int:
    """Bytes of a delta's files; PEFT's model card does not count."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != "README.md")


def recipe(name: str) -> Method:
    """The method with its defaults."""
    return methods[name](**SETTINGS.get(name, {}))


class Ours:
    """Save, load and inspect with deltatune."""

    def __init__(self, method: Method, place: Path) -> None:
        self.folder, self.model = place, backbone()
        self.delta = dt.attach(self.model, method, name="d", head=False)
        if isinstance(method, Exported):
            method.export(self.delta.patches, self.delta.shared)  # as PEFT saves its prompts: without what made them
        self.target = backbone()
        dt.attach(self.target, LoRA(rank=1), name="indexed", head=False).disable()

    def save(self) -> float:
        """Seconds of one save over the last one."""
        return timed(lambda: dt.save(self.delta, self.folder, overwrite=True))

    def load(self) -> float:
        """Seconds of one load; taking it off again is not counted."""
        seconds = timed(lambda: dt.load(self.target, self.folder, name="d"))
        dt.detach(next(delta for delta in dt.deltas(self.target) if delta.name == "d"))
        return seconds

    def inspect(self) -> float:
        """Seconds of reading the record and the header of the tensors."""
        return timed(lambda: (read(self.folder), read_header(self.folder / "delta.safetensors")))


class Theirs:
    """Save, load and inspect with PEFT."""

    def __init__(self, config: peft.PeftConfig, place: Path) -> None:
        self.folder, self.config = place, config
        self.model = peft.get_peft_model(backbone(), config)
        self.target = backbone()

    def save(self) -> float:
        """Seconds of one save over the last one."""
        return timed(lambda: self.model.save_pretrained(self.folder))

    def load(self) -> float:
        """Seconds of one load onto a backbone without adapters; copying it is not counted."""
        target = copy.deepcopy(self.target)
        return timed(lambda: peft.PeftModel.from_pretrained(target, self.folder))

    def inspect(self) -> float:
        """Seconds of reading the config and the header of the tensors."""
        return timed(self._look)

    def _look(self) -> dict[str, list[int]]:
        peft.PeftConfig.from_pretrained(self.folder)
        with safe_open(self.folder / "adapter_model.safetensors", framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping


def measured(name: str, place: Path, rounds: int) -> dict[str, Any]:
    """One method, in turns with PEFT's where there is one."""
    ours = Ours(recipe(name), place / "ours" / name)
    theirs = Theirs(PEERS[name](), place / "theirs" / name) if name in PEERS else None
    found: dict[str, Any] = {}
    for action in ("save", "load", "inspect"):
        competitors = {"ours": getattr(ours, action)} | ({} if theirs is None else {"peft": getattr(theirs, action)})
        for competitor in competitors.values():
            competitor()  # warm
        seconds = interleave(competitors, rounds)
        found |= {f"{who}_{action}_ms": round(1e3 * statistics.median(times), 3) for who, times in seconds.items()}
        if theirs is not None:
            found[f"{action}_ratio"] = round(ratio(seconds["ours"], seconds["peft"]), 2)
    found["ours_bytes"] = size_of(ours.folder)
    if theirs is not None:
        found |= {"peft_bytes": size_of(theirs.folder)}
        found["bytes_ratio"] = round(found["ours_bytes"] / found["peft_bytes"], 3)
    return found


def thousand(place: Path, loads: int) -> dict[str, Any]:
    """Loading the last of many deltas against the first, each at rest once loaded."""
    model = backbone()
    delta = dt.attach(model, LoRA(rank=2), name="d", head=False)
    dt.save(delta, place / "one")
    seconds = [timed(lambda k=k: dt.load(model, place / "one", name=f"d{k}", enable=False)) for k in range(loads)]  # type: ignore[misc]
    config = peft.LoraConfig(r=2, **QUERY_VALUE)
    other = peft.get_peft_model(backbone(), config)
    other.save_pretrained(place / "other")
    theirs = [timed(lambda k=k: other.load_adapter(place / "other", f"d{k}")) for k in range(min(PEFT_LOADS, loads))]  # type: ignore[misc]
    window = min(WINDOW, loads // 2)
    first, last = statistics.median(seconds[1 : window + 1]), statistics.median(seconds[-window:])
    return {
        "loads": loads,
        "first_ms": round(1e3 * first, 3),
        "last_ms": round(1e3 * last, 3),
        "ratio": round(last / first, 2),
        "peft_loads": len(theirs),
        "peft_first_ms": round(1e3 * statistics.median(theirs[1:6]), 3),
        "peft_last_ms": round(1e3 * statistics.median(theirs[-5:]), 3),
        "bar": BAR,
        "holds": last <= BAR * first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--loads", type=int, default=LOADS)
    parser.add_argument("--methods", default="", help="names, separated by commas; all if left out")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = [name for name in asked.methods.split(",") if name] or [name for name in methods if _fits(name)]
    with tempfile.TemporaryDirectory() as place:
        found = {name: measured(name, Path(place), asked.rounds) for name in chosen}
        many = thousand(Path(place), asked.loads)
    shared = [name for name in found if "load_ratio" in found[name]]
    summary = {
        key: round(statistics.median(found[name][key] for name in shared), 2)
        for key in ("save_ratio", "load_ratio", "inspect_ratio", "bytes_ratio")
        if shared
    }
    report("save, load and inspect, ours / PEFT's", medians=summary, thousand=many, rounds=asked.rounds, methods=found)


def _fits(name: str) -> bool:
    """It has something to do on this backbone without its head."""
    model = backbone()
    try:
        dt.attach(model, recipe(name), head=False)
    except DeltaError:
        return False
    return True


if __name__ == "__main__":
    main()
