"""Write the README's measured tables from ``benchmarks/results``; a table holds only what a committed command produced.

.venv/bin/deltatune demo --json | tail -n 1 > benchmarks/results/demo.json
.venv/bin/python benchmarks/bbc.py > benchmarks/results/bbc.json
.venv/bin/python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from deltatune.cli.terminal import share, size

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def demo_table(found: dict[str, Any]) -> str:
    """The closing table of ``make demo``."""
    lines = ["| method | test accuracy | trained | share | per step | peak memory | on disk |", "|---|--:|--:|--:|--:|--:|--:|"]
    for row in found["rows"]:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        sizes = f"{size(row['peak_memory_bytes'])} | {size(row['disk_bytes'])}"
        lines.append(
            f"| {row['method']} | {accuracy} | {row['trained']:,} | {share(row['share'], 1)} | {row['seconds_per_step']:.2f} s | {sizes} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"The whole demo took {found['seconds']:.0f} s on two cores with nothing else running; other work on them makes it longer.",
        ]
    )


def bbc_table(found: dict[str, Any]) -> str:
    """Accuracy over three seeds, and the difference."""
    lines = ["| method | test accuracy | std | trained | share | on disk |", "|---|--:|--:|--:|--:|--:|"]
    for name, row in found["rows"].items():
        lines.append(
            f"| {name} | {row['accuracy']:.4f} | {row['std']:.4f} | {row['trained_parameters']:,} | {share(row['share'], 1)} "
            f"| {size(row['delta_bytes'])} |"
        )
    low, high = found["lora_minus_full"]["interval95"]
    difference = (
        f"LoRA minus full fine-tuning: {found['lora_minus_full']['mean']:+.4f}, paired bootstrap 95% interval [{low:+.4f}, {high:+.4f}]."
    )
    return "\n".join([*lines, "", difference])


TABLES = {"demo": demo_table, "bbc": bbc_table}


def filled(text: str, results: Path = HERE / "results") -> str:
    """The README with every table whose result is committed."""
    for name, table in TABLES.items():
        source = results / f"{name}.json"
        if source.exists():
            body = table(json.loads(source.read_text(encoding="utf-8")))
            opening, closing = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
            text = re.sub(f"{opening}.*?{closing}", lambda _, o=opening, b=body, c=closing: f"{o}\n{b}\n{c}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
