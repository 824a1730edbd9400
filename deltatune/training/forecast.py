"""Peak memory and seconds of a training step, before anything trains.

Memory: the step is taken by a shadow of the backbone (``training.shadow``), whose tensors have shapes and no bytes, and what lives at once
is counted. On a GPU that is what its allocator holds. A process on a CPU holds more: the holes of its heap, the libraries' code, what their
kernels keep for themselves. Real steps show that, on as many rows b as a few seconds and the free memory allow; what the other rows of the
batch add follows from the heap that the shadow's tensors would grow (``training.heap``).

    live(B) = delta + max_t sum of the tensors that live at t
    resident(B) = resident(b) + heap(tensors of B, in their order) - heap(tensors of b)

Time: the same real steps. Fewer rows than a batch has are continued on a line:

    t(B) = t(b) + (t(b) - t(b/2)) (B - b) / (b/2)
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.training.freed import KEEPING, give_back, keeping_freed
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


@dataclass(frozen=True)
class Trial:
    """What real steps showed.

    Attributes:
        rows: of each batch.
        seconds: a step by the clock, of as many rows as the batch that is asked for.
        processor_seconds: the same of the processor.
        resident: what the process grew by in a step of the most rows, in bytes; None where the system does not tell.
    """

    rows: tuple[int, ...]
    seconds: float
    processor_seconds: float
    resident: int | None


def forecast(
    steps: Steps,
    batch_of: Callable[[int], Batch],
    rows: int,
    *,
    delta_bytes: int = 0,
    before: int | None = None,
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
        before: ``at_rest`` of the backbone, ahead of what was attached; left out, what is attached counts as there before.
        timed: the same, of the batch whose time is asked for.
        seconds: that a step of the trial may take.
    """
    timed = timed or batch_of
    with keeping_freed():
        start = at_rest(steps.backbone) if before is None else before
        one = min(_timed(steps, batch_of(1), turns=1))
        settled = at_rest(steps.backbone)
        memory = _memory(steps, batch_of, rows)
        wanted = delta_bytes + max(memory.live, memory.heap or 0)
        trial = _trial(steps, timed, rows, _affordable(rows, one, seconds, wanted))
    lengths = _length(batch_of(rows)), _length(timed(rows))
    others = _others(memory, steps, timed, trial, same=trial.rows[-1] == rows and lengths[0] == lengths[1])
    grew = None if start is None or settled is None else settled - start
    return Estimate(
        rows=rows,
        tokens=lengths,
        live_bytes=delta_bytes + memory.live,
        resident_bytes=_sum(grew, trial.resident, others) if _is_on_cpu(steps.backbone) else None,
        backbone_bytes=_backbone_bytes(steps.backbone),
        seconds=trial.seconds,
        processor_seconds=trial.processor_seconds,
        timed_rows=trial.rows,
        counted=memory.counted,
    )


def at_rest(backbone: nn.Module) -> int | None:
    """Bytes of the process with the backbone in memory and nothing that it could give back; None where the system does not tell."""
    gc.collect()
    _read(backbone)
    give_back()
    return resident()


def _others(memory: Memory, steps: Steps, timed: Callable[[int], Batch], trial: Trial, *, same: bool) -> int | None:
    """What the heap grows by from the trial's largest batch to the one that is asked for; None where the C library does not tell."""
    heap = memory.heap if same else _memory(steps, timed, trial.rows[-1]).heap
    return None if heap is None or memory.heap is None else memory.heap - heap


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


def _trial(steps: Steps, batch_of: Callable[[int], Batch], rows: int, few: tuple[int, ...]) -> Trial:
    """Steps of a few rows each, continued to all."""
    before = at_rest(steps.backbone)
    with peak_memory() as peak:
        found = [_timed(steps, batch_of(count)) for count in few]
    grew = None if before is None else max(0, peak.bytes - before)
    clock, processor = found[0] if len(found) == 1 else (_line(few[0], a, b, rows) for a, b in zip(*found, strict=True))
    return Trial(few, clock, processor, grew)


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


def _sum(*parts: int | None) -> int | None:
    """None where one of them is."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _is_on_cpu(backbone: nn.Module) -> bool:
    return next(backbone.parameters()).device.type == "cpu"


def _backbone_bytes(backbone: nn.Module) -> int:
    storages = (tensor.untyped_storage() for tensor in (*backbone.parameters(), *backbone.buffers()))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _length(batch: Batch) -> int:
    """Of the batch's padded rows, in tokens; 0 where rows are no tokens."""
    ids = batch.get("input_ids")
    return int(ids.shape[-1]) if isinstance(ids, torch.Tensor) else 0
