"""The schema of a task's YAML: which fields there are, whose they are, and what they can hold. Nothing is read but the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltatune.errors import InvalidValue, UnknownName, missing_extra, nearest
from deltatune.tasks.types.base import task_types

COMMON: dict[str, type | tuple[type, ...]] = {
    "description": str,
    "category": str,
    "type": str,
    "text": list,
    "label": str,
    "metrics": list,
    "hub": dict,
    "mirror": str,
    "packaged": dict,
    "split": dict,
    "templates": list,
    "language": str,
    "licence": str,
    "citation": str,
}
"""Fields of every type, and what YAML has to give for them."""
OWN: dict[str, type | tuple[type, ...]] = {
    "labels": list,
    "words": (dict, str),
    "range": list,
    "choices": dict,
    "context": str,
    "references": str,
}
"""Fields that belong to some types; each type says which are its own and which it needs."""
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hub": (("id",), ("config", "mirror", "labels", "splits", "columns")),
    "packaged": (("pip", "module", "path", "reader"), ("columns", "encoding")),
    "split": ((), ("validation", "test", "cap")),
    "choices": ((), ("columns", "list", "keys", "right", "wrong", "first")),
}
"""Fields that hold fields: those they need, and those they may have."""
NEEDED = ("type", "text", "label")
SPACED = "spaced"
CATEGORIES = (
    "acceptability-linguistic", "commonsense-reasoning", "data-to-text", "dialogue", "emotion-hate-irony", "grammar-style", "math", "nli",
    "paraphrase-sts", "qa-extractive-abstractive", "qa-multiple-choice", "question-type-intent", "sentiment", "sequence-labelling",
    "summarization-simplification", "topic", "translation",
)  # fmt: skip
"""Categories of the built-in tasks; plug-ins may have others."""


def checked(file: Path) -> dict[str, Any]:
    """The fields of a task's file, each of the right kind and none of another type.

    Raises:
        InvalidValue: not YAML, or a field that is unknown, missing, another type's or of another kind.
    """
    fields, place = _loaded(file), f"The task file `{file.name}`"
    known = {**COMMON, **OWN}
    for entry in fields:
        if entry not in known:
            raise InvalidValue(f"{place} has the field `{entry}`, which tasks do not have. {nearest(str(entry), known)}")
    for entry, wanted in known.items():
        if entry in fields and not isinstance(fields[entry], wanted):
            raise InvalidValue(f"{place} has {fields[entry]!r} for `{entry}`; it has to be {_said(wanted)}.")
    _check_type(fields, place)
    for entry, (needed, optional) in PARTS.items():
        _check_part(fields.get(entry), needed, optional, f"{place}, `{entry}`,")
    _check_names(fields, place)
    for template in fields.get("templates", ()):
        _check_template(template, place)
    return fields


def _loaded(file: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as cause:
        raise missing_extra("pyyaml", "train") from cause
    try:
        fields = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as cause:
        raise InvalidValue(f"The task file `{file.name}` is not YAML: {cause}") from cause
    if not isinstance(fields, dict):
        raise InvalidValue(f"The task file `{file.name}` holds {type(fields).__name__} where fields and their values are wanted.")
    return fields


def _check_type(fields: Mapping[str, Any], place: str) -> None:
    """The type's own fields are there, and no other type's."""
    if "type" not in fields:
        raise InvalidValue(f"{place} has no `type`. {nearest('', task_types)}")
    try:
        kind = task_types[fields["type"]]
    except UnknownName as cause:
        raise InvalidValue(f"{place} has the type `{fields['type']}`. {nearest(str(fields['type']), task_types)}") from cause
    for entry in OWN:
        if entry in fields and entry not in kind.fields:
            raise InvalidValue(f"{place} has the field `{entry}`, which a {kind.name} task does not have. {nearest(entry, kind.fields)}")
    paired = "right" in (fields.get("choices") or {})
    needed = [*NEEDED[: 2 if paired else 3], *(entry for entry, needs in kind.fields.items() if needs)]
    for entry in needed:
        if entry not in fields:
            raise InvalidValue(f"{place} has no `{entry}`, which a {kind.name} task needs. Add it.")


def _check_part(part: Any, needed: Sequence[str], optional: Sequence[str], place: str) -> None:
    if part is None:
        return
    for entry in part:
        if entry not in (*needed, *optional):
            raise InvalidValue(f"{place} has the entry `{entry}`, which it cannot have. {nearest(str(entry), (*needed, *optional))}")
    for entry in needed:
        if entry not in part:
            raise InvalidValue(f"{place} has no `{entry}`. Add it.")


def _check_names(fields: Mapping[str, Any], place: str) -> None:
    """Labels, columns and metrics are texts, each once; YAML reads a bare ``no`` as false."""
    lists = {entry: fields.get(entry, ()) for entry in ("text", "labels", "metrics")}
    for entry, names in lists.items():
        for name in names:
            if not isinstance(name, str):
                raise InvalidValue(f"{place} has {name!r} among its `{entry}`, which is no text. Write it in quotes.")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidValue(f"{place} has `{twice}` twice among its `{entry}`.")
    for number in fields.get("range", ()):
        if isinstance(number, bool) or not isinstance(number, int | float) or len(fields["range"]) != 2:
            raise InvalidValue(f"{place} has {fields['range']} for `range`; it has to be two numbers.")


def _check_template(template: Any, place: str) -> None:
    if isinstance(template, str):
        return
    if not isinstance(template, Mapping) or "prompt" not in template:
        raise InvalidValue(f"{place} has the template {template!r}; it has to be a text, or {{prompt: ..., words: ...}}.")
    _check_part(template, ("prompt",), ("words",), f"{place}, a template,")


def label_words(words: Any, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The label words in the order of the labels (of tagging: of the kinds of span); the names themselves where no words are given.

    Raises:
        InvalidValue: not one word for each.
    """
    labels = task_types[fields["type"]].spoken.worded(tuple(fields.get("labels", ())))
    if words is None:
        return labels
    if words == SPACED:
        return tuple(" ".join(label.replace("_", " ").replace("-", " ").lower().split()) for label in labels)
    if not isinstance(words, Mapping) or set(words) != set(labels):
        lacking, foreign = _difference(labels, words)
        raise InvalidValue(f"A template has words for other labels than the task's ({lacking or 'none'} lacking, {foreign or 'none'} odd). "
                           "Give each label one word.")  # fmt: skip
    if bad := [word for word in words.values() if not isinstance(word, str)]:
        raise InvalidValue(f"The word {bad[0]!r} is no text. Write it in quotes.")
    return tuple(words[label] for label in labels)


def _difference(labels: Iterable[str], words: Any) -> tuple[str, str]:
    given = set(words) if isinstance(words, Mapping) else {words}
    return ", ".join(sorted(set(labels) - given)), ", ".join(sorted(map(str, given - set(labels))))


def _said(wanted: type | tuple[type, ...]) -> str:
    names: dict[type, str] = {str: "a text", list: "a list", dict: "fields with values"}
    return " or ".join(names[one] for one in (wanted if isinstance(wanted, tuple) else (wanted,)))
