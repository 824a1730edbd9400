"""The ways to compose, as data: what each makes of what a module returns, and under which names people look for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deltatune.injection.slot import How


@dataclass(frozen=True)
class Way:
    """One way to compose.

    Attributes:
        summary: what the members do, in a few words.
        formula: the new output, and what its letters are.
        called: the name it was published under; empty where it has none.
        source: where it was published.
    """

    summary: str
    formula: str
    called: str = ""
    source: str = ""


WAYS: dict[How, Way] = {
    "sequential": Way("One behind the other", "F_n(... F_1(f) ...)"),
    "parallel": Way("Side by side", "y + sum_i z_i"),
    "weighted": Way("Side by side, each with a weight that is given", "y + sum_i w_i z_i"),
    "gated": Way(
        "Side by side, with weights that are trained, token by token",
        "y + sum_i g_i(y) z_i with g(y) = sigmoid(y U + c); trains U: (width, members) and c: (members,) for each module.",
    ),
    "fusion": Way(
        "An attention over the members, trained token by token while they are frozen (Pfeiffer et al. 2021)",
        "y + sum_i s_i(y) z_i V with s(y) = softmax_i((y Q) . (z_i K)); trains Q, K, V: (width, width) for each module.",
        called="AdapterFusion",
        source="arXiv:2005.00247",
    ),
}


LETTERS = "With f the module, x its input, y = f(x), and z_i = F_i(f, x) - y what member i changes of it."
"""What the letters of the formulas stand for."""


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


_NAMES = {_letters(name): how for how, way in WAYS.items() for name in (how, way.called) if name}


def way_called(name: str) -> How | None:
    """The way that goes by this name, however it is spelt; None if there is none.

    >>> way_called("fusion"), way_called("adapter-fusion"), way_called("AdapterFusion"), way_called("lora")
    ('fusion', 'fusion', 'fusion', None)
    """
    return _NAMES.get(_letters(name))
