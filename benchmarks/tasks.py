"""A linear probe on frozen MiniLM for every classification, regression and choice task of a mirror: does the data hold what it asks?

Each text is encoded once, as the head framing encodes it, and what the readout reads of it is kept. A head of the same shape is then
trained on that with the task's own loss: the parameters are those of the method ``linear-probe``, the optimizer is one that converges.
A second head reads the mean of the tokens instead.

Needs a mirror (DELTATUNE_MIRROR). Run: python benchmarks/tasks.py [--tasks glue-sst2,...]; tasks that have a line already are left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import attach, find_sites
from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.methods import LinearProbe
from deltatune.tasks import Rows, Task, compute, get_task, load_task, subset, tasks
from deltatune.tasks.framing import HeadFraming
from deltatune.tasks.metrics import measure
from deltatune.tasks.tensors import SEVERAL, Features, by_length

OUT = Path(__file__).parent / "results" / "tasks.jsonl"
KINDS = ("classification", "multilabel", "regression", "choice")
TRAIN, TEST, LENGTH = 400, 300, 64
"""Most rows to learn from and to test on, and most tokens of an input."""
CHOICES = 800
"""Most inputs of a choice task's split, which has one an option; so many rows fewer."""
BATCH, STEPS = 32, 100
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Readout(nn.Module):
    """The backbone's head alone, on features (inputs, d) in place of token ids."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, outputs)
        nn.init.normal_(self.classifier.weight, std=0.02)  # as transformers begins a head
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Tensor) -> SimpleNamespace:
        """(inputs, d) -> logits (inputs, outputs)."""
        return SimpleNamespace(logits=self.classifier(features))


class Encoder:
    """Frozen MiniLM: what its readout reads of an input, and the mean of its last hidden states."""

    def __init__(self, name: str = "minilm") -> None:
        self.tokenizer = load_tokenizer(name)
        self.model = load_backbone(name, auto_class="AutoModelForSequenceClassification", num_labels=2)
        [site] = find_sites(self.model, "readout")
        site.module.register_forward_pre_hook(self._keep)
        self._read = torch.empty(0)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._read = inputs[0]

    @torch.inference_mode()
    def __call__(self, framing: HeadFraming, inputs: Sequence[Features]) -> dict[str, Tensor]:
        """``readout`` and ``mean``, both (inputs, d); batches are of like length."""
        found = {name: torch.empty(len(inputs), self.model.config.hidden_size) for name in ("readout", "mean")}
        for batch in by_length(inputs, BATCH):
            ready = framing.inputs.padded([inputs[index] for index in batch])
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.model(**ready, output_hidden_states=True).hidden_states[-1].float()  # (batch, length, d)
            mask = ready["attention_mask"][..., None]
            found["readout"][batch] = self._read.float()
            found["mean"][batch] = (hidden * mask).sum(1) / mask.sum(1)
        return found


@dataclass
class Examples:
    """Rows whose inputs are features already; a choice's row has as many inputs as options.

    Attributes:
        rows: the rows.
        features: (inputs, d).
        counts: inputs a row.
        labels: as the task's loss takes them.
    """

    rows: Rows
    features: Tensor
    counts: Tensor
    labels: Tensor

    def batch(self, task: Task, chosen: Tensor) -> dict[str, Tensor]:
        """What a head reads of some rows."""
        ends = self.counts.cumsum(0)
        places = torch.cat([torch.arange(int(ends[row] - self.counts[row]), int(ends[row])) for row in chosen])
        batch = {"features": self.features[places], "labels": self.labels[chosen]}
        return {**batch, "counts": self.counts[chosen]} if task.type == "choice" else batch


def examples(framing: HeadFraming, encoder: Encoder, rows: Rows) -> tuple[dict[str, Examples], int]:
    """The rows by the place their features are read at, and the tokens that were encoded."""
    encoded = framing.encode(rows)
    inputs = [one for feature in encoded for one in feature.get(SEVERAL, [feature])]
    counts = torch.tensor([len(feature.get(SEVERAL, [feature])) for feature in encoded])
    labels = framing.collate(encoded)["labels"]
    found = encoder(framing, inputs)
    return {place: Examples(rows, features, counts, labels) for place, features in found.items()}, sum(
        len(one["input_ids"]) for one in inputs
    )


def learnt(framing: HeadFraming, train: Examples) -> Readout:
    """The best head on all rows, with the decay that did best on a fifth of them after training on the others."""
    rows = torch.arange(len(train.rows))
    fit, held = rows[: -len(rows) // 5], rows[-len(rows) // 5 :]
    batch = train.batch(framing.task, held)
    losses = {}
    for decay in DECAYS:
        with torch.no_grad():
            losses[decay] = float(framing.loss(converged(framing, train.batch(framing.task, fit), decay), batch))
    return converged(framing, train.batch(framing.task, rows), min(losses, key=losses.__getitem__))


def converged(framing: HeadFraming, batch: dict[str, Tensor], decay: float) -> Readout:
    """min_W loss(W) / N + decay / 2 |W|^2 over the parameters that the method ``linear-probe`` trains, by L-BFGS."""
    torch.manual_seed(0)
    model = Readout(batch["features"].shape[1], framing.outputs)
    delta = attach(model, LinearProbe(), where="classifier")
    optimizer = torch.optim.LBFGS(list(delta.parameters()), max_iter=STEPS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = framing.loss(model, batch) / len(batch["labels"]) + decay / 2 * model.classifier.weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(objective)
    return model


@torch.no_grad()
def predicted(framing: HeadFraming, model: Readout, test: Examples) -> list[Any]:
    """What the head says to each row."""
    logits = model(test.features).logits.split(test.counts.tolist())  # a row: (its inputs, outputs)
    return [framing.head.value(framing, {}, scores.flatten()) for scores in logits]


def sample(task: Task, rows: Rows, most: int) -> Rows:
    """Rows that a task can do with, in the order of their texts' hashes."""
    if task.type != "choice":
        return subset(task, rows, most)
    options = max(len(row["options"]) for row in rows[:100])
    return subset(task, rows, min(most, CHOICES // options))


def probed(name: str, encoder: Encoder) -> dict[str, Any]:
    """One task's line."""
    began = time.process_time()
    data = load_task(name)
    task = data.task
    framing = HeadFraming(task, encoder.tokenizer, LENGTH)
    (train, seen), (test, more) = (
        examples(framing, encoder, sample(task, rows, most)) for rows, most in ((data.train, TRAIN), (data.test, TEST))
    )
    rows, metric = test["mean"].rows, task.metric
    references = framing.references(rows)
    said = {place: predicted(framing, learnt(framing, train[place]), test[place]) for place in train}
    found = {place: measure(metric, answers, references, rows)[metric] for place, answers in said.items()}
    said["baseline"] = [data.majority] * len(rows)  # a predictor that has only seen the answers of train
    scores = {place: compute(task.metrics, answers, references, rows) for place, answers in said.items()}
    return {
        "task": name,
        "category": task.category,
        "type": task.type,
        "outputs": task.outputs,
        "options": round(float(test["mean"].counts.float().mean()), 1),
        "sizes": {split: len(rows) for split, rows in data.splits.items()},
        "train": len(train["mean"].rows),
        "test": len(rows),
        "metric": metric,
        "baseline": round(scores["baseline"][metric], 4),
        **{place: [round(number, 4) for number in (one.value, one.low, one.high)] for place, one in found.items()},
        "all": {place: {each: round(value, 4) for each, value in values.items()} for place, values in scores.items()},
        "tokens": seen + more,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    wanted = arguments.tasks.split(",") if arguments.tasks else [name for name in tasks if get_task(name).type in KINDS]
    done = {json.loads(line)["task"] for line in arguments.out.read_text().splitlines()} if arguments.out.is_file() else set()
    encoder = Encoder()
    for name in wanted:
        if name not in done and get_task(name).is_runnable:
            line = probed(name, encoder)
            print(name, line["metric"], line["baseline"], *line["readout"], "mean", *line["mean"], line["cpu_seconds"], flush=True)
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            done.add(name)


if __name__ == "__main__":
    main()
