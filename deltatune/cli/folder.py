"""What a saved delta says about itself: ``deltatune inspect DIR``. Of tensors the headers are read, and no backbone is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from deltatune.checkpoint.format import read
from deltatune.checkpoint.record import Record
from deltatune.cli.contents import described_header, native_headers, tensors_table
from deltatune.cli.terminal import facts, show, show_json, size, table
from deltatune.methods.fields import as_written, in_short
from deltatune.training.opening import delta_folder
from deltatune.training.settings import Settings


def show_folder(folder: str, json: bool) -> None:
    """Print the record of the delta in ``folder``, or in the run it belongs to.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    place = delta_folder(folder)
    record = read(place)
    size_bytes = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    headers = native_headers(place)
    if json:
        files = {name: described_header(header) for name, header in headers.items()}
        show_json({**described(record), "size_bytes": size_bytes, "folder": str(place), "files": files})
        return
    about = record.about
    kind = f"a composition, {record.how}" if record.is_composition else _kind(record)
    show(
        Text.assemble((record.name, "bold cyan"), "  ", (kind, "bold")),
        "",
        facts(
            ("backbone", record.origin.id or "not named"),
            ("task", about.task),
            ("labels", ", ".join(about.labels or ())),
            ("test score", f"{about.score:.4f} {about.metric}" if about.score is not None else None),
            ("on disk", f"{size(size_bytes)} in {place}"),
            ("where", _words(about.where)),
            ("layers", _words(about.layers)),
            ("heads", ", ".join(record.heads)),
            ("members", ", ".join(f"{member.name}: {recipe_of(member)}" for member in record.member_records)),
            ("training", ", ".join(f"{name} {as_written(value)}" for name, value in _told(about.training).items())),
            ("data", about.data),
            ("versions", ", ".join(f"{name} {version}" for name, version in (about.versions or {}).items())),
        ),
    )
    for member in record.member_records or (record,):
        show(_sites(member))
    for header in headers.values():
        show(tensors_table(header.tensors))


def described(record: Record) -> dict[str, Any]:
    """A record as JSON tells it."""
    found: dict[str, Any] = {
        "name": record.name,
        "method": record.method,
        "fields": record.fields,
        "backbone": record.origin.id,
        "num_labels": record.origin.num_labels,
        "sites": list(record.sites),
        "heads": list(record.heads),
        **dataclasses.asdict(record.about),
    }
    if record.is_composition:
        members = [described(member) for member in record.member_records]
        found |= {"how": record.how, "weights": list(record.weights), "members": members}
    return found


def _kind(record: Record) -> str:
    """The method behind the delta's name, which need not be said again where the delta is called after it."""
    recipe = recipe_of(record)
    return recipe if record.name != record.method else recipe.removeprefix(record.name).strip() or "with its defaults"


def recipe_of(record: Record) -> str:
    """The method as one asks for it on the command line: ``lora rank=4``."""
    return in_short(record.method or "", record.fields)


def _words(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _told(training: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings worth a line: those that are not at their defaults."""
    usual = {setting.name: as_written(setting.default) for setting in dataclasses.fields(Settings)}
    return {name: value for name, value in (training or {}).items() if name in usual and as_written(value) != usual[name]}


def _sites(record: Record) -> Any:
    """The sites, those that differ only in a number folded into one line."""
    folded = Counter(re.sub(r"(?<![^.])\d+(?![^.:])", "*", key) for key in record.sites)
    drawn = table("site", "times", right=("times",))
    for pattern, count in folded.items():
        drawn.add_row(Text(pattern, style="cyan"), str(count))
    return drawn
