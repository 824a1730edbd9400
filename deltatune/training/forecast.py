"""Peak memory and seconds of a training step, before anything trains.

Memory: the step is taken by a shadow of the backbone (``training.shadow``), whose tensors have shapes and no bytes, and what lives at once
is counted. On a GPU that is what its allocator holds. A process on a CPU holds more: what its heap cannot fill (``training.heap``), and
what the kernels keep for themselves, which a real step on one row shows.

    live = delta + max_t sum of the tensors that live at t
    resident = delta + heap(tensors in their order) + kernels

Time: real steps on as many rows as a few seconds allow. Fewer rows than a batch has are continued on a line:

    t(B) = t(b) + (t(b) - t(b/2)) (B - b) / (b/2)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.training.freed import KEEPING, keeping_freed
from deltatune.training.heap import grown
from deltatune.training.live import LiveTensors, live_tensors
from deltatune.training.measure import available, peak_memory, resident, wait
from deltatune.training.shadow import shadow_of
from deltatune.training.steps import Batch, Steps

SECONDS = 2.0
"""That one of the steps may take which are taken to learn the time of a step, by the clock or of the processor, whichever is less: beside
other work the clock tells what the others take."""
PAGE = 4096
TURNS = 3
"""Steps whose median counts."""


@dataclass(frozen=True)
class Estimate:
    """What a training step needs.

    Attributes:
        rows: of a batch.
        tokens: of the longest row of the batch whose memory is told, and of that whose time is told.
        live_bytes: high-water mark of live tensors, the backbone left out.
        resident_bytes: peak of the process's memory, that of the loaded backbone left out; None on a GPU, and where nobody tells.
        backbone_bytes: of the backbone's own tensors.
        seconds: a step by the clock.
        processor_seconds: the same in processor seconds of all threads.
        timed_rows: rows of the steps that were timed.
        counted: how memory was counted: ``shapes``, or ``rows`` where the backbone cannot be run without numbers.
    """

    rows: int
    tokens: tuple[int, int]
    live_bytes: int
    resident_bytes: int | None
    backbone_bytes: int
    seconds: float
    processor_seconds: float
    timed_rows: tuple[int, ...]
    counted: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "seconds": round(self.seconds, 5), "processor_seconds": round(self.processor_seconds, 5)}


@dataclass(frozen=True)
class Memory:
    """What a stretch of work held at most beyond what was there before: live tensors, and the process's heap; in bytes."""

    live: int
    heap: int | None
    counted: str = "shapes"


def forecast(
    steps: Steps,
    batch_of: Callable[[int], Batch],
    rows: int,
    *,
    delta_bytes: int = 0,
    timed: Callable[[int], Batch] | None = None,
    seconds: float = SECONDS,
) -> Estimate:
    """Memory and time of one of the steps.

    The steps are real ones, at a learning rate close to nothing: give what may be thrown away.

    Args:
        steps: what takes them.
        batch_of: the batch of so many rows whose memory is asked for.
        rows: how many there will be.
        delta_bytes: of what was attached.
        timed: the same, of the batch whose time is asked for.
        seconds: that a step of the trial may take.
    """
    timed = timed or batch_of
    with keeping_freed():
        kernels, one = _first(steps, batch_of(1))
        memory = _memory(steps, batch_of, rows)
        wanted = delta_bytes + max(memory.live, memory.heap or 0)
        few = _affordable(rows, one, seconds, wanted)
        trial = _trial(steps, timed, rows, few)
    on_cpu = next(steps.backbone.parameters()).device.type == "cpu"
    settled = on_cpu and memory.heap is not None and kernels is not None
    return Estimate(
        rows=rows,
        tokens=(_length(batch_of(rows)), _length(timed(rows))),
        live_bytes=delta_bytes + memory.live,
        resident_bytes=delta_bytes + (memory.heap or 0) + (kernels or 0) if settled else None,
        backbone_bytes=_backbone_bytes(steps.backbone),
        seconds=trial[0],
        processor_seconds=trial[1],
        timed_rows=few,
        counted=memory.counted,
    )


