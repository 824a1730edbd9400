"""Files of other libraries, read with limits: weights as safetensors, or as a pickle only where that is allowed, and configs as JSON."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.checkpoint.record import MAX_RECORD
from deltatune.checkpoint.strict_json import parse
from deltatune.checkpoint.tensors import named, read_tensors, regular_file_size
from deltatune.errors import CheckpointError, Unsupported, nearest

MAX_NAME = 1000
"""Letters of a tensor's name."""
ZIPPED = (zipfile.BadZipFile, NotImplementedError)
"""What reading a zip archive raises beside the rest."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is missing, a link, too large, or no JSON object.
    """
    size = regular_file_size(file)
    if size > MAX_RECORD:
        raise CheckpointError(f"`{file}` has {size:,} bytes; a config has at most {MAX_RECORD:,}. It is not what it is called.")
    try:
        data = parse(file.read_bytes(), constants=True)
    except (OSError, ValueError, RecursionError) as cause:
        raise CheckpointError(f"`{file}` is truncated or was edited: {cause}. Copy it again.") from cause
    if not isinstance(data, dict):
        raise CheckpointError(f"`{file}` holds {type(data).__name__} instead of an object. Copy it again.")
    return data


def weights_file(folder: Path, safe: str, pickled: str, *, allow_bin: bool) -> Path:
    """The file of a folder's tensors: its safetensors file, else its pickle if that is allowed.

    Args:
        folder: where.
        safe: name of the safetensors file.
        pickled: name of the pickle.
        allow_bin: take a pickle.

    Raises:
        CheckpointError: neither is there, or it is a pickle that is not allowed.
    """
    if (folder / safe).exists() or (folder / safe).is_symlink():
        return folder / safe
    if not (folder / pickled).exists():
        raise CheckpointError(f"`{folder}` has no weights: neither `{safe}` nor `{pickled}` is there. Copy the folder again.")
    if not allow_bin:
        raise CheckpointError(
            f"`{folder / pickled}` is a pickle, which can run code when it is read. Convert it to `{safe}`; or pass allow_bin=True "
            "(--allow-bin) to read it by torch.load(weights_only=True), which takes tensors and plain values alone."
        )
    return folder / pickled


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``weights_file`` found: a safetensors file, or a pickle, by ``torch.load(weights_only=True)`` alone.

    Raises:
        CheckpointError: it is a link, or damaged, or has names beyond all sense.
    """
    found = read_tensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    longest = max(map(len, found), default=0)
    if longest > MAX_NAME:
        raise CheckpointError(f"`{file}` has a name of {longest:,} letters; {MAX_NAME:,} are the most. It was edited; copy it again.")
    return found


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of ``torch.save``, read by ``torch.load(weights_only=True)``.

    Raises:
        CheckpointError: it is missing, a link, damaged, or holds anything but tensors under names, each in full length.
    """
    regular_file_size(file)
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as packed:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in packed.infolist()):
                    raise ValueError("it is compressed, which torch.save never does")  # a few bytes could stand for gigabytes
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, OSError, *ZIPPED) as cause:
        reason = str(cause).strip().splitlines()
        raise CheckpointError(f"`{file}` cannot be read as tensors alone: {reason[0] if reason else cause!r}. Copy it again.") from cause
    if not isinstance(state, Mapping) or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise CheckpointError(f"`{file}` holds more than tensors under names. Save the delta's state_dict alone.")
    odd = [name for name, tensor in state.items() if not _is_whole(tensor)]
    if odd:
        raise CheckpointError(
            f"`{file}` holds {named(odd)} as something else than its numbers, one by one. Save the delta's state_dict alone."
        )
    return {name: tensor.detach() for name, tensor in state.items()}


def _is_whole(tensor: Tensor) -> bool:
    """It is a plain tensor, and the file has every number of it: a view could say that one number stands for gigabytes."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


class Fields:
    """Takes values out of a foreign config one by one, and complains about what is left: nothing is silently ignored.

    Args:
        data: the config.
        file: where it stands, for errors.
        harmless: fields that change neither what is computed nor what trains; they may stay.
    """

    def __init__(self, data: Mapping[str, Any], file: Path, harmless: Collection[str] = ()) -> None:
        self.data = {key: value for key, value in data.items() if key not in harmless}
        self.file = file
        self.lenient: list[str] = []

    def take(self, key: str, default: Any, *types: type) -> Any:
        """The value of a field, or the default where it is absent or null.

        Raises:
            CheckpointError: it is of another type than those given (of the default's, if none is), or no finite number.
        """
        value = self.data.pop(key, None)
        return default if value is None else self._checked(key, value, types or (type(default),))

    def take_table(self, key: str, *types: type) -> dict[str, Any]:
        """The table in a field, each value of one of these types; empty where it is absent or null.

        Raises:
            CheckpointError: it is none, or a value is of another type.
        """
        return {name: self._checked(f"{key}.{name}", value, types) for name, value in self.take(key, {}).items()}

    def _checked(self, key: str, value: Any, kinds: tuple[type, ...]) -> Any:
        if float in kinds and isinstance(value, int) and int not in kinds and not isinstance(value, bool):
            value = float(value)
        endless = isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds) or endless:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(f"`{self.file}` has {key} = {value!r:.80}, which is no {wanted}. Correct or copy the config again.")
        return value

    def peek(self, key: str) -> Any:
        """The value of a field, which stays; None where it is absent."""
        return self.data.get(key)

    def refuse(self, key: str, *allowed: Any, why: str = "") -> None:
        """A field that must be absent, null, empty, false, or one of the values given.

        Raises:
            Unsupported: it has another value.
        """
        value = self.data.pop(key, None)
        if value not in (None, False, *allowed) and value not in ([], {}, ""):
            raise Unsupported(
                f"`{self.file}` has {key} = {value!r:.80}, which deltatune cannot reproduce{f': {why}' if why else ''}. "
                "Convert the delta with the library that wrote it, or train it anew here."
            )

    def only_trains(self, key: str, *allowed: Any) -> None:
        """A field that we lack and that matters in training alone: an error unless unknown fields are allowed; see ``end``."""
        value = self.data.pop(key, None)
        if value not in (None, False, 0, *allowed) and value not in ([], {}, ""):
            self.lenient.append(f"{key} = {value!r:.60}")

    def end(self, *, allow_unknown: bool) -> None:
        """Nothing may be left.

        Raises:
            CheckpointError: a field is unknown, or would be lost when the delta trains on.
        """
        if allow_unknown:
            return
        if self.data:
            key, value = sorted(self.data.items())[0]
            more = f" and {len(self.data) - 1} more" if len(self.data) > 1 else ""
            raise CheckpointError(
                f"`{self.file}` has {key} = {value!r:.80}{more}, which this version of deltatune does not know. "
                "Upgrade deltatune, or pass allow_unknown=True to load without."
            )
        if self.lenient:
            raise CheckpointError(
                f"`{self.file}` has {', '.join(self.lenient)}, which our method lacks: outputs would be the same, further training would "
                "not. Pass allow_unknown=True to load without."
            )


def left_over(tensors: Mapping[str, Tensor], file: Path, known: Collection[str]) -> CheckpointError:
    """The error for tensors that no rule of a format takes."""
    first = min(tensors)
    return CheckpointError(f"`{file}` holds tensors that have no place here: {named(sorted(tensors))}. {nearest(first, known)}")
