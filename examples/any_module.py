"""Any module: a network of your own around ``nn.TransformerEncoder`` learns to read digits that lie on their side.

Nobody has told deltatune about this class. Roles are inferred from names, classes and shapes, so ``attention.query``
means here what it means in BERT, although ``nn.MultiheadAttention`` keeps query, key and value in one raw parameter.
"""

from __future__ import annotations

import torch
from rich import print
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import deltatune as dt
from deltatune.methods import LoRA


class Reader(nn.Module):
    """Eight rows of eight pixels -> scores of the ten digits."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(torch.randn(8, width) / 8)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.classify = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.encoder(self.embed(image) + self.place).mean(1))


def train(reader: nn.Module, groups: list[dict], images: Tensor, digits: Tensor, epochs: int = 12) -> None:
    optimizer = torch.optim.AdamW(groups)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            F.cross_entropy(reader(images[rows]), digits[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()


def main() -> tuple[dt.Delta, float, float]:
    """The delta, and test accuracy on the lying digits before and after."""
    torch.manual_seed(0)
    pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
    upright = pixels.float().view(-1, 8, 8) / 8 - 1
    lying, answers = upright.mT, digits[1200:]

    reader = Reader()
    train(reader, [{"params": list(reader.parameters()), "lr": 2e-3}], upright[:1200], digits[:1200])
    before = (reader(lying[1200:]).argmax(-1) == answers).float().mean().item()

    delta = dt.attach(reader, LoRA(rank=4), where=["attention.{query,key,value}", "feed_forward.*"])
    train(reader, delta.parameter_groups(lr=5e-3), lying[:1200], digits[:1200])
    return delta, before, (reader(lying[1200:]).argmax(-1) == answers).float().mean().item()


if __name__ == "__main__":
    delta, before, after = main()
    print(dt.tree(delta.backbone))
    print(f"Digits on their side: accuracy {before:.2f} -> {after:.2f}, training {delta.budget()}.")
