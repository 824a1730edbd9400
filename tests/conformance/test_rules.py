"""Every rule on every cell: one test per cell, so that its rules share a backbone; each broken rule is named."""

from __future__ import annotations

import pytest

from tests.conformance.cells import TAKEN, Cell, over
from tests.conformance.rules import RULES
from tests.conformance.sitting import Rule, Sitting

CELLS_OF = {rule: frozenset(cells) for rule, cells in RULES.items()}


def rules_of(cell: Cell) -> list[Rule]:
    """The rules that a cell must keep, in order."""
    return [rule for rule, cells in CELLS_OF.items() if cell in cells]


@over(TAKEN)
def test_the_rules_hold(cell: Cell) -> None:
    sitting, broken = Sitting(cell), []
    sitting.fresh()
    for rule in rules_of(cell):
        try:
            rule(sitting)
        except (Exception, pytest.fail.Exception) as fault:
            fault.add_note(f"{cell} breaks the rule `{rule.__name__}` of {rule.__module__}")
            broken.append(fault)
            sitting.spoil()
    if len(broken) == 1:
        raise broken[0]
    if broken:
        raise BaseExceptionGroup(f"{cell} breaks {len(broken)} of {len(rules_of(cell))} rules", broken)
