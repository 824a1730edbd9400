"""Prompts as tokens: a template rendered for a row and cut to a length, in which only the row's own texts are shortened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltatune.errors import DataError, InvalidValue, Unsupported
from deltatune.tasks.inputs import BARE
from deltatune.tasks.rows import Row, text_of
from deltatune.tasks.task import Task
from deltatune.tasks.template import OPTIONS, Template, Verbalizer
from deltatune.tasks.truncation import kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompts:
    """template + row -> token ids without special ones.

    Args:
        task: whose template, for errors.
        template: the prompt.
        tokenizer: a fast one, which tells the place of each token in the text.
        max_length: what the whole may have, for errors.
    """

    def __init__(self, task: Task, template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.task = task
        self.template = template
        self.tokenizer = tokenizer
        self.max_length = max_length

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of some texts."""
        return list(self.tokenizer(list(texts), add_special_tokens=False, **BARE)["input_ids"]) if len(texts) else []

    def encode(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[list[int]]:
        """The prompts of some rows, each in so many tokens at most.

        Raises:
            InvalidValue: the template alone does not fit.
        """
        bodies = self.tokens([self.template.render(row) for row in rows])
        long = [index for index, room in enumerate(rooms) if len(bodies[index]) > room]
        texts = dict(zip(long, self._texts([rows[index] for index in long]), strict=True))
        while long:  # again where the cut text has more tokens than its parts had
            excess = [len(bodies[index]) - rooms[index] for index in long]
            beyond = [over - sum(texts[index].kept) + 1 for index, over in zip(long, excess, strict=True)]
            if max(beyond) > 0:
                raise InvalidValue(
                    f"The template of `{self.task.name}` and its answer need more than {self.max_length} tokens alone "
                    f"in {sum(most > 0 for most in beyond)} of {len(rows)} rows. "
                    f"Raise `max_length` to {self.max_length + max(beyond)} or more."
                )
            for index, over in zip(long, excess, strict=True):
                texts[index].shorten(over)
            cut = self.tokens([self.template.render({**rows[index], **texts[index].values()}) for index in long])
            for index, body in zip(long, cut, strict=True):
                bodies[index] = body
            long = [index for index in long if len(bodies[index]) > rooms[index]]
        return bodies

    def _texts(self, rows: Sequence[Row]) -> list[Texts]:
        """The pieces of each row that may be cut: its texts, and one by one the entries of a list."""
        pieces = [_pieces(row, self.template.columns) for row in rows]
        flat = [text for piece in pieces for _, _, text in piece]
        if not flat:
            return [Texts([], []) for _ in rows]
        spans = iter(self.tokenizer(flat, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])
        return [Texts(piece, [[end for _, end in next(spans)] for _ in piece]) for piece in pieces]


def _pieces(row: Row, named: Sequence[str]) -> list[tuple[str, int, str]]:
    """(column, place in its list or -1, text) of all that a prompt shows; options are pieces of their own."""
    found: list[tuple[str, int, str]] = []
    for column in dict.fromkeys(name if name in row else OPTIONS for name in named):
        if column == OPTIONS and isinstance(row[column], list | tuple):
            found += [(column, place, text_of(entry).strip()) for place, entry in enumerate(row[column])]
        else:
            found.append((column, -1, text_of(row[column]).strip()))
    return found


class Texts:
    """The texts of one row while they are cut: where the characters of each token end, and how many tokens are kept."""

    def __init__(self, pieces: Sequence[tuple[str, int, str]], ends: Sequence[Sequence[int]]) -> None:
        self.pieces = pieces
        self.ends = ends
        self.kept = [len(places) for places in ends]

    def shorten(self, excess: int) -> None:
        """Take ``excess`` tokens away, of which there are more, from the longest text first."""
        self.kept = kept(self.kept, sum(self.kept) - excess)

    def values(self) -> dict[str, Any]:
        """The columns as they are cut now."""
        found: dict[str, Any] = {}
        for (column, place, text), ends, length in zip(self.pieces, self.ends, self.kept, strict=True):
            cut = text if length >= len(ends) else text[: ends[length - 1] if length else 0].rstrip()
            if place < 0:
                found[column] = cut
            else:
                found.setdefault(column, []).append(cut)
        return found


def chosen(task: Task, template: int | Template, *, manual: bool = True) -> Template:
    """One of the task's templates by its number, or a given one; without a manual template the columns stand alone.

    Raises:
        Unsupported: the task has no template.
        InvalidValue: it has none of that number, or one that names other columns.
    """
    if isinstance(template, Template):
        template.check_columns(task.kind.spoken.prompted(task))
        found = template
    elif not task.templates:
        raise Unsupported(f"The task `{task.name}` has no template. Give one, or use the head framing.")
    elif not 0 <= template < len(task.templates):
        raise InvalidValue(f"The task `{task.name}` has {len(task.templates)} templates, numbered from 0; {template} was asked for.")
    else:
        found = task.templates[template]
    if found.verbalizer is None and task.kind.spoken.is_closed(task) and task.labels:
        raise Unsupported(
            f"The template {found.prompt!r} has no label words for `{task.name}`. Give it a verbalizer, or use the head framing."
        )
    return found if manual else bare_template(task, found.verbalizer)


def bare_template(task: Task, verbalizer: Verbalizer | None) -> Template:
    """The columns alone, one a line, and a line break before the answer's place would begin: no word of ours."""
    return Template("\n".join(f"{{{column}}}" for column in task.kind.inputs(task)), verbalizer)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text.

    Raises:
        DataError: it changes the text's own tokens.
    """
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    start = next((index for index in range(len(full)) if full[index : index + len(bare)] == bare), None)
    if start is None:
        raise DataError(
            f"The tokenizer {type(tokenizer).__name__} changes a text's tokens when it adds special ones, so prompts cannot be cut safely."
        )
    return full[:start], full[start + len(bare) :]


def distinct(task: Task, words: Mapping[str, Sequence[int]]) -> None:
    """Make sure that no label word is the same to the tokenizer as another one, or nothing at all.

    Raises:
        InvalidValue: one is.
    """
    seen: set[tuple[int, ...]] = set()
    for word, ids in words.items():
        if not ids or tuple(ids) in seen:
            raise InvalidValue(f"The label word `{word}` of `{task.name}` is the same to this tokenizer as another one. Choose others.")
        seen.add(tuple(ids))
