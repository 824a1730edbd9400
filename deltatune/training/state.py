"""The deltas' part of a run's checkpoint: their tensors, bit for bit, and nothing of the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltatune.errors import CheckpointError
from deltatune.training.life import Trained

SUFFIX = ".delta.safetensors"


def write_state(deltas: Sequence[Trained], folder: Path) -> None:
    """One file a delta, ``<name>.delta.safetensors``."""
    for delta in deltas:
        save_file(_unshared(delta.state_dict()), folder / f"{delta.name}{SUFFIX}")


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, with a copy of those whose memory another one holds too, which safetensors refuses."""
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return tensors


def read_state(deltas: Sequence[Trained], folder: Path) -> None:
    """Give the attached deltas the tensors that ``write_state`` wrote.

    Raises:
        CheckpointError: a file is missing or broken, or its tensors do not fit.
    """
    for delta in deltas:
        file = folder / f"{delta.name}{SUFFIX}"
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as cause:
            raise CheckpointError(
                f"The checkpoint `{folder.name}` has no readable state of delta `{delta.name}`: {cause}. Resume from another checkpoint."
            ) from cause
        delta.load_state_dict(tensors)


def has_state(folder: Path) -> bool:
    """Whether the folder holds the state of some delta."""
    return any(folder.glob(f"*{SUFFIX}"))
