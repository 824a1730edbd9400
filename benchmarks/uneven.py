"""How many tokens a second does a whole run train on real texts of uneven lengths, beside plain Trainer + PEFT with its defaults?

LoRA of rank 8 on queries and values, batches of 16 rows: a head on MiniLM, and answers in words on SmolLM2-135M. Both sides train on the
same token ids for as many steps, score the validation rows twice on the way and the test rows at the end. ``Trainer`` shuffles rows, pads
each batch to its longest and computes all logits; in words it is asked for no more than its loss on those rows. Tokens are those of the
rows that are trained on, padding left out; seconds are those of everything behind the loading of the backbone. The two take turns.

Floor: ours without scoring anything and with rows of one length, which no real text has. Bar: at least 1.5 times as many tokens a second.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from paired import interleave, report
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

import deltatune as dt
from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.backbones.quiet import quiet
from deltatune.methods import LoRA
from deltatune.tasks import TaskData, load_task
from deltatune.tasks.framing import Framing, How, framings
from deltatune.tasks.sampling import subset

BATCH, LENGTH, RATE = 16, 128, 1e-3


@dataclass(frozen=True)
class Case:
    """A backbone and a task.

    Attributes:
        backbone: its name.
        task: its name.
        framing: with a head or in words.
        kind: what PEFT calls that.
        targets: queries and values, as PEFT names them.
        steps: that are taken.
        rows: that are scored, each time.
    """

    backbone: str
    task: str
    framing: str
    kind: str
    targets: tuple[str, str]
    steps: int = 60
    rows: int = 256


KINDS = {"SEQ_CLS": "encoder", "CAUSAL_LM": "decoder"}

CASES = {
    "minilm, head, sentences": Case("minilm", "glue-sst2", "head", "SEQ_CLS", ("query", "value")),
    "minilm, head, news": Case("minilm", "ag-news", "head", "SEQ_CLS", ("query", "value")),
    "smollm2-135m, words, news": Case("smollm2-135m", "ag-news", "text2text", "CAUSAL_LM", ("q_proj", "v_proj"), steps=16, rows=64),
}


def framed(case: Case, data: TaskData) -> Framing:
    return framings[case.framing].make(data.task, load_tokenizer(case.backbone), How(max_length=LENGTH, kind=KINDS[case.kind]))


def ours(case: Case, data: TaskData) -> float:
    """Seconds of a run."""
    backbone = load_backbone(case.backbone, auto_class=framed(case, data).auto_class, **framed(case, data).backbone_options)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        dt.train(
            backbone, data, LoRA(rank=8), where=["attention.query", "attention.value"], tokenizer=load_tokenizer(case.backbone),
            framing=case.framing, out=Path(folder) / "run", lr=RATE, max_steps=case.steps, batch_size=BATCH, max_length=LENGTH,
            evaluations=2, eval_rows=case.rows, test_rows=case.rows, progress="none",
        )  # fmt: skip
    return time.perf_counter() - began


def theirs(case: Case, data: TaskData) -> float:
    """The same of ``Trainer``."""
    framing = framed(case, data)
    backbone = load_backbone(case.backbone, auto_class=framing.auto_class, **framing.backbone_options)
    began = time.perf_counter()
    train, validation, test = (
        [dict(row) for row in framing.encode(part)]
        for part in (data.train, subset(data.task, data.validation, case.rows), subset(data.task, data.test, case.rows))
    )
    config = peft.LoraConfig(task_type=case.kind, r=8, lora_alpha=16, target_modules=list(case.targets))
    words = case.framing != "head"
    collator = (DataCollatorForSeq2Seq if words else DataCollatorWithPadding)(framing.tokenizer)
    with tempfile.TemporaryDirectory() as folder, quiet():
        arguments = TrainingArguments(
            folder, max_steps=case.steps, learning_rate=RATE, per_device_train_batch_size=BATCH, report_to=[], disable_tqdm=True,
            seed=0, eval_strategy="steps", eval_steps=max(1, case.steps // 2), save_strategy="no", logging_strategy="no",
            prediction_loss_only=words,
        )  # fmt: skip
        trainer = Trainer(
            peft.get_peft_model(backbone, config), arguments, train_dataset=train, eval_dataset=validation, data_collator=collator
        )  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)  # what is printed is the result
        trainer.train()
        trainer.predict(test)  # type: ignore[arg-type]
    return time.perf_counter() - began


def tokens_of(case: Case, data: TaskData) -> float:
    """Of a row that is trained on, on average: each side takes its rows at random."""
    lengths = [len(row["input_ids"]) for row in framed(case, data).encode(data.train)]
    return sum(lengths) / len(lengths)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Both in turns."""
    data = load_task(case.task)
    runs: dict[str, Callable[[Case, TaskData], float]] = {"ours": ours, "theirs": theirs}
    for run in runs.values():
        run(replace(case, steps=1, rows=8), data)  # what is imported and converted once
    seconds = interleave({name: partial(run, case, data) for name, run in runs.items()}, rounds)
    tokens = case.steps * BATCH * tokens_of(case, data)
    pairs = sorted(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
    return {
        "ours / theirs": round(pairs[len(pairs) // 2], 3),
        "bar": 1.5,
        "steps": case.steps,
        "tokens a row": round(tokens_of(case, data), 1),
        "tokens a second": {name: [round(tokens / one) for one in found] for name, found in seconds.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases; all if left out")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.manual_seed(0)
    found = {name: measure(CASES[name], asked.rounds) for name in asked.names or CASES}
    report("tokens a second of whole runs with scoring, ours beside Trainer + PEFT", **found)
