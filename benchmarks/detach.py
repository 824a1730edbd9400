"""Does detaching leave a real backbone as it was, to the bit? Every registered method, attached, moved, run and detached.

What is compared, per method and backbone: every tensor of the ``state_dict``, the outputs, the modules, the hooks and
``requires_grad``. A method that a backbone cannot take is counted as refused. There is no tolerance: the bar is that
nothing differs.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from paired import report
from torch import Tensor, nn

import deltatune as dt
from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.errors import NoSite, Unsupported
from deltatune.methods import methods
from deltatune.methods.kinds import Method

BACKBONES = {"minilm": "AutoModelForSequenceClassification", "smollm2-135m": "AutoModelForCausalLM"}
TEXTS = ["Shares rise as the bank beats forecasts", "A knee injury"]
HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]
REQUIRED: dict[str, Any] = {"token_ids": (1000, 2000, 3000)}
"""Values of fields that have no default."""


def recipe(name: str) -> Method:
    """The method with its defaults."""
    needed = {field.name for field in dataclasses.fields(methods[name])} & REQUIRED.keys()
    return methods[name](**{field: REQUIRED[field] for field in needed})


def snapshot(backbone: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Everything by which one could tell."""
    with torch.no_grad():
        logits = backbone(**batch).logits
    return {
        "state_dict": {name: tensor.clone() for name, tensor in backbone.state_dict().items()},
        "outputs": {"logits": logits},
        "modules": [(path, id(module), type(module)) for path, module in backbone.named_modules()],
        "hooks": [(path, name, list(getattr(module, name).values())) for path, module in backbone.named_modules() for name in HOOKS],
        "requires_grad": [(path, id(parameter), parameter.requires_grad) for path, parameter in backbone.named_parameters()],
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Which of those differ."""
    return [key for key, value in before.items() if not same(value, after[key])]


def same(one: Any, other: Any) -> bool:
    """Equal; tensors to the bit."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    return bool(one == other)


def once(backbone: nn.Module, batch: dict[str, Tensor], before: dict[str, Any], name: str) -> tuple[str, list[str]]:
    """Attach, move, run, detach: whether that was refused, did nothing, or acted; and what is not as before."""
    try:
        delta = dt.attach(backbone, recipe(name), name="tried")
    except (NoSite, Unsupported):
        return "refused", changed(before, snapshot(backbone, batch))
    with torch.no_grad():
        for parameter in delta.trained_parameters().values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    acted = "outputs" in changed(before, snapshot(backbone, batch))
    dt.detach(delta)
    return "acted" if acted else "idle", changed(before, snapshot(backbone, batch))


if __name__ == "__main__":
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for alias, auto_class in BACKBONES.items():
        backbone, tokenizer = load_backbone(alias, auto_class=auto_class).eval(), load_tokenizer(alias)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
        before = snapshot(backbone, batch)
        outcomes = {}
        for name in methods:
            outcomes[name] = once(backbone, batch, before, name)
            print(f"{alias} {name}: {outcomes[name]}", file=sys.stderr, flush=True)
        counts = {kind: sorted(name for name, (outcome, _) in outcomes.items() if outcome == kind) for kind in ("acted", "idle", "refused")}
        differing = {name: differences for name, (_, differences) in outcomes.items() if differences}
        found[alias] = {"acted": len(counts["acted"]), "idle": counts["idle"], "refused": counts["refused"], "differing": differing}
    report(
        "is a real backbone bit for bit as before once a delta is detached: state_dict, outputs, modules, hooks, requires_grad",
        methods=len(methods),
        backbones=found,
        holds=not any(entry["differing"] for entry in found.values()),
    )
