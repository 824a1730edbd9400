"""What trains beside a PEFT type: modules saved whole, heads, biases, and rows of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.config import HEADS
from deltatune.checkpoint.peft.keys import TUNED
from deltatune.checkpoint.peft.tuner import Content, Output, cannot
from deltatune.checkpoint.tensors import named
from deltatune.errors import CheckpointError
from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry
from deltatune.injection.state import originals
from deltatune.methods.kinds import SelectionPatch
from deltatune.methods.specification.bitfit import BitFit
from deltatune.methods.specification.full import FullFineTuning
from deltatune.methods.specification.trainable_tokens import TrainableTokens

STRAY = ("original_module.", "modules_to_save.")
"""Of a saved module with ``bias="all"``: copies of its own and of the backbone's bias."""
SECOND, B_BIAS = "lora_B.weight", "lora_B.bias"
ROWS = "token_adapter.trainable_tokens_delta"
BASE_BIAS, BASE_WEIGHT = "base_layer.bias", "base_layer.weight"


def read_biases(content: Content) -> list[Part]:
    """The biases that a config's ``bias`` lets train, those of the targets or all, and what the type adds to outputs."""
    found = _trained_biases(content, content.fields.take("bias", "none", str))
    for path, vector in content.added.items():
        site = content.modules.site(path)
        bias = site.module._parameters.get("bias")
        if bias is None:
            found[site.key, "b"] = vector
        else:
            own = found.get((site.key, "bias"), bias.detach().cpu())
            found[site.key, "bias"] = (own + vector).to(bias.dtype)
    add_missing = any(name == "b" for _, name in found)
    return [Part("bias", BitFit(add_missing=add_missing), found)] if found else []


def _trained_biases(content: Content, kind: str) -> dict[tuple[str, str], Tensor]:
    found: dict[tuple[str, str], Tensor] = {}
    if kind == "none":
        return found
    if kind != "all" and not kind.endswith("_only"):
        raise CheckpointError(
            f"`{content.fields.file}` has bias = {kind!r:.40}, which is none of PEFT's: none, all or lora_only. Correct it."
        )
    kept = content.fields.peek("modules_to_save") or []
    for path in content.stored.paths({BASE_BIAS, "bias"}):
        suffixes = {BASE_BIAS} if kind != "all" or _is_kept(path, kept) else {BASE_BIAS, "bias"}
        for tensor in content.stored.take(path, suffixes).values():
            found[content.modules.site(path).key, "bias"] = tensor
    for path in [*content.stored.at]:
        content.stored.take(path, [suffix for suffix in content.stored.at[path] if kind == "all" and suffix.startswith(STRAY)])
    return found


def read_rows(content: Content) -> list[Part]:
    """Rows of the vocabulary that train beside a type: ``trainable_token_indices``, by table or for the input's."""
    asked = content.fields.take("trainable_token_indices", None, list, dict)
    parts: dict[tuple[int, ...], dict[tuple[str, str], Tensor]] = {}
    for path in content.stored.paths({ROWS}):
        ids = asked if isinstance(asked, list) else next((ids for name, ids in (asked or {}).items() if _ends(path, name)), None)
        if not ids:
            raise CheckpointError(f"`{content.stored.file}` holds rows of `{path}`, and its config does not say which. Copy it again.")
        [rows] = content.stored.take(path, {ROWS}).values()
        parts.setdefault(tuple(ids), {})[content.modules.table(path).key, "e"] = rows
    if asked and not parts:
        raise CheckpointError(f"`{content.stored.file}` lacks the rows that `trainable_token_indices` asks for. Copy or save it again.")
    return [Part(f"tokens{f'-{k + 1}' * (k > 0)}", TrainableTokens(ids), found) for k, (ids, found) in enumerate(parts.items())]


def read_saved(content: Content) -> tuple[list[Part], dict[tuple[str, str], Tensor]]:
    """Modules that are stored whole: task heads, and all others."""
    asked = content.fields.take("modules_to_save", [], list)
    heads: dict[tuple[str, str], Tensor] = {}
    whole: dict[tuple[str, str], Tensor] = {}
    _drop_unchanged(content)
    readouts = [site.path for site in content.modules.sites if site.leaf == "readout" and site.parameter is None]
    for path in [path for path in content.modules.all if path in content.stored.at]:
        module = content.modules.all[path]
        found = content.stored.take(path, module._parameters.keys())
        site = content.modules.site(path) if found else None
        head = next((head for head in readouts if _within(path, head)), None)
        for name, tensor in found.items():
            if head is not None:
                heads[head, f"{path}.{name}"[len(head) + 1 :]] = tensor
            elif site is not None:
                whole[site.key, name] = tensor
    _check_saved(content, asked, {key for key, _ in (*heads, *whole)})
    return [Part("modules", FullFineTuning(), whole)] if whole else [], heads


def _drop_unchanged(content: Content) -> None:
    """PEFT stores the table below a targeted embedding; what equals the backbone's own is no change of it."""
    for path in content.stored.paths({BASE_WEIGHT}):
        [table] = content.stored.take(path, {BASE_WEIGHT}).values()
        own = getattr(content.modules.all[path], "weight", None)
        if not isinstance(own, Tensor) or own.shape != table.shape or not torch.equal(own.detach().cpu().to(table.dtype), table):
            content.stored.at[path]["weight"] = table


def _check_saved(content: Content, asked: Sequence[Any], found: set[str]) -> None:
    absent = [
        path
        for path, module in content.modules.first.items()
        if any(isinstance(name, str) and path.endswith(name) for name in asked)
        and any(True for _ in module.parameters())
        and not any(_within(key, path) for key in found)
        and not any(_within(path, key) for key in found)
    ]
    if absent:
        raise CheckpointError(f"`{content.stored.file}` lacks {named(absent)}, which `modules_to_save` names. Copy or save it again.")


