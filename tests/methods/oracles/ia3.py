"""(IA)^3 at the outputs; ``test_ia3.py`` has the inputs of feed-forward networks."""

from __future__ import annotations

from typing import Any

from peft import IA3Config
from torch import Tensor

from deltatune.methods import IA3
from tests.methods.oracles.hosts import LINEARS
from tests.methods.oracles.table import Oracle, cases


def config(**targets: Any) -> IA3Config:
    return IA3Config(feedforward_modules=[], **targets)


def shaped(name: str, own: Tensor, theirs: Tensor) -> Tensor:
    """(out, 1), and (1, out, 1, 1) at convolutions, as a vector."""
    return theirs.flatten()


FLAT = ("conv2d", "conv3d", "conv2d-1x1", "conv2d-strided", "conv2d-dilated", "conv2d-circular", "conv2d-grouped", "conv2d-depthwise")
"""PEFT takes no Conv1d, embeddings, attention or raw parameters; those are in ``test_ia3.py``, by the formula."""
ORACLE = Oracle(lambda: IA3(inputs=()), config, lambda tensor, _: "ia3_l.default", shaped=shaped)
CASES = cases("ia3", [*(host.name for host in LINEARS), *FLAT], [{}])
