"""Experiment trackers: one that is installed is told the losses, another is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from deltatune.errors import MissingExtra
from deltatune.training.train import train
from tests.training import tiny

MISSING = sorted(set(INTEGRATION_TO_CALLBACK) - set(get_available_reporting_integrations()))


@pytest.mark.parametrize("name", MISSING)
def test_one_that_is_not_installed_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match=rf"`{name}` was asked for, but its package is not installed .* `pip install {name}`"):
        train(tiny.backbone("bert"), tiny.data(), "lora", tokenizer=tiny.tokenizer(), out=tmp_path / "run", report_to=name)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_is_told_the_losses(tmp_path: Path) -> None:
    if "tensorboard" in MISSING:
        pytest.skip("neither tensorboard nor tensorboardX is installed")
    options = {"max_steps": 2, "batch_size": 8, "progress": "none"}
    train(tiny.backbone("bert"), tiny.data(), "lora", tokenizer=tiny.tokenizer(), out=tmp_path, report_to="tensorboard", **options)  # type: ignore[arg-type]
    [events] = [file for file in (tmp_path / "logs").rglob("*tfevents*") if b"train/loss" in file.read_bytes()]
    assert events.stat().st_size > 0
