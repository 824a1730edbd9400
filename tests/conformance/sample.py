"""Which cells stand for the whole matrix in the tests that cost too much to run on all of it.

Every pair of a method and a sort of architecture, and of a way of acting and an architecture, comes up in one of them;
a test that costs very much says what it crosses instead. Of the cells that would do, one is chosen whose method and
architecture have come up least.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import product

from deltatune.methods import kinds
from deltatune.methods.kinds import Patch
from tests.conformance.cells import TAKEN, Cell
from tests.models import SORTS

ACTS = tuple(kind for kind in vars(kinds).values() if isinstance(kind, type) and issubclass(kind, Patch) and kind is not Patch)
"""The abstract patches: the ways of acting."""
SORT_OF = {build.__name__: sort for sort, builds in SORTS.items() for build in builds}
_PROBED = ("bert", "llama", "t5", "mlp")


@cache
def acts_of(method: str) -> frozenset[type[Patch]]:
    """How a method acts, as those of ``ACTS`` that its patches are on the first of a few models that takes it."""
    for cell in [cell for model in _PROBED for cell in TAKEN if cell == Cell(method, model)]:
        backbone, _ = cell.fresh()
        try:
            patches = cell.attach(backbone, head=False).patches
        except Exception:  # whatever is wrong with a method is for the tests of its cells to say, not for their collection
            continue
        return frozenset(act for patch in patches for act in type(patch).__mro__ if act in ACTS)
    return frozenset()


def representatives(model: str) -> dict[type[Patch], str]:
    """For each way of acting the first method that acts so, and if possible in no other way, on an architecture."""
    taken = [cell.method for cell in TAKEN if cell.model == model]
    found = {}
    for act in ACTS:
        acting = [method for method in taken if act in acts_of(method)]
        if acting:
            found[act] = min(acting, key=lambda method: len(acts_of(method)))
    return found


def pairwise(cells: Iterable[Cell], *crossings: tuple[str, ...]) -> list[Cell]:
    """Cells in which everything meets everything that the crossings name, where one of ``cells`` lets it.

    Args:
        cells: to choose from.
        crossings: each of one or more of ``method``, ``model``, ``sort`` and ``act``; left out, every method meets every
            sort of architecture, and every architecture every way of acting.
    """
    cells = list(cells)
    wishes: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Cell]] = {}
    for cell in cells:
        own = {"method": [cell.method], "model": [cell.model], "sort": [SORT_OF[cell.model]]}
        own["act"] = [act.__name__ for act in ACTS if act in acts_of(cell.method)]  # a set has another order in each process
        for crossing in crossings or (("method", "sort"), ("act", "model")):
            for met in product(*(own[what] for what in crossing)):
                wishes.setdefault((crossing, met), []).append(cell)
    used: Counter[str] = Counter()
    chosen: set[Cell] = set()
    for candidates in wishes.values():
        if chosen.isdisjoint(candidates):
            cell = min(candidates, key=lambda cell: used[cell.method] + used[cell.model])
            used.update((cell.method, cell.model))
            chosen.add(cell)
    return [cell for cell in cells if cell in chosen]
