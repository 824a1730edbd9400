"""The loss against its definition, and accumulated batches against one large one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from deltatune.errors import InvalidValue
from deltatune.tasks import Task
from deltatune.tasks.framing import HeadFraming
from deltatune.tasks.text2text import TextToTextFraming, keeps_logits
from deltatune.training.objective import Objective
from tests.training import tiny


def batch_of(name: str, head: bool, encoder_decoder: bool = False) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    data = tiny.data()
    framing: Any = HeadFraming(data.task, tiny.tokenizer(), 32)
    if not head:
        framing = TextToTextFraming(data.task, tiny.tokenizer(), 32, encoder_decoder=encoder_decoder)
    return tiny.backbone(name), framing, framing.collate(framing.encode(data.train[:5]))


def test_head_with_class_weights() -> None:
    model, framing, batch = batch_of("bert", head=True)
    weights = torch.tensor([1.0, 2.0, 0.5])
    loss = Objective(framing, weights)(model, batch)
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    expected = sum(weights[label] * F.cross_entropy(row, label) for row, label in zip(logits, batch["labels"], strict=True)) / 5
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_decoder_learns_the_answer_only(name: str) -> None:
    model, framing, batch = batch_of(name, head=False)
    assert keeps_logits(model)
    loss = Objective(framing)(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected)
    assert (batch["labels"] != -100).sum() == 10  # a word and the end, for each of five rows


def test_an_encoder_decoder_learns_its_labels() -> None:
    model, framing, batch = batch_of("t5", head=False, encoder_decoder=True)
    torch.testing.assert_close(Objective(framing)(model, batch), model(**batch).loss)


def test_parts_of_a_batch_add_up() -> None:
    model, framing, batch = batch_of("bert", head=True)
    objective = Objective(framing)
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(objective(model, part, count=5) for part in parts), objective(model, batch))


def test_balanced_weights_have_mean_one() -> None:
    data = tiny.data()
    rows = data.train.select([0, 3, 6, 9, 1, 2])  # four of the first class, one of each other
    framing = HeadFraming(data.task, tiny.tokenizer(), 32)
    weights = framing.class_weights(rows)
    torch.testing.assert_close(weights, torch.tensor([0.5, 2.0, 2.0]))
    assert sum(weights[label] for label in rows["label"]) / len(rows) == 1
    with pytest.raises(InvalidValue, match="no training row of `tiny-topics` has the label `neither`"):
        framing.class_weights(data.train.select([0, 1]))


def test_class_weights_need_a_head() -> None:
    data = tiny.data()
    with pytest.raises(InvalidValue, match="`class_weights` was asked for"):
        TextToTextFraming(data.task, tiny.tokenizer(), 32).class_weights(data.train)
    with pytest.raises(InvalidValue, match="`x` is a regression task"):
        HeadFraming(Task("x", "regression", ("text",), "label"), tiny.tokenizer(), 32).class_weights(data.train)
