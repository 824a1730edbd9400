"""A LightningModule that trains a delta: each moment of a method's life has its Lightning hook."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

import deltatune as dt
from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.methods import IA3
from deltatune.tasks import load_task, subset
from deltatune.tasks.framing import HeadFraming
from deltatune.training.evaluation import score_rows
from deltatune.training.life import Life


class Tuning(LightningModule):
    """A backbone that learns by its delta in so many steps."""

    def __init__(self, delta: dt.Delta, steps: int, lr: float) -> None:
        super().__init__()
        self.backbone, self.delta, self.lr = delta.backbone, delta, lr
        self.life = Life(delta, steps)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.delta.parameter_groups(self.lr))

    def on_train_start(self) -> None:
        self.life.begin(self.trainer.train_dataloader)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.life.before_step()
        return self.backbone(**batch).loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.life.add_penalty()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.life.after_step()

    def on_train_end(self) -> None:
        self.life.finish()


def main() -> tuple[dt.Delta, float, float]:
    """The delta, and test accuracy before and after."""
    torch.manual_seed(0)
    data = load_task("bbc-news")
    framing = HeadFraming(data.task, load_tokenizer("minilm"), max_length=32)
    backbone = load_backbone("minilm", auto_class=framing.auto_class, label_names=data.task.labels)
    train, test = subset(data.task, data.train, 256), subset(data.task, data.test, 100)
    batches = DataLoader(framing.encode(train), batch_size=8, shuffle=True, collate_fn=framing.collate)

    delta = dt.attach(backbone, IA3())
    before = score_rows(framing, backbone, test)["accuracy"]
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Tuning(delta, len(batches), lr=1e-2).train(), batches)
    return delta, before, score_rows(framing, backbone, test)["accuracy"]


if __name__ == "__main__":
    delta, before, after = main()
    print(f"(IA)^3 learnt the topics of BBC News: accuracy {before:.2f} -> {after:.2f}, training {delta.budget()}.")
