"""New words: MiniLM knows no emoji, so its vocabulary grows by six, and only their six rows train.

Each emoji learns to mean its word in four sentences, and is tried in others. The file holds six rows; it opens on any
backbone resized in the same way, whose own new rows are random.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltatune as dt
from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.methods import TrainableTokens

MEANINGS = {"⚽": "football", "🎵": "music", "💰": "money", "🎬": "movie", "🐶": "dog", "🍕": "pizza"}
LESSONS = ["I love {}.", "There was a lot of {} yesterday.", "They talked about {} all evening.", "No {} today"]
TRIALS = ["My sister writes about {}.", "The best {} in town", "What do you think of {}?"]

tokenizer = load_tokenizer("minilm")
tokenizer.add_tokens(list(MEANINGS))


def resized() -> nn.Module:
    backbone = load_backbone("minilm")
    backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return backbone


def embed(backbone: nn.Module, frames: list[str], words: list[str]) -> Tensor:
    """One vector for each frame filled with each word, (frames * words, width)."""
    batch = tokenizer([frame.format(word) for frame in frames for word in words], padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    return F.normalize((backbone(**batch).last_hidden_state * mask).sum(1), dim=-1)


def main() -> tuple[dt.Delta, float, float, float]:
    """The delta, the cosine of emoji and word before, after, and on a fresh backbone with the delta from its file."""
    torch.manual_seed(0)
    emoji, words = list(MEANINGS), list(MEANINGS.values())
    backbone, fresh = resized(), resized()
    wanted, truth = embed(backbone, LESSONS, words).detach(), embed(backbone, TRIALS, words).detach()
    delta = dt.attach(backbone, TrainableTokens(tuple(tokenizer.convert_tokens_to_ids(emoji))))
    before = F.cosine_similarity(embed(backbone, TRIALS, emoji), truth).mean().item()

    optimizer = torch.optim.Adam(delta.parameter_groups(lr=2e-2))
    for _ in range(12):
        (1 - F.cosine_similarity(embed(backbone, LESSONS, emoji), wanted).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        dt.load(fresh, dt.save(delta, f"{folder}/emoji"))
    after, opened = (F.cosine_similarity(embed(model, TRIALS, emoji), truth).mean().item() for model in (backbone, fresh))
    return delta, before, after, opened


if __name__ == "__main__":
    delta, before, after, opened = main()
    print(f"Emoji and word: cosine {before:.2f} -> {after:.2f}, from the file {opened:.2f}; trained {delta.budget()}.")
