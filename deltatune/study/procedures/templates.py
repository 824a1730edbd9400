"""``templates``: a training with the task's template, and the scores with the others it has and with one word changed at a time."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltatune.study.procedures.procedure import procedures
from deltatune.study.procedures.train import RUN, train
from deltatune.study.trial import Outcome, Trial
from deltatune.tasks import Task
from deltatune.tasks.framing import How, framings
from deltatune.tasks.metrics import compute
from deltatune.tasks.sampling import subset
from deltatune.tasks.template import Template
from deltatune.training.borrowed import trainer_modules
from deltatune.training.files import write_text
from deltatune.training.job import kind_of
from deltatune.training.opening import open as dt_open
from deltatune.training.run import load_data

ASKED = "templates.json"
ROWS = 256
"""Most test rows for each template."""

OTHERS = {
    "review": "text", "film": "movie", "sentence": "text", "question": "query", "answer": "reply", "article": "text", "news": "report",
    "topic": "subject", "sentiment": "feeling", "feeling": "sentiment", "tweet": "message", "text": "passage", "true": "right",
    "mean": "say", "following": "next", "this": "that", "does": "would", "is": "was", "did": "does", "the": "this",
}  # fmt: skip
"""Words of about the same meaning; any other word is left out instead."""

BLANKS = re.compile(r" +(?=[ ?:.,!\n])|(?<=\n) +")
"""Those that stand alone when a word between them is gone."""


@procedures.register("templates")
def templates(trial: Trial, folder: Path) -> Outcome:
    """Train with the template of the settings, then ask with others; a control, which trains nothing, is asked as it is.

    ``numbers["templates"]`` has a line for each: its ``prompt``, the ``change`` (``own``, ``other`` for the task's further ones, or the two
    words), and the ``score`` on at most 256 test rows.

    Raises:
        Unsupported: the backbone answers by a head, or the task has no template.
    """
    began, kept = time.perf_counter(), folder / ASKED
    outcome = train(trial, folder)
    if not kept.exists():
        write_text(kept, json.dumps(_asked(trial, folder / RUN)))
    told = json.loads(kept.read_text(encoding="utf-8"))
    return Outcome(trial.key, {**outcome.numbers, "templates": told}, outcome.history, round(time.perf_counter() - began, 3))


def _asked(trial: Trial, place: Path) -> list[dict[str, Any]]:
    settings = trial.run.settings
    with trainer_modules():
        backbone, tokenizer, _ = dt_open(place)
        data = load_data(trial.run.task, settings)
        rows, kind, found = subset(data.task, data.test, ROWS), kind_of(trial.backbone), []
        for change, template in variants(data.task, settings.template):
            framing = framings["text2text"].make(data.task, tokenizer, How(settings.max_length, kind, template))
            said = [answer.value for answer in framing.answers(backbone, rows, settings.eval_batch_size)]
            scores = compute(data.task.metrics, said, framing.references(rows), rows)
            found.append({"change": change, "prompt": template.prompt, "score": scores[data.task.metric]})
    return found


def variants(task: Task, own: int) -> Iterator[tuple[str, Template]]:
    """The task's own template, its others, and its own with one word changed: each word in turn."""
    yield "own", task.templates[own]
    yield from (("other", template) for number, template in enumerate(task.templates) if number != own)
    yield from changed(task.templates[own])


def changed(template: Template) -> Iterator[tuple[str, Template]]:
    r"""One word at a time gives way to another of about its meaning, or is left out.

    >>> [one.prompt for _, one in changed(Template("{text}\nThis review is"))]
    ['{text}\nThat review is', '{text}\nThis text is', '{text}\nThis review was']
    """
    pieces = template.prompt.split(" ")
    words = [(at, piece) for at, piece in enumerate(pieces) if "{" not in piece.rpartition("\n")[2]]
    for at, piece in words:
        lead, line, word = piece.rpartition("\n")
        bare = word.strip("?:.,!")
        if not bare.isalpha():
            continue
        new = OTHERS.get(bare.lower(), "")
        new = new.capitalize() if bare[0].isupper() else new
        tail = word[len(bare) :]
        whole = " ".join([*pieces[:at], f"{lead}{line}{new}{tail}", *pieces[at + 1 :]])
        yield f"{bare} -> {new or 'nothing'}", replace(template, prompt=BLANKS.sub("", whole).rstrip())
