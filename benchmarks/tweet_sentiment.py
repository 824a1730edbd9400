"""Does 100 steps of LoRA teach SmolLM2-135M tweet sentiment? Scored by label words, against the untrained model and the majority class.

The command is ``deltatune tune --backbone smollm2-135m --task tweet-sentiment --method lora --max-steps 100``; here the
validation rows are not scored on the way, and what the last step left is put to all test rows. Bar: accuracy at least
10 points above both, mean of 3 seeds. Takes about an hour on two cores.
"""

from __future__ import annotations

import statistics
import sys

from paired import report

import deltatune as dt
from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.tasks import load_task
from deltatune.tasks.text2text import TextToTextFraming
from deltatune.training.evaluation import score_rows

SEEDS = (13, 21, 42)

if __name__ == "__main__":
    data = load_task("tweet-sentiment")
    labels = [row["label"] for row in data.test]
    majority = max(labels.count(label) for label in set(labels)) / len(labels)
    tokenizer = load_tokenizer("smollm2-135m")
    framing = TextToTextFraming(data.task, tokenizer, 128)
    untrained = score_rows(framing, load_backbone("smollm2-135m", auto_class="AutoModelForCausalLM"), data.test)["accuracy"]
    print(f"majority {majority:.4f}, untrained {untrained:.4f}", file=sys.stderr, flush=True)
    scores, seconds = [], []
    for seed in SEEDS:
        result = dt.train("smollm2-135m", data, "lora", max_steps=100, seed=seed, evaluations=0, progress="none")
        scores.append(result.score)
        seconds.append(result.seconds_per_step)
        print(f"seed {seed}: {result.score:.4f}", file=sys.stderr, flush=True)
    gain = statistics.mean(scores) - max(majority, untrained)
    report(
        "SmolLM2-135M, tweet sentiment by label words, LoRA for 100 steps: test accuracy, mean of 3 seeds",
        trained=round(statistics.mean(scores), 4),
        seeds=[round(score, 4) for score in scores],
        untrained=round(untrained, 4),
        majority=round(majority, 4),
        test_rows=len(labels),
        seconds_per_step=round(statistics.median(seconds), 3),
        gain=round(gain, 4),
        bar=0.10,
        holds=gain >= 0.10,
    )
