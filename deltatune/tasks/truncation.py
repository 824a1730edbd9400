"""How much of several texts is kept where not all fits: the longest is cut first, the shorter ones last."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def kept(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each is kept, so that the sum is at most ``room``: the longest are cut down to one level.

    >>> kept([10, 3, 8], 15)
    [6, 3, 6]
    >>> kept([2, 2], 9)
    [2, 2]
    """
    if sum(lengths) <= room:
        return list(lengths)
    if room <= 0:
        return [0] * len(lengths)
    level = bisect.bisect_right(range(max(lengths) + 1), room, key=lambda level: _within(lengths, level)) - 1
    spare = room - _within(lengths, level)
    found = [min(length, level) for length in lengths]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if spare and found[index] < lengths[index]:
            found[index] += 1
            spare -= 1
    return found


def _within(lengths: Sequence[int], level: int) -> int:
    return sum(min(length, level) for length in lengths)
