"""Data-parallel training: two gloo processes get the gradients that one process gets from the joined batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deltatune.errors import Unsupported
from deltatune.injection.attach import attach
from deltatune.methods import LoRA
from tests.conformance.cells import TAKEN, Cell
from tests.conformance.sample import pairwise

PAIRS = [str(cell) for cell in pairwise(TAKEN, ("act", "sort"), ("method",))]
"""Every way of acting on every sort of architecture, and every method."""

ONE_OF_TWO = """
import json, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.conformance.cells import TAKEN, shake
from tests.models import output

rank, meeting, names = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
found = {}
for name in names:
    cell = next(cell for cell in TAKEN if str(cell) == name)

    def trained(rows, wrapped):
        backbone, inputs = cell.fresh()
        delta = cell.attach(backbone, name="busy")
        shake(delta)
        idle = cell.attach(backbone, name="idle")
        idle.disable()
        inputs = {key: tensor[rows] for key, tensor in inputs.items()}
        model = DistributedDataParallel(backbone) if wrapped else backbone
        optimizer = torch.optim.SGD(delta.trained_parameters().values(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            output(model, inputs).float().square().mean().backward()
            gradients = [parameter.grad.clone() for parameter in delta.trained_parameters().values()]
            optimizer.step()
        return gradients + [parameter.detach().clone() for parameter in delta.trained_parameters().values()]

    together = trained(slice(rank, rank + 1), True)
    alone = trained(slice(None), False)
    scale = max(float(tensor.abs().max()) for tensor in alone)
    found[name] = max(float((one - other).abs().max()) for one, other in zip(together, alone, strict=True)) / scale
dist.destroy_process_group()
print(json.dumps(found))
"""


def test_two_processes_equal_one_with_the_joined_batch(tmp_path: Path) -> None:
    meeting = f"file://{tmp_path}/meeting"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ONE_OF_TWO, str(rank), meeting, *PAIRS],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=environment,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for process in running:
            out, error = process.communicate(timeout=250)
            assert process.returncode == 0, error[-3000:]
            found = json.loads(out.strip().splitlines()[-1])
            assert found.keys() == set(PAIRS)
            assert {name: difference for name, difference in found.items() if not difference < 1e-5} == {}
    finally:
        for process in running:
            process.kill()


def test_a_wrapped_backbone_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    try:
        cell = Cell("lora", "tied_mlp")
        backbone, _ = cell.fresh()
        with pytest.raises(Unsupported, match=r"wrapped in DistributedDataParallel already.*Attach first, then wrap"):
            attach(DistributedDataParallel(backbone), LoRA(rank=2), "first")
        with pytest.raises(Unsupported, match=r"wrapped in DistributedDataParallel already"):
            attach(nn.Sequential(DistributedDataParallel(backbone)), LoRA(rank=2), "0.module.first")
    finally:
        torch.distributed.destroy_process_group()
