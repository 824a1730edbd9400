"""A study of tiny trainings, done once without interruption."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltatune.study.design import Study, study_from_dict
from deltatune.study.driver import Driver
from deltatune.study.record import Record
from deltatune.study.runner.local import LocalRunner
from deltatune.study.shows import Silent
from deltatune.study.store.store import Store
from tests.cli.conftest import write_texts
from tests.training.tiny import folder

SETTINGS = {"max_steps": 6, "save_steps": 2, "evaluations": 2, "batch_size": 8, "lr": 5e-3}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two methods, two seeds and the baselines on made-up texts: eight trials of six steps."""
    place = tmp_path_factory.mktemp("study")
    written = {
        "name": "tiny",
        "backbones": [folder("bert", place)],
        "tasks": [{"path": str(write_texts(place / "headlines.csv")), "text": "headline", "label": "topic"}],
        "methods": [{"name": "lora", "rank": 2}, "bitfit"],
        "settings": SETTINGS,
        "seeds": [0, 1],
    }
    return study_from_dict(written)


def driver(store: Store, study: Study, place: Path, **fields: object) -> Driver:
    """A driver in this process that shows nothing."""
    return Driver(store, study.name, place, **{"runner": LocalRunner, "show": Silent(), **fields})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def whole(tiny: Study, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """What the tiny study comes to when nobody kills it."""
    place = tmp_path_factory.mktemp("whole")
    store = Store(place / "studies.db")
    store.add(tiny)
    driver(store, tiny, place / "trials").run()
    return store.records(tiny.name)
