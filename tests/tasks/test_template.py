from __future__ import annotations

import pytest

from deltatune.errors import InvalidValue
from deltatune.tasks import Template, Verbalizer, get_task, tasks
from deltatune.tasks.template import plain_template


def test_render() -> None:
    template = Template("Premise: {first}\nHypothesis: {second} {{sic}} True?")
    row = {"first": " It {rains}. ", "second": "It is wet.", "label": 1}
    assert template.render(row) == "Premise: It {rains}.\nHypothesis: It is wet. {sic} True?"
    assert template.columns == ("first", "second")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("no column:", "names no column"), ("{text} It is ", "ends with a blank"), ("{text} {", "cannot be read")],
)
def test_bad_prompts(prompt: str, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        Template(prompt)


def test_a_column_that_does_not_exist() -> None:
    with pytest.raises(InvalidValue, match=r"names the column `sentnce`, which the task does not have. Did you mean `sentence`"):
        Template("{sentnce}:").check_columns(["sentence"])


@pytest.mark.parametrize(("words", "message"), [(("a", " b"), "blanks around"), (("a", ""), "is empty"), (("a", "a"), "share a word")])
def test_bad_words(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        Verbalizer(words)


def test_label_to_word_and_back_for_every_task() -> None:
    seen = 0
    for task in map(get_task, tasks):
        for template in task.templates if task.labels else ():
            assert template.verbalizer is not None
            for index, word in enumerate(template.verbalizer.words):
                assert template.verbalizer.label(f" {word}") == index
                seen += 1
            assert template.verbalizer.label("none of them") is None
    assert seen >= 2 * (4 + 5 + 2 + 2 + 2 + 2 + 3) + 6


def test_plain_template() -> None:
    assert plain_template(["body"], "topic", ["a", "b"]).render({"body": "x"}) == "x\ntopic:"
