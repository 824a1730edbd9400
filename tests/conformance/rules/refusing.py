"""Rule 5: nothing matches silently."""

from __future__ import annotations

import pytest

from deltatune.errors import NoSite
from tests.conformance.cells import NO_ROLES
from tests.conformance.sitting import Sitting
from tests.conformance.trace import trace


def an_entry_that_hits_nothing_is_an_error(sitting: Sitting) -> None:
    """One among others that do; the error names it, and nothing is changed."""
    sitting.fresh()
    method = sitting.cell.recipe
    before = trace(sitting.backbone)
    where = NO_ROLES.get(sitting.cell.model) or list(type(method).where)
    with pytest.raises(NoSite, match=r"`attention\.qurey`.*(find_sites|inspect)"):
        sitting.cell.attach(sitting.backbone, where=[*([where] if isinstance(where, str) else where), "attention.qurey"], name="second")
    assert sitting.changes(before) == []
