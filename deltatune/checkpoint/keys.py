"""Lists of keys as ``delta.json`` writes them: those that differ only in numbers are one entry, ``layer.{0..5}.query``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

MAX_KEYS = 2**20
"""How many keys one list may stand for."""

MAX_LETTERS = 2**26
"""How long they may be in all: a long key with a wide range in it would fill any memory."""

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_PIECE = re.compile(r"\{\{|\}\}|\{([0-9.,]*)\}|[{}]")

Box = tuple[tuple[int, ...], ...]
"""Numbers for each numeric part of a key; it stands for their product."""


def fold(keys: Iterable[str]) -> tuple[str, ...]:
    """The same set of keys, shorter, in an order of its own; braces that belong to a key are doubled.

    >>> fold(["layer.0.query", "layer.1.query", "layer.3.query", "head"])
    ('head', 'layer.{0..1,3}.query')
    """
    groups: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for key in keys:
        words = key.split(".")
        form = tuple("" if _NUMBER.fullmatch(word) else word.replace("{", "{{").replace("}", "}}") or "\0" for word in words)
        groups.setdefault(form, set()).add(tuple(int(word) for word in words if _NUMBER.fullmatch(word)))
    return tuple(sorted(_written(form, box) for form, points in groups.items() for box in _boxes(points)))


def unfold(patterns: Sequence[str]) -> tuple[str, ...]:
    """The keys that folded ones stand for, in natural order.

    Raises:
        ValueError: a brace is malformed, or they are too many or too long.

    >>> unfold(["layer.{0..1,3}.query", "head"])
    ('head', 'layer.0.query', 'layer.1.query', 'layer.3.query')
    """
    found: dict[str, None] = {}
    letters = 0
    for pattern in patterns:
        parts = list(_parts(pattern))
        size = 1
        for part in parts:
            size *= len(part)
        if size + len(found) > MAX_KEYS:
            raise ValueError(f"`{pattern[:80]}` stands for more than {MAX_KEYS:,} keys")
        letters += size * sum(max(map(len, part), default=0) for part in parts)
        if letters > MAX_LETTERS:
            raise ValueError(f"`{pattern[:80]}` stands for more than {MAX_LETTERS:,} letters")
        found |= dict.fromkeys("".join(words) for words in product(*parts))
    return tuple(sorted(found, key=_natural))


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Numbers by value, ahead of words."""
    return [(0, int(word), "") if _NUMBER.fullmatch(word) else (1, 0, word) for word in re.split(r"[.:]", key)]


def _boxes(points: set[tuple[int, ...]]) -> list[Box]:
    """Few boxes that cover exactly these points: one axis after the other is folded where all others agree."""
    boxes: list[Box] = [tuple((number,) for number in point) for point in sorted(points)]
    for axis in range(len(boxes[0])):
        alike: dict[Box, list[int]] = {}
        for box in boxes:
            alike.setdefault((*box[:axis], (), *box[axis + 1 :]), []).extend(box[axis])
        boxes = [(*rest[:axis], tuple(sorted(numbers)), *rest[axis + 1 :]) for rest, numbers in alike.items()]
    return boxes


def _written(form: tuple[str, ...], box: Box) -> str:
    numbers = iter(box)
    return ".".join(_numbers(next(numbers)) if word == "" else word.replace("\0", "") for word in form)


def _numbers(numbers: tuple[int, ...]) -> str:
    """``3`` for one, ``{0..2,5}`` for more."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs) + "}"


def _parts(pattern: str) -> Iterator[Sequence[str]]:
    """What may stand at each place of a folded key."""
    end = 0
    for piece in _PIECE.finditer(pattern):
        yield (pattern[end : piece.start()],)
        end = piece.end()
        if piece.group() in ("{{", "}}"):
            yield (piece.group()[0],)
        elif piece.group(1) is None:
            raise ValueError(f"`{pattern[:80]}` has a brace without its partner")
        else:
            yield tuple(map(str, _ranges(piece.group(1), pattern)))
    yield (pattern[end:],)


def _ranges(text: str, pattern: str) -> list[int]:
    numbers: list[int] = []
    for run in text.split(","):
        first, dots, last = run.partition("..")
        last = last if dots else first
        if not (_NUMBER.fullmatch(first) and _NUMBER.fullmatch(last)) or int(last) < int(first) or int(last) - int(first) >= MAX_KEYS:
            raise ValueError(f"`{pattern[:80]}` has the range `{run[:40]}`, which is none")
        numbers.extend(range(int(first), int(last) + 1))
        if len(numbers) > MAX_KEYS:
            raise ValueError(f"`{pattern[:80]}` stands for more than {MAX_KEYS:,} keys")
    return numbers
