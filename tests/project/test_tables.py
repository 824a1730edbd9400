"""The README's measured tables are what the committed results say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme_tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run benchmarks/readme_tables.py"
    for name in tables.TABLES:
        assert (ROOT / "benchmarks" / "results" / f"{name}.json").exists()
        assert f"<!-- table:{name} -->\n| method |" in text
