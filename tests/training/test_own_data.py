"""A file of one's own from the disk to a trained delta that answers: chats, prompts and completions, plain texts; packed and streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deltatune.methods import LoRA
from deltatune.training.predict import evaluate, predict
from deltatune.training.run import DataFile, read_run
from deltatune.training.train import train
from tests.training import tiny

CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
TEXTS = tiny.rows(60, 1)["text"]
FORMS: dict[str, list[dict[str, Any]]] = {
    "conversation": [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"the {text.split()[0]}"}]} for text in TEXTS
    ],
    "generation": [{"prompt": f"{text} Topic:", "completion": text.split()[0]} for text in TEXTS],
    "plain": [{"text": text} for text in TEXTS],
}


def decoder(place: Path) -> str:
    folder = tiny.folder("llama", place)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def written(file: Path, rows: list[dict[str, Any]]) -> DataFile:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return DataFile(str(file))


@pytest.mark.parametrize(
    ("form", "ending", "options"),
    [
        ("conversation", "jsonl", {"packing": True}),
        ("conversation", "parquet", {"streaming": True}),
        ("generation", "jsonl", {}),
        ("generation", "parquet", {"streaming": True}),
        ("plain", "parquet", {"packing": True}),
        ("plain", "jsonl", {"packing": True, "streaming": True}),
    ],
)
def test_a_file_is_learnt_scored_and_asked(form: str, ending: str, options: dict[str, Any], tmp_path: Path) -> None:
    own = written(tmp_path / f"own.{ending}", FORMS[form])
    asked: dict[str, Any] = {"max_steps": 12, "lr": 1e-2, "batch_size": 8, "max_length": 48, "evaluations": 1, "progress": "none"}
    result = train(decoder(tmp_path), own, LoRA(rank=4), where="*", out=tmp_path / "run", **asked, **options)
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert read_run(tmp_path / "run").task == own
    assert evaluate(tmp_path / "run")["score"] == pytest.approx(result.score, abs=1e-5)
    [said] = predict(tmp_path / "run", "goal of the match")
    assert isinstance(said.label, str)
