"""Every task whose rows are here: loads, renders, tokenizes, says its answers and understands them, is scored rightly at both ends."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltatune.backbones import load_tokenizer
from deltatune.tasks import Task, TaskData, get_task, load_task, tasks
from deltatune.tasks.check import faults, index_faults
from deltatune.tasks.framing import HeadFraming, framings_of
from deltatune.tasks.metrics import is_degenerate, measure, metrics
from deltatune.tasks.prompts import chosen
from deltatune.tasks.rows import Row, text_of
from deltatune.tasks.split import overlap
from deltatune.tasks.tensors import items, length_of
from deltatune.tasks.text2text import TextToTextFraming

NAMES = list(tasks)
BACKBONES = ("minilm", "smollm2-135m")
SAMPLE, LENGTH = 12, 4096


@functools.cache
def tokenizer(backbone: str) -> Any:
    found = load_tokenizer(backbone)
    found.model_max_length = LENGTH
    return found


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Of the module, so that all tests of a task stand together and its rows are loaded once."""
    return str(request.param)


@pytest.fixture(scope="module")
def data(name: str, mirror_folder: Path) -> Iterator[TaskData]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTATUNE_MIRROR", str(mirror_folder))
        if not get_task(name).is_runnable:
            pytest.skip("on the hub only")
        yield load_task(name)


def sample(data: TaskData) -> list[Row]:
    """Rows from all over the test split."""
    step = max(1, len(data.test) // SAMPLE)
    return [data.test[place] for place in range(0, len(data.test), step)][:SAMPLE]


def test_definition(name: str, mirror: Path) -> None:
    task = get_task(name)
    assert [*faults(task), *index_faults(task)] == []
    for template in task.templates:
        named = [f"{column}:" for column in template.columns if "_" in column or column[-1:].isdigit()]
        assert not any(name in template.prompt for name in named), "templates are written, not made from column names"


def test_rows(name: str, data: TaskData) -> None:
    task = data.task
    assert min(map(len, data.splits.values())) >= 10
    assert overlap(data.splits, task.kind.inputs(task)) == {"validation": 0, "test": 0}
    shown = [column for column in task.text if any(text_of(row[column]).strip() for row in sample(data))]
    assert shown == list(task.text)
    for template in task.templates:
        for row in sample(data):
            prompt = template.render(row)
            assert "{" + template.columns[0] + "}" not in prompt and prompt == prompt.rstrip()


def test_tokens_of_two_backbones(name: str, data: TaskData) -> None:
    task, rows = data.task, sample(data)
    for backbone in BACKBONES:
        if task.kind.head is not None:
            head = HeadFraming(task, tokenizer(backbone), 128)
            features = head.encode(rows)
            assert all(0 < length_of(feature) <= 128 for feature in features)
            assert items(head.collate(features)) > 0
        for number in range(len(task.templates)):
            framing = TextToTextFraming(task, tokenizer(backbone), LENGTH, template=number)
            for feature, row in zip(framing.encode(rows), rows, strict=True):
                said = task.kind.spoken.say(task, framing.template, row)
                answer = [token for token in feature["labels"] if token >= 0]
                ids = framing.prompts.tokens([f" {said}"])[0]
                assert answer[: len(ids)] == ids and len(answer) - len(ids) <= 1


def test_answers_come_back(name: str, data: TaskData) -> None:
    task, spoken = data.task, data.task.kind.spoken
    for template in [*task.templates, chosen(task, 0, manual=False)]:
        for row in data.test:
            said = spoken.say(task, template, row)
            value = spoken.understand(task, template, row, f" {said}\n")
            options = spoken.options(task, template, row)
            assert said and (said == options[value] if options else _same(task, template, row, value, said)), (said, value)


def _same(task: Task, template: Any, row: Row, value: Any, said: str) -> bool:
    """Saying the value again says the same; spans may have gone to an earlier place with the same words."""
    if task.kind.answers == "text":
        return bool(value == said)
    if task.kind.answers == "tags":
        again = [task.labels.index(tag) for tag in value.tags]
        return sorted(task.kind.spoken.say(task, template, {**row, task.label: again}).split("; ")) == sorted(said.split("; "))
    return bool(task.kind.spoken.say(task, template, {**row, task.label: value}) == said)


def test_both_ends_of_the_metrics(name: str, data: TaskData) -> None:
    task, rows = data.task, data.test[:200]
    perfect = [task.kind.perfect(task, row) for row in rows]
    references = [task.kind.reference(task, row) for row in rows]
    for metric in task.metrics:
        right = references if metrics[metric].alone else perfect
        found = measure(metric, perfect, right, rows, resamples=20)[metric]
        if metrics[metric].exact:
            assert found.value == pytest.approx(metrics[metric].best), metric
        assert found.low <= found.value <= found.high and not found.degenerate
    constant = [task.kind.constant(task, data.train)] * len(rows)
    assert is_degenerate(constant, references)
    worst = measure(task.metric, constant, references, rows, resamples=20)[task.metric]
    assert worst.degenerate
    assert worst.value < 1.0 if metrics[task.metric].higher else worst.value > 0.0


def test_framings(name: str) -> None:
    task = get_task(name)
    assert "text2text" in framings_of(task)
    assert ("head" in framings_of(task)) == (task.kind.head is not None)
