"""Several deltas on one backbone: attach, switch, compose, disable, merge, unmerge, detach.

A small network has learnt to read scikit-learn's digits. One delta adapts it to a scanner that shifts its images to the
left, another to one that shifts them up; half of each reads both better than the plain network.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import deltatune as dt
from deltatune.methods import LoRA

torch.manual_seed(0)
pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = pixels.float().view(-1, 8, 8) / 16
views = {"plain": images, "left": images.roll(-1, dims=2), "up": images.roll(-1, dims=1)}


def train(network: nn.Module, groups: list[dict], view: str, epochs: int = 20) -> None:
    optimizer = torch.optim.AdamW(groups)
    for _ in range(epochs):
        for rows in torch.randperm(1200).split(64):
            F.cross_entropy(network(views[view][rows]), digits[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def accuracies(network: nn.Module) -> dict[str, float]:
    return {name: (network(view[1200:]).argmax(-1) == digits[1200:]).float().mean().item() for name, view in views.items()}


def main() -> tuple[nn.Module, dict[str, dict[str, float]]]:
    """The network with nothing attached, and its test accuracy on each view, by what acted."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    train(network, [{"params": list(network.parameters()), "lr": 3e-3}], "plain")
    table = {"nothing": accuracies(network)}

    for name in ("left", "up"):
        delta = dt.attach(network, LoRA(rank=4), where=["1", "3"], name=name)
        dt.switch(network, name)  # it acts, and the others rest
        train(network, delta.parameter_groups(lr=5e-3), name)
        table[name] = accuracies(network)

    half = dt.compose(network, ["left", "up"], how="weighted", weights=[0.5, 0.5])
    table["half of each"] = accuracies(network)
    with dt.disabled(network):
        table["disabled"] = accuracies(network)
    half.dissolve()

    left, up = dt.deltas(network)
    dt.switch(network, "left")
    dt.merge(left)  # into the weights: no cost in the forward
    table["left, merged"] = accuracies(network)
    dt.unmerge(left)  # the exact bits again
    dt.detach(left)
    dt.detach(up)
    table["detached"] = accuracies(network)
    return network, table


if __name__ == "__main__":
    _, table = main()
    print(f"{'what acts':15}" + "".join(f"{view:>8}" for view in views))
    for acts, row in table.items():
        print(f"{acts:15}" + "".join(f"{score:8.2f}" for score in row.values()))
