"""``make bench``: what became worse is told, quick results leave the others, and the page is what the committed results give."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.project import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name: str) -> Any:
    return importlib.import_module(name)


def made_up(ours: float, s1: float) -> Any:
    """A step and a routed batch with these figures."""
    milliseconds = {"floor": 100.0, "ours": 100 * ours, "peft": 130.0}
    results = {
        "step": {"minilm": {"ours / floor": ours, "peft / floor": 1.3, "milliseconds": milliseconds}, "machine": {"threads": 2}},
        "many": {"S": {"S1": s1}, "machine": {"threads": 2, "cores": 2, "processor": "P", "memory_gb": 8, "peft": "1.2"}},
    }
    return results.get


def test_worse_is_beyond_the_noise_band_in_the_figures_own_direction() -> None:
    worse = module("bench_figures").worse
    assert worse(made_up(1.1, 4.0), made_up(1.1, 4.0)) == []
    assert worse(made_up(1.2, 3.2), made_up(1.1, 4.0)) == [], "within the bands"
    [slower] = worse(made_up(1.3, 9.0), made_up(1.1, 4.0))
    assert slower == "MiniLM: ours / floor: 1.3, was 1.1; its noise band is 12%."
    [less] = worse(made_up(0.9, 2.9), made_up(1.1, 4.0))
    assert less.startswith("S, 32 deltas decoding: PEFT's mixed batch / ours: 2.9, was 4")
    assert worse(made_up(9.0, 0.1), {}.get) == [], "what never was committed cannot be worse"


def test_what_the_page_says_of_made_up_results() -> None:
    text = module("bench_page").page(made_up(1.05, 3.0))
    assert "| MiniLM: ours / floor | **1.05** | <= 1.1 | 12% |" in text
    assert "| S, 32 deltas decoding: PEFT's mixed batch / ours | 3.00 | >= 4 | 25% |" in text, "below its bar, so not bold"
    assert "- `step`: two cores of a shared machine; 2 threads, PEFT" in text and "as pinned" in text
    assert "- `many`: 2 cores of P, 8 GB; PEFT 1.2, 2 threads" in text
    assert "| minilm | 100 | 105 | 130 |" in text
    assert "## Estimates before a run" not in text and "Many jobs trained together" not in text


def test_quick_results_leave_what_they_do_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = module("bench")
    script, results = tmp_path / "quick.py", tmp_path / "results"
    script.write_text("import json; print(json.dumps({'S': {'S1': 5.0}}))")
    results.mkdir()
    (results / "quick.json").write_text(json.dumps({"S": {"S1": 4.0, "S6": 1.0}, "M": {"S2": 2.0}}))
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "RESULTS", results)
    monkeypatch.setattr(bench, "result", lambda name: json.loads((results / f"{name}.json").read_text()))
    assert bench.run(bench.Script("quick", seconds=1), left=60.0) == ""
    assert json.loads((results / "quick.json").read_text()) == {"S": {"S1": 5.0, "S6": 1.0}, "M": {"S2": 2.0}}
    assert "was left out" in bench.run(bench.Script("quick", seconds=100), left=60.0)
    script.write_text("import time; time.sleep(60)")
    assert "did not end" in bench.run(bench.Script("quick", seconds=0), left=0.3)
    script.write_text("raise SystemExit(3)")
    assert "failed" in bench.run(bench.Script("quick", seconds=1), left=60.0)
    assert json.loads((results / "quick.json").read_text())["S"]["S1"] == 5.0


def test_the_set_takes_at_most_twenty_minutes_and_its_scripts_are_there() -> None:
    bench = module("bench")
    assert sum(script.seconds for script in bench.SCRIPTS) <= bench.LIMIT == 1200
    for script in bench.SCRIPTS:
        text = (BENCHMARKS / f"{script.name}.py").read_text()
        flags = [word for word in script.arguments if word.startswith("--")]
        assert [flag for flag in flags if f'"{flag}"' not in text] == []
    assert "benchmarks/bench.py" in (ROOT / "Makefile").read_text()


def test_every_figure_lies_in_its_committed_result() -> None:
    figures = module("bench_figures")
    there = [figure for figure in figures.FIGURES if figures.result(figure.result) is not None]
    assert len(there) >= 30
    assert [figure.name for figure in there if figure.value(figures.result) is None] == []
    assert len({figure.says for figure in figures.FIGURES}) == len(figures.FIGURES)
    assert all(0 < figure.band <= 1 for figure in figures.FIGURES)


def test_the_page_is_what_the_committed_results_give() -> None:
    page = module("bench_page")
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run benchmarks/bench.py page"
    names = set(re.findall(r"\(benchmarks/(\w+)\.svg\)", page.page()))
    assert names == {file.stem for file in page.PICTURES.glob("*.svg")} != set()


def test_the_pictures_are_what_the_committed_results_give() -> None:
    pinned = re.search(r"^matplotlib==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    if version("matplotlib") != pinned[1]:
        pytest.skip(f"matplotlib {version('matplotlib')} draws letters in its own way; the pictures are of {pinned[1]}")
    page = module("bench_page")
    for file, text in page.written().items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name} is of another time: run benchmarks/bench.py page"


def test_estimates_lie_within_their_bar() -> None:
    found = json.loads((BENCHMARKS / "results" / "estimates.json").read_text())
    lines = found["configurations"]
    assert lines
    far = {
        name: line["predicted / found"] for name, line in lines.items() if abs(line["predicted / found"]["live_bytes"] - 1) > found["bar"]
    }
    assert far == {}


def test_help_is_shown_without_measuring() -> None:
    done = subprocess.run([sys.executable, "bench.py", "--help"], cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "at most 20 minutes" in done.stdout
