"""The measured row of a method, as `deltatune methods show` tells it."""

from __future__ import annotations

from typing import Any

import pytest

from deltatune.methods import measured as module
from deltatune.methods import methods
from deltatune.methods.measured import Measured, measured

ROW: dict[str, Any] = {
    "scores": {"bbc-news": [0.9512, 0.004], "tweet-sentiment": [0.61, None]},
    "share": 0.00333,
    "file_bytes": 310_227,
    "step": 0.71,
    "memory": 0.5,
    "collapsed": {},
    "settings": "",
}
FROZEN: dict[str, Any] = {"step": None, "memory": None, "collapsed": {"tweet-sentiment": [3, 3], "bbc-news": [1, 3]}}


def test_a_row_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_table", lambda: {"budget": "MiniLM", "rows": {"lora": ROW, "frozen": ROW | FROZEN}})
    row = measured("lora")
    assert row == Measured({"bbc-news": (0.9512, 0.004), "tweet-sentiment": (0.61, None)}, 0.00333, 310_227, 0.71, 0.5)
    assert str(row) == (
        "bbc-news 0.951 ± 0.004, tweet-sentiment 0.610; 0.333% of the parameters, 310 kB; step 0.71, memory 0.50 of full fine-tuning's"
    )
    assert str(measured("frozen")) == (
        "bbc-news 0.951 ± 0.004 (one answer to every text with 1 of 3 seeds), tweet-sentiment 0.610 (one answer to every text); "
        "0.333% of the parameters, 310 kB"
    )
    assert measured("bitfit") is None


def test_a_row_says_what_was_not_at_its_default() -> None:
    row = measured("trainable-tokens")
    assert row is not None and str(row).endswith("of full fine-tuning's; with token_ids=1996,1997,1998,1999,... (2000)")
    assert [name for name in methods if (row := measured(name)) and row.settings] == ["trainable-tokens"]


def test_what_is_packaged_names_methods_that_exist() -> None:
    assert module._table()["rows"].keys() <= set(methods)
