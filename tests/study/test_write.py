"""Open generations: how varied they are, and the judges that hold deltas against fine-tuned models of equal score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import InvalidValue, UnknownName
from deltatune.study.diversity import distinct, self_bleu
from deltatune.study.experiments import experiments
from deltatune.study.experiments.diversity import FROZEN, FT, ON, RING, pairs
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.procedures import procedures
from deltatune.study.procedures import write as module
from deltatune.study.trial import Trial
from deltatune.training.run import DataFile, Run, load_data, method_from_dict
from deltatune.training.settings import Settings
from tests.cli.conftest import write_texts
from tests.study.made_up_numbers import evidence, record
from tests.training.tiny import data, folder


def test_measures() -> None:
    assert distinct([[1, 1, 1, 1]], 1) == 0.25 and distinct([[1, 2], [1, 2]], 2) == 0.5 and distinct([[1]], 2) == 0.0
    same, unlike = ["the bank of the league"] * 3, ["a goal for the team", "shares rise at noon", "profit by trade with them"]
    assert self_bleu(same) == pytest.approx(1.0) and self_bleu(unlike) < 0.3 and self_bleu(["alone"]) == 0.0


def trial(place: Path, backbone: str = "llama", **options: Any) -> Trial:
    texts = DataFile(str(write_texts(place / "headlines.csv", 90)), text="headline", label="topic")
    run = Run(
        folder(backbone, place), texts, (method_from_dict({"name": "lora", "rank": 2}),), settings=Settings(max_steps=2, batch_size=8)
    )
    return Trial(run, "lora", "write", options={"prompts": "bbc-news", "rows": 5, "words": 3, "tokens": 7, **options})


def test_what_was_trained_goes_on_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_data", lambda task: data() if task == "bbc-news" else load_data(task))
    drawn: list[Any] = []
    original = module.written
    monkeypatch.setattr(module, "written", lambda *args: drawn.append(original(*args)) or drawn[-1])
    outcome = procedures["write"](trial(tmp_path), tmp_path / "t")
    [(tokens, texts)] = drawn
    assert [len(one) for one in tokens] == [7] * 5  # no end ahead of time
    told = outcome.numbers["written"]
    assert told["texts"] == 5 and told["shown"] == texts[:3] and 0 < told["distinct-1"] <= told["distinct-2"] <= 1
    assert outcome.numbers["score"] is not None
    assert procedures["write"](trial(tmp_path), tmp_path / "t").numbers == outcome.numbers  # drawn the same way again
    assert all(len(text.split()) <= 3 for text in module.openings(module.Writing("bbc-news", 5, 3)))


def test_what_cannot_write(tmp_path: Path) -> None:
    for options in ({"tokens": 0}, {"prompts": 3}, {"sentences": 2}):
        with pytest.raises(InvalidValue, match="It wants `prompts`, the name of a task"):
            module.writing(trial(tmp_path, **options))
    with pytest.raises(InvalidValue, match="cannot write: it wants a decoder"):
        module.writing(trial(tmp_path, "bert"))
    with pytest.raises(UnknownName):
        module.writing(trial(tmp_path, prompts="no-such"))


FULL = experiments["diversity"].study("full")


def varied(delta: float, full: float, backbone: float = 0.9, score: float = 0.8, tasks: int = 6) -> Evidence:
    """Distinct pairs of tokens of deltas, of fine-tuned models that score 0.8, and of the backbone."""
    found = []
    for number, task in enumerate(RING[:tasks]):
        for method in (FT, *ON, FROZEN):
            value = {FT: full, FROZEN: backbone}.get(method, delta) + 0.001 * number * (method in ON)
            own = {FT: 0.8, FROZEN: 0.3}.get(method, score)
            for steps, less in ((60, 0.5), (120, 0.0)):
                numbers = {"written": {"distinct-1": value, "distinct-2": value, "self-bleu": 1 - value}}
                found.append(record(method, task, own - less * (method != FROZEN), cell={"max_steps": steps}, numbers=numbers))
    return evidence(FULL, found)


def test_diversity_is_judged() -> None:
    def verdicts(found: Evidence) -> list[str]:
        return [claim.judge(found).verdict for claim in experiments["diversity"].claims]

    assert verdicts(varied(0.85, 0.6)) == ["holds"] * 3
    assert verdicts(varied(0.5, 0.8)) == ["does not hold"] * 3
    assert verdicts(varied(0.85, 0.6, tasks=4)) == ["undecided"] * 3
    assert verdicts(varied(0.85, 0.6, score=0.7)) == ["undecided"] * 3  # no two of equal score


def test_pairs_have_equal_scores_and_learnt_something() -> None:
    found = pairs(varied(0.85, 0.6, score=0.78))
    assert len(found) == len(RING) * len(ON)
    assert all(pair.delta.cell == pair.full.cell == {"max_steps": 120} for pair in found)
