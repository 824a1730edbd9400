"""A task: what its columns mean, where its rows come from, how it is asked and scored. Built-in tasks are YAML files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deltatune.errors import InvalidValue
from deltatune.registry import Registry
from deltatune.tasks.schema import checked, label_words
from deltatune.tasks.template import Template, Verbalizer
from deltatune.tasks.types.base import TaskType, task_types

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Packaged:
    """Rows that lie in an installed Python package, which is located but never imported.

    Attributes:
        pip: name of the distribution, as ``pip install`` takes it.
        module: the module it installs.
        path: file or folder inside the module.
        reader: ``folders`` (one folder per label, one file per text) or ``csv``.
        columns: for ``csv``, our column name -> the file's.
        encoding: of bytes that are not UTF-8.
    """

    pip: str
    module: str
    path: str
    reader: str
    columns: Mapping[str, str] = field(default_factory=dict)
    encoding: str = "latin-1"

    @property
    def location(self) -> Path | None:
        """Where the data lies; None if the package is not installed."""
        spec = find_spec(self.module)
        places = [Path(folder, self.path) for folder in spec.submodule_search_locations or ()] if spec else []
        return next((place for place in places if place.exists()), None)


@dataclass(frozen=True)
class Hub:
    """Rows on the hub, or in a mirror of it under ``$DELTATUNE_MIRROR/<id>/<config>/<split>.parquet``.

    Attributes:
        id: the dataset's hub id.
        config: its configuration.
        mirror: folder in the mirror where that is not ``<id>/<config>``.
        labels: label names in the order of the file's integers, where neither the mirror's index nor the hub's features say it.
        splits: our split -> the hub's, where the names differ; what one of ours takes, no other one reads under its own name, so that
            ``{train: test}`` is a dataset that only has a test split, from which we cut.
        columns: our column -> the hub's, where the names differ; dots lead into structs.
    """

    id: str
    config: str = "default"
    mirror: str = ""
    labels: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def location(self) -> Path | None:
        """The folder in the mirror; None without a mirror, or if it lacks this task."""
        return next((folder for path in self.paths if (folder := mirrored(path)) is not None), None)

    def __post_init__(self) -> None:
        """Of the splits, each is named once on either side.

        Raises:
            InvalidValue: a split that is none of ours, or one of theirs twice.
        """
        if odd := [name for name in self.splits if name not in SPLITS]:
            raise InvalidValue(f"`splits` has the entry `{odd[0]}`; it maps our splits ({', '.join(SPLITS)}) to the hub's.")
        if len(set(self.splits.values())) < len(self.splits):
            raise InvalidValue(
                f"`splits` takes a split of the hub twice ({self.splits}). Name each once; what is missing is cut from train."
            )

    def theirs(self, split: str) -> str | None:
        """The hub's split for ours; None where another one of ours takes it.

        >>> hub = Hub("some/set", splits={"train": "test"})
        >>> hub.theirs("train"), hub.theirs("validation"), hub.theirs("test")
        ('test', 'validation', None)
        """
        if split in self.splits:
            return self.splits[split]
        return None if split in self.splits.values() else split

    @property
    def paths(self) -> tuple[str, ...]:
        """Where a mirror would have it."""
        return (self.mirror,) if self.mirror else (f"{self.id}/{self.config}", self.id)


@dataclass(frozen=True)
class Choices:
    """Where a row of a choice task keeps its options, in one of three forms.

    Attributes:
        columns: one column an option.
        list: one column, or a field of a struct, that lists them.
        keys: with ``list``, what the label calls each of them.
        right: of a minimal pair, the column of the right option.
        wrong: of a minimal pair, the column of the other.
        first: what the label says for the first option; a digit or a letter.

    Raises:
        InvalidValue: none of the forms, or a mixture.
    """

    columns: tuple[str, ...] = ()
    list: str = ""
    keys: str = ""
    right: str = ""
    wrong: str = ""
    first: str = "0"

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", str(self.first))
        forms = [len(self.columns) > 1, bool(self.list), bool(self.right and self.wrong)]
        if sum(forms) != 1 or (self.keys and not self.list) or len(self.first) != 1 or not self.first.isalnum():
            raise InvalidValue(
                "`choices` has one of the forms {columns: [a, b]}, {list: column}, {list: column, keys: column} and {right: a, wrong: b}, "
                "and `first` is what the label says for the first option, such as 0, 1 or A."
            )

    @property
    def read(self) -> tuple[str, ...]:
        """The columns that the options come from."""
        return tuple(column for column in (*self.columns, self.list, self.keys, self.right, self.wrong) if column)


def mirror_root() -> Path | None:
    """The mirror's folder, from ``DELTATUNE_MIRROR``; None without one."""
    root = os.environ.get("DELTATUNE_MIRROR")
    return Path(root).expanduser() if root else None


