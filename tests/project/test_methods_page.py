"""The page of measured methods: what it says of results made up for it, and that it is what the committed results say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from deltatune.methods import methods
from tests.project import ROOT

BENCHMARKS = ROOT / "benchmarks"
LABELS = {"bbc-news": "01234" * 6, "tweet-sentiment": "001122" * 5}


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name: str) -> Any:
    return importlib.import_module(name)


def marks(task: str, right: int) -> str:
    """So many right answers at the beginning."""
    return "1" * right + "0" * (len(LABELS[task]) - right)


def made_up(place: Path) -> Path:
    """Results of a few methods: a probe, LoRA with all seeds, SAID that says the same to all, IA3 of other defaults, a control."""
    runs = module("methods_runs")
    right: dict[str, dict[str, str]] = {task: {"linear-probe": marks(task, 15), "lora": marks(task, 30)} for task in LABELS}
    constant = "".join(str(int(label == "1")) for label in LABELS["tweet-sentiment"])
    right["tweet-sentiment"] |= {"said": constant, "frozen": marks("tweet-sentiment", 4), "ia3": marks("tweet-sentiment", 15)}
    right["bbc-news"] |= {"said": marks("bbc-news", 30), "frozen": marks("bbc-news", 3), "ia3": marks("bbc-news", 30)}
    for task, by in right.items():
        with (place / f"{task}.jsonl").open("w") as out:
            for name, answers in by.items():
                for seed in runs.SEEDS if name in ("lora", "linear-probe") else (21,):
                    told = {"method": name, "seed": seed, "steps": 0 if name == "frozen" else 200, "length": 32, "device": "CPU, 1 threads"}
                    run = told | runs.asked(name) | {"trained": 5, "total": 9, "file_bytes": 2000, "right": answers}
                    if name == "ia3":
                        run |= {"lr": 0.5}
                    if name in ("ia3", "lora"):
                        run |= {"answers": 3}
                    out.write(json.dumps(run) + "\n")
    ground = {"total": 1_000_000, "trained": dict.fromkeys(methods, 1925) | {"said": 25_000}, "labels": LABELS}
    (place / "ground.json").write_text(json.dumps(ground))
    cost = {"device": "CPU, 2 threads", "batch": 16, "tokens": 64, "rows": {"lora": {"step": 0.7, "memory": 0.5}}}
    (place / "cost.json").write_text(json.dumps(cost))
    return place


def test_what_the_page_says(tmp_path: Path) -> None:
    text = module("methods_page").page(made_up(tmp_path))
    assert "200 steps of 16 texts of up to 32 tokens, seeds 13, 21, 42, on CPU, 1 threads" in text
    assert "its head of 1,925 numbers included" in text and "on 16 texts of 64 tokens, CPU, 2 threads" in text
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert rows.keys() == set(methods)
    assert "| **1.000 ± 0.000** | **1.000 ± 0.000** | 0.193% | 2 kB | 0.70 | 0.50 |" in rows["lora"]
    assert "| **1.000** (1 seed) | 0.333 (1 seed, one answer) | 2.500% | 2 kB | - | - |" in rows["said"], "the share is what trained"
    assert "0.500 (1 seed, stale)" in rows["ia3"]
    missing = [line for line in text.splitlines() if line.startswith("- `")]
    assert [line.split("`")[1] for line in missing] == ["ia3", "said"]
    assert missing[1].endswith("tweet-sentiment 0.333 (1 seed, one answer), the probe 0.500."), "it is above on the other"
    assert "on one of the tasks: all but " in text and "## AdapterFusion" not in text


def test_fusion_beside_the_adapters_it_fuses(tmp_path: Path) -> None:
    place = made_up(tmp_path)
    rows = {
        "a adapter": {"score": 0.7, "seeds": [0.6, 0.8], "trained_parameters": 770},
        "fusion": {"score": 0.75, "seeds": [0.75], "trained_parameters": 9_000},
    }
    told = {"question": "Fusion of 1 on b", "sources": {"a": 0.9}, "target": rows, "best_single": "a adapter", "gain": 0.05, "steps": 3}
    (place / "adapter_fusion.json").write_text(json.dumps(told))
    text = module("methods_page").page(place)
    assert "| a adapter, the best single one | 0.700 | 0.600, 0.800 | 770 |" in text and "| fusion | 0.750 | 0.750 | 9,000 |" in text
    assert "with their scores on their own tasks: a 0.900. Fusion less the best single adapter: +0.0500." in text


def test_what_is_packaged(tmp_path: Path) -> None:
    row = module("methods_page").packaged(made_up(tmp_path))["rows"]["said"]
    assert row["settings"] == ""
    assert (row["share"], row["collapsed"], row["scores"]["tweet-sentiment"]) == (0.025, {"tweet-sentiment": (1, 1)}, (0.3333, None))


def test_a_run_of_other_defaults_is_stale_and_results_are_incomplete_until_it_is_done_again(tmp_path: Path) -> None:
    runs = module("methods_runs")
    place = made_up(tmp_path)
    by = runs.runs_of("bbc-news", place)
    assert not runs.is_stale(by["lora"][0]) and runs.is_stale(by["ia3"][0])
    assert runs.is_stale({name: value for name, value in by["lora"][0].items() if name not in ("lr", "fields")}), "it does not say"
    again = by["ia3"][0] | runs.asked("ia3") | {"right": marks("bbc-news", 29)}
    with (place / "bbc-news.jsonl").open("a") as out:
        out.write(json.dumps(again) + "\n")
    assert runs.runs_of("bbc-news", place)["ia3"] == [again]
    assert not runs.is_complete(place), "methods without a run"


def test_the_ground_names_every_method_and_its_truth() -> None:
    ground = module("methods_runs").read("ground")
    assert ground["trained"].keys() == set(methods), "run benchmarks/methods.py page"
    assert ground["trained"]["frozen"] == 0 and ground["trained"]["linear-probe"] == 5 * (384 + 1)
    assert ground["trained"]["full"] == ground["total"]
    for task, labels in ground["labels"].items():
        for name, by in module("methods_runs").runs_of(task).items():
            assert {len(run["right"]) for run in by} == {len(labels)}, f"{name} was scored on other rows of {task}"


def test_the_page_is_what_the_committed_results_say() -> None:
    runs, page = module("methods_runs"), module("methods_page")
    if not page.PAGE.exists():
        assert not runs.is_complete(), "every method is measured: run benchmarks/methods.py page"
        assert not page.PACKAGED.exists()
        return
    assert runs.is_complete(), "a method lacks runs: run benchmarks/methods.py train"
    found = page.scores()
    assert not [(task, name) for task, by in found.items() for name, score in by.items() if score.stale], "run benchmarks/methods.py train"
    below = [name for name in methods if methods[name].family != "baseline" and not page.learns(name, found)]
    assert set(below) <= set(page.REASONS), "what keeps them below the probe, and which setting does not?"
    for file, text in page.written().items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name} is of another time: run benchmarks/methods.py page"


def test_the_index_leads_to_the_page_once_there_is_one() -> None:
    assert ("](methods.md)" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")) == module("methods_page").PAGE.exists()


def test_a_sweep_of_rates_goes_on_where_it_was_stopped_for_each_task_and_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = module("learning_rates")
    lines = [
        {"method": "said", "lr": 1e-2, "loss": 0.9, "accuracy": 0.7},  # of the first sweep: BBC News, 100 steps
        {"task": "tweet-sentiment", "steps": 200, "method": "said", "lr": 1e-2, "loss": 1.1, "accuracy": 0.4, "answers": 1},
    ]
    monkeypatch.setattr(sweeps, "RUNS", tmp_path / "rates.jsonl")
    sweeps.RUNS.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def trial(name: str, lr: float, data: Any, steps: int) -> dict[str, Any]:
        return {"method": name, "lr": lr, "loss": abs(lr - 1e-2), "accuracy": 0.5, "answers": 3}

    monkeypatch.setattr(sweeps, "trial", trial)
    first, second = sweeps.Sweep("said", "bbc-news", 100), sweeps.Sweep("said", "tweet-sentiment", 200)
    assert first.losses() == {1e-2: 0.9}
    assert second.row()["one answer"] == [1e-2]
    other = sweeps.Sweep("said", "tweet-sentiment", 100)
    other.go(None)
    assert other.row()["best"] in other.losses() and len(other.losses()) >= 3
    before = sweeps.RUNS.read_text()
    other.go(None)
    assert sweeps.RUNS.read_text() == before
    assert (len(first.losses()), len(second.losses())) == (1, 1)