def _first(steps: Steps, batch: Batch) -> tuple[int | None, float]:
    """What the kernels keep for themselves, in bytes, from a step on one row; and its seconds, when it is warm."""
    _read(steps.backbone)
    before = resident()
    with peak_memory() as peak, live_tensors() as live:
        start = len(live.course)
        with steps.taking() as step:
            step(batch)
    heap = grown(_since(live, start), KEEPING)
    kernels = None if before is None or heap is None else max(0, peak.bytes - before - heap)
    return kernels, min(_timed(steps, batch, turns=1))


def _memory(steps: Steps, batch_of: Callable[[int], Batch], rows: int) -> Memory:
    """Of two steps by their shapes; of a backbone that cannot be run without numbers, by fewer rows."""
    try:
        with shadow_of(steps) as shadow:
            return _counted(shadow, batch_of(rows))
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        # what has no shape-only form: operations of other libraries, or values of weights that decide what runs
        few = max(1, min(rows // 2, 2))
        small, large = (_counted(steps, batch_of(count)) for count in (few, 2 * few))
        live, heap = (_line(few, a, b, rows) for a, b in ((small.live, large.live), (small.heap, large.heap)))
        return Memory(live, heap, "rows")


def _counted(steps: Steps, batch: Batch) -> Memory:
    with live_tensors() as live:
        start, before = len(live.course), live.bytes
        live.peak = before
        with steps.taking() as step:
            step(batch)
            step(batch)  # the optimiser's state is there from the beginning
    return Memory(live.peak - before, grown(_since(live, start), KEEPING))


def _since(live: LiveTensors, start: int) -> list[tuple[int, int]]:
    """What began within the block, and its ends."""
    earlier = {number for number, _ in live.course[:start]}
    return [entry for entry in live.course[start:] if entry[0] not in earlier]


def _line(few: int, a: float | None, b: float | None, rows: int) -> Any:
    """The value at ``rows`` on the line through a at ``few`` and b at twice as many."""
    return None if a is None or b is None else type(a)(b + (b - a) * (rows - 2 * few) / few)


def _affordable(rows: int, one: float, seconds: float, wanted: int) -> tuple[int, ...]:
    """Rows of the steps that are timed: all of a batch, or two numbers to put a line through."""
    free = available()
    room = rows if free is None or wanted <= 0 else int(rows * 0.8 * free / wanted)
    most = max(1, min(rows, room, int(seconds / max(one, 1e-9))))
    if most >= rows or rows <= 2:
        return (rows,)
    return (max(1, most // 2), 2 * max(1, most // 2))


def _trial(steps: Steps, batch_of: Callable[[int], Batch], rows: int, few: tuple[int, ...]) -> tuple[float, float]:
    """Seconds of a step, by the clock and of the processor."""
    found = [_timed(steps, batch_of(count)) for count in few]
    if len(found) == 1:
        return found[0]
    return _line(few[0], found[0][0], found[1][0], rows), _line(few[0], found[0][1], found[1][1], rows)


def _timed(steps: Steps, batch: Batch, turns: int = TURNS) -> tuple[float, float]:
    """Median seconds of a step by the clock and of the processor, behind one that is not counted."""
    clock, processor = [], []
    with steps.taking() as step:
        step(batch)
        for _ in range(turns):
            wait()
            began = time.perf_counter(), time.process_time()
            step(batch)
            wait()
            clock.append(time.perf_counter() - began[0])
            processor.append(time.process_time() - began[1])
    return statistics.median(clock), statistics.median(processor)


def _read(backbone: nn.Module) -> None:
    """Every page of the weights once: files that are mapped into memory come when they are read, and belong to the backbone."""
    for tensor in backbone.parameters():
        if tensor.device.type == "cpu" and type(tensor.data) is Tensor and tensor.untyped_storage().nbytes():
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())[::PAGE].sum()


def _backbone_bytes(backbone: nn.Module) -> int:
    storages = (tensor.untyped_storage() for tensor in (*backbone.parameters(), *backbone.buffers()))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _length(batch: Batch) -> int:
    """Of the batch's padded rows, in tokens; 0 where rows are no tokens."""
    ids = batch.get("input_ids")
    return int(ids.shape[-1]) if isinstance(ids, torch.Tensor) else 0
