"""What judges of claims have in common: intervals decide, and too little evidence decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from deltatune.study.experiments.experiment import Judgement, Verdict
from deltatune.study.statistics import Paired, Scores, complete, mean_of, paired

FEWEST = 6
"""Tasks below which no claim about methods across tasks is decided: with five, no signed-rank test reaches 5 %."""


def lacking(scores: Scores, methods: Sequence[str]) -> Judgement | None:
    """Undecided, where a method is missing or too few tasks have them all; else None."""
    there = {method for row in scores.values() for method in row}
    if absent := [method for method in methods if method not in there]:
        return Judgement("undecided", f"No scores of {', '.join(absent)}.")
    tasks = len(complete(scores, methods))
    return (
        Judgement("undecided", f"Only {tasks} tasks have scores of {', '.join(methods)}; {FEWEST} are needed.") if tasks < FEWEST else None
    )


def ordered(scores: Scores, methods: Sequence[str]) -> Judgement:
    """Whether the mean scores fall in this order: no neighbours may be reversed, and a significant reversal decides against it."""
    if (found := lacking(scores, methods)) is not None:
        return found
    shared = complete(scores, methods)
    pairs = paired(shared, list(pairwise(methods)))
    said = "; ".join(f"{one.method} - {one.other} = {one.difference:+.3f} (p = {p_of(one)})" for one in pairs)
    because = f"Over {len(shared)} tasks: {said}."
    if any(one.difference < 0 and one.is_significant for one in pairs):
        return Judgement("does not hold", because)
    return Judgement("holds" if all(one.difference > 0 for one in pairs) else "undecided", because)


def reaches(scores: Scores, method: str, other: str, share: float) -> Judgement:
    """Whether the mean score of a method is at least that share of another's: the interval of the ratio decides."""
    if (found := lacking(scores, (method, other))) is not None:
        return found
    ratio, low, high = ratio_of(scores, method, other)
    because = f"{method} reaches {ratio:.1%} of {other} ({low:.1%} to {high:.1%})."
    return Judgement("holds" if low >= share else "does not hold" if high < share else "undecided", because)


def level(scores: Scores, method: str, other: str, margin: float) -> Judgement:
    """Whether two methods are level: the interval of their mean difference lies within the margin."""
    if (found := lacking(scores, (method, other))) is not None:
        return found
    [one] = paired(scores, [(method, other)])
    because = (
        f"{method} - {other} = {one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f}) over {one.tasks} tasks; level is within {margin}."
    )
    inside = -margin <= one.low and one.high <= margin
    outside = one.low > margin or one.high < -margin
    return Judgement("holds" if inside else "does not hold" if outside else "undecided", because)


def better(scores: Scores, method: str, other: str) -> Judgement:
    """Whether one method is better than another across tasks."""
    if (found := lacking(scores, (method, other))) is not None:
        return found
    [one] = paired(scores, [(method, other)])
    because = f"{method} - {other} = {one.difference:+.3f} (p = {p_of(one)}), better on {one.wins:g} of {one.tasks} tasks."
    if not one.is_significant:
        return Judgement("undecided", because)
    return Judgement("holds" if one.difference > 0 else "does not hold", because)


def all_of(judgements: Sequence[Judgement]) -> Judgement:
    """Several conditions of one claim: one that does not hold decides, then one that is undecided."""
    worst: tuple[Verdict, ...] = ("does not hold", "undecided")
    verdicts = {one.verdict for one in judgements}
    return Judgement(next((one for one in worst if one in verdicts), "holds"), " ".join(dict.fromkeys(one.because for one in judgements)))


def p_of(pair: Paired) -> str:
    """A corrected probability with two digits that matter."""
    return f"{pair.corrected:.2g}"


def ratio_of(scores: Scores, method: str, other: str) -> tuple[float, float, float]:
    """Mean score over another's mean score, with the interval over tasks (of differences, divided by the other's mean)."""
    shared = complete(scores, (method, other))
    whole = mean_of([row[other] for row in shared.values()]).value
    difference = mean_of([row[method] - row[other] for row in shared.values()])
    return 1 + difference.value / whole, 1 + difference.low / whole, 1 + difference.high / whole
