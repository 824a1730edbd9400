"""A second look at tasks where the linear probe is not above the baseline: does a linear model of words learn them from all rows?

It reads words and pairs of words of each text, those of the last text that the others lack, and how many the texts share. So it knows
no meanings, but it compares texts, which a probe of one frozen vector hardly does, and it reads whole texts. What it learns shows that
texts and labels belong together; where it learns nothing either, only reading the rows tells.

Needs a mirror (DELTATUNE_MIRROR). Run: python benchmarks/tasks_words.py [--tasks glue-rte,...]; tasks that have a line are left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from tasks_page import is_above, lines

from deltatune.tasks import Rows, Task, load_task
from deltatune.tasks.metrics import measure
from deltatune.tasks.rows import Row, text_of

OUT = Path(__file__).parent / "results" / "tasks_words.jsonl"
NEGATIONS = {"not", "no", "never", "nobody", "nothing", "none", "n't", "without", "hardly"}
Text = tuple[str, ...]


def words_of(text: str) -> list[str]:
    """In small letters, with n't as a word."""
    return re.findall(r"n't|\w+(?=n't)|\w+", text.lower())


def inputs_of(task: Task, row: Row) -> list[Text]:
    """The texts of a row, once; of a choice once an option, which comes last."""
    texts = tuple(text_of(row[column]) for column in task.text)
    return [(*texts, option) for option in row["options"]] if task.type == "choice" else [texts]


def marked(texts: Text) -> list[str]:
    """Words and pairs of words, each with the number of its text; and the words that the last text has alone."""
    found = []
    for number, text in enumerate(texts):
        words = words_of(text)
        found += [f"{number}:{word}" for word in words] + [f"{number}:{one} {two}" for one, two in pairwise(words)]
    before = {word for text in texts[:-1] for word in words_of(text)}
    return found + [f"new:{word}" for word in words_of(texts[-1]) if word not in before and len(texts) > 1]


def shared(texts: Text) -> list[float]:
    """How the last text compares with the others: words in common, lengths, negations."""
    before, last = (set(words_of(text)) for text in (" ".join(texts[:-1]), texts[-1]))
    both = len(before & last)
    negations = len(before & NEGATIONS), len(last & NEGATIONS)
    lengths = len(before), len(last)
    return [
        both / max(lengths[1], 1),
        both / max(lengths[0], 1),
        both / max(len(before | last), 1),
        *np.log1p([both, *lengths]),
        *map(float, negations),
        float(negations[0] != negations[1]),
        float(both == lengths[1]),
    ]


def learnt(task: Task, train: Rows, test: Rows) -> list[Any]:
    """What a linear model says to the test rows."""
    counts = [len(inputs_of(task, row)) for row in test]
    texts, asked = ([one for row in rows for one in inputs_of(task, row)] for rows in (train, test))
    seen = TfidfVectorizer(analyzer=marked, min_df=2, sublinear_tf=True).fit(texts)

    def features(several: Sequence[Text]) -> Any:
        return hstack([seen.transform(several), csr_matrix([shared(one) for one in several])]).tocsr()

    if task.type == "regression":
        model = Ridge(alpha=3.0).fit(features(texts), train[task.label])
        return [float(value) for value in model.predict(features(asked))]
    if task.type == "classification":
        model = LogisticRegression(C=1.0, max_iter=200).fit(features(texts), train[task.label])
        return [int(value) for value in model.predict(features(asked))]
    right = [place == row[task.label] for row in train for place in range(len(inputs_of(task, row)))]
    scores = LogisticRegression(C=1.0, max_iter=200).fit(features(texts), right).decision_function(features(asked))
    return [int(part.argmax()) for part in np.split(scores, np.cumsum(counts)[:-1])]


def looked_at(name: str) -> dict[str, Any]:
    """One task's line."""
    data = load_task(name)
    task = data.task
    references = [task.kind.reference(task, row) for row in data.test]
    found = measure(task.metric, learnt(task, data.train, data.test), references, data.test)[task.metric]
    known = measure(task.metric, [data.majority] * len(data.test), references, data.test, resamples=1)[task.metric]
    numbers = {"words": [round(value, 4) for value in (found.value, found.low, found.high)], "baseline": round(known.value, 4)}
    return {"task": name, "metric": task.metric, "train": len(data.train), "test": len(data.test), **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="")
    arguments = parser.parse_args()
    probed = lines().values()
    wanted = (
        arguments.tasks.split(",")
        if arguments.tasks
        else [line["task"] for line in probed if not is_above(line, "readout") and not is_above(line, "mean")]
    )
    done = lines(OUT) if OUT.is_file() else {}
    for name in wanted:
        if name not in done:
            line = looked_at(name)
            print(name, line["metric"], line["baseline"], *line["words"], flush=True)
            with OUT.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
