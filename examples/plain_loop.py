"""A plain PyTorch loop: MiniLM learns the topics of BBC News from 256 articles, by any method.

The delta says what trains (``parameter_groups``). ``Life`` calls what its method wants done on the way: a look at data,
a penalty, something after each step, phases, a final form. Most methods want nothing; the loop is the same for all.
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

import deltatune as dt
from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.methods import LoRA, Method
from deltatune.tasks import load_task, subset
from deltatune.tasks.framing import HeadFraming
from deltatune.training.evaluation import score_rows
from deltatune.training.life import Life

METHOD = LoRA(rank=8)


def main(method: Method = METHOD, where: str | None = None, lr: float = 5e-3) -> tuple[dt.Delta, float, float]:
    """The delta, and test accuracy before and after."""
    torch.manual_seed(0)
    data = load_task("bbc-news")
    framing = HeadFraming(data.task, load_tokenizer("minilm"), max_length=32)  # headline and first sentence
    backbone = load_backbone("minilm", auto_class=framing.auto_class, label_names=data.task.labels)
    train, test = subset(data.task, data.train, 256), subset(data.task, data.test, 100)
    batches = DataLoader(framing.encode(train), batch_size=8, shuffle=True, collate_fn=framing.collate)

    delta = dt.attach(backbone, method, where)
    before = score_rows(framing, backbone, test)["accuracy"]
    optimizer = torch.optim.AdamW(delta.parameter_groups(lr))
    life = Life(delta, total=len(batches))

    life.begin(batches)
    backbone.train()
    for batch in batches:
        life.before_step()
        backbone(**batch).loss.backward()
        life.add_penalty()
        optimizer.step()
        life.after_step()
        optimizer.zero_grad()
    life.finish()
    return delta, before, score_rows(framing, backbone, test)["accuracy"]


if __name__ == "__main__":
    delta, before, after = main()
    print(f"{delta.method} learnt the topics of BBC News: accuracy {before:.2f} -> {after:.2f}.")
    print(f"It trained {delta.budget()}.")
