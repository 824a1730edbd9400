"""Duplicates and splits. A row's place depends on its own text only: not on its order, a seed, or a library's version."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from deltatune.tasks.rows import Row, text_of
from deltatune.tasks.task import Split

LEAST = 3
"""Different texts of a class that give each of the three splits one."""


def text_key(row: Row, columns: Sequence[str]) -> str:
    r"""The row's texts in lower case with blanks merged: rows with one key are the same for every purpose.

    >>> text_key({"text": "Two  Words\n"}, ["text"])
    'two words'
    """
    return "\x1f".join(" ".join(text_of(row[column]).lower().split()) for column in columns)


def rank(key: str) -> str:
    """SHA-256 of a key: a fixed, arbitrary order."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def without_duplicates(rows: Iterable[Row], text: Sequence[str], label: str) -> tuple[list[Row], dict[str, int]]:
    """Each text once, in its first spelling; texts that come with different labels not at all.

    Texts that differ in case or blanks only are one text, so what a source does to blanks does not change the rows.

    Returns:
        the rows in their order, and how many were left out: ``duplicates``, ``contradictions``.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    total = 0
    for row in rows:
        groups[text_key(row, text)].append(row)
        total += 1
    kept: list[Row] = []
    contradictions = 0
    for group in groups.values():
        if len({_hashable(row[label]) for row in group}) > 1:
            contradictions += len(group)
        else:
            kept.append(group[0])
    return kept, {"duplicates": total - len(kept) - contradictions, "contradictions": contradictions}


Stratum = str | Callable[[Row], Hashable] | None
"""A column, or a function of the row, in whose values a split keeps the shares; None for nothing."""


def cut(rows: Sequence[Row], text: Sequence[str], label: Stratum, split: Split) -> dict[str, list[Row]]:
    """Train, validation and test, class by class in the split's shares; each in the order of the keys' hashes.

    Rows whose texts have one key count once and stay together, so no text of test is in train in another spelling.

    Args:
        rows: the rows, in any order.
        text: the text columns.
        label: what to stratify by; None for a target that is not a class.
        split: the shares, and the most rows to keep.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[text_key(row, text)].append(row)
    ranked = sorted(groups, key=rank)
    if split.cap is not None:
        ranked = _first(ranked, groups, split.cap)
    strata: dict[Any, list[str]] = defaultdict(list)
    for key in ranked:
        strata[_stratum(groups[key][0], label)].append(key)
    place = {key: name for keys in strata.values() for key, name in zip(keys, _names(len(keys), split), strict=True)}
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for key in ranked:
        parts[place[key]].extend(sorted(groups[key], key=lambda row: [str(row[column]) for column in text]))
    return parts


def _stratum(row: Row, label: Stratum) -> Hashable:
    return label(row) if callable(label) else None if label is None else _hashable(row[label])


def _first(ranked: Sequence[str], groups: Mapping[str, Sequence[Row]], cap: int) -> list[str]:
    """The first keys that hold at most ``cap`` rows together."""
    total = list(itertools.accumulate(len(groups[key]) for key in ranked))
    return list(ranked[: bisect.bisect_right(total, cap)])


def _names(count: int, split: Split) -> list[str]:
    test = _share(count, split.test)
    validation = _share(count, split.validation)
    return ["test"] * test + ["validation"] * validation + ["train"] * (count - test - validation)


def _share(count: int, share: float) -> int:
    """At least one row of a class that has ``LEAST``, where the share is not zero."""
    exact = int(count * share + 0.5)
    return max(exact, 1) if share > 0 and count >= LEAST else exact


def _hashable(value: Any) -> Hashable:
    """A label of any kind as something sets can hold."""
    if isinstance(value, Mapping):
        return tuple((name, _hashable(entry)) for name, entry in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def overlap(splits: Mapping[str, Sequence[Row]], text: Sequence[str]) -> dict[str, int]:
    """For validation and test, how many rows have a text that an earlier split has too."""
    seen = {text_key(row, text) for row in splits["train"]}
    found = {}
    for name in ("validation", "test"):
        keys = [text_key(row, text) for row in splits[name]]
        found[name] = sum(key in seen for key in keys)
        seen.update(keys)
    return found
