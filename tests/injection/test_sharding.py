"""FSDP2 around a backbone with deltas: two processes that hold shards do what one process does with whole parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ONE_OF_TWO = """
import json, sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import deltatune as dt
from deltatune.methods import BitFit, DiffPruning, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from tests.conformance.cells import shake
from tests.models import MODELS, output

rank, meeting = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
found = {}

def life(method, sharded):
    torch.manual_seed(0)
    backbone, inputs = MODELS["bert"]()
    backbone.eval()
    delta = dt.attach(backbone, method, head=False)
    shake(delta)
    if sharded:
        for layer in backbone.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(backbone, mesh=mesh)
    optimizer = torch.optim.SGD(delta.trained_parameters().values(), lr=0.05)
    outputs = []
    for _ in range(2):
        optimizer.zero_grad()
        outputs.append(output(backbone, inputs))
        outputs[-1].square().mean().backward()
        optimizer.step()
    for act in (delta.disable, delta.enable, lambda: dt.switch(backbone, None), lambda: dt.switch(backbone, delta.name)):
        with torch.no_grad():
            outputs.append(output(backbone, inputs))
        act()
    state = {name: (tensor.full_tensor() if sharded else tensor).clone() for name, tensor in delta.state_dict().items()}
    delta.load_state_dict(delta.state_dict())
    with torch.no_grad():
        outputs.append(output(backbone, inputs))
        dt.detach(delta)
        outputs.append(output(backbone, inputs))
    return [tensor.detach() for tensor in outputs] + [state[name] for name in sorted(state)]

context = PrefixTuning(num_virtual_tokens=2), PromptTuning(num_virtual_tokens=2)
for method in (LoRA(rank=2), FullFineTuning(), BitFit(), DiffPruning(), *context):
    pairs = list(zip(life(method, True), life(method, False), strict=True))
    found[type(method).__name__] = max(float((one - other).abs().max()) for one, other in pairs)
dist.barrier()
dist.destroy_process_group()
print(json.dumps(found))
"""


def test_shards_do_what_whole_parameters_do(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ONE_OF_TWO, str(rank), f"file://{tmp_path}/meeting"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=environment,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for process in running:
            out, error = process.communicate(timeout=250)
            assert process.returncode == 0, error[-3000:]
            found = json.loads(out.strip().splitlines()[-1])
            assert len(found) == 6
            assert {name: difference for name, difference in found.items() if not difference < 1e-5} == {}
    finally:
        for process in running:
            process.kill()
