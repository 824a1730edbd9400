"""Exit codes, errors, help, what starts fast, and commands of other packages."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import deltatune
from deltatune.cli import main as door
from deltatune.cli.commands import commands
from deltatune.errors import InvalidValue
from tests.cli.conftest import Call, refused
from tests.project import ROOT


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own."""
    place = {"cwd": ROOT, "capture_output": True, "text": True, "check": False, "timeout": 120}
    return subprocess.run([sys.executable, "-m", "deltatune.cli.main", *words], **(place | options))  # type: ignore[call-overload]


@pytest.mark.parametrize("words", [("--help",), ("-h",), ("tune", "--help"), ("methods", "--help"), ("methods", "show", "--help")])
def test_help(words: tuple[str, ...], call: Call) -> None:
    shown = call(*words)
    assert shown.code == 0
    assert "Usage: deltatune" in shown.out


@pytest.mark.parametrize("name", sorted(name for names in door.PANELS.values() for name in names))
def test_every_command_explains_itself(name: str, call: Call) -> None:
    shown = call(name, "--help")
    assert shown.code == 0 and name in commands
    assert f"Usage: deltatune {name}" in shown.out
    assert f" {name} " in call("--help").out


def test_examples_in_the_help_are_valid(call: Call) -> None:
    """Each option that an example of ``tune --help`` uses is an option of it."""
    shown = call("tune", "--help").out
    examples = [line for line in shown.splitlines() if line.strip().startswith("deltatune tune")]
    assert len(examples) >= 4
    assert {word for line in examples for word in line.split() if word.startswith("--")} <= set(shown.replace("│", " ").split())


def test_version(call: Call) -> None:
    assert call("--version").out == f"deltatune {deltatune.__version__}\n"


@pytest.mark.parametrize("words", ["--help", "methods", "methods show lora", "tasks", "backbones"])
def test_listings_start_without_transformers(words: str) -> None:
    program = f"""
import sys
from deltatune.cli.main import main
assert main({words.split()!r}) == 0
heavy = {{"transformers", "datasets", "accelerate", "matplotlib", "sklearn", "scipy", "pandas", "peft", "huggingface_hub", "pyarrow"}}
print(sorted(heavy & {{name.partition(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_the_console_script_ends_with_its_exit_code() -> None:
    bad = run("methods", "show", "lroa")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("Error: No method is called `lroa`. Did you mean `lora`")
    good = run("methods", "--json")
    assert good.returncode == 0, good.stderr
    assert "lora" in {entry["name"] for entry in json.loads(good.stdout)}


def test_a_closed_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run("methods", "--json", capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == ""


def failing(cause: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``deltatune methods`` raise ``cause``."""

    def fail(json: bool = False) -> None:
        raise cause

    monkeypatch.setattr("deltatune.cli.methods.listing", fail)


def test_what_goes_wrong_is_one_message(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(InvalidValue("It is `this`. Do that."), monkeypatch)
    ended = call("methods")
    assert (ended.code, ended.err) == (2, "Error: It is `this`. Do that.\n")
    told = call("methods", "--debug")
    assert told.code == 2
    assert "Traceback" in told.err and told.err.endswith("Error: It is `this`. Do that.\n")


def test_what_was_not_foreseen(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(ZeroDivisionError("by zero"), monkeypatch)
    ended = call("methods")
    assert ended.code == 1
    assert ended.err.startswith("Error: ZeroDivisionError: by zero\n")
    assert "--debug" in ended.err and "Traceback" not in ended.err
    told = call("--debug", "methods")
    assert told.code == 1
    assert "Traceback" in told.err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_the_disk_says(number: int, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(OSError(number, os.strerror(number), "out/delta.json"), monkeypatch)
    refused(call("methods"), "`out/delta.json`", os.strerror(number), "Free some space")


def test_the_keyboard(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(KeyboardInterrupt(), monkeypatch)
    ended = call("methods")
    assert (ended.code, ended.err) == (130, "Stopped.\n")


def test_commands_of_other_packages(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deltatune_hello.py").write_text(
        "from deltatune.cli.commands import commands\n"
        "@commands.register('hello')\n"
        "def hello(name: str) -> None:\n"
        "    'Greet somebody.'\n"
        "    print(f'hello {name}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    call("--version")  # the built-in commands register themselves once a process, and stay when the table is put back
    monkeypatch.setattr(
        "deltatune.registry.entry_points", lambda group: [EntryPoint("hello", "deltatune_hello", group)] if group == commands.group else []
    )
    monkeypatch.setattr(commands, "_plugins_read", False)
    monkeypatch.setattr(commands, "_entries", dict(commands._entries))
    assert "Greet somebody." in call("--help").out
    assert call("hello", "world").out == "hello world\n"
