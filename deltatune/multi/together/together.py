"""``train_together``: many jobs on one backbone, whose rows share forward and backward; each ends as if it were trained alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from deltatune.backbones import load_tokenizer
from deltatune.errors import Halt, InvalidValue, Unsupported
from deltatune.injection.ledger import ledger_of
from deltatune.multi.together.company import Company
from deltatune.multi.together.job import Job, Outcome, named
from deltatune.multi.together.shells import Shells
from deltatune.multi.together.tally import Tally
from deltatune.multi.together.wanted import Wanted, wanted
from deltatune.training.borrowed import trainer_modules
from deltatune.training.freed import keeping_freed
from deltatune.training.train import train
from deltatune.training.watch import Show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train_together(
    jobs: Sequence[Job],
    backbone: str | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    at_once: int | None = None,
    tokens: int | None = None,
    progress: Show = "auto",
) -> list[Outcome]:
    """Train many deltas on one backbone, their rows together in its forward and backward.

    Jobs are independent: rows, order, loss, rate, clipping, dropout, steps, scores, early stopping and checkpoints are each
    job's own, and each ends with the delta, and the files, that ``dt.train`` would give it. A job whose numbers are no longer
    finite stops alone, and so does one that raises an error. What cannot share a forward is trained by itself afterwards, and
    its outcome says why.

    Args:
        jobs: what to train; they may differ in task, method, head and every setting.
        backbone: an alias, installed package, folder or hub id; or a transformers model, which stays as it is and where it is: each result
            has a backbone of its own, around the same frozen tensors where it shared forwards.
        tokenizer: of a model that was given; found by the model's name if left out.
        out: a folder with one run's folder a job, under the job's name; nothing is kept on disk if left out. Asked again, jobs
            that are finished there are left alone, and unfinished ones go on from their last checkpoints.
        overwrite: replace runs that are there.
        at_once: most jobs that train at the same time; the next one joins when one leaves. All if left out.
        tokens: most tokens of a shared forward, padding included; 0 shares none. Left out, a short probe finds the fastest.
        progress: ``bar``, ``lines``, ``none``, or ``auto``: a bar on a terminal, lines elsewhere.

    Returns:
        What became of each job, in their order.

    Raises:
        UnknownName: a backbone, task, method, field or setting nobody knows.
        InvalidValue: no jobs, two jobs for one folder, or a value out of its range.
        Unsupported: the backbone has deltas already, or several processes train.
        OutputError: a folder holds something else already, or cannot be written.

    Example:
        >>> from deltatune.methods import IA3, LoRA
        >>> jobs = [Job("bbc-news", LoRA(rank=rank), lr=lr) for rank in (4, 8) for lr in (1e-3, 3e-3)] + [Job("tweet-sentiment", IA3())]
        >>> outcomes = train_together(jobs, "minilm", out="runs/sweep")  # doctest: +SKIP
        >>> [outcome.result.score for outcome in outcomes]  # doctest: +SKIP
    """
    _check(jobs, backbone, at_once, tokens)
    with trainer_modules():
        own = tokenizer or load_tokenizer(backbone if isinstance(backbone, str) else _path_of(backbone))
        asked = [
            wanted(job, name, backbone, own, _folder(job, name, out), overwrite=overwrite)
            for job, name in zip(jobs, named(jobs), strict=True)
        ]
        _check_folders(asked)
        shells = Shells(backbone)
        with Tally(len(jobs), progress) as tally, keeping_freed():
            for company in _companies(asked):
                Company(shells, company, own, tally, at_once or len(jobs), tokens).train()
    for one in asked:
        if one.outcome.apart is not None and not one.outcome.numbers:
            _train_apart(one, shells, own, overwrite, progress)
    return [one.outcome for one in asked]


def _check(jobs: Sequence[Job], backbone: str | nn.Module, at_once: int | None, tokens: int | None) -> None:
    if not jobs:
        raise InvalidValue("train_together was given no jobs. Give it a list of `Job`s.")
    if at_once is not None and at_once < 1:
        raise InvalidValue(f"`at_once` is {at_once}; it has to be at least 1, or left out.")
    if tokens is not None and tokens < 0:
        raise InvalidValue(f"`tokens` is {tokens}; it has to be at least 0, or left out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise Unsupported("Several processes were started, but jobs train together in one. Start one process.")
    if isinstance(backbone, nn.Module):
        if ledger_of(backbone) is not None:
            raise Unsupported("Jobs cannot be trained together on a backbone that has deltas already. Detach them first.")
        if any(parameter.is_meta for parameter in backbone.parameters()):
            raise Unsupported("Jobs cannot be trained together on a backbone whose weights are offloaded. Load it into memory.")


def _path_of(backbone: nn.Module) -> str:
    path = str(getattr(getattr(backbone, "config", None), "name_or_path", "") or "")
    if not path:
        kind = type(backbone).__name__
        raise InvalidValue(f"This {kind} does not say where its tokenizer is. Give it: train_together(..., tokenizer=tokenizer).")
    return path


def _folder(job: Job, name: str, out: str | os.PathLike[str] | None) -> Path | None:
    return job.out or (None if out is None else Path(out).expanduser() / name)


def _check_folders(asked: Sequence[Wanted]) -> None:
    taken: dict[Path, str] = {}
    for one in asked:
        if one.place is None:
            continue
        path = one.place.path.resolve()
        if path in taken:
            raise InvalidValue(f"The jobs `{taken[path]}` and `{one.name}` have one folder, `{one.place.path}`. Give each its own.")
        taken[path] = one.name


def _companies(asked: Sequence[Wanted]) -> list[list[Wanted]]:
    """The jobs whose forwards can be joined, in the order in which they were asked for."""
    found: dict[object, list[Wanted]] = {}
    for one in asked:
        if one.outcome.apart is None and not one.outcome.numbers:
            found.setdefault(one.company, []).append(one)
    return list(found.values())


def _train_apart(one: Wanted, shells: Shells, tokenizer: PreTrainedTokenizerBase, overwrite: bool, progress: Show) -> None:
    """By itself, as ``dt.train`` does it."""
    job, place = one.job, one.place
    try:
        result = train(
            shells.whole(), job.task, job.methods, where=job.where, layers=job.layers, out=None if place is None else place.path,
            tokenizer=tokenizer, overwrite=overwrite, progress=progress, **job.settings.to_dict(),
        )  # fmt: skip
    except Halt:
        raise
    except Exception as error:
        one.outcome.error = error
        return
    one.outcome.result, one.outcome.numbers = result, result.to_json()
