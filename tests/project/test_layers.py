"""Imports flow down the layers that `pyproject.toml` lists, and import-linter would notice one that does not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.project import PACKAGE, ROOT

LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(LINT, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False)


def test_imports_flow_down() -> None:
    finished = lint(ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "imports flow down KEPT" in finished.stdout


def test_an_import_upwards_breaks_the_contract(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "deltatune", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "deltatune" / "structure" / "site.py").open("a") as file:
        file.write("\nfrom deltatune.methods import kinds\n")
    finished = lint(tmp_path)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "deltatune.structure is not allowed to import deltatune.methods" in finished.stdout


def test_every_package_has_a_layer() -> None:
    [contract] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert contract["exhaustive"]
    named = {name.strip("() ") for layer in contract["layers"] for name in layer.split("|")}
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert packages <= named
