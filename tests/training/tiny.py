"""A tiny task with a tiny tokenizer, and backbones of the common tests in folders that open by name."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from deltatune.tasks import Rows, Task, TaskData, Template, Verbalizer
from tests.models import MODELS

WORDS = {"sport": ["goal", "match", "team", "coach", "league"], "money": ["bank", "share", "market", "profit", "trade"]}
COMMON = ["the", "a", "of", "and", "in", "for", "on", "with", "at", "by"]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
LABELS = ("sport", "money", "neither")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; [CLS] and [SEP] around a text."""
    words = [*SPECIAL, *COMMON, *(word for group in WORDS.values() for word in group), *LABELS, "Topic", ":"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **named)


def rows(count: int, seed: int) -> Rows:
    """Texts of unequal length whose topic is plain from two of their words."""
    draw = random.Random(seed)
    texts, labels = [], []
    for index in range(count):
        label = index % len(LABELS)
        own = WORDS.get(LABELS[label], COMMON)
        words = [*draw.choices(own, k=2), *draw.choices(COMMON, k=draw.randint(2, 9))]
        draw.shuffle(words)
        texts.append(" ".join(words))
        labels.append(label)
    return Rows({"text": texts, "label": labels})


def data(train: int = 36, test: int = 12) -> TaskData:
    """The task with its rows."""
    template = Template("{text} Topic:", Verbalizer(LABELS))
    task = Task("tiny-topics", "classification", ("text",), "label", labels=LABELS, metrics=("accuracy", "f1_macro"), templates=(template,))
    return TaskData(task, rows(train, 1), rows(test, 2), rows(test, 3), "made up")


def backbone(name: str) -> nn.Module:
    """One of the common tiny models."""
    return MODELS[name]()[0]


def folder(name: str, place: Path) -> str:
    """A tiny model saved with the tokenizer, to be opened by its path."""
    target = place / name
    model: Any = backbone(name)
    model.save_pretrained(target)
    tokenizer().save_pretrained(target)
    return str(target)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
