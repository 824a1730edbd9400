"""Rule 2, second half: a pickle of an attached backbone acts in a process that has never seen it, and is detached there."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import torch

from tests.conformance.cells import TAKEN, shake
from tests.conformance.sample import pairwise
from tests.models import output

FRESH_PROCESS = """
import pickle, sys, torch
from deltatune.injection.attach import attach, detach
from deltatune.injection.switching import deltas
from deltatune.methods import LoRA
from tests.models import output

torch.set_num_threads(1)
torch.set_grad_enabled(False)
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        backbone, inputs, expected, plain = pickle.load(file)
    assert torch.equal(output(backbone, inputs), expected), f"{path}: outputs after unpickling"
    (delta,) = deltas(backbone)
    modules = list(backbone.modules())
    handles = [module.register_forward_hook(lambda *_: None) for module in modules]
    handles += [module.register_forward_pre_hook(lambda *_: None) for module in modules]
    told = f"{path}: new hooks took the place of ours"  # beside which sums are made in another order
    torch.testing.assert_close(output(backbone, inputs), expected, rtol=1e-5, atol=1e-5, msg=told)
    for handle in handles:
        handle.remove()
    other = attach(backbone, LoRA(rank=2), "feed_forward.up", name="other", head=False)
    assert torch.equal(output(backbone, inputs), expected), f"{path}: a second delta"
    detach(delta)
    detach(other)
    assert torch.equal(output(backbone, inputs), plain), f"{path}: detached"
    left = [module for module in backbone.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not left, f"{path}: hooks left on {left}"
print("fine")
"""
MODELS = ("bert", "gpt2", "llama", "t5", "torch_encoder")
CELLS = pairwise((cell for cell in TAKEN if cell.model in MODELS), ("method",), ("act", "model"))


def test_pickle_in_a_fresh_process(tmp_path: Path) -> None:
    assert {cell.model for cell in CELLS} == set(MODELS)
    for cell in CELLS:
        backbone, inputs = cell.fresh()
        with torch.no_grad():
            plain = output(backbone, inputs)
            shake(cell.attach(backbone))
            expected = output(backbone, inputs)
        (tmp_path / str(cell)).write_bytes(pickle.dumps((backbone, inputs, expected, plain)))
    command = [sys.executable, "-c", FRESH_PROCESS, *(str(tmp_path / str(cell)) for cell in CELLS)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=250)
    assert run.stdout.strip() == "fine", run.stderr[-2000:]
