"""Reading comprehension, templates, and answers in words: what the experiments make of made-up scores."""

from __future__ import annotations

import pytest

from deltatune.study.experiments import experiments, templates
from deltatune.study.experiments.basis import AP, BF, FT, LR, PF, PROBE, PT
from deltatune.study.experiments.combination import GLUE, PARTS
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.experiments.generalization import BARE
from deltatune.study.experiments.reading import SPANS
from deltatune.study.experiments.text_to_text import TASKS
from deltatune.study.report.comparison import comparison, form_of
from deltatune.tasks import get_task
from tests.study.made_up_numbers import evidence, record


def verdicts(name: str, found: Evidence) -> list[str]:
    return [claim.judge(found).verdict for claim in experiments[name].claims]


def read(worth: dict[str, float], sets: int, seeds: int = 3) -> Evidence:
    found = [
        record(method, name, value + 0.01 * place + 0.001 * seed, seed=seed)
        for method, value in worth.items()
        for place, name in enumerate(SPANS[:sets])
        for seed in range(seeds)
    ]
    return evidence(experiments["reading"].study("full"), found)


def test_reading_is_judged() -> None:
    close = {FT: 0.6, LR: 0.6, AP: 0.59, PF: 0.58, PROBE: 0.2}
    assert verdicts("reading", read(close, sets=7)) == ["holds", "holds"]
    assert verdicts("reading", read(close, sets=4)) == ["holds", "holds"]  # twelve sets with seeds
    assert verdicts("reading", read(close, sets=4, seeds=1)) == ["undecided", "undecided"]
    assert verdicts("reading", read({**close, PF: 0.1}, sets=7)) == ["does not hold", "does not hold"]


def asked(zero: float, few: float, whole: float, worth: dict[str, float] | None = None) -> Evidence:
    """What the template adds to the frozen backbone, with 16 examples, and with all; and what each part adds to others."""
    worth, found = worth or {"AP": 0.1, "BF": 0.05, "PT": -0.05}, []
    for shots, gain in ((16, few), (None, whole)):
        for place, task in enumerate(GLUE):
            for label in (templates.ZERO, *templates.LABELS):
                own = sum(worth[part] for part in label.split("+") if part in PARTS)
                plain = 0.5 + own + 0.01 * place
                lift = zero if label == templates.ZERO else gain
                found.append(record(label + BARE, task, plain, cell={"shots": shots}))
                found.append(record(label, task, plain + lift + 0.001 * place, cell={"shots": shots}))
    return evidence(experiments["templates"].study("full"), found)


def test_templates_are_judged() -> None:
    assert verdicts("templates", asked(zero=0.2, few=0.1, whole=0.0)) == ["holds"] * 6
    worse = asked(zero=-0.2, few=-0.1, whole=0.1, worth={"AP": -0.1, "BF": -0.05, "PT": 0.05})
    assert verdicts("templates", worse) == ["does not hold"] * 6
    half = asked(zero=0.2, few=0.1, whole=0.0).narrowed(lambda one: one.task in GLUE[:3])
    assert verdicts("templates", half) == ["undecided"] * 6


@pytest.mark.parametrize(("lora", "verdict"), [(0.6, "holds"), (0.4, "does not hold")])
def test_words_are_judged(lora: float, verdict: str) -> None:
    worth = {FT: 0.6, LR: lora, AP: 0.58, PF: 0.57, PT: 0.3, BF: 0.575, "frozen": 0.1}
    found = [record(method, task, value + 0.01 * place) for method, value in worth.items() for place, task in enumerate(TASKS)]
    own = experiments["text-to-text"]
    told = {claim.says: claim.judge(evidence(own.study("full"), found)) for claim in own.claims}
    assert told["LoRA matches FT (at least 97 %) on a decoder."].verdict == verdict
    assert told["BitFit is better than the frozen backbone."].verdict == "holds"
    assert told["Training the last quarter of the layers reaches about 90 % of FT (at least 88 %)."].verdict == "undecided"


def test_tasks_in_words_are_of_many_kinds() -> None:
    known = [get_task(name) for name in TASKS]
    assert len(known) >= 12 and len({task.category for task in known}) >= 5
    assert sum(task.type == "generation" for task in known) == 5


FORMS = [("performance", "minilm", "head"), ("text-to-text", "smollm2-135m", "text-to-text")]


@pytest.mark.parametrize(("name", "backbone", "form"), FORMS)
def test_a_report_says_its_form(name: str, backbone: str, form: str) -> None:
    found = [record(method, task, 0.5, backbone=backbone) for method in (FT, LR) for task in ("bbc-news", "ag-news")]
    own = evidence(experiments[name].study("full"), found)
    assert f"of the {form} form" in form_of(own, backbone)
    assert comparison(own)[0].text == form_of(own, backbone)
