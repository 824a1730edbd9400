"""A training that dies: the body of a process of its own, which is killed at a step or inside saving."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from typing import Any

import torch

from deltatune.methods.kinds import Method
from deltatune.training import files, replaced, trainer
from deltatune.training import train as main
from deltatune.training.result import Result
from deltatune.training.run import DataFile
from tests.training import tiny

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def run(name: str, method: Method, out: str, own: str | None = None, **options: Any) -> Result:
    """Train a delta on one of the tiny models; on the tiny task, or on a file."""
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"max_steps": 12, "save_steps": 4, "evaluations": 3, "batch_size": 8, "lr": 5e-3} | options
    task = tiny.data() if own is None else DataFile(own)
    return main.train(tiny.backbone(name), task, method, out=out, tokenizer=tiny.tokenizer(), progress="none", **settings)


def die(name: str, method: Method, out: str, moment: str, options: dict[str, Any]) -> None:
    """The same, killed at ``step:N``, before step N's forward; or at ``save:N``, inside the N-th file that torch.save writes;
    at ``mark:N``, ahead of the N-th completion marker; at ``move:N``, ahead of the N-th file of a run that moves; or
    at ``test:1``, when training is over and the test rows are scored.
    """
    kind, number = moment.split(":")
    calls = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == int(number):
                if kind == "save":
                    with open(args[1], "wb") as half:
                        half.write(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    if kind == "step":
        trainer.DeltaTrainer.compute_loss = counted(trainer.DeltaTrainer.compute_loss)  # type: ignore[method-assign]
    elif kind == "save":
        torch.save = counted(torch.save)
    elif kind == "move":
        replaced.move = counted(replaced.move)
    elif kind == "test":
        main.measure_rows = counted(main.measure_rows)  # type: ignore[attr-defined]
    else:
        trainer.mark_complete = counted(files.mark_complete)  # type: ignore[attr-defined]
    run(name, method, out, **options)


def kill(name: str, method: Method, out: str, moment: str, **options: Any) -> int:
    """Run ``die`` in a process of its own; returns its exit code, minus the signal."""
    process = CONTEXT.Process(target=die, args=(name, method, out, moment, options))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode
