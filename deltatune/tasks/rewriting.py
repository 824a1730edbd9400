"""Metrics of rewritten sentences that no kept library has: SARI for simplification, GLEU for grammatical correction."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

ORDER = 4
Grams = Counter[tuple[str, ...]]


def ngrams(words: Sequence[str], size: int) -> Grams:
    """The n-grams of a sentence, counted."""
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI = mean over n = 1..4 of (F_keep + P_delete + F_add) / 3, from 0 to 1 (Xu et al., TACL 2016).

    Words are compared in lower case, as they stand between blanks; tokenise beforehand what is not tokenised. The counts
    are those of the authors' own script: source and prediction count as often as there are references, and what is not
    there at all counts as done right.

    >>> references = ["About 95 species are currently known .", "About 95 species are now accepted .", "95 species are now accepted ."]
    >>> round(sari("About 95 species are currently accepted .", "About 95 you now get in .", references), 4)
    0.2683

    Args:
        source: the sentence before.
        prediction: the sentence behind.
        references: sentences that people wrote.
    """
    before, behind, *right = (text.lower().split() for text in (source, prediction, *references))
    parts = [_sari_parts(ngrams(before, size), ngrams(behind, size), [ngrams(one, size) for one in right]) for size in range(1, ORDER + 1)]
    return sum(sum(part) for part in zip(*parts, strict=True)) / (3 * ORDER)


def _sari_parts(source: Grams, said: Grams, right: Sequence[Grams]) -> Iterator[float]:
    """F of what was kept, precision of what was deleted, F of what was added."""
    many = len(right)
    wanted: Grams = sum(right, Counter())
    before, behind = _times(source, many), _times(said, many)
    kept, keepable = before & behind, before & wanted
    precision = _mean([(kept & wanted)[gram] / kept[gram] for gram in kept])
    recall = _mean([(kept & wanted)[gram] / keepable[gram] for gram in keepable])
    yield _harmonic(precision, recall)
    deleted = before - behind
    yield _mean([(deleted - wanted)[gram] / deleted[gram] for gram in deleted])
    added, wished = set(said) - set(source), set(wanted) - set(source)
    hits = len(added & wished)
    yield _harmonic(hits / len(added) if added else 1.0, hits / len(wished) if wished else 1.0)


def _times(counts: Grams, many: int) -> Grams:
    return Counter({gram: count * many for gram, count in counts.items()})


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares) if shares else 1.0


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def gleu(sources: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """GLEU of grammatical error correction (Napoles et al., ACL 2015; without tuning, 2016), from 0 to 1.

    Like BLEU, but n-grams of the source that the reference does not have and the prediction kept are subtracted. Several
    references are averaged over one draw each in turn, where the authors draw at random.

    >>> gleu(["i has a cat ."], ["i have a cat ."], [["i have a cat ."]])
    1.0
    >>> gleu(["i has a cat ."], ["i has a cat ."], [["i have a cat ."]]) < 0.3
    True
    """
    most = max(map(len, references))
    draws = [[right[turn % len(right)] for right in references] for turn in range(most)]
    return sum(_gleu(sources, predictions, draw) for draw in draws) / most


def _gleu(sources: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> float:
    matched, possible, said, wanted = [0] * ORDER, [0] * ORDER, 0, 0
    for source, prediction, reference in zip(sources, predictions, references, strict=True):
        before, behind, right = source.split(), prediction.split(), reference.split()
        said, wanted = said + len(behind), wanted + len(right)
        for size in range(1, ORDER + 1):
            there, good = ngrams(behind, size), ngrams(right, size)
            bad = Counter({gram: count for gram, count in ngrams(before, size).items() if gram not in good})
            matched[size - 1] += max((there & good).total() - (there & bad).total(), 0)
            possible[size - 1] += max(len(behind) + 1 - size, 0)
    known = [(hits, all_) for hits, all_ in zip(matched, possible, strict=True) if all_]
    if not known or any(not hits for hits, _ in known):
        return 0.0
    brevity = min(0.0, 1 - wanted / said)
    return math.exp(brevity + sum(math.log(hits / all_) for hits, all_ in known) / len(known))
