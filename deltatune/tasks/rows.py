"""Rows: the examples of one split as plain columns, light to load and accepted wherever PyTorch takes a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from deltatune.errors import DataError, nearest

Row = Mapping[str, Any]


class Rows(Sequence[Row]):
    """Examples by column; ``rows[3]`` is one example, ``rows["text"]`` one column.

    >>> rows = Rows({"text": ["good", "bad"], "label": [1, 0]})
    >>> rows[1]
    {'text': 'bad', 'label': 0}
    >>> rows.select([1])["text"]
    ['bad']
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns: Final = dict(columns)
        self._length = min((len(values) for values in self.columns.values()), default=0)

    @classmethod
    def of(cls, rows: Iterable[Row], names: Sequence[str]) -> Rows:
        """The columns ``names`` of examples given one by one."""
        rows = list(rows)
        return cls({name: [row[name] for row in rows] for name in names})

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        if isinstance(key, slice):
            return self.select(range(*key.indices(len(self))))
        if not -len(self) <= key < len(self):
            raise IndexError(key)
        return {name: values[key] for name, values in self.columns.items()}

    def select(self, indices: Iterable[int]) -> Rows:
        """The examples at ``indices``, in that order."""
        chosen = list(indices)
        return Rows({name: [values[index] for index in chosen] for name, values in self.columns.items()})

    def to_dataset(self) -> Any:
        """The same as a ``datasets.Dataset``, for code that wants one."""
        import datasets

        return datasets.Dataset.from_dict(self.columns)


def text_of(value: Any) -> str:
    """A column's value as text; a list of words has a blank between them.

    >>> text_of(["two", "words"])
    'two words'
    """
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def inside(row: Row, path: str) -> Any:
    """A column, or with dots a field of the struct in it; of a list of structs, the field of each.

    >>> inside({"choices": {"text": ["a", "b"]}}, "choices.text")
    ['a', 'b']
    >>> inside({"answers": [{"text": "a"}, {"text": "b"}]}, "answers.text")
    ['a', 'b']

    Raises:
        DataError: there is no such field; those that there are, are named.
    """
    if path in row:
        return row[path]
    name, _, rest = path.partition(".")
    if name not in row or not rest:
        raise DataError(f"A row has no field `{name}`. {nearest(name, row)}")
    value = row[name]
    if isinstance(value, list):
        return [inside(one, rest) for one in value]
    if not isinstance(value, Mapping):
        raise DataError(f"`{path}` was asked for, but `{name}` holds {str(value)[:80]!r}, which has no fields. Name it without the dot.")
    return inside(value, rest)
