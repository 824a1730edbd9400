from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deltatune.tasks.truncation import kept


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(-2, 80))
def test_the_longest_is_cut_first(lengths: list[int], room: int) -> None:
    found = kept(lengths, room)
    assert sum(found) == min(sum(lengths), max(room, 0))
    assert all(0 <= here <= there for here, there in zip(found, lengths, strict=True))
    cut = [here for here, there in zip(found, lengths, strict=True) if here < there]
    whole = [here for here, there in zip(found, lengths, strict=True) if here == there]
    assert not cut or max(cut) - min(cut) <= 1
    assert not cut or max(whole, default=0) <= max(cut) or max(whole) - min(cut) <= 1
