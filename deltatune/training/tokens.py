"""Tokenised training rows, kept: the second run on the same rows, template and tokenizer reads them instead of making them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from deltatune.compiled.cache import cache_folder
from deltatune.tasks import TaskData
from deltatune.tasks.collector import collector_held
from deltatune.tasks.framing import Framing
from deltatune.tasks.tensors import Features

FEWEST = 1000
"""Rows from which on keeping pays."""
MOST_BYTES = 2 * 10**9
"""What is kept at most; the longest unused goes first."""
_RECIPE = 1
"""Counts up when what framings make of the same rows changes."""


def encoded(framing: Framing, data: TaskData) -> list[Features]:
    """The framing's training examples of a task's train split, from the cache where they are there.

    The key is the rows' fingerprint, the task, the framing with its template and length, and the tokenizer, so what is read is what
    would be made. A cache that cannot be written is done without.
    """
    if len(data.train) < FEWEST:
        return framing.encode(data.train)
    file = cache_folder() / "tokens" / f"{key(framing, data)}.arrow"
    if file.is_file():
        return _read(file)
    features = framing.encode(data.train)
    try:
        _write(file, features)
    except OSError:  # full or read-only: the examples are at hand anyway
        return features
    return features


def key(framing: Framing, data: TaskData) -> str:
    """Hash of all that decides the examples."""
    parts = [
        _RECIPE,
        data.fingerprint,
        repr(framing.task),
        framing.name,
        framing.max_length,
        repr(framing.template),
        getattr(framing, "packing", False),
        getattr(framing, "encoder_decoder", False),
        _tokenizer_hash(framing.tokenizer),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=8)
def _tokenizer_hash(tokenizer: Any) -> str:
    whole = tokenizer.backend_tokenizer.to_str() + str(tokenizer.special_tokens_map) + str(getattr(tokenizer, "chat_template", ""))
    return hashlib.sha256(whole.encode()).hexdigest()


@collector_held()
def _read(file: Path) -> list[Features]:
    import pyarrow

    os.utime(file)
    with pyarrow.memory_map(str(file)) as source:
        table = pyarrow.ipc.open_file(source).read_all()
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _write(file: Path, features: list[Features]) -> None:
    """In one piece or not at all, and room is made for it."""
    import pyarrow

    file.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({name: [feature[name] for feature in features] for name in features[0]})
    draft = file.with_suffix(f".{os.getpid()}")
    with pyarrow.OSFile(str(draft), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    draft.replace(file)
    kept = sorted(file.parent.glob("*.arrow"), key=lambda path: -path.stat().st_mtime)
    total = 0
    for path in kept:
        total += path.stat().st_size
        if total > MOST_BYTES and path != file:
            path.unlink(missing_ok=True)
