"""What every command prints through: commands that can be copied, and a word while something takes its time."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import pytest

from deltatune.cli.terminal import copyable, noticing, program, quoted, show_error, working
from deltatune.errors import Noticed
from tests.cli.conftest import Call


class Terminal(io.StringIO):
    """A stream that is looked at."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("called", "on_path", "shown"),
    [
        (".venv/bin/deltatune", None, ".venv/bin/deltatune"),
        ("/opt/tools/deltatune", "/opt/tools/deltatune", "deltatune"),
        (".venv/bin/deltatune", "/opt/tools/deltatune", ".venv/bin/deltatune"),
        ("my tools/deltatune", None, "'my tools/deltatune'"),
        ("pytest", None, "deltatune"),
    ],
)
def test_hints_name_the_program_as_it_was_called(called: str, on_path: str | None, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr("shutil.which", lambda name: on_path)
    assert program() == shown
    assert copyable("deltatune has `deltatune tune --help` and `tune`.") == f"deltatune has `{shown} tune --help` and `tune`."
    assert quoted("`deltatune tasks` lists them.").plain == f"{shown} tasks lists them."


def test_listings_errors_and_help_can_be_copied(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/deltatune"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert ".venv/bin/deltatune methods show NAME explains one." in call("methods").out
    assert (
        "`.venv/bin/deltatune methods show lora` explains"
        in call("inspect", "--backbone", "minilm", "--method", "lora", "--set", "a=1").err
    )
    assert "`.venv/bin/deltatune tune --backbone minilm" in call("tune", "--method", "lora").err
    shown = call("eval", "--help").out
    assert "Usage: .venv/bin/deltatune eval" in shown and " .venv/bin/deltatune eval runs/bbc" in shown
    assert "Try '.venv/bin/deltatune" in call("tnue").err


def test_work_is_told_in_a_line_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with working("Loading `it`."):
        assert capsys.readouterr() == ("", "Loading it.\n")
    assert capsys.readouterr() == ("", "")


def test_work_is_shown_on_a_terminal_as_long_as_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", err := Terminal())
    with working("Loading `it`."):
        pass
    assert "Loading" in err.getvalue() and err.getvalue().endswith("\x1b[2K")  # the line is wiped


def test_an_error_in_a_frame_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "argv", [str(Path("bin") / "deltatune")])
    monkeypatch.setattr(sys, "stderr", err := Terminal())
    show_error("Write `deltatune tasks`.")
    assert "bin/deltatune tasks" in err.getvalue()


@pytest.mark.filterwarnings("always")
def test_our_warnings_are_notes_and_others_are_left_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: others.append(str(message)))
    before = warnings.showwarning
    with noticing():
        warnings.warn("`a.csv`: 2 rows left out.", Noticed, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr() == ("", "Note: a.csv: 2 rows left out.\n") and others == ["old"]
    assert warnings.showwarning is before
