"""The plain loop with ``accelerate``: the same lines on a CPU, a GPU or several, started by ``accelerate launch``.

Attach first, then ``prepare``: that is when the backbone may be wrapped for several processes.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import deltatune as dt
from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.methods import Adapter
from deltatune.tasks import load_task, subset
from deltatune.tasks.framing import HeadFraming
from deltatune.training.evaluation import score_rows
from deltatune.training.life import Life


def main() -> tuple[dt.Delta, float, float]:
    """The delta, and test accuracy before and after."""
    torch.manual_seed(0)
    data = load_task("bbc-news")
    framing = HeadFraming(data.task, load_tokenizer("minilm"), max_length=32)
    backbone = load_backbone("minilm", auto_class=framing.auto_class, label_names=data.task.labels)
    train, test = subset(data.task, data.train, 256), subset(data.task, data.test, 100)

    delta = dt.attach(backbone, Adapter(bottleneck_dim=16))
    before = score_rows(framing, backbone, test)["accuracy"]
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, batches = accelerator.prepare(
        backbone,
        torch.optim.AdamW(delta.parameter_groups(lr=5e-3)),
        DataLoader(framing.encode(train), batch_size=4, shuffle=True, collate_fn=framing.collate),
    )
    life = Life(delta, total=len(batches) // 2)

    life.begin(batches)
    model.train()
    for batch in batches:
        with accelerator.accumulate(model):
            life.before_step()
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                life.add_penalty()
            optimizer.step()
            if accelerator.sync_gradients:
                life.after_step()
            optimizer.zero_grad()
    life.finish()
    return delta, before, score_rows(framing, backbone, test)["accuracy"]


if __name__ == "__main__":
    delta, before, after = main()
    print(f"Adapters learnt the topics of BBC News: accuracy {before:.2f} -> {after:.2f}, training {delta.budget()}.")
