"""The mirror of real datasets, for tests that train on it."""

from __future__ import annotations

from tests.tasks.conftest import mirror as mirror
from tests.tasks.conftest import mirror_folder as mirror_folder
