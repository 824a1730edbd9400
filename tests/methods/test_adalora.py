"""AdaLoRA against its formulas, against PEFT's allocator, and through its life."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from deltatune.checkpoint.format import load, save
from deltatune.errors import CheckpointError, InvalidValue
from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.injection.merge import merge
from deltatune.methods import AdaLoRA
from deltatune.methods.reparameterization.adalora import Triplets
from deltatune.training.life import Life
from tests.conformance.cells import fresh, shake
from tests.models import output


def _triplets(delta: Delta) -> list[Triplets]:
    return [module for patch in delta.patches for module in patch.modules() if isinstance(module, Triplets)]


def test_the_formula_in_double_precision() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(7, 5)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    delta = attach(backbone, AdaLoRA(rank=2, initial_rank=3, alpha=2.5), "0")
    backbone.double()
    shake(delta, spread=1.0)
    P, Lambda, Q = delta.parameters()
    expected = x @ (backbone[0].weight + 2.5 / 3 * P @ Lambda.diag() @ Q).T + backbone[0].bias
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    eye = torch.eye(3)
    by_hand = 0.1 * ((P.T @ P - eye).square().sum().sqrt() + (Q @ Q.T - eye).square().sum().sqrt()) / 2
    torch.testing.assert_close(delta.penalty(), by_hand, atol=1e-10, rtol=1e-10)
    merge(delta)
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)


def _run(backbone: nn.Module, step: Any, inputs: dict[str, Tensor], rounds: int, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.0)
    for k in range(1, rounds + 1):
        optimizer.zero_grad()
        output(backbone, inputs).square().mean().backward()
        optimizer.step()
        step(k)


def test_triplets_are_chosen_as_pefts_are() -> None:
    """The same start, data and optimizer: after a whole run, outputs and surviving triplets are the same."""
    backbone, inputs = fresh("bert")
    total = 12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields: dict[str, Any] = dict(init_r=4, target_r=2, lora_alpha=8, tinit=2, tfinal=4, deltaT=1, beta1=0.8, beta2=0.7)
        config = AdaLoraConfig(**fields, total_step=total, target_modules=["query", "value"])
        theirs: Any = get_peft_model(copy.deepcopy(backbone), config).eval()  # type: ignore[arg-type]
    method = AdaLoRA(rank=2, initial_rank=4, alpha=8, warmup_share=2 / 12, final_share=4 / 12, beta1=0.8, beta2=0.7)
    delta = attach(backbone, method, head=False)
    tensors = dict(theirs.base_model.model.named_parameters())
    names = {"P": "lora_B", "Lambda": "lora_E", "Q": "lora_A"}
    pairs = []
    with torch.no_grad():
        for name, own in delta.named_parameters():
            path, _, factor = name.rpartition(".triplets.")
            pairs.append((own, tensors[f"{path}.{names[factor]}.default"]))
            own.copy_(pairs[-1][1].reshape(own.shape))
    kept: list[int] = []

    def after(k: int) -> None:
        method.after_step(delta.patches, k, total)
        kept.append(sum(int(triplets.kept.sum()) for triplets in _triplets(delta)))

    _run(backbone, after, inputs, total, list(delta.parameters()))
    _run(theirs, lambda k: theirs.base_model.update_and_allocate(k), inputs, total, [other for _, other in pairs])
    for own, other in pairs:
        torch.testing.assert_close(own, other.reshape(own.shape), atol=1e-4, rtol=1e-3)
    assert kept[:2] == [16, 16] and kept[-4:] == [8] * 4 and kept == sorted(kept, reverse=True)
    assert sum(int((triplets.Lambda != 0).sum()) for triplets in _triplets(delta)) == 8


def test_the_penalty_is_pefts() -> None:
    backbone, inputs = fresh("bert")
    delta = attach(backbone, AdaLoRA(rank=2, initial_rank=3, alpha=8, orthogonality=0.3), head=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AdaLoraConfig(
            init_r=3, target_r=2, orth_reg_weight=0.3, tinit=1, tfinal=1, total_step=9, target_modules=["query", "value"]
        )
        theirs: Any = get_peft_model(copy.deepcopy(fresh("bert")[0]), config).eval()  # type: ignore[arg-type]
    tensors = dict(theirs.base_model.model.named_parameters())
    with torch.no_grad():
        for name, own in delta.named_parameters():
            path, _, factor = name.rpartition(".triplets.")
            other = tensors[f"{path}.{dict(P='lora_B', Lambda='lora_E', Q='lora_A')[factor]}.default"]
            own.copy_(torch.randn(own.shape))
            other.copy_(own.reshape(other.shape))
    labels = torch.tensor([0, 1])
    plain = torch.nn.functional.cross_entropy(output(backbone, inputs), labels)
    torch.testing.assert_close(plain + delta.penalty(), theirs.base_model(**inputs, labels=labels).loss, atol=1e-5, rtol=1e-5)


def test_export_drops_what_was_not_chosen_and_outputs_stay(tmp_path: Path) -> None:
    backbone, inputs = fresh("mixtral")
    delta = attach(backbone, AdaLoRA(rank=2, initial_rank=5, final_share=0.3), ["attention.query", "*.experts.down_proj"], head=False)
    life = Life(delta, 10)
    life.begin([])
    optimizer = torch.optim.AdamW(delta.parameters(), 1e-2)
    for _ in range(10):
        life.before_step()
        output(backbone, inputs).square().mean().backward()
        life.add_penalty()
        optimizer.step()
        life.after_step()
        optimizer.zero_grad()
    before = output(backbone, inputs).detach()
    stored = delta.budget().size_bytes
    life.finish()
    torch.testing.assert_close(output(backbone, inputs).detach(), before, atol=1e-6, rtol=1e-6)
    assert delta.budget().size_bytes < stored / 3, "neither the dropped triplets nor the importance are stored"
    assert {name.rpartition(".")[2] for name in delta.state_dict()} == {"P", "Lambda", "Q"}
    save(delta, tmp_path / "delta")
    other, _ = fresh("mixtral")
    loaded = load(other, tmp_path / "delta")
    assert torch.equal(output(other, inputs), output(backbone, inputs))
    assert {triplets.P.shape[-1] for triplets in _triplets(loaded)} == {triplets.P.shape[-1] for triplets in _triplets(delta)}


def test_a_site_may_lose_all_its_triplets(tmp_path: Path) -> None:
    backbone, inputs = fresh("bert")
    delta = attach(backbone, AdaLoRA(rank=1, initial_rank=2), head=False)
    shake(delta, spread=1.0)
    for k, triplets in enumerate(_triplets(delta)):
        triplets.kept.fill_(k > 0)
    delta.method.export(delta.patches, None)  # type: ignore[attr-defined]
    found = output(backbone, inputs)
    assert [triplets.P.shape[-1] for triplets in _triplets(delta)] == [0, 2, 2, 2]
    save(delta, tmp_path / "delta")
    other, _ = fresh("bert")
    load(other, tmp_path / "delta")
    assert torch.equal(output(other, inputs), found)


def test_a_state_that_does_not_fit_leaves_the_form() -> None:
    backbone, inputs = fresh("bert")
    delta = attach(backbone, AdaLoRA(rank=1, initial_rank=2), head=False)
    shake(delta, spread=1.0)
    before = output(backbone, inputs)
    bad = {name: tensor for name, tensor in delta.state_dict().items() if name.rpartition(".")[2] in ("P", "Q")}
    with pytest.raises(CheckpointError):
        delta.load_state_dict(bad)
    assert torch.equal(output(backbone, inputs), before) and not any(triplets.exported for triplets in _triplets(delta))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rank=0), "`rank` must be greater than 0"),
        (dict(rank=8, initial_rank=7), "`initial_rank` must be at least `rank`, 8"),
        (dict(warmup_share=0.5, final_share=0.5), "less than 1 together"),
        (dict(beta1=1.0), "`beta1` must be at least 0 and less than 1"),
        (dict(orthogonality=-1.0), "`orthogonality` must be at least 0"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        AdaLoRA(**fields)
