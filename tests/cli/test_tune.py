"""``deltatune tune``, ``predict`` and ``eval``: the main job on a tiny backbone."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

import deltatune as dt
from deltatune.methods import BitFit, LoRA
from deltatune.training.run import read_run
from deltatune.training.settings import Settings
from tests.cli.conftest import Call, refused, tune_words, write_texts
from tests.project import ROOT
from tests.training.tiny import LABELS

LINE = {"score", "metric", "trainable_parameters", "total_parameters", "seconds", "delta_bytes", "out"}


def test_json_ends_with_the_line_programs_read(call: Call, encoder: str, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = call(*tune_words(encoder, texts, out, "--set", "rank=2", "--seed", 3, "--json"))
    assert done.code == 0, done.err
    numbers = json.loads(done.out.splitlines()[-1])
    assert numbers.keys() >= LINE
    assert numbers["metric"] == "accuracy"
    assert 0 <= numbers["score"] <= 1
    assert 0 < numbers["trainable_parameters"] < numbers["total_parameters"]
    assert numbers["out"] == str(out)
    assert {"delta", "metrics.json", "curve.png", "run.yaml"} <= {entry.name for entry in out.iterdir()}
    written = yaml.safe_load((out / "run.yaml").read_text())
    assert (written["method"]["rank"], written["settings"]["seed"], written["settings"]["max_steps"]) == (2, 3, 4)


def test_a_configuration_is_replayed_and_changed(call: Call, finished: Path, tmp_path: Path) -> None:
    again = call("tune", "--config", finished / "run.yaml", "--out", tmp_path / "again", "--json")
    assert again.code == 0, again.err
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, tmp_path / "again"))
    assert [entry.get("loss") for entry in second["history"]] == [entry.get("loss") for entry in first["history"]]
    changed = call("tune", "--config", finished, "--set", "rank=3", "--batch-size", 4, "--out", tmp_path / "changed", "--json")
    assert changed.code == 0, changed.err
    written = yaml.safe_load((tmp_path / "changed" / "run.yaml").read_text())
    assert (written["method"]["name"], written["method"]["rank"], written["settings"]["batch_size"]) == ("lora", 3, 4)


def test_a_list_of_methods_comes_from_a_configuration(call: Call, encoder: str, texts: Path, tmp_path: Path) -> None:
    methods: list[object] = [{"name": "lora", "rank": 2}, "bitfit"]
    data = {"path": str(texts), "text": "headline", "label": "topic"}
    settings = {"max_steps": 2, "batch_size": 4, "evaluations": 0}
    file, out = tmp_path / "several.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump({"backbone": encoder, "data": data, "method": methods, "settings": settings}))
    refused(call("tune", "--config", file, "--set", "rank=3", "--out", out), "`--set` does not say which of the configuration's methods")
    done = call("tune", "--config", file, "--out", out, "--json")
    assert done.code == 0, done.err
    assert "to train lora rank=2 and bitfit into" in done.err
    assert read_run(out).methods == (LoRA(rank=2), BitFit())
    held = dt.open(out)[2]
    assert isinstance(held, dt.Composition) and [delta.method for delta in held.deltas] == [LoRA(rank=2), BitFit()]
    assert call("predict", out, "goal for the team").code == 0


def test_the_end_for_people(call: Call, encoder: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = tune_words(encoder, texts, tmp_path / "unused")
    del words[words.index("--out") : words.index("--out") + 2]
    for number, folder in enumerate(("headlines-lora-bert", "headlines-lora-bert-2")):
        done = call(*words, "--seed", number)
        assert done.code == 0, done.err
        assert f"runs/{folder}" in done.out
        assert "test score" in done.out and "accuracy" in done.out
        assert (tmp_path / "runs" / folder / "metrics.json").is_file()


def test_every_setting_has_an_option(call: Call) -> None:
    shown = call("tune", "--help").out
    missing = [field.name for field in dataclasses.fields(Settings) if f"--{field.name.replace('_', '-')} " not in shown]
    assert missing == []


def test_early_stopping_may_stand_alone(call: Call, encoder: str, texts: Path, tmp_path: Path) -> None:
    done = call(*tune_words(encoder, texts, tmp_path / "run", "--early-stopping", "--json"))
    assert done.code == 0, done.err
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["settings"]["early_stopping"] == 2


def test_where_and_layers_reach_the_delta(call: Call, encoder: str, texts: Path, tmp_path: Path) -> None:
    more = ("--where", "attention.key", "--where", "feed_forward.up", "--layers", "top:1", "--json")
    done = call(*tune_words(encoder, texts, tmp_path / "run", *more))
    assert done.code == 0, done.err
    held = json.loads(call("inspect", tmp_path / "run", "--json").out)
    assert len(held["sites"]) == 2
    assert all(".1." in site for site in held["sites"])


def test_predict_takes_arguments_and_lines(call: Call, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = call("predict", finished, "goal for the team", "bank with profit", "--json")
    assert given.code == 0, given.err
    said = json.loads(given.out)
    assert [entry["text"] for entry in said] == ["goal for the team", "bank with profit"]
    assert all(entry["label"] in LABELS and abs(sum(entry["scores"].values()) - 1) < 1e-5 for entry in said)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"goal for the team\nbank with profit\n")))
    assert json.loads(call("predict", finished, "--json").out) == said
    shown = call("predict", finished, "goal for the team")
    assert said[0]["label"] in shown.out
    assert re.fullmatch(r"Loading lora and its backbone \S+, to label 1 text.\n", shown.err)


def test_eval_gives_the_score_of_the_training(call: Call, finished: Path) -> None:
    done = call("eval", finished, "--json")
    assert done.code == 0, done.err
    numbers, before = json.loads(done.out), json.loads((finished / "metrics.json").read_text())
    assert numbers["score"] == pytest.approx(before["score"])
    assert numbers["metrics"] == pytest.approx(before["metrics"])
    assert numbers["data_changed"] is False
    shown = call("eval", finished)
    assert "when trained" in shown.out
    assert re.fullmatch(r"Loading lora and its backbone \S+, to score the 12 test rows of headlines.\n", shown.err)


def test_eval_tells_that_the_rows_are_others(call: Call, encoder: str, tmp_path: Path) -> None:
    rows = write_texts(tmp_path / "headlines.csv")
    assert call(*tune_words(encoder, rows, tmp_path / "run")).code == 0
    with rows.open("a") as file:
        file.write("the goal of the whole team,sport\n")
    assert json.loads(call("eval", tmp_path / "run", "--json").out)["data_changed"] is True
    shown = call("eval", tmp_path / "run")
    assert shown.code == 0 and "are not those of the training" in shown.err


def test_inspect_shows_a_delta_folder(call: Call, finished: Path, encoder: str) -> None:
    held = json.loads(call("inspect", finished, "--json").out)
    assert (held["method"], held["backbone"], held["task"], held["labels"]) == ("lora", encoder, "headlines", sorted(LABELS))
    shown = call("inspect", finished / "delta")
    assert shown.code == 0, shown.err
    assert shown.out.startswith("lora  with its defaults\n") and "attention.self.query" in shown.out


def test_a_pair_needs_both_texts(call: Call, finished: Path) -> None:
    refused(call("tune", "--text", "a", "--backbone", "x", "--task", "y", "--method", "lora"), "`--text`", "--data FILE")


def _interrupted(begun: subprocess.Popen[str]) -> str:
    """What it says on its way out. Python drops an interrupt that comes within a destructor: one presses the key again."""
    for _ in range(6):
        begun.send_signal(signal.SIGINT)
        try:
            return begun.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("six interrupts did not stop the run")


def test_the_keyboard_stops_a_run_that_can_go_on(encoder: str, texts: Path, tmp_path: Path) -> None:
    words = tune_words(encoder, texts, tmp_path / "run", "--max-steps", 100_000, "--save-steps", 2, "--evaluations", 0)
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would their children
    begun = subprocess.Popen(
        [sys.executable, "-m", "deltatune.cli.main", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    try:
        for _ in range(3000):  # a loaded machine takes long to begin
            if any((tmp_path / "run").glob("checkpoints/*/complete.json")) or begun.poll() is not None:
                break
            time.sleep(0.1)
        err = _interrupted(begun)
    finally:
        begun.kill()
    assert begun.returncode == 130, err
    assert "Traceback" not in err
    assert f"--out {tmp_path / 'run'} goes on from the last checkpoint" in err
    assert err.endswith("Stopped.\n")
