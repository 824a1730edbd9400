"""Prefix tuning written out by hand: one row at a time, unpadded, no cache, eager attention with a mask made here.

It shares nothing with the library but the numbers P_k and P_v, so it decides where PEFT is wrong or silent.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Prefixes = dict[str, tuple[Tensor, Tensor]]
"""Path of an attention -> P_k and P_v, each (heads, virtual, head_dim)."""


def plain_eager(model: nn.Module) -> nn.Module:
    """An independent copy without deltas that runs eager attention."""
    plain: Any = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return plain.eval()


@contextmanager
def with_prefixes(plain: nn.Module, prefixes: Prefixes) -> Iterator[None]:
    """Within it, the attentions of ``plain`` compute softmax(Q [P_k; K]^T + bias) [P_v; V] by hand."""
    of_module = {id(plain.get_submodule(path)): pair for path, pair in prefixes.items()}
    files = {sys.modules[type(plain.get_submodule(path)).__module__] for path in prefixes}
    originals = {file: file.eager_attention_forward for file in files}

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        P_k, P_v = of_module[id(module)]
        virtual, text, queries = P_k.shape[1], key.shape[2], query.shape[2]
        key = torch.cat([P_k[None], key], dim=2)
        value = torch.cat([P_v[None], value], dim=2)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scaling = kwargs.get("scaling")
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if kwargs.get("position_bias") is not None:
            scores = scores + _bias(plain, module, queries, virtual, text)
        scores = scores + _hidden(module, queries, virtual, text, kwargs.get("sliding_window"))
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    for file in files:
        file.eager_attention_forward = attention
    try:
        yield
    finally:
        for file, original in originals.items():
            file.eager_attention_forward = original


def _hidden(module: nn.Module, queries: int, virtual: int, text: int, window: int | None) -> Tensor:
    """-inf where a query may not look, (queries, virtual + text): never at the prefix."""
    hidden = torch.zeros(queries, virtual + text)
    for i in range(queries):
        for j in range(text):
            future = module.is_causal and j > i
            far = window is not None and abs(i - j) >= window
            if future or far:
                hidden[i, virtual + j] = -torch.inf
    return hidden


def _bias(plain: nn.Module, module: nn.Module, queries: int, virtual: int, text: int) -> Tensor:
    """T5's bias with virtual token j at position j - virtual, (heads, queries, virtual + text); none in cross-attention."""
    path = next(path for path, other in plain.named_modules() if other is module)
    if "EncDecAttention" in path:
        return torch.zeros(())
    first = plain.get_submodule(f"{path.partition('.')[0]}.block.0.layer.0.SelfAttention")
    positions = torch.tensor([[j - virtual - i for j in range(virtual + text)] for i in range(queries)])
    buckets = first._relative_position_bucket(
        positions, not first.is_decoder, first.relative_attention_num_buckets, first.relative_attention_max_distance
    )
    return first.relative_attention_bias(buckets).permute(2, 0, 1)


def shift_positions(plain: nn.Module, virtual: int) -> dict[str, Any]:
    """Move the text's positions up by ``virtual``: in the tables of ``plain`` where it has some, else by the ids returned."""
    tables = [module for path, module in plain.named_modules() if path.endswith(("wpe", "embed_positions", "position_embeddings"))]
    with torch.no_grad():
        for table in tables:
            if isinstance(table, nn.Embedding):
                first = 0 if table.padding_idx is None else table.padding_idx + 1
                table.weight[first:-virtual] = table.weight[first + virtual :].clone()
    rotary = any(path.endswith("rotary_emb") for path, _ in plain.named_modules())
    return {"rotary": rotary}


def row_by_row(plain: nn.Module, prefixes: Prefixes, inputs: dict[str, Tensor], virtual: int) -> list[Tensor]:
    """What the model makes of each row without its padding, behind the prefixes: (length, vocabulary) or (labels,) a row."""
    rotary = shift_positions(plain, virtual)["rotary"]
    rows = []
    with with_prefixes(plain, prefixes):
        for i in range(next(iter(inputs.values())).shape[0]):
            row = {name: tensor[i : i + 1] for name, tensor in inputs.items() if name != "attention_mask"}
            if "attention_mask" in inputs:
                row["input_ids"] = row["input_ids"][:, inputs["attention_mask"][i].bool()]
            if rotary:
                row["position_ids"] = torch.arange(virtual, virtual + row["input_ids"].shape[1])[None]
            caching = {"use_cache": False} if "pixel_values" not in inputs else {}
            rows.append(plain(**row, **caching).logits[0])
    return rows


def prompted_row_by_row(plain: nn.Module, P: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What a decoder makes of [P; X], each row without its padding, virtual positions cut off: (length, vocabulary) a row."""
    model: Any = plain
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        text = model.get_input_embeddings()(ids[mask.bool()])
        rows.append(model(inputs_embeds=torch.cat([P, text])[None], use_cache=False).logits[0, P.shape[0] :])
    return rows


def greedy(step: Any, ids: Tensor, length: int) -> Tensor:
    """The ``length`` likeliest tokens behind ``ids`` (text,), each from a forward over all before: (length,)."""
    for _ in range(length):
        ids = torch.cat([ids, step(ids[None])[-1:].argmax(-1)])
    return ids[-length:]
