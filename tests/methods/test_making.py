"""Methods from names and loose settings; what a recipe says about itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import pytest
from torch import nn

from deltatune.errors import InvalidValue, UnknownName
from deltatune.methods import Adapter, LoRA, PromptTuning
from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation
from deltatune.methods.fields import REQUIRED, fields_of, formula_of, in_words, summary_of
from deltatune.methods.kinds import Method, Patch, methods
from deltatune.methods.making import make, pairs, settings_of
from deltatune.structure.site import Site
from tests.project import ROOT

BUILT_IN = sorted(methods)


@dataclass(frozen=True)
class Sample(Method):
    """y = x: one field of each type.

    Args:
        needed: has no default,
            and two lines.
        mode: one of two.
    """

    family = "addition"
    kind = "output"
    where: ClassVar[tuple[str, ...]] = ("*",)

    needed: int
    mode: Literal["fast", "slow"] = "fast"
    level: Literal[1, 2] = 1
    perhaps: float | None = None
    number_or_name: int | str = "auto"
    pair: tuple[int, float] = (1, 0.5)
    names: tuple[str, ...] = ()

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        return []


@pytest.fixture(autouse=True)
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods._entries, "sample", Sample)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("lora", {}, LoRA()),
        ("lora", {"rank": "4", "alpha": "1e1", "dropout": ".5", "rank_stabilized": "TRUE"}, LoRA(4, 10.0, 0.5, True)),
        ("lora", {"rank": 4.0, "alpha": 8}, LoRA(4, 8.0)),
        ("prompt-tuning", {"init_ids": "[3, 4]", "init": "random"}, PromptTuning(init_ids=(3, 4), init="random")),
        ("prompt-tuning", {"init_ids": [3, 4]}, PromptTuning(init_ids=(3, 4))),
        ("prompt-tuning", {"init_ids": ""}, PromptTuning()),
        ("adapter", {"activation": "gelu_new"}, Adapter(activation="gelu_new")),
        ("sample", {"needed": "1", "mode": "slow", "level": "2"}, Sample(1, "slow", 2)),
        ("sample", {"needed": 1, "perhaps": "none", "number_or_name": "7"}, Sample(1, number_or_name=7)),
        ("sample", {"needed": 1, "perhaps": "0.5", "number_or_name": "seven"}, Sample(1, perhaps=0.5, number_or_name="seven")),
        ("sample", {"needed": 1, "pair": "2,3", "names": "a,'b'"}, Sample(1, pair=(2, 3.0), names=("a", "b"))),
    ],
)
def test_settings_become_the_types_of_the_fields(name: str, settings: dict[str, Any], expected: Method) -> None:
    made = make(name, settings)
    assert made == expected
    assert [type(value) for value in settings_of(made).values()] == [type(value) for value in settings_of(expected).values()]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("lora", {"rank": "2.5"}, r"LoRA\(rank='2.5'\) was asked for; `rank` takes a whole number, such as rank=8"),
        ("lora", {"rank": 2.5}, "whole number"),
        ("lora", {"rank": True}, "whole number"),
        ("lora", {"rank": "0"}, r"LoRA\(rank=0\) was asked for; `rank` must be greater than 0"),
        ("lora", {"alpha": "nan"}, "`alpha` takes a number"),
        ("lora", {"alpha": "inf"}, "`alpha` takes a number"),
        ("lora", {"rank_stabilized": "maybe"}, "true or false"),
        ("lora", {"rank_stabilized": 1}, "true or false"),
        ("prompt-tuning", {"init": 3}, "one of `vocabulary`, `random`, `labels`, `text`"),
        ("prompt-tuning", {"init_text": 3}, "takes a text"),
        ("adapter", {"activation": "mish"}, "one of `gelu`, `gelu_new`, `relu`, `silu`, `tanh`"),
        ("prompt-tuning", {"init_ids": "1,x"}, "whole numbers with commas"),
        ("sample", {}, "Sample needs a value for `needed`: a whole number. Set it, as in needed=8"),
        ("sample", {"needed": 1, "mode": "medium"}, "one of `fast`, `slow`"),
        ("sample", {"needed": 1, "pair": "1"}, "2 values"),
        ("sample", {"needed": 1, "perhaps": "x"}, "a number or none"),
    ],
)
def test_a_value_that_does_not_fit(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        make(name, settings)


def test_unknown_names() -> None:
    with pytest.raises(UnknownName, match=r"No method is called `lroa`. Did you mean `lora`"):
        make("lroa")
    with pytest.raises(UnknownName, match=r"LoRA has no field called `rnk`. Did you mean `rank`"):
        make("lora", {"rnk": 1})
    with pytest.raises(UnknownName, match=r"NormTuning has no field called `rank`. It has none"):
        make("norm-tuning", {"rank": 1})


def test_pairs() -> None:
    assert pairs(["rank=8", "init-std = 0.1", "init=a=b"]) == {"rank": "8", "init_std": "0.1", "init": "a=b"}
    for wrong in (["rank"], ["=8"], ["rank=8", "rank=4"]):
        with pytest.raises(InvalidValue, match=r"rank|=8"):
            pairs(wrong)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_is_described(name: str) -> None:
    recipe = methods[name]
    assert summary_of(recipe)[0].isupper()
    assert formula_of(recipe)
    fields = fields_of(recipe)
    assert [field.name for field in fields] == [field.name for field in dataclasses.fields(recipe)]
    assert [field.name for field in fields if not field.meaning] == []


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in ("trainable-tokens",)])
def test_defaults_survive_being_written(name: str) -> None:
    written = {field.name: field.default_text for field in fields_of(methods[name])}
    assert make(name, written) == make(name)


def test_fields_say_what_they_take() -> None:
    fields = {field.name: field for field in fields_of(Sample)}
    assert fields["needed"].default is REQUIRED
    assert fields["needed"].meaning == "has no default, and two lines."
    assert fields["perhaps"].type_name == "float | None"
    assert fields["perhaps"].example == "perhaps=0.1"
    assert in_words(fields["number_or_name"].hint) == "a whole number or a text"
    assert formula_of(Sample) == "y = x: one field of each type."


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_method_has_at_most_eight_fields(name: str) -> None:
    """A variant that would need more is a method of its own."""
    assert len(fields_of(methods[name])) <= 8


def test_activations_are_told_as_they_are_taken() -> None:
    found = {name: field for name in methods for field in fields_of(methods[name]) if field.name == "activation"}
    assert len(found) > 10
    assert {in_words(field.hint) for field in found.values()} == {"one of " + ", ".join(f"`{name}`" for name in ACTIVATIONS)}
    assert [settings_of(make("adapter", {"activation": name}))["activation"] for name in ACTIVATIONS] == list(get_args(Activation))


def test_normal_distributions_are_written_with_their_variance() -> None:
    """N(0, sigma^2) in every docstring and page, or N(0, 1)."""
    files = [*(ROOT / "deltatune").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    told = {(path.name, found) for path in files for found in re.findall(r"N\(0, ([^()]*)\)", path.read_text(encoding="utf-8"))}
    assert len(told) > 10
    assert {(name, variance) for name, variance in told if variance != "1" and not variance.endswith("^2")} == set()
