"""Training what is attached already: a fusion of three deltas, a delta further, one delta behind another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.errors import InvalidValue, OutputError
from deltatune.injection.compose import Composition
from deltatune.methods import Adapter, LinearProbe, LoRA
from deltatune.tasks import Rows
from deltatune.tasks.framing import HeadFraming
from deltatune.training.evaluation import score_rows
from deltatune.training.life import Life
from deltatune.training.predict import evaluate
from deltatune.training.train import train
from tests.training import tiny

QUICK: dict[str, Any] = {"max_steps": 4, "evaluations": 2, "batch_size": 8, "progress": "none"}


def fused(place: Path) -> Composition:
    """Three adapters that were trained, without their heads, and a head of the task to come."""
    model = dt_backbone(place)
    for name in "abc":
        dt.attach(model, Adapter(bottleneck_dim=3, init_std=0.2), name=name, head=False)
    dt.attach(model, LinearProbe(), name="head")
    return dt.compose(model, ["a", "b", "c", "head"], how="fusion", name="fused")


def dt_backbone(place: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(tiny.folder("bert", place))


def test_a_fusion_trains_and_its_members_do_not(tmp_path: Path) -> None:
    fusion = fused(tmp_path)
    model = fusion.backbone
    members = {name: {key: tensor.clone() for key, tensor in delta.state_dict().items()} for name, delta in named(fusion)}
    mixers = {key: tensor.clone() for key, tensor in fusion.mixing.state_dict().items()}
    result = train(model, tiny.data(), fusion, tokenizer=tiny.tokenizer(), out=tmp_path / "fused", lr=1e-2, **QUICK)
    assert all(tiny.same(dict(delta.state_dict()), members[name]) == (name != "head") for name, delta in named(fusion))
    assert all(not torch.equal(tensor, mixers[key]) for key, tensor in fusion.mixing.state_dict().items())
    width, labels = model.config.hidden_size, len(tiny.LABELS)
    assert result.trainable_parameters == 3 * width**2 * len(fusion.mixers()) + (width + 1) * labels
    assert result.score == score(model, tiny.data().test)
    assert result.out == tmp_path / "fused" and result.delta_bytes > 4 * result.trainable_parameters
    _, _, loaded = dt.open(tmp_path / "fused")
    assert isinstance(loaded, Composition) and loaded.how == "fusion"
    assert evaluate(tmp_path / "fused", tiny.data())["score"] == result.score
    with pytest.raises(OutputError, match="exists already"):
        train(model, tiny.data(), fusion, tokenizer=tiny.tokenizer(), out=tmp_path / "fused", **QUICK)


def named(composition: Composition) -> list[tuple[str, Any]]:
    return [(delta.name, delta) for delta in composition.deltas]


def test_the_penalty_keeps_values_near_the_identity(tmp_path: Path) -> None:
    fusion = fused(tmp_path)
    with torch.no_grad():
        for mixer in fusion.mixers().values():
            mixer.get_parameter("V").add_(1.0)
    life = Life([fusion], total=1)
    life.add_penalty()
    for mixer in fusion.mixers().values():
        torch.testing.assert_close(mixer.get_parameter("V").grad, torch.full_like(mixer.get_parameter("V"), 0.02))
        assert mixer.get_parameter("Q").grad is None


def test_a_delta_trains_further_and_another_behind_it(tmp_path: Path) -> None:
    model = dt_backbone(tmp_path)
    [first] = train(model, tiny.data(), LoRA(rank=2), tokenizer=tiny.tokenizer(), **QUICK).deltas
    before = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    train(model, tiny.data(), first, tokenizer=tiny.tokenizer(), **QUICK)
    assert not any(torch.equal(tensor, before[key]) for key, tensor in first.state_dict().items())
    first.freeze()
    before = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    second = dt.attach(model, Adapter(bottleneck_dim=3), name="second", head=False)
    fresh = {key: tensor.clone() for key, tensor in second.state_dict().items()}
    train(model, tiny.data(), second, tokenizer=tiny.tokenizer(), **QUICK)
    assert tiny.same(dict(first.state_dict()), before)
    assert not any(torch.equal(tensor, fresh[key]) for key, tensor in second.state_dict().items())
    assert not first.trainable


def test_early_stopping_keeps_the_best_mixers(tmp_path: Path) -> None:
    fusion = fused(tmp_path)
    options = QUICK | {"early_stopping": 1, "max_steps": 6, "evaluations": 3}
    result = train(fusion.backbone, tiny.data(), fusion, tokenizer=tiny.tokenizer(), **options)
    best = max(entry["eval_score"] for entry in result.history if "eval_score" in entry)
    assert score(fusion.backbone, tiny.data().validation) == best


def score(model: Any, rows: Rows) -> float:
    return score_rows(HeadFraming(tiny.data().task, tiny.tokenizer(), 64), model, rows)["score"]


def test_what_is_refused(tmp_path: Path) -> None:
    fusion = fused(tmp_path)
    with pytest.raises(InvalidValue, match="`fused` is attached already"):
        train(tiny.backbone("bert"), tiny.data(), fusion, tokenizer=tiny.tokenizer(), **QUICK)
    with pytest.raises(InvalidValue, match="neither `where` nor `layers`"):
        train(fusion.backbone, tiny.data(), fusion, where="attention", tokenizer=tiny.tokenizer(), **QUICK)
    fusion.disable()
    with pytest.raises(InvalidValue, match="Nothing of `fused` would train: it is disabled"):
        train(fusion.backbone, tiny.data(), fusion, tokenizer=tiny.tokenizer(), **QUICK)
    fusion.dissolve()
    [a, *_] = dt.deltas(fusion.backbone)
    a.enable()
    a.freeze()
    with pytest.raises(InvalidValue, match="Nothing of `a` would train: it is frozen"):
        train(fusion.backbone, tiny.data(), a, tokenizer=tiny.tokenizer(), **QUICK)
