"""What a delta can be converted to: a table of writers, and the writers that need no more than the native format and merging."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltatune.checkpoint.foreign import Writing, formats
from deltatune.checkpoint.format import save
from deltatune.checkpoint.merged import write_merged
from deltatune.checkpoint.record import About
from deltatune.errors import InvalidValue, UnknownName, nearest
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.registry import Registry


@dataclass(frozen=True)
class Given:
    """A delta to be written in another form.

    Attributes:
        delta: it, attached and acting.
        tokenizer: of its backbone; None where there is none.
        about: what its record told of task, scores and training; empty for foreign ones.
        backbone_id: name that opens its backbone again.
        rank: that was asked for; None if none was.
        allow_left_out: write what the target can hold, though it cannot hold everything.
        overwrite: replace what is there.
    """

    delta: Delta | Composition
    tokenizer: Any = None
    about: About = field(default_factory=About)
    backbone_id: str | None = None
    rank: int | None = None
    allow_left_out: bool = False
    overwrite: bool = False

    def refuse_rank(self, target: str) -> None:
        """The target has no use for a rank.

        Raises:
            InvalidValue: one was asked for.
        """
        if self.rank is not None:
            raise InvalidValue(f"`--rank {self.rank}` means nothing for `--to {target}`. Leave it out, or convert to lora.")


Target = Callable[[Given, Path], Mapping[str, Any]]
"""Writes a delta to a place, whole or not at all, and tells what is worth telling, such as an error."""

targets: Registry[Target] = Registry("target", "targets")
"""Every form by its name on the command line, but for foreign formats that can be written: those are targets by themselves."""


def target_of(name: str) -> Target:
    """What writes this form.

    Raises:
        UnknownName: there is none of that name.
    """
    from deltatune.checkpoint import gguf_lora, low_rank

    assert gguf_lora and low_rank  # importing them registers them
    if name in targets:
        return targets[name]
    able = [other for other in formats if isinstance(formats[other], Writing)]
    if name not in able:
        raise UnknownName(f"Deltas are not converted to `{name}`. {nearest(name, [*targets, *able])}")

    def foreign(given: Given, out: Path) -> Mapping[str, Any]:
        given.refuse_rank(name)
        save(given.delta, out, format=name, overwrite=given.overwrite, backbone_id=given.backbone_id)
        return {}

    return foreign


@targets.register("native")
def native(given: Given, out: Path) -> Mapping[str, Any]:
    """Our own folder."""
    given.refuse_rank("native")
    save(given.delta, out, overwrite=given.overwrite, unfinished=True, backbone_id=given.backbone_id, **vars(given.about))
    return {}


@targets.register("merged")
def merged(given: Given, out: Path) -> Mapping[str, Any]:
    """A plain checkpoint of the backbone's own library."""
    given.refuse_rank("merged")
    write_merged(given.delta, out, tokenizer=given.tokenizer, overwrite=given.overwrite)
    return {}
