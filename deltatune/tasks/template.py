"""Templates and verbalizers: how an example becomes a prompt, and a label becomes a word."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from deltatune.errors import InvalidValue, nearest
from deltatune.tasks.rows import text_of

OPTIONS, OPTION = "options", "option"
"""The columns by which a prompt names the options of a choice: all, or one by its number from 1."""
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Verbalizer:
    """label i -> word i, the answer a language model gives for it.

    Attributes:
        words: one word or phrase per label, in the order of the task's labels, without blanks around it.

    Raises:
        InvalidValue: an empty word, blanks around one, or two labels with the same word.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        for word in self.words:
            if not word.strip() or word != word.strip():
                raise InvalidValue(
                    f"The label word {word!r} is empty or has blanks around it. Write the bare word; the framing adds the blank."
                )
        if len(set(self.words)) != len(self.words):
            raise InvalidValue(f"Two labels share a word ({', '.join(self.words)}), so no answer could tell them apart. Give each its own.")

    def label(self, word: str) -> int | None:
        """The label whose word this is; None if it is nobody's."""
        return self.words.index(word.strip()) if word.strip() in self.words else None


@dataclass(frozen=True)
class Template:
    """x -> prompt: literal text with the task's columns in braces, as in ``{sentence} Sentiment:``.

    Attributes:
        prompt: the text; it ends where the answer begins, without a blank. ``{{`` writes a brace.
        verbalizer: the label words; None for a task whose target is text already.

    Raises:
        InvalidValue: unbalanced braces, no column at all, or a blank at the end.
    """

    prompt: str
    verbalizer: Verbalizer | None = None

    def __post_init__(self) -> None:
        if not self.columns:
            raise InvalidValue(
                f"The template {self.prompt!r} names no column, so every prompt would be the same. Write columns as {{name}}."
            )
        if self.prompt != self.prompt.rstrip():
            raise InvalidValue(f"The template {self.prompt!r} ends with a blank. Leave it out: the answer brings its own.")

    @cached_property
    def pieces(self) -> tuple[tuple[str, str, str], ...]:
        """(text, column behind it, word that joins the column's entries), in order; the last column may be empty."""
        try:
            parsed = list(string.Formatter().parse(self.prompt))
        except ValueError as cause:
            raise InvalidValue(
                f"The template {self.prompt!r} cannot be read: {cause}. Write columns as {{name}} and a brace as {{{{."
            ) from cause
        return tuple((text, column or "", joined or "") for text, column, joined, _ in parsed)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns the prompt names, each once, in order."""
        return tuple(dict.fromkeys(column for _, column, _ in self.pieces if column))

    @property
    def lists_options(self) -> bool:
        """The prompt lists a choice's options in lines with letters, so that the answer is a letter."""
        return any(column == OPTIONS and not joined for _, column, joined in self.pieces)

    def check_columns(self, known: Iterable[str]) -> None:
        """Make sure that every column of the prompt exists.

        Raises:
            InvalidValue: one does not; the nearest are named.
        """
        options = list(known)
        for column in self.columns:
            if column not in options:
                raise InvalidValue(
                    f"The template {self.prompt!r} names the column `{column}`, which the task does not have. {nearest(column, options)}"
                )

    def render(self, row: Mapping[str, Any]) -> str:
        r"""The prompt of one example; blanks around a value are left out.

        >>> Template("{text} Sentiment:").render({"text": "a {fine} film", "label": 1})
        'a {fine} film Sentiment:'
        >>> Template("It is {options:or}.\n{options}").render({"options": ["hot", "cold"]})
        'It is hot or cold.\nA. hot\nB. cold'
        """
        return "".join([text + (_value(row, column, joined) if column else "") for text, column, joined in self.pieces])


def _value(row: Mapping[str, Any], column: str, joined: str) -> str:
    """What stands for a column: its text, or of a choice its options, or one of them."""
    if column not in row and column.startswith(OPTION):
        return text_of(row[OPTIONS][int(column.removeprefix(OPTION)) - 1]).strip()
    value = row[column]
    return listed(value, joined) if column == OPTIONS and isinstance(value, list | tuple) else text_of(value).strip()


def listed(options: Sequence[Any], joined: str = "") -> str:
    r"""Options for a prompt: in lines with letters, or in a sentence with a word before the last.

    >>> listed(["yes", "no"]), listed(["a", "b", "c"], "or")
    ('A. yes\nB. no', 'a, b or c')
    """
    texts = [text_of(option).strip() for option in options]
    if not joined:
        return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    return f"{', '.join(texts[:-1])} {joined} {texts[-1]}" if len(texts) > 1 else texts[0]


def plain_template(text: Sequence[str], label: str, words: Sequence[str]) -> Template:
    r"""The template of a user's own data: its columns by name, then the label column's name as the question.

    >>> plain_template(["title", "body"], "topic", ["sport", "tech"]).prompt
    'title: {title}\nbody: {body}\ntopic:'
    """
    head = "{" + text[0] + "}" if len(text) == 1 else "\n".join(f"{column}: {{{column}}}" for column in text)
    return Template(f"{head}\n{label}:", Verbalizer(tuple(words)) if words else None)
