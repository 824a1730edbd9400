"""What the documentation says can be typed: its Python compiles, its verbs and console script exist, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.project import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text()
VERBS = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page.read_text(), "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_verbs_exist(page: Path) -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE))
    assert named <= VERBS


def test_the_readme_shows_the_main_job() -> None:
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE))
    assert len(blocks(README, "python")) >= 2
    assert any("deltatune tune --backbone minilm --task bbc-news --method lora" in block for block in blocks(README, "sh"))


@pytest.mark.parametrize("table", ["demo", "bbc"])
def test_the_readme_has_a_place_for_each_measured_table(table: str) -> None:
    assert README.count(f"<!-- table:{table} -->") == 1
    assert README.count(f"<!-- /table:{table} -->") == 1
    assert README.index(f"<!-- table:{table} -->") < README.index(f"<!-- /table:{table} -->")


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    assert [page.name for page in folder.glob("0*.md") if f"({page.name})" not in index] == []
