"""The optimiser of a run: AdamW over what the deltas train, each method's own groups of rates kept."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainingArguments

from deltatune.injection.compose import optimizer_groups
from deltatune.training.flat import FlatAdamW
from deltatune.training.life import Trained


def optimizer_of(deltas: Sequence[Trained], args: TrainingArguments) -> FlatAdamW:
    """AdamW with the arguments' rate, moments and decoupled weight decay.

    Args:
        deltas: what trains.
        args: of the run.
    """
    betas = (args.adam_beta1, args.adam_beta2)
    groups = optimizer_groups(deltas, args.learning_rate)
    return FlatAdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay)