def is_extra(delta: Delta) -> bool:
    """PEFT holds such a delta beside a type, not as one."""
    return type(delta.method) in (BitFit, FullFineTuning, TrainableTokens)


def write_extra(delta: Delta, output: Output, biased: str) -> None:
    """Put a delta beside a type into its folder.

    Args:
        delta: one that ``is_extra``.
        output: the folder.
        biased: what the type's ``bias`` says where the biases of its targets train.

    Raises:
        Unsupported: PEFT cannot hold it there.
    """
    WRITERS[type(delta.method)](delta, output, biased)


def _write_biases(delta: Delta, output: Output, biased: str) -> None:
    """``bias``: those of exactly the targets, or all; ``lora_bias`` where modules have none."""
    state = delta.state_dict()
    entries = [entry for entry in delta.entries if not entry.head or only_biases(delta)]
    added = next((entry for entry in entries if not isinstance(entry.patch, SelectionPatch) or entry.patch.parameter != "bias"), None)
    if added is not None:
        if not output.scales.keys() >= {output.modules.path(entry.site) for entry in entries}:
            raise cannot(delta, f"it adds a bias at `{added.key}`, and PEFT does so at modules of LORA, but for embeddings")
        _write_added(delta, entries, output)
        return
    found = {output.modules.path(entry.site): state[entry.key] for entry in entries}
    own = {entry.key.rpartition(".")[0] for entry in delta.entries if entry.head and not only_biases(delta)} | output.heads
    have = {path for path, module in output.modules.first.items() if _has_bias(module) and not any(_within(path, head) for head in own)}
    if set(found) == have & set(output.paths):
        kind = biased
    elif set(found) == have:
        kind = "all"
    else:
        raise cannot(delta, "it trains neither the biases of exactly the modules the other delta sits at, nor all biases")
    output.config["bias"] = kind
    for path, bias in found.items():
        output.add(TUNED, path, {BASE_BIAS if path in output.paths else "bias": bias})


def _write_added(delta: Delta, entries: Sequence[Entry], output: Output) -> None:
    """``lora_bias``: B x becomes B x + c at every module, so that the outputs grow by s c; c = 0 where nothing is added."""
    state, before = delta.state_dict(), originals(output.modules.backbone)
    added: dict[str, Tensor] = {}
    for entry in entries:
        if isinstance(entry.patch, SelectionPatch):
            change = state[entry.key] - before[id(entry.parameter)].to(state[entry.key].device)
        else:
            change = entry.patch.get_parameter("b").detach()
        added[output.modules.path(entry.site)] = change
    output.config["lora_bias"] = True
    for path, scale in output.scales.items():
        none = torch.zeros(len(output.tensors[f"{TUNED}{path}.{SECOND}"]))
        output.add(TUNED, path, {B_BIAS: added[path] / scale if path in added else none})


def _write_whole(delta: Delta, output: Output, biased: str) -> None:
    """``modules_to_save``: whole modules."""
    state = delta.state_dict()
    for entry in delta.entries:
        if entry.head:
            continue
        path = output.modules.path(entry.site)
        assert isinstance(entry.patch, SelectionPatch)
        output.add(TUNED, path, {entry.patch.parameter: state[entry.key]})
        save_module(output, path)


def _write_rows(delta: Delta, output: Output, biased: str) -> None:
    """``trainable_token_indices``: rows of tables by their paths."""
    assert isinstance(delta.method, TrainableTokens)
    for entry in delta.entries:
        if entry.head:
            continue
        path = output.modules.tied_paths(entry.site)[0]
        output.config.setdefault("trainable_token_indices", {})[path] = list(delta.method.token_ids)
        output.add(TUNED, path, {ROWS: entry.patch.state_dict()["e"]})


def save_module(output: Output, path: str) -> None:
    """Name a module in ``modules_to_save``."""
    saved = output.config.setdefault("modules_to_save", [])
    if path not in saved:
        saved.append(path)


def write_heads(deltas: Sequence[Delta], output: Output, prefix: str) -> set[str]:
    """The task heads of deltas; returns their paths."""
    heads: set[str] = set()
    readouts = [site for site in output.modules.sites if site.leaf == "readout" and site.parameter is None]
    for delta in deltas:
        state = delta.state_dict()
        for entry in delta.entries:
            if not entry.head or not isinstance(entry.patch, SelectionPatch) or only_biases(delta):
                continue
            head = next(site.path for site in readouts if _within(entry.key, site.path))
            output.add(prefix, entry.key.rpartition(".")[0], {entry.key.rpartition(".")[2]: state[entry.key]})
            heads.add(head)
    for head in sorted(heads):
        save_module(output, head)
    output.heads |= heads
    return heads


def only_biases(delta: Delta) -> bool:
    """It trains nothing of a head but its biases, as BitFit does where the head is not its own."""
    return all(entry.key.rpartition(".")[2] == "bias" for entry in delta.entries)


def add_default_heads(output: Output, task: str | None) -> None:
    """PEFT names its usual heads of a task, whatever the backbone calls its own."""
    for name in HEADS.get(task or "", ()):
        save_module(output, name)
    if "modules_to_save" in output.config:
        output.config["modules_to_save"].sort()


WRITERS = {BitFit: _write_biases, FullFineTuning: _write_whole, TrainableTokens: _write_rows}


def _has_bias(module: Any) -> bool:
    return getattr(module, "_parameters", {}).get("bias") is not None


def _is_kept(path: str, kept: Sequence[str]) -> bool:
    return any(part == name for name in kept for part in path.split(".")) or any(path.endswith(name) for name in kept)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _within(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.")
