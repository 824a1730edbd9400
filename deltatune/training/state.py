"""The deltas' part of a run's checkpoint: their tensors, finite and bit for bit, and nothing of the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltatune.checkpoint.tensors import named, not_finite
from deltatune.errors import CheckpointError, Diverged
from deltatune.training.files import write_whole
from deltatune.training.life import Trained

SUFFIX = ".delta.safetensors"


def write_state(deltas: Sequence[Trained], folder: Path) -> None:
    """One file a delta, ``<name>.delta.safetensors``; each is whole or as it was.

    Raises:
        OutputError: it cannot be written.
    """
    for delta in deltas:
        tensors = _unshared(delta.state_dict())
        write_whole(folder / f"{delta.name}{SUFFIX}", partial(save_file, tensors))


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


def check_finite(deltas: Sequence[Trained], step: int) -> None:
    """Make sure that the training has not diverged.

    Raises:
        Diverged: a delta holds NaN or infinity.
    """
    for delta in deltas:
        broken = not_finite(delta.state_dict())
        if broken:
            raise Diverged(
                f"The training diverged: at step {step}, `{delta.name}` holds NaN or infinity in {named(broken)}. "
                "Lower the learning rate (`lr`), or clip the gradients to a smaller norm (`max_grad_norm`)."
            )


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
