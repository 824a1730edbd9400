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
WORDS = HERE / "results" / "tasks_words.jsonl"
PAGE = HERE.parent / "docs" / "tasks.md"
KINDS = ("classification", "multilabel", "regression", "choice")
HARD = {
    "add-one-rte": "85 % are no, and the two sentences differ in one adjective (`for the first time in his life`, `in his whole life`)",
    "anli-r1": "claims were written until a model failed on them; they take reckoning with dates, negation and what a passage leaves open",
    "anli-r2": "claims were written until a stronger model failed (`was born the year before 1981`, of one born in 1980)",
    "anli-r3": "claims were written until the strongest model failed; they turn on what a speaker means",
    "aqua-rat": "takes calculation; 160 rows, five numbers to choose from",
    "arc-challenge": "science from school that texts do not repeat; each option is scored alone",
    "arc-easy": "science from school (`Which organ is the site of gas exchange?`); each option is scored alone, from 200 rows",
    "argument-reasoning-comprehension": "the two options differ by a negation (`will change`, `will not change`)",
    "boolq": "the answer follows from question and passage together; of the passage's 100 words, 64 tokens are read",
    "com2sense": "statements come in pairs that differ in a word, or in which way a comparison goes",
    "comve-a-validation": "two sentences that differ in a word; one vector loses which of them is absurd (`The cow went to college`)",
    "csqa2": "facts found to mislead models (`At least one of the states is an island`); a head of 400 rows has not seen them",
    "definite-pronoun-resolution": "whom a pronoun stands for follows from what happens, both options are in the sentence",
    "fracas": "logic of quantifiers, plurals and tenses; 240 rows to learn from and 69 to test on",
    "gap-coreference": "whom a pronoun stands for; the passage is longer than the 64 tokens read",
    "glue-cola": "grammar, not meaning (`Which house does your friend live?`); the probe says yes to all",
    "glue-mnli": "whether one sentence follows from another; one vector of both hardly compares them",
    "glue-mrpc": "F1 of saying yes to all is 0.80; what differs are details (`during the 1998 confrontation`)",
    "glue-qnli": "whether a sentence answers the question, not only has its words; one vector of both hardly compares them",
    "glue-rte": "whether one text follows from another; one vector of both hardly compares them",
    "glue-wnli": "whom a pronoun stands for; pairs differ in the noun and have opposite answers; 71 rows to test on",
    "hellaswag": "wrong endings were chosen so that a model could not tell them from right ones",
    "joci": "how likely a further statement is by common sense (`The sweeping is effective`); one vector of both hardly compares them",
    "liar": "whether a politician's claim is true takes facts; six grades, of which neighbours are much alike",
    "logiqa": "logic of an examination; questions and options are longer than the 64 tokens read",
    "math-qa": "takes calculation; the mirror's options have capital E and F within words (`nonE oF thEsE`)",
    "mcl-wic-en": "which sense one word has in each of two sentences is not in one vector of both; 60 tokens a row",
    "mctest-500": "stories of 150 to 300 words, of which 64 tokens are read",
    "mpe": "whether a short description follows from four captions together; a third of the rows are undecided",
    "numersense": "number words that stand nowhere else in the sentence (`a painting is a <mask> dimensional piece of art`)",
    "openbookqa": "science from school that needs a second fact (`layers of sediment` to `fueling a car`); each option is scored alone",
    "pan-paraphrase": "F1 of saying yes to all is 0.65; two passages, cut to 64 tokens, in one vector",
    "pubmedqa": "abstracts of 200 words and more, of which 64 tokens are read; the finding comes last",
    "query-wellformedness": "form, not meaning (`What citys are between oregon ?` 0.2); vectors made for meaning keep little of it",
    "sick-entailment": "whether one sentence follows from another; the scenes are the same, a `not` or one word makes the difference",
    "snli-cad": "people changed a few words so that the answer changes, which takes away what a single sentence tells",
    "strategyqa": "facts of two or three steps (`Did Lionel Richie ever have dinner with Abraham Lincoln?`)",
    "super-glue-wic": "which sense one word has in each of two sentences is not in one vector of both; 400 rows",
    "tweet-eval-emoji": "twenty emojis, several of hearts and smiles, and 400 rows: 20 a class at most; the probe says the commonest",
    "winogrande": "two names or nouns that fit the gap alike but for common sense (`she always got the harder cases`)",
}
"""Task -> why no probe may be above the predictor that has only seen the answers; its YAML, rows and labels were read and found right."""

