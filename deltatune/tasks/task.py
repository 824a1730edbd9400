"""A task: what its columns mean, where its rows come from, how it is asked and scored. Built-in tasks are YAML files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from deltatune.errors import InvalidValue, nearest
from deltatune.registry import Registry
from deltatune.tasks.template import Template, Verbalizer

TaskType = Literal["classification", "multilabel", "regression", "text2text"]


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
        labels: label names in the order of the file's integers, where that is not the task's order.
        splits: our split -> the file's, where the names differ.
    """

    id: str
    config: str = "default"
    mirror: str = ""
    labels: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(default_factory=dict)

    @property
    def location(self) -> Path | None:
        """The folder in the mirror; None without a mirror, or if it lacks this task."""
        root = os.environ.get("DELTATUNE_MIRROR")
        folders = [self.mirror] if self.mirror else [f"{self.id}/{self.config}", self.id]
        found = (Path(root).expanduser() / folder for folder in folders) if root else iter(())
        return next((folder for folder in found if (folder / "train.parquet").is_file()), None)


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
        type: classification, multilabel, regression or text2text.
        category: for listings, after the paper's ontology.
        text: the text columns, in order; two of them are a pair.
        label: the label column.
        labels: the label names; row labels are indices into them.
        metrics: names of the metrics, the customary one first.
        templates: prompts with verbalizers, for the text-to-text framing.
        packaged: rows in a package, read first where it is installed.
        hub: rows on the hub or in a mirror.
        split: how the pooled rows are cut; None keeps the source's own splits.
        description: one line.
        licence: of the data.
        citation: whom to cite.
    """

    name: str
    type: TaskType
    text: tuple[str, ...]
    label: str
    category: str = "own data"
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    templates: tuple[Template, ...] = ()
    packaged: Packaged | None = None
    hub: Hub | None = None
    split: Split | None = None
    description: str = ""
    licence: str = ""
    citation: str = ""

    def __post_init__(self) -> None:
        if self.type not in get_args(TaskType):
            raise InvalidValue(f"The task `{self.name}` has the type `{self.type}`. {nearest(self.type, get_args(TaskType))}")
        if self.type in ("classification", "multilabel") and len(self.labels) < 2:
            raise InvalidValue(f"The task `{self.name}` has {len(self.labels)} labels; {self.type} needs at least two.")
        for template in self.templates:
            template.check_columns(self.text)
            if self.labels and template.verbalizer is not None and len(template.verbalizer.words) != len(self.labels):
                raise InvalidValue(
                    f"A template of `{self.name}` has {len(template.verbalizer.words)} label words for {len(self.labels)} labels."
                )

    @property
    def metric(self) -> str:
        """The customary metric, by which models are chosen."""
        return self.metrics[0]

    @property
    def outputs(self) -> int:
        """Numbers a head gives per row: one per label, or one for regression."""
        return len(self.labels) or 1

    @property
    def is_runnable(self) -> bool:
        """Whether the rows are at hand without a network: package installed, or in the mirror."""
        return any(source is not None and source.location is not None for source in (self.packaged, self.hub))


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
        InvalidValue: not YAML, or unknown, missing or contradicting fields.
    """
    import yaml

    try:
        fields = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as cause:
        raise InvalidValue(f"The task file `{file.name}` is not YAML: {cause}") from cause
    known = set(Task.__dataclass_fields__) - {"name"}
    for entry in fields:
        if entry not in known:
            raise InvalidValue(f"The task file `{file.name}` has the field `{entry}`, which tasks do not have. {nearest(entry, known)}")
    labels = tuple(str(label) for label in fields.pop("labels", ()))
    templates = tuple(_template(entry, labels, file) for entry in fields.pop("templates", ()))
    for entry, kind in (("packaged", Packaged), ("hub", Hub), ("split", Split)):
        if entry in fields:
            fields[entry] = kind(**_frozen(fields[entry]))
    return Task(name=file.stem, labels=labels, templates=templates, **_frozen(fields))


def _template(entry: Mapping[str, Any], labels: tuple[str, ...], file: Path) -> Template:
    words = entry.get("words")
    if words is None:
        return Template(entry["prompt"], Verbalizer(labels) if labels else None)
    if set(words) != set(labels):
        raise InvalidValue(
            f"A template of `{file.name}` has words for {sorted(words)}, but the labels are {sorted(labels)}. Give each label one word."
        )
    return Template(entry["prompt"], Verbalizer(tuple(str(words[label]) for label in labels)))


def _frozen(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


for _file in sorted(_CATALOG.glob("*.yaml")):
    tasks.register(_file.stem)(functools.partial(read_task, _file))
