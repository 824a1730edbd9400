"""Small real tokenizers and an example task; nothing here needs a download."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltatune.tasks.rows import Rows
from deltatune.tasks.task import Task
from deltatune.tasks.template import Template, Verbalizer

TEXTS = [
    "a fine film",
    "a bad film, it is not good",
    "the plot is thin but the cast is fine",
    "boring",
    "not good: it is bad and too long",
] * 4


def bytes_tokenizer(bos: bool = False) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on the texts, as GPT-2's; with ``bos`` it puts a token in front, as Llama's."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    if bos:
        core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return bytes_tokenizer()


@pytest.fixture
def films() -> Task:
    return Task(
        name="films",
        type="classification",
        text=("text",),
        label="label",
        labels=("bad", "fine"),
        templates=(
            Template("{text} It is", Verbalizer(("bad", "fine"))),
            Template("Film: {text}\nVerdict:", Verbalizer(("not good at all", "fine"))),
        ),
    )


@pytest.fixture
def rows() -> Rows:
    return Rows({"text": ["a fine film", "the plot is thin", "boring, too long and bad"], "label": [1, 0, 0]})


@pytest.fixture(scope="session")
def mirror_folder() -> Path:
    """The mirror of real datasets, from DELTATUNE_MIRROR or beside the project."""
    found = Path(os.environ.get("DELTATUNE_MIRROR") or Path(__file__).parents[3] / "shared" / "data")
    if not (found / "index.json").is_file():
        pytest.skip("no mirror: set DELTATUNE_MIRROR to its folder")
    return found


@pytest.fixture
def mirror(mirror_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mirror, and the setting that names it."""
    monkeypatch.setenv("DELTATUNE_MIRROR", str(mirror_folder))
    return mirror_folder
