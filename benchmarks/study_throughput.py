"""How many tokens a second does a study train, beside the same trials through plain transformers Trainer + PEFT?

Ten trials of experiment 1 (two tasks x five methods on MiniLM; rows, rates, steps, batches alike) run through our engine as the evidence
does, on Ray with a trial a core, store and files in; and then one after the other through ``Trainer`` on all cores, with PEFT's defaults
for what PEFT has and parameters frozen by hand for the rest. The two take turns, whole rounds at a time. Tokens are those that training
read, padding left out; seconds are those of everything from loading the backbone to the score on the test rows; of ours also those of
starting the workers with their imports, where ``Trainer`` has everything imported and the data read. ``--fuse`` trains ours together in
this process instead.

Bar: at least 2 times as many tokens a second, at scores that do not differ (the interval of the mean difference holds 0).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import peft
import torch
from paired import ratio, report
from torch import nn
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.backbones.quiet import quiet
from deltatune.study.design import Study
from deltatune.study.driver import Driver
from deltatune.study.experiments.basis import BF, FT, LR, PROBE, PT, basis
from deltatune.study.runner.local import LocalRunner
from deltatune.study.runner.ray import Resources, ray_runner
from deltatune.study.shows import Silent
from deltatune.study.statistics import mean_of
from deltatune.study.store.store import Store
from deltatune.study.trial import Trial
from deltatune.tasks import load_task
from deltatune.tasks.metrics import compute
from deltatune.tasks.sampling import subset

TASKS, METHODS = ("bbc-news", "tweet-sentiment"), (FT, LR, PT, BF, PROBE)
HEAD = "classifier"


def sample(steps: int, test_rows: int) -> Study:
    """The ten trials: validation and early stopping are left out, so that both sides read the same rows."""
    full = basis("full")
    methods = tuple(replace(entry, settings={}) for entry in full.methods if entry.label in METHODS)
    settings = {"max_steps": steps, "max_length": 64, "batch_size": 16, "evaluations": 0, "test_rows": test_rows}
    return replace(full, name="sample", tasks=TASKS, methods=methods, settings=settings, seeds=(0,), baselines=False)


def _peft(config: Callable[[], Any]) -> Callable[[nn.Module], Any]:
    return lambda model: peft.get_peft_model(model, config())  # type: ignore[arg-type]


def _only(names: Callable[[str], bool]) -> Callable[[nn.Module], nn.Module]:
    def frozen(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(names(name))
        return model

    return frozen


PREPARED: dict[str, Callable[[nn.Module], Any]] = {
    FT: _only(lambda name: True),
    LR: _peft(lambda: peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], lora_alpha=16)),
    PT: _peft(lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=100)),
    BF: _only(lambda name: name.endswith("bias") or HEAD in name),
    PROBE: _only(lambda name: HEAD in name),
}
"""How plain code makes each method: by PEFT where it has it."""


class Counting:
    """Pads as everybody does, and counts the tokens of each batch; accelerate asks for one more than is trained on."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad, self.tokens = DataCollatorWithPadding(tokenizer), list[int]()

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch."""
        batch: dict[str, Any] = self.pad(features)
        self.tokens.append(int(batch["attention_mask"].sum()))
        return batch


def theirs(trial: Trial) -> tuple[int, float]:
    """Tokens read in training, and the score on the test rows."""
    settings, data = trial.run.settings, load_task(trial.task)
    tokenizer, task = load_tokenizer(trial.backbone), data.task
    torch.manual_seed(settings.seed)
    model = load_backbone(trial.backbone, auto_class="AutoModelForSequenceClassification", num_labels=task.outputs)

    def encoded(rows: Any) -> list[dict[str, Any]]:
        texts = [rows[column] for column in task.text]
        found = tokenizer(*[list(text) for text in texts], truncation=True, max_length=settings.max_length)
        return [{**{name: found[name][at] for name in found}, "labels": rows[task.label][at]} for at in range(len(rows))]

    test, collator = subset(task, data.test, settings.test_rows), Counting(tokenizer)
    rate = settings.lr or min(method.learning_rate for method in trial.run.methods)
    with tempfile.TemporaryDirectory() as folder, quiet():
        arguments = TrainingArguments(
            folder, max_steps=settings.max_steps or -1, learning_rate=rate, per_device_train_batch_size=settings.batch_size,
            warmup_steps=settings.warmup, report_to=[], save_strategy="no", disable_tqdm=True, seed=settings.seed, logging_strategy="no",
            per_device_eval_batch_size=settings.eval_batch_size,
        )  # fmt: skip
        trainer = Trainer(PREPARED[trial.label](model), arguments, train_dataset=encoded(data.train), data_collator=collator)  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)  # what is printed is the result
        trainer.train()
        tokens = sum(collator.tokens[: trainer.state.global_step])
        logits = trainer.predict(encoded(test)).predictions  # type: ignore[arg-type]
    said = logits.argmax(-1).tolist()
    return tokens, compute(task.metric, said, list(test[task.label]))[task.metric]


def their_round(study: Study) -> tuple[int, dict[str, float]]:
    """All trials one after the other: tokens, and score by trial."""
    found = {f"{trial.label} on {trial.task}": theirs(trial) for trial in study.trials()}
    return sum(tokens for tokens, _ in found.values()), {name: score for name, (_, score) in found.items()}


def our_round(study: Study, *, fuse: bool = False) -> tuple[int, dict[str, float]]:
    """The study through the engine, into a store of its own."""
    runner = LocalRunner if fuse else ray_runner(Resources(workers=os.cpu_count(), cpus=1))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "studies.db")
        store.add(study)
        Driver(store, study.name, Path(folder) / "trials", runner, Silent(), fuse=fuse).run()
        records = store.records(study.name)
    if failed := [record.error for record in records if record.state != "done"]:
        raise SystemExit(f"{len(failed)} trials failed: {failed[0]}")
    return sum(record.tokens or 0 for record in records), {f"{one.method} on {one.task}": one.score or 0.0 for one in records}


def measure(steps: int, rounds: int, test_rows: int, *, fuse: bool) -> dict[str, Any]:
    study = sample(steps, test_rows)
    for task in TASKS:
        load_task(task)
    sides: dict[str, Callable[[Study], tuple[int, dict[str, float]]]] = {"ours": partial(our_round, fuse=fuse), "theirs": their_round}
    for side in sides.values():
        side(sample(1, 16))  # what is imported and converted once
    pace: dict[str, list[float]] = {name: [] for name in sides}
    scores: dict[str, dict[str, float]] = {}
    minutes: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            began = time.perf_counter()
            tokens, scores[name] = sides[name](study)
            seconds = time.perf_counter() - began
            pace[name].append(tokens / seconds)
            minutes[name].append(60 * len(scores[name]) / seconds)
    difference = mean_of([scores["ours"][name] - score for name, score in scores["theirs"].items()])
    return {
        "ours / theirs": round(ratio(pace["ours"], pace["theirs"]), 3),
        "tokens a second": {name: [round(one) for one in found] for name, found in pace.items()},
        "trials a minute": {name: round(fmean(found), 2) for name, found in minutes.items()},
        "score, ours - theirs": [round(one, 4) for one in (difference.value, difference.low, difference.high)],
        "scores": {name: [round(scores[side][name], 4) for side in sides] for name in scores["theirs"]},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--test-rows", type=int, default=512)
    parser.add_argument("--fuse", action="store_true", help="ours in one process, trials that may share forwards together")
    asked = parser.parse_args()
    report(
        f"tokens a second of ten trials of {asked.steps} steps, our engine and plain Trainer + PEFT in turns",
        **measure(asked.steps, asked.rounds, asked.test_rows, fuse=asked.fuse),
    )
