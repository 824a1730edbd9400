"""How varied texts are: distinct n-grams, and how much each text is like the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from statistics import fmean

from deltatune.errors import missing_extra


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all texts over all their n-grams (Li et al. 2016); 0 of texts too short to have any.

    Args:
        texts: tokens of each; of equal length, since longer texts repeat more.
        n: tokens of a gram.

    >>> distinct([[1, 2, 3], [1, 2, 4]], 2)
    0.75
    """
    grams = list(chain.from_iterable(zip(*(text[start:] for start in range(n)), strict=False) for text in texts))
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean sentence BLEU of each text with all others as references, from 0 to 1 (Zhu et al. 2018); 0 of a single text.

    Raises:
        MissingExtra: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as cause:
        raise missing_extra("sacrebleu", "train") from cause
    if len(texts) < 2:
        return 0.0
    measure = BLEU(effective_order=True)
    scores = [measure.sentence_score(text, [*texts[:number], *texts[number + 1 :]]).score for number, text in enumerate(texts)]
    return fmean(scores) / 100
