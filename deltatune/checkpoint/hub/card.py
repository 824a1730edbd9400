"""The model card of a pushed delta: a README.md made from its record, with what it is, how good it is, and how to load it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator

from deltatune.checkpoint.format import HUB_ID
from deltatune.checkpoint.record import Record
from deltatune.methods.fields import as_written

LIBRARY = "deltatune"


def card(record: Record, id: str, *, parameters: int, size_bytes: int, source: str, name: str | None = None, licence: str = "") -> str:
    """The text of the card; the same record gives the same card.

    Args:
        record: of the delta.
        id: hash of its files.
        parameters: numbers its tensor files hold.
        size_bytes: of its files.
        source: the hub, as ``pull`` takes it.
        name: what it is called there.
        licence: of the backbone, if known.
    """
    title = name or record.name
    wanted = name or id
    rows = [row for row in _rows(record, id, parameters, size_bytes, licence) if row[1]]
    return "\n".join(
        [
            *_front_matter(record),
            f"# {_plain(title)}",
            "",
            _sentence(record),
            "",
            "| | |",
            "|---|---|",
            *(f"| {label} | {value} |" for label, value in rows),
            "",
            *_parts(record),
            "## Load it",
            "",
            "```python",
            "import deltatune as dt",
            "from deltatune.checkpoint import hub",
            "",
            f'folder = hub.pull({json.dumps(source)}, {json.dumps(wanted)}, "{_folder(title)}")',
            "backbone, tokenizer, delta = dt.open(folder)",
            "```",
            "",
            "```bash",
            f"deltatune hub pull {wanted} --hub {shlex.quote(source)} --out {_folder(title)} && deltatune inspect {_folder(title)}",
            "```",
            "",
        ]
    )


def _front_matter(record: Record) -> Iterator[str]:
    """What the Hugging Face Hub reads: JSON's strings are YAML's, too."""
    parts = record.member_records or (record,)
    tags = [LIBRARY, "delta-tuning", *dict.fromkeys(part.method for part in parts if part.method), *filter(None, [record.about.task])]
    yield "---"
    yield f"library_name: {LIBRARY}"
    if record.origin.id and HUB_ID.fullmatch(record.origin.id):
        yield f"base_model: {json.dumps(record.origin.id)}"
    yield f"tags: {json.dumps([_plain(tag) for tag in tags], ensure_ascii=False)}"
    yield "---"
    yield ""


def _sentence(record: Record) -> str:
    about, origin = record.about, record.origin
    kind = f"A composition ({record.how}) of {len(record.members)} deltas" if record.is_composition else f"A {record.method} delta"
    seen = _plain(origin.fingerprint.class_name)
    backbone = f"`{_plain(origin.id)}` ({seen})" if origin.id else f"a {seen}"
    task = f", trained for `{_plain(about.task)}`" if about.task else ""
    return f"{kind} for {backbone}{task}. The backbone itself is not in it."


def _rows(record: Record, id: str, parameters: int, size_bytes: int, licence: str) -> Iterator[tuple[str, str]]:
    about, seen = record.about, record.origin.fingerprint
    yield "method", "" if record.is_composition else _recipe(record)
    yield "backbone", _code(record.origin.id or "")
    yield "backbone's class", _code(seen.class_name)
    yield "backbone's fingerprint", _code(f"{seen.structure}-{seen.weights}")
    yield "backbone's licence", _plain(licence)
    yield "task", _code(about.task or "")
    yield "labels", ", ".join(_code(label) for label in about.labels or ())
    yield "score", f"{about.score:.4f} {_plain(about.metric or '')}".strip() if about.score is not None else ""
    yield "all scores", ", ".join(f"{_plain(name)} {value:.4f}" for name, value in sorted((about.metrics or {}).items()))
    yield "numbers stored", f"{parameters:,}"
    yield "bytes", f"{size_bytes:,}"
    yield "sites", "" if record.is_composition else f"{len(record.sites):,}"
    yield "heads", ", ".join(_code(head) for head in record.heads)
    yield "trained with", ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in sorted((about.versions or {}).items()))
    yield "id", _code(id)


def _parts(record: Record) -> Iterable[str]:
    """The members of a composition."""
    if not record.is_composition:
        return []
    lines = [f"| {_code(part.name)} | {_recipe(part)} | {len(part.sites):,} |" for part in record.member_records]
    return ["| member | method | sites |", "|---|---|---|", *lines, ""]


def _recipe(record: Record) -> str:
    """The method with every field that has a value: what a default is may change after the card was written."""
    fields = [f"{name}={as_written(value)}" for name, value in record.fields.items() if value not in (None, [], ())]
    return _code(" ".join([record.method or "", *fields]))


def _code(text: str) -> str:
    return f"`{_plain(text)}`" if text else ""


def _plain(text: str) -> str:
    """Text that cannot break out of its cell or line, or steer a terminal."""
    shown = (letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(str(text).split()))
    return "".join(shown).replace("`", "'").replace("|", "/").replace("<", "&lt;")


def _folder(title: str) -> str:
    kept = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in title).strip("-")
    return kept or "delta"
