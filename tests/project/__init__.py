"""The rules the repository holds itself to: import cost, layers, sizes, packaging, and a README that runs."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "deltatune"
