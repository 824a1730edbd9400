"""The guide and its continuation run from top to bottom and print what they say; its tables name every error."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import deltatune as dt
from deltatune import errors
from tests.models import MODELS
from tests.project import ROOT

PAGES = {name: ROOT / "docs" / f"{name}.md" for name in ("guide", "files", "routes", "data")}
TEXT = PAGES["guide"].read_text()
COMPARED = {"guide": 10, "files": 3, "routes": 4, "data": 3}
"""At least so many blocks of a page are compared with what the ones before them print."""


def printed(code: str, names: dict[str, Any], page: Path, line: int) -> str:
    """Run one block, its lines numbered as on the page; what it prints, without blanks at the ends of lines."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile("\n" * line + code, str(page), "exec"), names)
    return "\n".join(text.rstrip() for text in output.getvalue().strip().splitlines())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # TRL 1.16 under transformers 5.23
@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    text = PAGES[name].read_text()
    if "from trl import" in text:
        pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    compared = 0
    for place, (language, code) in enumerate(blocks):
        if language != "python":
            continue
        following = blocks[place + 1] if place + 1 < len(blocks) else ("", "")
        found = printed(code, names, PAGES[name], text[: text.index(code)].count("\n"))
        if following[0] == "text":
            assert found == following[1].strip()
            compared += 1
    assert compared == sum(language == "text" for language, _ in blocks) >= COMPARED[name]


def test_every_entry_of_where_in_the_guide_hits_something() -> None:
    table = TEXT.partition("| `where` | hits |")[2].partition("\n\n")[0]
    cells = [row.split(" | ")[0].removeprefix("| ") for row in table.strip().splitlines()[2:]]
    entries = [code.replace("\\|", "|") for cell in cells for code in re.findall(r"`(.+?)`", cell)]
    assert len(entries) == 7
    backbones = [MODELS[name]()[0] for name in ("bert", "t5", "opt")]
    for entry in entries:
        assert any(hits(backbone, eval(entry)) for backbone in backbones), entry


def hits(backbone: nn.Module, where: Any) -> int:
    try:
        return len(dt.find_sites(backbone, where))
    except errors.NoSite:
        return 0


def test_the_guide_names_every_error() -> None:
    kinds = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.DeltaError)}
    listed = re.findall(r"^\| `(\w+)` \| ", TEXT, re.MULTILINE)
    assert kinds - {"DeltaError"} <= set(listed)
    assert {name for name in listed if name[0].isupper()} <= kinds


def test_pages_stay_short_and_are_linked() -> None:
    for name, page in PAGES.items():
        assert len(page.read_text().splitlines()) <= 360
        assert f"({name}.md)" in (ROOT / "docs" / "index.md").read_text()
