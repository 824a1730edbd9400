"""Six deltas in one training: two methods at three learning rates, on one MiniLM, each as if it were trained alone.

Every step reads the rows of all six jobs in one forward and backward of the frozen backbone.
"""

from __future__ import annotations

import deltatune as dt
from deltatune.methods import IA3, LoRA


def main() -> dict[str, float]:
    """Test accuracy by job."""
    jobs = [
        dt.Job("bbc-news", method, name=f"{name} at {lr:g}", lr=lr, max_steps=12, batch_size=8, max_length=32, evaluations=0, test_rows=60)
        for name, method in (("LoRA", LoRA(rank=4)), ("IA3", IA3()))
        for lr in (1e-3, 5e-3, 2e-2)
    ]
    scores = {}
    for outcome in dt.train_together(jobs, "minilm", progress="none"):
        if outcome.error is not None or outcome.result is None:
            raise SystemExit(f"{outcome.name} failed: {outcome.error}")
        scores[outcome.name] = outcome.result.score
    return scores


if __name__ == "__main__":
    for name, score in main().items():
        print(f"{name}: {score:.2f}")
