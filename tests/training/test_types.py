"""Every task type is trained, saved, opened and asked: with a head on an encoder and a decoder, and in words on a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import Unsupported
from deltatune.tasks import Rows, Task, TaskData, Template, Verbalizer, get_task, load_task, tasks
from deltatune.tasks.rows import Row
from deltatune.training.predict import Predictor, evaluate, predict
from deltatune.training.train import train
from tests.training import tiny

TEXTS = list(tiny.rows(24, 1)["text"])
ASK = Template("{text} Topic:")
NAMED = Template("{text} Topic:", Verbalizer(tiny.LABELS))


def made(task: Task, answers: list[Any], **columns: list[Any]) -> TaskData:
    inputs = columns or {"text": TEXTS}
    rows = Rows({**inputs, task.label: answers})
    return TaskData(task, rows, rows[:6], rows[:6], "made up")


def words_of(texts: list[str]) -> list[list[str]]:
    return [text.split() for text in texts]


DATA = {
    "multilabel": made(
        Task("m", "multilabel", ("text",), labels=tiny.LABELS, metrics=("f1_micro",), templates=(NAMED,)), [[k % 3, 2] for k in range(24)]
    ),
    "regression": made(
        Task("r", "regression", ("text",), range=(0.0, 5.0), metrics=("pearson",), templates=(ASK,)), [k % 3 / 2 for k in range(24)]
    ),
    "choice": made(
        Task("c", "choice", ("text",), templates=(ASK, Template("{text} {options} Topic:"))),
        [k % 2 for k in range(24)],
        text=TEXTS,
        options=[["bank", "goal", "the team"][: 2 + k % 2] for k in range(24)],
    ),
    "tagging": made(
        Task(
            "t",
            "tagging",
            ("tokens",),
            labels=("O", "B-sport", "I-sport"),
            metrics=("span_f1",),
            templates=(Template("{tokens} :", Verbalizer(("sport",))),),
        ),
        [[int(word in tiny.WORDS["sport"]) for word in words] for words in words_of(TEXTS)],
        tokens=words_of(TEXTS),
    ),
    "span": made(
        Task(
            "s", "span", ("question", "context"), context="context", metrics=("squad_f1",), templates=(Template("{context} {question} :"),)
        ),
        [{"text": [words[1]], "answer_start": [len(words[0]) + 1]} for words in words_of(TEXTS)],
        question=["bank"] * 24,
        context=TEXTS,
    ),
    "generation": made(Task("g", "generation", ("text",), metrics=("exact_match",), templates=(ASK,)), ["goal"] * 24),
}
FEW: dict[str, Any] = {"max_steps": 2, "batch_size": 6, "evaluations": 1, "progress": "none"}


def an_input(data: TaskData) -> Row:
    columns = data.task.kind.inputs(data.task)
    return {column: data.test[0][column] for column in columns}


@pytest.mark.parametrize("name", [name for name in DATA if name != "generation"])
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_with_a_head(name: str, model: str, tmp_path: Path) -> None:
    data = DATA[name]
    result = train(tiny.folder(model, tmp_path), data, "lora", out=tmp_path / "run", framing="head", new_head=True, **FEW)
    assert result.metric == data.task.metric and result.steps == 2
    assert evaluate(tmp_path / "run", data)["score"] == pytest.approx(result.score)
    [said] = predict(tmp_path / "run", an_input(data))
    assert {"multilabel": list, "tagging": list, "regression": float, "choice": str, "span": str}[name] is type(said.label)


@pytest.mark.parametrize("name", list(DATA))
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_in_words(name: str, model: str, tmp_path: Path) -> None:
    data = DATA[name]
    result = train(tiny.folder(model, tmp_path), data, "lora", out=tmp_path / "run", framing="text2text", **FEW)
    assert evaluate(tmp_path / "run", data)["score"] == pytest.approx(result.score)
    predictor = Predictor.open(tmp_path / "run")
    assert predictor.framing.name == "text2text"
    [said] = predictor(an_input(data))
    assert {"multilabel": list, "tagging": list, "regression": float}.get(name, str) is type(said.label)
    assert bool(said.scores) == (name == "choice")


def test_a_decoder_is_asked_in_words_where_its_type_prefers_them(tmp_path: Path) -> None:
    folder = tiny.folder("llama", tmp_path)
    for name, data in DATA.items():
        worded = name in ("choice", "span", "generation")
        train(folder, data, "lora", out=tmp_path / name, **{**FEW, "max_steps": 1}, new_head=True)
        assert (Predictor.open(tmp_path / name).framing.name == "text2text") == worded


def test_without_a_manual_template_the_columns_stand_alone(tmp_path: Path) -> None:
    train(tiny.folder("llama", tmp_path), tiny.data(), "lora", out=tmp_path / "run", manual_template=False, **FEW)
    framing = Predictor.open(tmp_path / "run").framing
    assert framing.template is not None and framing.template.prompt == "{text}"
    assert framing.template.verbalizer is not None and framing.template.verbalizer.words == tiny.LABELS


def test_cloze_needs_a_masked_language_model_with_its_head(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = BertForMaskedLM(config)
    for name, part in (("whole", model), ("headless", model.bert)):
        part.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    result = train(str(tmp_path / "whole"), tiny.data(), "lora", out=tmp_path / "run", framing="cloze", **FEW)
    assert evaluate(tmp_path / "run", tiny.data())["score"] == pytest.approx(result.score)
    assert set(predict(tmp_path / "run", "goal")[0].scores) == set(tiny.LABELS)
    with pytest.raises(Unsupported, match=r"no pretrained head for BertForMaskedLM"):
        train(str(tmp_path / "headless"), tiny.data(), "lora", framing="cloze", **FEW)
    with pytest.raises(Unsupported, match="has no mask token"):
        train(tiny.folder("bert", tmp_path), tiny.data(), "lora", framing="cloze", **FEW)
    with pytest.raises(Unsupported, match="a regression task has no label words"):
        train(str(tmp_path / "whole"), DATA["regression"], "lora", framing="cloze", **FEW)


REAL = ("glue-sst2", "stsb", "piqa", "wikigold", "xquad-en", "blimp-ellipsis-n-bar-1")


@pytest.mark.parametrize("name", [name for name in REAL if name in tasks])
def test_real_tasks_on_minilm(mirror: Path, name: str) -> None:
    data = load_task(get_task(name))
    few = TaskData(data.task, data.train[:32], data.validation[:8], data.test[:8], data.source)
    result = train("minilm", few, "bitfit", max_steps=5, batch_size=4, max_length=64, progress="none")
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses and all(0 < loss < 100 for loss in losses)
