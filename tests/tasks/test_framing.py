from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase

from deltatune.errors import Unsupported
from deltatune.tasks import Rows, Task
from deltatune.tasks.framing import HeadFraming

PAIRS = Rows({"a": ["a fine film", "boring"], "b": ["the plot is thin but the cast is fine and good", "bad"], "label": [1, 0]})


def encoder(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=outputs, pad_token_id=0
    )
    return BertForSequenceClassification(config).eval()


def test_classification(films: Task, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
    framing = HeadFraming(films, tokenizer)
    assert framing.auto_class == "AutoModelForSequenceClassification"
    features = framing.encode(rows)
    assert [feature["labels"] for feature in features] == [1, 0, 0]
    assert tokenizer.decode(features[0]["input_ids"]) == "a fine film"
    batch = framing.collate(features)
    assert batch["labels"].tolist() == [1, 0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [len(feature["input_ids"]) for feature in features]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_scores_are_in_the_rows_order_whatever_the_batch(films: Task, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
    framing, model = HeadFraming(films, tokenizer), encoder(2)
    single = torch.cat([framing.score(model, rows[index : index + 1]) for index in range(3)])
    assert torch.allclose(framing.score(model, rows, batch_size=2), single, atol=1e-5)
    assert framing.predict(torch.tensor([[0.1, 0.2], [3.0, 1.0]])) == [1, 0]
    assert framing.references(rows) == [1, 0, 0]
    assert framing.score(model, Rows({"text": [], "label": []})).shape == (0, 2)


def test_scoring_leaves_each_module_in_its_mode(films: Task, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
    model = encoder(2).train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    HeadFraming(films, tokenizer).score(model, rows)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes


def test_of_a_pair_the_longer_text_is_cut(films: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    task = replace(films, text=("a", "b"), templates=())
    long = HeadFraming(task, tokenizer, max_length=64).encode_inputs(PAIRS)[0]["input_ids"]
    short = HeadFraming(task, tokenizer, max_length=len(long) - 2).encode_inputs(PAIRS)[0]["input_ids"]
    assert len(short) == len(long) - 2
    assert tokenizer.decode(short).startswith("a fine film") and long[: len(short)] == short


def test_multilabel_and_regression(films: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    several = HeadFraming(replace(films, type="multilabel", templates=()), tokenizer)
    batch = several.collate(several.encode(Rows({"text": ["a", "b"], "label": [[0, 1], []]})))
    assert batch["labels"].tolist() == [[1.0, 1.0], [0.0, 0.0]] and batch["labels"].dtype == torch.float
    assert several.predict(torch.tensor([[0.5, -1.0], [1.0, 2.0]])) == [[0], [0, 1]]
    number = HeadFraming(replace(films, type="regression", labels=(), templates=()), tokenizer)
    batch = number.collate(number.encode(Rows({"text": ["a", "b"], "label": [0.5, 2.0]})))
    assert batch["labels"].tolist() == [0.5, 2.0]
    assert number.predict(torch.tensor([[0.5], [1.5]])) == [0.5, 1.5]


def test_the_loss_of_a_model_is_that_of_the_labels(films: Task, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
    framing, model = HeadFraming(films, tokenizer), encoder(2)
    loss = model(**framing.collate(framing.encode(rows))).loss
    expected = nn.functional.cross_entropy(framing.score(model, rows), torch.tensor(rows["label"]))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_refusals(films: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Unsupported, match="generates text"):
        HeadFraming(replace(films, type="text2text"), tokenizer)


def test_of_three_texts_the_longest_is_cut(films: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    task = replace(films, text=("a", "b", "c"), templates=())
    row = {"a": "a fine film", "b": "the plot is thin but the cast is fine and good " * 3, "c": "boring"}
    whole = tokenizer.decode(HeadFraming(task, tokenizer, max_length=64).encode_inputs([row])[0]["input_ids"])
    assert whole.startswith("a fine film\nthe plot is thin") and whole.endswith("\nboring")
    short = HeadFraming(task, tokenizer, max_length=20).encode_inputs([row])[0]["input_ids"]
    assert len(short) == 20
    assert tokenizer.decode(short).startswith("a fine film\n") and tokenizer.decode(short).endswith("\nboring")
