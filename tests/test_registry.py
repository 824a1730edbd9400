"""Names and what they stand for, plug-ins included."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from deltatune import registry
from deltatune.errors import InvalidValue, UnknownName, Unsupported
from deltatune.registry import Registry


def _colours() -> Registry[str]:
    colours = Registry[str]("colour", "colours")
    colours.register("red")("#f00")
    return colours


def test_names() -> None:
    colours = _colours()
    assert list(colours) == ["red"]
    assert "red" in colours
    assert colours.name_of(colours["red"]) == "red"
    with pytest.raises(UnknownName, match=r"No colour is called `rde`\. Did you mean `red`"):
        colours["rde"]
    with pytest.raises(UnknownName, match="is not a registered colour"):
        colours.name_of("#0f0")
    with pytest.raises(InvalidValue, match="The colour `red` is registered already"):
        colours.register("red")("#e00")


def test_a_plug_in_that_cannot_be_loaded_is_named_and_the_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("blue", "no_such_package.blue", "deltatune.colours")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken] if group == "deltatune.colours" else [])
    colours = _colours()
    with pytest.warns(UserWarning, match=r"The colour `blue` \(no_such_package\.blue\) could not be loaded.*others can be used"):
        assert colours["red"] == "#f00"
    for _ in range(2):
        with pytest.raises(Unsupported, match=r"The colour `blue` \(no_such_package\.blue\) could not be loaded.*uninstall its package"):
            colours["blue"]
    with pytest.raises(UnknownName):
        colours["rde"]


def test_a_plug_in_may_look_things_up(monkeypatch: pytest.MonkeyPatch) -> None:
    colours = _colours()

    class Loading:
        def load(self) -> None:
            colours.register("darkred")(colours["red"].replace("f", "8"))

    monkeypatch.setattr(registry, "entry_points", lambda group: [Loading()])
    assert colours["darkred"] == "#800"


def test_methods_load_when_the_first_is_asked_for() -> None:
    program = (
        "import sys, deltatune, deltatune.methods as m\n"
        "assert 'deltatune.methods.builtin' not in sys.modules\n"
        "assert not hasattr(m, 'LroA') and 'LoRA' in dir(m)\n"
        "assert m.LoRA is m.methods['lora'] and len(m.methods) > 40\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