HEAD = """# Tasks, measured

Does the data of a task hold what its YAML says it asks? A linear probe answers cheaply: MiniLM stays frozen, each text is encoded once (at
most {length} tokens, bfloat16), and a head is trained on that by the task's own loss. *Probe* reads what the readout of
`--method linear-probe` reads, MiniLM's pooled first token; *mean* reads the mean of the tokens. Both have the decay that did best on a
fifth of their training rows. *Baseline* is a predictor that has only seen the answers of the training rows: it says the commonest one, of
a regression the mean. In brackets: 95 % intervals from bootstrap samples of the test rows. *Seconds* are one processor's, for loading,
encoding and training.

Rows are drawn from the mirror's splits: at most {train} to train and {test} to test, of choice tasks {choices} inputs. So these are
no scores to compare models by; they say whether a task can be learnt from its text. Where neither probe is above the baseline (its
interval does not lie above it), the YAML, the rows and their labels were read, and the last column says what makes the task hard. No YAML
was found wrong. There, *words* is a second look by the task's own metric on all test rows: a linear model of words, pairs of words and how
many the texts share, learnt from all training rows (`benchmarks/tasks_words.py`); it is bold where it is above the baseline, so that texts
and labels are shown to belong together. `benchmarks/tasks.py` measures, `benchmarks/tasks_page.py` writes this page.

"""


def lines(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Task -> its line; the last one counts."""
    return {line["task"]: line for line in map(json.loads, results.read_text(encoding="utf-8").splitlines())}


def is_above(line: Mapping[str, Any], place: str) -> bool:
    """Whether the interval of a probe lies above the baseline."""
    return bool(line[place][1] > line["baseline"])


def note(task: Task, line: Mapping[str, Any], words: Mapping[str, Any] | None) -> str:
    """Nothing where a probe is above the baseline; else why it is not, and what a linear model of words makes of all rows."""
    if is_above(line, "readout"):
        return ""
    if is_above(line, "mean"):
        return "by the mean only"
    told = f"hard: {HARD[task.name]}" if task.name in HARD else "not looked into yet"
    if words is None:
        return told
    value, low, high = words["words"]
    sign = "**words**" if low > words["baseline"] else "words"
    return f"{told}. {sign} {value:.3f} [{low:.3f}, {high:.3f}], baseline {words['baseline']:.3f}"


def named(task: Task) -> str:
    """The task's name, with a link to its dataset where that has a page."""
    return f"[{task.name}](https://huggingface.co/datasets/{task.hub.id})" if task.hub else task.name


def row(task: Task, line: Mapping[str, Any], words: Mapping[str, Any] | None) -> str:
    """One line of a table."""
    asks = f"{line['options']:.0f} options" if task.type == "choice" else task.kind.asks.format(len(task.labels))
    sizes = " / ".join(f"{size:,}" for size in line["sizes"].values())
    probes = (f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in (line["readout"], line["mean"]))
    used, baseline, seconds = f"{line['train']} / {line['test']}", f"{line['baseline']:.3f}", f"{line['cpu_seconds']:.0f}"
    return f"| {' | '.join([named(task), asks, sizes, used, line['metric'], baseline, *probes, seconds, note(task, line, words)])} |"


def page(found: Mapping[str, Mapping[str, Any]], words: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The page, piece by piece."""
    from tasks import CHOICES, LENGTH, TEST, TRAIN

    yield HEAD.format(length=LENGTH, train=TRAIN, test=TEST, choices=CHOICES)
    fitting = sorted((task for task in map(get_task, tasks) if task.type in KINDS), key=lambda task: (task.category, task.name))
    yield counts([(task, found[task.name]) for task in fitting if task.name in found], words)
    for category, several in groupby((task for task in fitting if task.name in found), key=lambda task: task.category):
        yield f"\n## {category}\n\n"
        yield "| task | asks for | train / validation / test | rows used | metric | baseline | probe | mean | seconds | note |\n"
        yield "|---|---|---|---|---|---|---|---|---|---|\n"
        yield from (f"{row(task, found[task.name], words.get(task.name))}\n" for task in several)
    if missing := [f"`{task.name}`" for task in fitting if task.name not in found and (task.mirror or task.is_runnable)]:
        yield f"\nNot measured yet: {', '.join(missing)}.\n"


def counts(measured: Sequence[tuple[Task, Mapping[str, Any]]], words: Mapping[str, Mapping[str, Any]]) -> str:
    """How many are above the baseline, in sentences."""
    above = sum(is_above(line, "readout") for _, line in measured)
    mean = sum(not is_above(line, "readout") and is_above(line, "mean") for _, line in measured)
    neither = [task.name for task, line in measured if not is_above(line, "readout") and not is_above(line, "mean")]
    learnt = sum(words[name]["words"][1] > words[name]["baseline"] for name in neither if name in words)
    return (
        f"Of {len(measured)} tasks measured, {above} are above the baseline by the probe, {mean} more by the mean, "
        f"{len(measured) - above - mean} by neither; of these a linear model of words learns {learnt}.\n"
    )


if __name__ == "__main__":
    PAGE.write_text("".join(page(lines(), lines(WORDS))), encoding="utf-8")
