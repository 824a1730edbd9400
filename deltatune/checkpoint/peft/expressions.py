"""Regular expressions of foreign configs: bounded in length, and in the time that all of a config may take together."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from deltatune.errors import CheckpointError

MAX_LETTERS = 2**18
"""Of all expressions of a config, each as often as its counts can repeat it, because so often it is compiled."""
MAX_SECONDS = 10.0
"""Of the processor, for all matches of a config."""

_BRACES = re.compile(r"\\.|\{(?P<low>\d*),?(?P<high>\d*)\}|[{}]", re.DOTALL)


class Expressions:
    """The regular expressions of one config, by PEFT's rules.

    Args:
        file: the config, for errors.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._letters = 0
        self._seconds = MAX_SECONDS

    def fits(self, expression: str, text: str) -> bool:
        """The whole text is what the expression says.

        Raises:
            CheckpointError: as ``match`` does.
        """
        return self._run(expression, "fullmatch", text) is not None

    def match(self, expression: str, text: str) -> regex.Match[str] | None:
        """The text begins with what the expression says.

        Raises:
            CheckpointError: the expression is malformed, or it or the time it takes goes beyond the bounds.
        """
        return self._run(expression, "match", text)

    def _run(self, expression: str, how: str, text: str) -> regex.Match[str] | None:
        if expression not in self._compiled:
            self._compiled[expression] = self._compile(expression)
        begun = time.process_time()
        try:
            run = getattr(self._compiled[expression], how)
            found: regex.Match[str] | None = run(text, timeout=max(self._seconds, 0.001))  # which is the processor's time, too
        except (TimeoutError, MemoryError) as cause:
            raise self._beyond(expression, f"takes more than {MAX_SECONDS:g} seconds to look at the names of this backbone") from cause
        self._seconds -= time.process_time() - begun
        return found

    def value(self, pattern: Mapping[str, Any], path: str, default: Any) -> Any:
        """The value of a table such as ``rank_pattern`` for a module: keys are expressions for the end of its path; the first counts."""
        return next((value for key, value in pattern.items() if self.match(rf"(.*\.)?({key})$", path)), default)

    def _compile(self, expression: str) -> regex.Pattern[str]:
        counts = [int(text[:6]) for match in _BRACES.finditer(expression) for text in (match["high"] or match["low"],) if text]
        self._letters += len(expression) * math.prod(count for count in counts if count)
        if self._letters > MAX_LETTERS:
            raise self._beyond(expression, f"stands for more than {MAX_LETTERS:,} letters, with its repetitions and those before it")
        try:
            return regex.compile(_BRACES.sub(_literal, expression))
        except (regex.error, RecursionError, OverflowError, ValueError) as cause:
            raise CheckpointError(f"`{self.file}` has a malformed expression, `{expression:.80}`: {cause}. Correct it.") from cause

    def _beyond(self, expression: str, why: str) -> CheckpointError:
        return CheckpointError(f"`{self.file}` has an expression, `{expression:.80}`, that {why}. Simplify it, or name the modules.")


def _literal(found: re.Match[str]) -> str:
    """Braces that count nothing stand for themselves, as in ``re``; ``regex`` would read errors to be tolerated."""
    counts = len(found[0]) > 1 and found[0] != "{}"
    return found[0] if counts else re.escape(found[0])
