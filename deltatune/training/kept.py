"""Where the hidden states of frozen layers lie between epochs: in memory, or in a file that several runs read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice, pairwise, starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.checkpoint.fingerprint import fingerprint
from deltatune.compiled.cache import cache_folder
from deltatune.errors import InvalidValue, OutputError
from deltatune.injection.switching import deltas
from deltatune.tasks.framing import Framing
from deltatune.tasks.tensors import Features, by_length, inputs_of, length_of, moved
from deltatune.training.frozen import FrozenPrefix
from deltatune.training.settings import Place

ROW = "deltatune_row"
"""Under which a batch says which training rows it holds."""
MOST_OF_MEMORY = 0.5
"""Share of the free memory that may be taken."""
MOST_BYTES = 20 * 10**9
"""What lies on disk at most; the longest unused goes first."""
_RECIPE = 1
"""Counts up when what is kept of the same rows changes."""


class KeptRows:
    """Training rows with what the frozen layers give for each; a forward on them begins above these layers.

    The states are computed in batches of rows of like length, whose composition depends on nothing but the rows: so a resumed run, and
    one that reads what another has written, has the same bits.

    Args:
        backbone: with what trains attached.
        framing: how rows become batches.
        features: the encoded training rows.
        place: where the states lie.
        batch_size: rows a forward while they are computed.
        bf16: whether training runs under autocast.

    Raises:
        InvalidValue: no layers are frozen, or there is no room.
    """

    def __init__(
        self, backbone: nn.Module, framing: Framing, features: Sequence[Features], place: Place, *, batch_size: int = 64, bf16: bool = False
    ) -> None:
        self.backbone, self.framing, self.features, self.bf16 = backbone, framing, list(features), bf16
        self.spans = spans_of(self.features)
        few = range(min(2, len(self.features)))
        self.prefix = FrozenPrefix.of(backbone, self._call(few), (sum(len(self.spans[row]) for row in few), self._longest(few)))
        self.states = self._found(place, batch_size)

    def numbered(self) -> list[Features]:
        """The training rows, which know their places."""
        return [{**one, ROW: place} for place, one in enumerate(self.features)]

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """The framing's batch, and which rows it holds."""
        plain = [{name: value for name, value in one.items() if name != ROW} for one in features]
        return {**self.framing.collate(plain), ROW: torch.tensor([one[ROW] for one in features])}

    def plain_batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """The training rows in order, without their places, where the backbone is."""
        for start in range(0, len(self.features), batch_size):
            yield moved(self.framing.collate(self.features[start : start + batch_size]), self.backbone)

    @contextmanager
    def given(self, rows: Sequence[int]) -> Iterator[None]:
        """Within it, a forward on the batch of these rows begins above the frozen layers."""
        spans = self._spans(rows)
        states = self.states.new_zeros(len(spans), self._longest(rows), self.states.shape[1])
        for into, span in zip(states, spans, strict=True):
            into[: span.stop - span.start] = self.states[span]
        device = next((tensor.device for tensor in self.backbone.parameters()), states.device)
        with self.prefix.given(states.to(device)):
            yield

    def _spans(self, rows: Iterable[int]) -> list[slice]:
        return [span for row in rows for span in self.spans[row]]

    def _longest(self, rows: Iterable[int]) -> int:
        return max(length_of(self.features[row]) for row in rows)

    def _call(self, rows: Iterable[int]) -> Callable[[], Any]:
        batch = moved(self.framing.collate([self.features[row] for row in rows]), self.backbone)

        def call() -> Any:
            with torch.autocast(next(iter(batch.values())).device.type, torch.bfloat16, enabled=self.bf16):
                return self.framing.loss(self.backbone, batch)

        return call

    def _found(self, place: Place, batch_size: int) -> Tensor:
        """The states of all rows, (tokens, width), read or computed."""
        sample = self.prefix.states(self.backbone, self._call([0]))
        shape, dtype = (self.spans[-1][-1].stop, sample.shape[-1]), sample.dtype
        size = shape[0] * shape[1] * sample.element_size()
        if place == "memory":
            _check_memory(size)
            return self._computed(torch.empty(shape, dtype=dtype), batch_size)
        file = cache_folder() / "frozen" / f"{self._key(dtype, batch_size)}.bin"
        if not file.is_file() or file.stat().st_size != size:
            self._write(file, shape, dtype, size, batch_size)
        os.utime(file)
        return torch.from_file(str(file), shared=False, size=shape[0] * shape[1], dtype=dtype).view(shape)

    def _computed(self, states: Tensor, batch_size: int) -> Tensor:
        for rows in by_length(self.features, batch_size):
            found = self.prefix.states(self.backbone, self._call(rows))
            for span, one in zip(self._spans(rows), found, strict=True):
                states[span] = one[: span.stop - span.start]
        return states

    def _write(self, file: Path, shape: tuple[int, int], dtype: torch.dtype, size: int, batch_size: int) -> None:
        """In one piece or not at all; of two processes that compute the same, one wins."""
        draft = file.with_suffix(f".{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(file.parent).free
            if size > 0.9 * free:
                raise InvalidValue(
                    f"`keep_frozen=disk` needs {_gigabytes(size)} for {len(self.features):,} rows, and {_gigabytes(free)} are free beside "
                    "the other caches. Set DELTATUNE_CACHE to a folder with more room, or leave it out."
                )
            self._computed(torch.from_file(str(draft), shared=True, size=shape[0] * shape[1], dtype=dtype).view(shape), batch_size)
            draft.replace(file)
        except OSError as cause:
            raise OutputError(f"What the frozen layers give cannot be kept in `{file.parent.name}`: {cause}. Use `memory`.") from cause
        finally:
            draft.unlink(missing_ok=True)
        _make_room(file)

    def _key(self, dtype: torch.dtype, batch_size: int) -> str:
        """Hash of all that decides the states: backbone, what else acts on it, token ids, how many layers, how they are computed."""
        digest = hashlib.sha256()
        config = getattr(self.backbone, "config", None)
        plain = [
            _RECIPE,
            fingerprint(self.backbone).to_json(),
            str(getattr(config, "_attn_implementation", "")),
            len(self.prefix.layers),
            self.prefix.total,
            str(dtype),
            self.bf16,
            batch_size,
            str(next(self.backbone.parameters()).device.type),
            torch.__version__,
            self.framing.tokenizer.pad_token_id,
        ]
        digest.update(json.dumps(plain, sort_keys=True).encode())
        for one in self.features:
            inputs = {name: value for name, value in one.items() if name != "labels"}
            digest.update(json.dumps(inputs, sort_keys=True).encode())
        for delta in deltas(self.backbone):
            if delta.merged or (delta.enabled and not delta.trainable):
                digest.update(f"{delta.method} {delta.merged}".encode())
                _add(digest, delta.state_dict())
        return digest.hexdigest()[:32]


def spans_of(features: Sequence[Features]) -> list[list[slice]]:
    """Where the states of each row's inputs lie, the inputs of all rows one behind the other.

    >>> spans_of([{"input_ids": [1, 2]}, {"several": [{"input_ids": [3]}, {"input_ids": [4, 5]}]}])
    [[slice(0, 2, None)], [slice(2, 3, None), slice(3, 5, None)]]
    """
    ends = accumulate((length_of(one) for row in features for one in inputs_of(row)), initial=0)
    spans = starmap(slice, pairwise(ends))
    return [list(islice(spans, len(inputs_of(row)))) for row in features]


def _add(digest: Any, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _check_memory(size: int) -> None:
    free = _free_memory()
    if free is not None and size > MOST_OF_MEMORY * free:
        raise InvalidValue(
            f"`keep_frozen=memory` needs {_gigabytes(size)} for what the frozen layers give, and {_gigabytes(free)} of memory are free. "
            "Use `disk`, a smaller `max_length`, or leave it out."
        )


def _free_memory() -> int | None:
    """Bytes that the system could give; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _make_room(newest: Path) -> None:
    """Remove what was not read for longest."""
    total = 0
    for path in sorted(newest.parent.glob("*.bin"), key=lambda path: -path.stat().st_mtime):
        total += path.stat().st_size
        if total > MOST_BYTES and path != newest:
            path.unlink(missing_ok=True)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
