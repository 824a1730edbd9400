"""Write ``docs/tasks.md`` from ``results/tasks.jsonl``: what a linear probe on MiniLM makes of every task, or why it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from deltatune.tasks import Task, get_task, tasks

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "tasks.jsonl"
PAGE = HERE.parent / "docs" / "tasks.md"
KINDS = ("classification", "multilabel", "regression", "choice")
HARD = {
    "MiniLM was made for meaning, and a sentence that is wrong means nearly the same": "glue-cola",
    "judged by form, of which vectors made for meaning keep little; n-grams of words give 0.43 on 4,000 rows": "query-wellformedness",
    "one vector of both sentences does not hold which sense one word has in each": "super-glue-wic mcl-wic-en",
    "whom a pronoun stands for is not in the words that occur": "gap-coreference definite-pronoun-resolution winogrande glue-wnli",
    "takes knowledge of the world, which a linear head cannot read off": (
        "csqa2 creak strategyqa com2sense comve-a-validation numersense liar boolq"
    ),
    "each option is scored alone, by a vector that was not made to tell whether it fits": (
        "commonsense-qa arc-easy arc-challenge openbookqa cosmos-qa social-i-qa codah hellaswag piqa quail mctest-500 logiqa "
        "super-glue-copa argument-reasoning-comprehension comve-b-explanation"
    ),
    "takes calculation": "math-qa aqua-rat",
    "twenty emojis and 400 rows; many emojis stand for much the same": "tweet-eval-emoji",
    "the test rows are unlike the training rows": "tweet-eval-hate",
    "the answer lies between two texts, which one frozen vector of both hardly compares": (
        "anli-r1 anli-r2 anli-r3 snli snli-cad glue-mnli glue-rte glue-qnli glue-mrpc sick-entailment sick-relatedness sts12 sts13 sts14 "
        "sts15 sts16 stsb stsb-de mpe joci med fracas super-glue-cb pan-paraphrase trec-qa super-glue-multirc mc-taco pubmedqa add-one-rte"
    ),
}
"""Why a task is hard -> tasks whose YAML and rows were read and found right, so that this is all that can be wrong with them."""
REASONS = {name: why for why, names in HARD.items() for name in names.split()}
REASONS |= {name: REASONS["glue-cola"] for name in tasks if name.startswith("blimp-")}
"""Task -> why no probe may be above the predictor that has only seen the answers."""

HEAD = """# Tasks, measured

Does the data of a task hold what its YAML says it asks? A linear probe answers cheaply: MiniLM stays frozen, each text is encoded once (at
most {length} tokens, bfloat16), and a head is trained on that by the task's own loss. *Probe* reads what the readout of
`--method linear-probe` reads, MiniLM's pooled first token; *mean* reads the mean of the tokens. Both have the decay that did best on a
fifth of their training rows. *Baseline* is a predictor that has only seen the answers of the training rows: it says the commonest one, of
a regression the mean. In brackets: 95 % intervals from bootstrap samples of the test rows. *Seconds* are one processor's, for loading,
encoding and training.

Rows are drawn from the mirror's splits: at most {train} to train and {test} to test, of choice tasks {choices} inputs. So these are
no scores to compare models by; they say whether a task can be learnt from its text. Where neither probe is above the baseline (its
interval does not lie above it), the last column says what was found by reading the rows. `benchmarks/tasks.py` measures,
`benchmarks/tasks_page.py` writes this page.

"""


def lines(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Task -> its line; the last one counts."""
    return {line["task"]: line for line in map(json.loads, results.read_text(encoding="utf-8").splitlines())}


def is_above(line: Mapping[str, Any], place: str) -> bool:
    """Whether the interval of a probe lies above the baseline."""
    return bool(line[place][1] > line["baseline"])


def note(task: Task, line: Mapping[str, Any]) -> str:
    """Nothing where a probe is above the baseline; else why it is not."""
    if is_above(line, "readout"):
        return ""
    if is_above(line, "mean"):
        return "by the mean only"
    return f"hard: {REASONS[task.name]}" if task.name in REASONS else "not looked into yet"


def named(task: Task) -> str:
    """The task's name, with a link to its dataset where that has a page."""
    return f"[{task.name}](https://huggingface.co/datasets/{task.hub.id})" if task.hub else task.name


def row(task: Task, line: Mapping[str, Any]) -> str:
    """One line of a table."""
    asks = f"{line['options']:.0f} options" if task.type == "choice" else task.kind.asks.format(len(task.labels))
    sizes = " / ".join(f"{size:,}" for size in line["sizes"].values())
    probes = (f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in (line["readout"], line["mean"]))
    used, baseline, seconds = f"{line['train']} / {line['test']}", f"{line['baseline']:.3f}", f"{line['cpu_seconds']:.0f}"
    return f"| {' | '.join([named(task), asks, sizes, used, line['metric'], baseline, *probes, seconds, note(task, line)])} |"


def page(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The page, piece by piece."""
    from tasks import CHOICES, LENGTH, TEST, TRAIN

    yield HEAD.format(length=LENGTH, train=TRAIN, test=TEST, choices=CHOICES)
    fitting = sorted((task for task in map(get_task, tasks) if task.type in KINDS), key=lambda task: (task.category, task.name))
    yield counts([(task, found[task.name]) for task in fitting if task.name in found])
    for category, several in groupby((task for task in fitting if task.name in found), key=lambda task: task.category):
        yield f"\n## {category}\n\n"
        yield "| task | asks for | train / validation / test | rows used | metric | baseline | probe | mean | seconds | note |\n"
        yield "|---|---|---|---|---|---|---|---|---|---|\n"
        yield from (f"{row(task, found[task.name])}\n" for task in several)
    if missing := [f"`{task.name}`" for task in fitting if task.name not in found and (task.mirror or task.is_runnable)]:
        yield f"\nNot measured yet: {', '.join(missing)}.\n"


def counts(measured: Sequence[tuple[Task, Mapping[str, Any]]]) -> str:
    """How many are above the baseline, in a sentence."""
    above = sum(is_above(line, "readout") for _, line in measured)
    mean = sum(not is_above(line, "readout") and is_above(line, "mean") for _, line in measured)
    return (
        f"Of {len(measured)} tasks measured, {above} are above the baseline by the probe, {mean} more by the mean, "
        f"{len(measured) - above - mean} by neither.\n"
    )


if __name__ == "__main__":
    PAGE.write_text("".join(page(lines())), encoding="utf-8")
