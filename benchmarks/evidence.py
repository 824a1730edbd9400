"""The study's evidence: run experiments for a while, and write what there is into ``docs/evidence``.

``evidence.py run performance low-data --minutes 90`` takes what ``docs/evidence`` holds of each into a store, goes on with one after the
other until the time is up, and writes their reports there again; so it can be stopped, and gone on with on another machine.
``evidence.py index`` writes ``docs/evidence/README.md``: for each experiment how far it is, its verdicts, and the command that does it.

Trials run side by side on Ray, one a core, each on one thread.
"""

from __future__ import annotations

import _thread
import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Timer

from deltatune.study.driver import Driver
from deltatune.study.exchange import take_results
from deltatune.study.experiments import experiments
from deltatune.study.experiments.experiment import judged
from deltatune.study.progress import Progress
from deltatune.study.report.folder import write_report
from deltatune.study.report.report import evidence_of
from deltatune.study.runner.ray import Resources, ray_runner
from deltatune.study.shows import Lines
from deltatune.study.store.store import Store
from deltatune.study.trial import Trial

EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"
RUNS = Path("runs")


def entered(store: Store, experiment: str) -> str:
    """The study of an experiment in the store, with what is in the evidence; its name."""
    study, folder = experiments[experiment].study("full"), EVIDENCE / experiment
    store.add(study, change=True)
    if folder.exists():
        taken = take_results(store, folder, study=study)
        print(f"{experiment}: {taken.taken} trials taken from {folder}, {taken.strange} of an older design left out", file=sys.stderr)
    return study.name


class Until(Lines):
    """A line a trial; nothing begins once the time is up.

    The timer's interruption alone would do, if Python did not drop one that arrives while it is clearing something away.
    """

    def __init__(self, end: float) -> None:
        super().__init__()
        self.end = end

    def started(self, trial: Trial, progress: Progress) -> None:
        """Nothing, or the end."""
        if time.monotonic() >= self.end:
            raise KeyboardInterrupt


def run(store: Store, names: Sequence[str], minutes: float, workers: int) -> None:
    """One experiment after the other until the time is up."""
    end = time.monotonic() + 60 * minutes
    for experiment in names:
        name = entered(store, experiment)
        timer = Timer(max(0.0, end - time.monotonic()), _thread.interrupt_main)
        try:
            timer.start()
            Driver(store, name, RUNS / "studies" / name, ray_runner(Resources(workers=workers, cpus=1)), Until(end)).run()
        except KeyboardInterrupt:
            print(f"{experiment}: stopped", file=sys.stderr)
            return
        finally:
            timer.cancel()
            write_report(store, name, EVIDENCE / experiment)


def row(store: Store, experiment: str) -> list[str]:
    """Lines of the index: how far one experiment is, and its verdicts."""
    name = entered(store, experiment)
    counts, folder = store.counts(name), EVIDENCE / experiment
    total, command = sum(counts.values()), f"python benchmarks/evidence.py run {experiment}"
    if not folder.exists():
        return [f"- **{experiment}**: not begun ({total:,} trials). `{command}`"]
    verdicts = judged(experiments[experiment], evidence_of(store, name))
    told = Counter(judgement.verdict for _, judgement in verdicts)
    said = ", ".join(f"{count} {verdict}" for verdict, count in told.items())
    found = [f"- [**{experiment}**]({experiment}/report.md): {counts['done']:,} of {total:,} trials; of its claims {said}. `{command}`"]
    return found + [f"  - {claim.number}, *{judgement.verdict}*: {claim.says} {judgement.because}" for claim, judgement in verdicts]


def index(store: Store) -> None:
    """``README.md`` of the evidence."""
    lines = [
        "# Evidence",
        "",
        "What the study found on real models and data, by `python benchmarks/evidence.py`. Each folder holds the report, every trial with",
        "its learning curve (`results.csv`), the machines, and the design; `deltatune study import FOLDER` goes on with it elsewhere.",
        "Numbers of tasks and rows are in [decision 16](../decisions/0016-sizes-of-the-study.md). An experiment that is not finished is",
        "judged by what there is.",
        "",
    ]
    for experiment in experiments:
        lines += row(store, experiment)
    (EVIDENCE / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "index"])
    parser.add_argument("names", nargs="*", help="experiments")
    parser.add_argument("--minutes", type=float, default=24 * 60)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    opened = Store(RUNS / "evidence.db")
    if given.verb == "run":
        run(opened, given.names, given.minutes, given.workers)
    else:
        index(opened)
