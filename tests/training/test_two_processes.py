"""``dt.train`` in two processes: the steps of one process with the joined batch, the same delta on both, and one folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltatune.methods import LoRA
from deltatune.training.train import train
from tests.project import ROOT
from tests.training import tiny

OPTIONS: dict[str, Any] = {"max_steps": 3, "evaluations": 1, "lr": 1e-2, "progress": "none"}
ROWS = 24

ONE_OF_TWO = f"""
import sys, torch
from deltatune.methods import LoRA
from deltatune.training.train import train
from tests.training import tiny
torch.set_num_threads(1)
backbone, out, own = sys.argv[1:]
result = train(backbone, tiny.data(train={ROWS}), LoRA(rank=2), out=out, batch_size={ROWS // 2}, **{OPTIONS})
torch.save(result.deltas[0].state_dict(), own)
torch.distributed.destroy_process_group()
"""


def _port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    backbone, shared = tiny.folder("llama", tmp_path), tmp_path / "run"  # a model without dropout
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_port()), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ONE_OF_TWO, backbone, str(shared), str(tmp_path / f"{rank}.pt")],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **meeting, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    try:
        for process in running:
            _, error = process.communicate(timeout=250)
            assert process.returncode == 0, error[-3000:]
    finally:
        for process in running:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert tiny.same(first, second)
    assert {entry.name for entry in shared.iterdir()} == {"delta", "metrics.json", "curve.png", "run.yaml"}
    assert tiny.same(first, load_file(shared / "delta" / "delta.safetensors"))
    alone = train(backbone, tiny.data(train=ROWS), LoRA(rank=2), batch_size=ROWS, **OPTIONS).deltas[0].state_dict()
    assert max(float((alone[name] - first[name]).abs().max()) for name in alone) < 1e-4
    assert max(float(tensor.abs().max()) for name, tensor in alone.items() if name.endswith("lora_B")) > 1e-3
