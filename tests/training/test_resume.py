"""A run that was killed ends with the same bits as one that was not; its checkpoints hold the delta and never the backbone."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltatune.methods import DiffPruning, FullFineTuning, LoRA
from deltatune.methods.kinds import Method
from deltatune.training.trainer import checkpoints, last_checkpoint
from tests.training.killed import kill, run
from tests.training.tiny import same

CASES: dict[str, tuple[str, Method, str, dict[str, Any]]] = {
    "dropout, in the second epoch": ("bert", LoRA(rank=2, dropout=0.2), "step:8", {}),
    "inside saving the optimiser": ("bert", LoRA(rank=2, dropout=0.2), "save:4", {}),
    "ahead of the marker": ("bert", LoRA(rank=2), "mark:2", {}),
    "accumulated batches": ("bert", LoRA(rank=2, dropout=0.2), "step:15", {"grad_accumulation": 2}),
    "fused experts, inside saving": ("mixtral", LoRA(rank=2), "save:5", {"where": "experts.*"}),
    "tied embeddings": ("gpt2", LoRA(rank=2), "step:10", {"where": ["embedding", "attention.query"]}),
    "behind a change of phase": ("bert", DiffPruning(density=0.05, fine_tune_share=0.5), "step:10", {"lr": 1e-2}),
    "in place": ("bert", FullFineTuning(), "save:4", {"lr": 1e-3}),
    "frozen layers kept": ("bert", LoRA(rank=2, dropout=0.2), "step:8", {"layers": "top:1", "keep_frozen": "memory"}),
    "early stopping": ("bert", LoRA(rank=2, dropout=0.2), "step:6", {"early_stopping": 2, "evaluations": 6, "save_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_with_the_same_bits(case: str, tmp_path: Path) -> None:
    name, method, moment, options = CASES[case]
    whole = run(name, method, str(tmp_path / "whole"), **options)
    broken = tmp_path / "broken"
    assert kill(name, method, str(broken), moment, **options) == -signal.SIGKILL
    assert not (broken / "metrics.json").exists()
    assert last_checkpoint(broken / "checkpoints") is not None
    resumed = run(name, method, str(broken), **options)
    assert same(whole.deltas[0].state_dict(), resumed.deltas[0].state_dict())
    assert (tmp_path / "whole/delta/delta.safetensors").read_bytes() == (broken / "delta/delta.safetensors").read_bytes()
    assert whole.history == resumed.history
    assert whole.score == resumed.score


def test_a_run_killed_behind_its_last_step_takes_no_further_one(tmp_path: Path) -> None:
    method = LoRA(rank=2, dropout=0.2)
    whole = run("bert", method, str(tmp_path / "whole"), max_steps=7)
    assert kill("bert", method, str(tmp_path / "broken"), "test:1", max_steps=7) == -signal.SIGKILL
    resumed = run("bert", method, str(tmp_path / "broken"), max_steps=7)
    assert same(whole.deltas[0].state_dict(), resumed.deltas[0].state_dict())
    assert resumed.steps == 7


def test_a_checkpoint_holds_the_delta_and_never_the_backbone(tmp_path: Path) -> None:
    method = LoRA(rank=2)
    kill("mixtral", method, str(tmp_path), "step:11")
    folder = last_checkpoint(tmp_path / "checkpoints")
    assert folder is not None
    names = {path.name for path in folder.iterdir()}
    expected = {"lora.delta.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "complete.json"}
    assert names == expected
    tensors = load_file(folder / "lora.delta.safetensors")
    assert tensors
    assert all(name.endswith(("lora_A", "lora_B")) for name in tensors)
    held = sum(tensor.numel() for tensor in tensors.values())
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert sum(state["exp_avg"].numel() for state in moments.values()) == held
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 8
    assert len(checkpoints(tmp_path / "checkpoints")) == 1


def test_an_incomplete_checkpoint_is_ignored_and_removed(tmp_path: Path) -> None:
    kill("bert", LoRA(rank=2), str(tmp_path), "step:11")
    kept = last_checkpoint(tmp_path / "checkpoints")
    assert kept is not None
    half = kept.with_name("checkpoint-10")
    half.mkdir()
    (half / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path / "checkpoints") == kept
    (kept / "optimizer.pt").write_bytes(b"cut")
    assert last_checkpoint(tmp_path / "checkpoints") is None