def mirrored(path: str) -> Path | None:
    """A folder of the mirror; None without a mirror, or if it lacks the folder."""
    root = mirror_root()
    folder = root / path if root and path else None
    return folder if folder is not None and (folder / "train.parquet").is_file() else None


@dataclass(frozen=True)
class Split:
    """How a source that has no splits of its own is cut: by the texts' hashes, class by class.

    Attributes:
        validation: share of the rows.
        test: share of the rows; the rest trains.
        cap: most rows that are kept, all splits together; None keeps all.
    """

    validation: float = 0.1
    test: float = 0.2
    cap: int | None = None

    def __post_init__(self) -> None:
        if self.validation < 0 or self.test < 0 or self.validation + self.test >= 1:
            raise InvalidValue(
                f"The shares validation={self.validation} and test={self.test} leave nothing to train on. Their sum has to be below 1."
            )


@dataclass(frozen=True)
class Task:
    """What one dataset asks.

    Attributes:
        name: as in ``--task bbc-news``.
        type: a name of the registry ``task_types``: classification, multilabel, regression, choice, tagging, span, generation.
        text: the text columns, in order; two of them are a pair. Of tagging, the one column that lists the words.
        label: the label column.
        category: for listings, after the paper's ontology.
        labels: the label names, which row labels are indices into; of tagging, the tags.
        range: the least and the largest number of a regression.
        choices: where a choice task's rows keep their options.
        context: the text column that holds the answers of a span task.
        references: the column that lists all right texts of a generation task.
        metrics: names of the metrics, the customary one first.
        templates: prompts with verbalizers, for the text-to-text framing.
        packaged: rows in a package, read first where it is installed.
        hub: rows on the hub or in a mirror.
        mirror: folder in a mirror, for rows that are on no hub in this form.
        split: how the pooled rows are cut; None keeps the source's own splits.
        parts: of a mixture, the tasks that it mixes.
        language: of the texts.
        description: one line.
        licence: of the data.
        citation: whom to cite.

    Raises:
        UnknownName: nobody knows the type.
        InvalidValue: fields that contradict each other.
    """

    name: str
    type: str
    text: tuple[str, ...]
    label: str = "label"
    category: str = "own data"
    labels: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    choices: Choices | None = None
    context: str = ""
    references: str = ""
    metrics: tuple[str, ...] = ("accuracy",)
    templates: tuple[Template, ...] = ()
    packaged: Packaged | None = None
    hub: Hub | None = None
    mirror: str = ""
    split: Split | None = None
    parts: tuple[Task, ...] = ()
    language: str = "en"
    description: str = ""
    licence: str = ""
    citation: str = ""

    def __post_init__(self) -> None:
        self.kind.check(self)
        for template in self.templates:
            template.check_columns(self.kind.spoken.prompted(self))

    @property
    def kind(self) -> TaskType:
        """What the task's type says about its answers."""
        return task_types[self.type]

    @property
    def metric(self) -> str:
        """The customary metric, by which models are chosen."""
        return self.metrics[0]

    @property
    def outputs(self) -> int:
        """Numbers a head gives: one a label, or one for a regression; 0 where no head fits."""
        return self.kind.head.outputs(self) if self.kind.head else 0

    @property
    def is_runnable(self) -> bool:
        """Whether the rows are at hand without a network: package installed, or in the mirror."""
        found = any(source is not None and source.location is not None for source in (self.packaged, self.hub))
        return found or mirrored(self.mirror) is not None


tasks: Registry[Callable[[], Task]] = Registry("task", "tasks")

_CATALOG = Path(__file__).parent / "catalog"


def get_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        UnknownName: there is none; the nearest names are in the message.
    """
    return tasks[name]()


@functools.cache
def read_task(file: Path) -> Task:
    """The task in a YAML file; its name is the file's.

    Raises:
        InvalidValue: not YAML, or unknown, missing or contradicting fields; the message names the file and the field.
    """
    fields = checked(file)
    try:
        words, labels = fields.pop("words", None), tuple(fields.get("labels", ()))
        templates = tuple(_template(entry, words, fields) for entry in fields.pop("templates", ()))
        for entry, kind in (("packaged", Packaged), ("hub", Hub), ("split", Split), ("choices", Choices)):
            if entry in fields:
                fields[entry] = kind(**_frozen(fields[entry]))
        return Task(**_frozen({"name": file.stem, **fields, "labels": labels, "templates": templates}))
    except InvalidValue as cause:
        raise InvalidValue(f"The task file `{file.name}`: {cause}") from cause


def _template(entry: str | Mapping[str, Any], words: Any, fields: Mapping[str, Any]) -> Template:
    written = {"prompt": entry} if isinstance(entry, str) else entry
    said = label_words(written.get("words", words), fields)
    return Template(written["prompt"], Verbalizer(said) if said else None)


def _frozen(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


for _file in sorted(_CATALOG.glob("*.yaml")):
    tasks.register(_file.stem)(functools.partial(read_task, _file))
