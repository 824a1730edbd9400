"""Your own ``transformers.Trainer``: one callback makes it train a delta, whatever the method.

``DeltaCallback`` calls the method's life and puts the delta into each checkpoint. The method here has all of a life:
diff pruning looks for the entries of the weights worth changing, under a penalty, and keeps 1% of them.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

import deltatune as dt
from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.methods import DiffPruning
from deltatune.tasks import load_task, subset
from deltatune.tasks.framing import HeadFraming
from deltatune.training.callback import DeltaCallback


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> tuple[dt.Delta, float, float]:
    """The delta, and test accuracy before and after."""
    torch.manual_seed(0)
    data = load_task("bbc-news")
    framing = HeadFraming(data.task, load_tokenizer("minilm"), max_length=32)
    backbone = load_backbone("minilm", auto_class=framing.auto_class, label_names=data.task.labels)
    delta = dt.attach(backbone, DiffPruning(density=0.01), where="attention.{query,key,value}")

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=backbone,
            args=TrainingArguments(folder, num_train_epochs=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True),
            train_dataset=framing.encode(subset(data.task, data.train, 256)),
            eval_dataset=framing.encode(subset(data.task, data.test, 100)),
            data_collator=framing.collate,
            compute_metrics=accuracy,
            optimizers=(torch.optim.AdamW(delta.parameter_groups(lr=5e-3)), None),
            callbacks=[DeltaCallback(delta)],
        )
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        return delta, before, trainer.evaluate()["eval_accuracy"]


if __name__ == "__main__":
    delta, before, after = main()
    print(f"Diff pruning: accuracy {before:.2f} -> {after:.2f}, stored in {delta.budget().size_bytes:,} bytes.")
