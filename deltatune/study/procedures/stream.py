"""``stream``: one task after another, with one delta that trains on or with a delta for each; what is still known of the earlier ones?"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltatune.checkpoint.format import load
from deltatune.errors import InvalidValue
from deltatune.injection.attach import attach, detach
from deltatune.injection.delta import Delta
from deltatune.injection.state import backbone_state
from deltatune.study.procedures.procedure import procedures
from deltatune.study.procedures.stages import NUMBERS, SUMMED, Numbers, brief, joined, stage
from deltatune.study.trial import Outcome, Trial
from deltatune.tasks import Rows, TaskData, get_task
from deltatune.tasks.framing import Framing
from deltatune.tasks.sampling import subset
from deltatune.training.borrowed import trainer_modules
from deltatune.training.evaluation import measure_rows, score_rows
from deltatune.training.files import write_text
from deltatune.training.job import choose_framing, kind_of, load_framed, spelled
from deltatune.training.place import DELTA
from deltatune.training.run import Run, load_data
from deltatune.training.train import sampled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAME, OWN = "same", "own"
ROW = "row.json"
MEAN = "mean score"


@dataclass(frozen=True)
class Item:
    """A task of the stream.

    Attributes:
        data: its rows.
        framing: how they are put.
        test: the rows on which it is scored.
    """

    data: TaskData
    framing: Framing
    test: Rows

    def measured(self, backbone: nn.Module, batch_size: int) -> Numbers:
        """What the numbers of a run say of the test rows, of the backbone as it is now."""
        found = measure_rows(self.framing, backbone, self.test, batch_size)
        metric = self.framing.task.metric
        return {
            "score": found[metric].value,
            "metric": metric,
            "metrics": {name: one.value for name, one in found.items()},
            "intervals": {name: [one.low, one.high] for name, one in found.items()},
            "degenerate": found[metric].degenerate,
        }


@procedures.register("stream")
def stream(trial: Trial, folder: Path) -> Outcome:
    """Train on one task after another, and score each that was seen behind every one.

    ``numbers["matrix"][i][j]`` is the score on task j behind the training on task i, j <= i; ``score`` is the mean of its last row,
    ``numbers["forgetting"]`` what ``forgetting`` makes of it. ``numbers["stages"]`` has ``task``, test ``score``, best ``validation``
    score, ``steps`` and ``curve`` of each, and ``numbers["backbone"]`` the hash of the backbone's own tensors ahead of it all and behind.

    Options:
        tasks: a ring of tasks, begun at the run's own.
        most: so many of them; all if left out.
        deltas: ``same``, one delta that trains on, or ``own``, one for each task on the backbone as it was.

    Raises:
        InvalidValue: options that cannot be, several methods, or a task that the head of the first does not fit.
        UnknownName: a task nobody knows.
    """
    began, run = time.perf_counter(), trial.run
    names, own = asked(trial)
    with trainer_modules():
        torch.manual_seed(run.settings.seed)
        data = [sampled(load_data(name, run.settings), run.settings) for name in names]
        backbone, tokenizer, _ = load_framed(run.backbone, data[0].task, run.settings)
        course = _Course(run, folder, own, backbone, tokenizer)
        told, matrix = course.conduct([item_of(one, backbone, tokenizer, run) for one in data])
    seconds = round(time.perf_counter() - began, 3)
    numbers, history = joined(told, summed=SUMMED if own else ())
    numbers |= {"score": fmean(matrix[-1]), "metric": MEAN, "metrics": {MEAN: fmean(matrix[-1])}, "intervals": {}, "degenerate": False}
    numbers |= {"matrix": matrix, "forgetting": forgetting(matrix), "stages": [_told(one) for one in told]}
    numbers["backbone"] = {"before": course.before, "after": digest(backbone), "restored": course.restored}
    return Outcome(trial.key, numbers, history, seconds)


def asked(trial: Trial) -> tuple[list[str], bool]:
    """The tasks in their order, and whether each has a delta of its own.

    Raises:
        InvalidValue: options that cannot be, or several methods.
        UnknownName: a task nobody knows.
    """
    told, deltas, most = trial.options.get("tasks"), trial.options.get("deltas", SAME), trial.options.get("most")
    ring = list(told) if isinstance(told, Sequence) and not isinstance(told, str) else []
    few = most is None or (isinstance(most, int) and most > 0)
    if trial.run.task not in ring or not all(isinstance(name, str) for name in ring) or deltas not in (SAME, OWN) or not few:
        raise InvalidValue(
            f"The procedure `stream` of `{trial.said}` was given `tasks: {told}`, `deltas: {deltas}` and `most: {most}`. It wants a list "
            f"of names with `{trial.task}` among them, `{SAME}` or `{OWN}`, and a whole number above 0 or nothing."
        )
    if len(trial.run.methods) > 1:
        raise InvalidValue(f"The procedure `stream` of `{trial.said}` was given {len(trial.run.methods)} methods. Give it one.")
    start = ring.index(trial.run.task)
    names = [*ring[start:], *ring[:start]][:most]
    for name in names:
        get_task(name)  # ahead of hours of training
    return names, deltas == OWN


def forgetting(matrix: Sequence[Sequence[float]]) -> float | None:
    """F = mean over tasks j < T of max_{i < T} a_ij - a_Tj: what was known at best, less what is left (Chaudhry et al. 2018).

    >>> round(forgetting([[0.9], [0.6, 0.8], [0.7, 0.8, 0.9]]), 3)
    0.1
    >>> forgetting([[0.9]])
    """
    *earlier, last = matrix
    lost = [max(row[task] for row in earlier if task < len(row)) - last[task] for task in range(len(last) - 1)]
    return fmean(lost) if lost else None


def digest(backbone: nn.Module) -> str:
    """SHA-256 of the backbone's own tensors, every bit of them, with names, types and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(backbone_state(backbone).items()):
        if isinstance(tensor, Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def item_of(data: TaskData, backbone: nn.Module, tokenizer: PreTrainedTokenizerBase, run: Run) -> Item:
    """A task as the run puts it to its backbone, with the test rows on which it is scored."""
    framing = choose_framing(data.task, kind_of(backbone), run.settings, tokenizer)
    most = run.settings.test_rows
    return Item(data, framing, subset(data.task, data.test, most) if most else data.test)


class _Course:
    """One stream: its backbone, and the delta that is on it."""

    def __init__(self, run: Run, folder: Path, own: bool, backbone: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run, self.folder, self.own = run, folder, own
        self.backbone, self.tokenizer = backbone, tokenizer
        self.delta: Delta | None = None
        self.before, self.restored = digest(backbone), True

    def conduct(self, items: Sequence[Item]) -> tuple[list[Numbers], list[list[float]]]:
        """What came of each task, and the matrix; the backbone is bare behind it."""
        told, matrix = [], []
        for number, item in enumerate(items, 1):
            numbers = self._train(number, item)
            if self.own:
                self._release()
            told.append({**numbers, "task": item.data.task.name})
            matrix.append(self._row(number, items, numbers["score"]))
        self._release()
        return told, matrix

    def _train(self, number: int, item: Item) -> Numbers:
        """The delta that is there trains on, or a fresh one; of a stage that is finished, it comes from its folder."""
        place = self.folder / f"stage-{number}"
        if (place / NUMBERS).exists():
            self._release()
        there = self.delta

        def fresh() -> Delta:
            [method] = spelled(self.run.methods, self.tokenizer, item.framing)
            return there or attach(self.backbone, method, self.run.where, layers=self.run.layers, name=f"delta-{number}")

        self.delta, numbers = stage(place, self.backbone, fresh, item.data, self.run.settings, self.tokenizer)
        return numbers

    def _release(self) -> None:
        """Take the delta off, and look whether it left a trace."""
        if self.delta is not None:
            detach(self.delta)
            self.delta, self.restored = None, self.restored and digest(self.backbone) == self.before

    def _row(self, number: int, items: Sequence[Item], score: float) -> list[float]:
        """The scores on all tasks so far; those that were taken ahead of a kill are read."""
        file = self.folder / f"stage-{number}" / ROW
        if file.exists():
            row: list[float] = json.loads(file.read_text(encoding="utf-8"))
            return row
        row = [self._score(earlier, item) for earlier, item in enumerate(items[: number - 1], 1)] + [score]
        write_text(file, json.dumps(row) + "\n")
        return row

    def _score(self, number: int, item: Item) -> float:
        """On an earlier task, with its own delta where it has one."""
        other = load(self.backbone, self.folder / f"stage-{number}" / DELTA) if self.own else None
        score = score_rows(item.framing, self.backbone, item.test, self.run.settings.eval_batch_size)["score"]
        if other is not None:
            detach(other)
        return score


def _told(numbers: Numbers) -> Numbers:
    curve = [[entry["step"], entry["eval_score"]] for entry in numbers["history"] if "eval_score" in entry]
    return {"task": numbers["task"], **brief(numbers), "curve": curve}
