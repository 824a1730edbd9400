"""TRL's trainers on an attached model: supervised fine-tuning, and DPO with the delta disabled as the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import deltatune as dt
from deltatune.methods import LoRA
from deltatune.training.callback import DeltaCallback
from deltatune.training.reference import Reference
from tests.training import tiny

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")

COMMON: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "max_length": 32,
    "activation_checkpointing": False,
}


@pytest.fixture
def attached() -> tuple[Any, Any]:
    model = tiny.backbone("llama")
    return model, dt.attach(model, LoRA(rank=4), name="preferred")


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft(attached: tuple[Any, Any], tmp_path: Path) -> None:
    model, delta = attached
    before = {name: tensor.clone() for name, tensor in dt.backbone_state(model).items()}
    fresh = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
    rows = datasets.Dataset.from_dict({"prompt": ["goal match Topic:"] * 16, "completion": [" sport"] * 16})
    arguments = trl.SFTConfig(output_dir=str(tmp_path), completion_only_loss=True, **COMMON)
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tiny.tokenizer(), callbacks=[DeltaCallback([delta], saves=False)]
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert not tiny.same(fresh, delta.state_dict())
    assert tiny.same(before, dt.backbone_state(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # TRL 1.16 under transformers 5.23
def test_dpo(attached: tuple[Any, Any], tmp_path: Path) -> None:
    model, delta = attached
    tokenizer = tiny.tokenizer()
    batch = tokenizer(["goal match"], return_tensors="pt")
    with torch.no_grad(), dt.disabled(model):
        plain = model(**batch).logits
    rows = datasets.Dataset.from_dict({"prompt": ["goal match Topic:"] * 16, "chosen": [" sport"] * 16, "rejected": [" money"] * 16})
    reference = Reference(model)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(output_dir=str(tmp_path), **COMMON),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[DeltaCallback([delta], saves=False)],
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-3)  # a fresh delta is the reference
    assert losses(trainer)[-1] < losses(trainer)[0]
    with torch.no_grad():
        torch.testing.assert_close(reference(**batch).logits, plain)
        assert not torch.allclose(model(**batch).logits, plain)
    assert list(reference.parameters()) == []
