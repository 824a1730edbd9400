"""Images: a small ViT has learnt the digits 0 to 4, and is now to read 5 to 9, on scikit-learn's 8 x 8 scans.

A new head on the frozen ViT is the yardstick. LoRA in its layers, with the same head, has to beat it.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import deltatune as dt
from deltatune.methods import LinearProbe, LoRA, Method

SHAPE = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 5}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


def train(vit: nn.Module, groups: list[dict], images: Tensor, labels: Tensor, epochs: int = 12) -> None:
    optimizer = torch.optim.AdamW(groups)
    vit.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            F.cross_entropy(vit(images[rows]).logits, labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    vit.eval()


@torch.no_grad()
def accuracy(vit: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (vit(images).logits.argmax(-1) == labels).float().mean().item()


def main() -> tuple[nn.Module, dict[Method, float], str]:
    """The ViT with nothing attached, each method's test accuracy on the digits 5 to 9, and what LoRA trained."""
    torch.manual_seed(0)
    pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8) / 8 - 1
    old, new = images[digits < 5], images[digits >= 5]
    wanted = digits[digits >= 5] - 5

    vit = ViTForImageClassification(ViTConfig(**SHAPE, **WIDTHS))
    train(vit, [{"params": list(vit.parameters()), "lr": 2e-3}], old, digits[digits < 5])

    scores, budget = {}, ""
    for method, lr in ((LinearProbe(), 1e-2), (LoRA(rank=4), 5e-3)):
        delta = dt.attach(vit, method)  # query and value for LoRA; the head trains with either
        train(vit, delta.parameter_groups(lr), new[:600], wanted[:600])
        scores[method], budget = accuracy(vit, new[600:], wanted[600:]), str(delta.budget())
        dt.detach(delta)
    return vit, scores, budget


if __name__ == "__main__":
    _, scores, budget = main()
    for method, score in scores.items():
        print(f"{score:.2f}  {method}")
    print(f"LoRA trained {budget}.")
