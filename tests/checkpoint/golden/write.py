"""Writes one small delta file for every method and kind of composition, and the outputs that belong to it.

    python -m tests.checkpoint.golden.write          adds what is missing
    python -m tests.checkpoint.golden.write NAME     writes one anew

What stands here was written by the format version in its folder's name and is never changed: readers of every later version must
load it. So run this for a new method or a new format version, not to make a failing test pass.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import deltatune as dt
from deltatune.checkpoint.record import FORMAT_VERSION
from deltatune.methods import Adapter, BitFit, LoRA, PromptTuning
from deltatune.methods.kinds import Exported, Method, methods
from tests.conformance.cells import SMALL

HERE = Path(__file__).parent
VOCABULARY, HIDDEN, LENGTH = 16, 8, 6
SIZE: dict[str, Any] = dict(hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=VOCABULARY)


def bert() -> nn.Module:
    config = transformers.BertConfig(**SIZE, max_position_embeddings=16, num_labels=3, pad_token_id=0)
    return exact(transformers.BertForSequenceClassification(config))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=16, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
    )
    return exact(transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZE, num_key_value_heads=1, max_position_embeddings=16, bos_token_id=1, eos_token_id=2)
    return exact(transformers.LlamaForCausalLM(config))


@torch.no_grad()
def exact(model: nn.Module) -> nn.Module:
    """Parameters by integer arithmetic from their names, so that they have the same bits on every machine and version."""
    for name, parameter in model.named_parameters():
        places = torch.arange(parameter.numel(), dtype=torch.int64) * 7919 + zlib.crc32(name.encode())
        parameter.copy_(((places % 257 - 128).float() / 512 + (parameter.ndim == 1) * 0.5).view(parameter.shape))
    return model.eval()


@torch.no_grad()
def moved(delta: dt.Delta) -> dt.Delta:
    """As if trained."""
    for name, parameter in delta.trained_parameters().items():
        places = torch.arange(parameter.numel(), dtype=torch.int64) * 104729 + zlib.crc32(name.encode())
        parameter.add_(((places % 127 - 63).float() / 1024).view(parameter.shape).to(parameter))
    return delta


def inputs() -> dict[str, Tensor]:
    ids = (torch.arange(2 * LENGTH) * 5 % (VOCABULARY - 4) + 4).view(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs()).logits.float()
    return logits if logits.ndim == 2 else logits[:, 0]


Made = tuple[nn.Module, "dt.Delta | dt.Composition"]
BACKBONES: dict[str, Callable[[], nn.Module]] = {"bert": bert, "gpt2": gpt2, "llama": llama}


def recipe(name: str) -> Method:
    known = {field.name for field in dataclasses.fields(methods[name])}
    return methods[name](**{field: value for field, value in (SMALL | {"token_ids": (4, 9)}).items() if field in known})


def final(name: str) -> Made:
    model, delta = unfinished(name)
    assert isinstance(delta, dt.Delta)
    if isinstance(delta.method, Exported):
        delta.method.export(delta.patches, delta.shared)
    return model, delta


def unfinished(name: str) -> Made:
    model = bert()
    return model, moved(dt.attach(model, recipe(name), name="golden"))


def together(how: str) -> Made:
    model = bert()
    kinds = {"fusion": (Adapter(bottleneck_dim=2), Adapter(bottleneck_dim=3))}.get(how, (LoRA(rank=2), Adapter(bottleneck_dim=2)))
    members = [
        moved(dt.attach(model, kind, name=f"m{k}", head=k == 0 and how in ("sequential", "parallel"))) for k, kind in enumerate(kinds)
    ]
    composition = dt.compose(model, members, how, weights=(0.25, -0.5) if how == "weighted" else None, name="golden")
    with torch.no_grad():
        for tensor in composition.mixing.state_dict().values():
            tensor.add_(0.125)
    return model, composition


def every_kind() -> Made:
    model = bert()
    for k, kind in enumerate((LoRA(rank=2), BitFit(), PromptTuning(num_virtual_tokens=2))):
        moved(dt.attach(model, kind, name=f"m{k}", head=k == 0))
    return model, dt.compose(model, ["m0", "m1", "m2"], name="golden")


def half(method: Any) -> Made:
    model = bert().to(torch.bfloat16)
    return model, moved(dt.attach(model, method, name="golden"))


def fused() -> Made:
    model = gpt2()
    return model, moved(dt.attach(model, LoRA(rank=2), ["attention.{query,value}", "embedding"], name="golden"))


def grouped() -> Made:
    model = llama()
    return model, moved(dt.attach(model, LoRA(rank=2, ranks=(("attention.value", 1),)), name="golden"))


def cases() -> Iterator[tuple[str, str, Callable[[], Made]]]:
    """Name, backbone and maker of each file."""
    for name in methods:
        yield name, "bert", lambda name=name: final(name)
        if isinstance(recipe(name), Exported):
            yield f"{name}.unfinished", "bert", lambda name=name: unfinished(name)
    for how in ("sequential", "parallel", "weighted", "gated", "fusion"):
        yield f"composition.{how}", "bert", lambda how=how: together(how)
    yield "composition.kinds", "bert", every_kind
    yield "lora.bf16", "bert-bf16", lambda: half(LoRA(rank=2))
    yield "bitfit.bf16", "bert-bf16", lambda: half(BitFit())
    yield "lora.fused", "gpt2", fused
    yield "lora.grouped", "llama", grouped


def write(name: str, backbone: str, make: Callable[[], Made]) -> None:
    torch.manual_seed(zlib.crc32(name.encode()))
    folder = HERE / f"version-{FORMAT_VERSION}" / name
    shutil.rmtree(folder, ignore_errors=True)
    model, delta = make()
    dt.save(delta, folder, unfinished=True, task="golden", labels=["a", "b", "c"])
    told = {"backbone": backbone, "outputs": outputs(model).tolist()}
    (folder / "outputs.json").write_text(json.dumps(told) + "\n")


def main(asked: list[str]) -> None:
    warnings.simplefilter("ignore")
    for name, backbone, make in cases():
        if name in asked or not (asked or (HERE / f"version-{FORMAT_VERSION}" / name).exists()):
            write(name, backbone, make)
            print("wrote", name)


if __name__ == "__main__":
    main(sys.argv[1:])
