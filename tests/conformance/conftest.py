"""Rules are asserted outside of test files, and explain themselves as if they were inside."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.conformance.rules", "tests.conformance.sitting")
