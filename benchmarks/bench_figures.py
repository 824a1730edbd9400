"""The figures that ``make bench`` holds: where each lies in ``results``, its bar, and how far it moves by noise alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
Read = Callable[[str], Mapping[str, Any] | None]
"""Name of a result -> what it holds; None where there is none."""


@dataclass(frozen=True)
class Figure:
    """A number of a result.

    Attributes:
        result: the file in ``results``, without its ending.
        path: keys that lead to the number.
        says: what it is.
        band: share of its value by which it moves from run to run; found by running again, see ``NOTES.md``.
        more: larger is better.
        bar: what is to be reached; None where it lies in the result as ``bar``, or there is none.
    """

    result: str
    path: tuple[str, ...]
    says: str
    band: float
    more: bool = False
    bar: float | None = None

    def value(self, read: Read) -> float | None:
        """What was found."""
        found: Any = read(self.result)
        for key in self.path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return float(found) if isinstance(found, int | float) else None

    @property
    def name(self) -> str:
        """The file and the keys."""
        return " / ".join((self.result, *self.path))

    def holds(self, value: float) -> bool | None:
        """Whether a value reaches the bar; None without one."""
        if self.bar is None:
            return None
        return value >= self.bar if self.more else value <= self.bar

    def is_worse(self, now: float, before: float) -> bool:
        """Slower, larger or less by more than noise explains.

        >>> Figure("step", (), "", 0.1).is_worse(1.2, 1.0), Figure("step", (), "", 0.1).is_worse(1.05, 1.0)
        (True, False)
        """
        return now < before * (1 - self.band) if self.more else now > before * (1 + self.band)


def _steps() -> list[Figure]:
    found = []
    for backbone, said, reach in (("minilm", "MiniLM", 1.10), ("smollm2-135m", "SmolLM2-135M", 1.06), ("opt", "OPT-like", None)):
        for key, bar, words in (("ours / floor", reach, "ours"), ("peft / floor", None, "PEFT"), ("ours / full", 0.79, "ours / full")):
            ratio = words if "full" in words else f"{words} / floor"
            found.append(Figure("step", (backbone, key), f"{said}: {ratio}", 0.12, bar=bar))
    return found


STEP = tuple(_steps())
METHODS = tuple(
    Figure("step_methods", (method, backbone, key), f"{method} on {said}: {words}", 0.12, bar=bar)
    for method, reach in (
        ("bitfit", 1.10), ("ia3", 1.10), ("adapter", 1.10), ("prefix-tuning", 1.10), ("prompt-tuning", 1.10), ("dora", 1.25), ("vera", 1.10)
    )
    for backbone, said in (("minilm", "MiniLM"), ("smollm2-135m", "SmolLM2-135M"), ("opt", "OPT-like"))
    for key, words, bar in (("ours / floor", "ours / floor", reach), ("ours / peft", "ours / PEFT", 1.0))
)  # fmt: skip
SAVED = tuple(
    Figure("memory", (backbone, key), f"{backbone}: {words} / floor", 0.01, bar=bar if key == "recompute / floor" else None)
    for backbone, bar in (
        ("minilm, dropout 0", 1.30),
        ("minilm, dropout 0.1", 1.15),
        ("smollm2-135m, dropout 0", None),
        ("opt, dropout 0", None),
    )
    for key, words in (("ours / floor", "ours"), ("recompute / floor", "ours with `recompute`"), ("peft / floor", "PEFT"))
)
WHOLE = (
    *(
        Figure("uneven", (case, "ours / theirs"), f"{case}: tokens a second, ours / Trainer + PEFT", 0.15, more=True, bar=1.5)
        for case in ("minilm, head, sentences", "minilm, head, news", "smollm2-135m, words, news")
    ),
    Figure("many_tensors", ("one vector / step",), "optimiser's share of a step of 10,080 small tensors", 0.3, bar=0.03),
)
FROZEN = tuple(
    Figure("frozen", (case, "gain"), f"{case}: steps without / with", 0.15, more=True)
    for case in ("LoRA, top 1", "LoRA, top 2", "LoRA, top 3", "last quarter, two of six", "head alone")
)
MANY = (
    Figure("many", ("S", "S1"), "S, 32 deltas decoding: PEFT's mixed batch / ours", 0.25, more=True, bar=4.0),
    Figure("many", ("M", "S2"), "M, the same", 0.30, more=True, bar=2.0),
    Figure("many", ("S", "S3"), "S: PEFT in turn / ours", 0.25, more=True, bar=30.0),
    Figure("many", ("S", "S4"), "S: ours / plain backbone", 0.12, bar=1.2),
    Figure("many", ("M", "S4"), "M: ours / plain backbone", 0.12, bar=1.2),
    Figure("many", ("S", "S5"), "S: 32 deltas / one", 0.10, bar=1.1),
    Figure("many", ("S", "S6"), "S: 2,000 deltas loaded / 32", 0.10, bar=1.1),
    Figure("many", ("S", "S7"), "S, prefill: PEFT / ours", 0.20, more=True, bar=1.7),
    Figure("many", ("M", "S7"), "M, prefill: PEFT / ours", 0.20, more=True, bar=1.3),
    Figure("many_real", ("classifiers", "peft / ours"), "MiniLM, 64 classifiers: PEFT / ours", 0.20, more=True),
    Figure("many_real", ("classifiers", "ours / backbone"), "MiniLM, 64 classifiers: ours / plain backbone", 0.12),
    Figure("many_real", ("decoding", "peft / ours"), "SmolLM2-135M, 32 LoRAs decoding: PEFT / ours", 0.20, more=True),
    Figure("many_real", ("decoding", "ours / backbone"), "SmolLM2-135M, 32 LoRAs decoding: ours / plain backbone", 0.12),
)
TOGETHER = tuple(
    Figure("many_training", (case, "PEFT in turn / ours"), f"{case}: PEFT in turn / ours", 0.15, more=True, bar=bar)
    for case, bar in (
        ("T1, N=32 b=1 T=16", 5.0),
        ("T1, N=8 b=1 T=16", 3.5),
        ("T1, N=8 b=1 T=64", 2.0),
        ("T2, N=8 b=1 T=16", 2.8),
        ("T2, N=16 b=1 T=32", 2.1),
        ("T3, N=4 b=8 T=128", 1.0),
    )
)
KERNEL = (
    Figure("import_time", ("extra_seconds",), "seconds of importing, beyond torch", 1.0, bar=0.2),
    Figure("attach_speed", ("ratio",), "attaching LoRA to 210 linear maps: ours / PEFT", 0.45, bar=1.0),
    Figure("thousand_deltas", ("attach_ratio",), "attaching the 1,000th delta / the first", 0.3, bar=1.5),
    Figure("thousand_deltas", ("switch_ratio",), "switching among 1,000 / among 2", 0.3, bar=1.5),
    Figure("files", ("medians", "save_ratio"), "saving: ours / PEFT", 0.4),
    Figure("files", ("medians", "load_ratio"), "loading: ours / PEFT", 0.3),
    Figure("files", ("thousand", "ratio"), "loading the 1,000th / the first", 0.3, bar=1.5),
)
FIGURES = (*STEP, *METHODS, *SAVED, *WHOLE, *FROZEN, *MANY, *TOGETHER, *KERNEL)


def result(name: str) -> Mapping[str, Any] | None:
    """A result as it lies there."""
    file = RESULTS / f"{name}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def committed(name: str) -> Mapping[str, Any] | None:
    """A result as it was committed last; None where it never was."""
    place = f"HEAD:./results/{name}.json"
    done = subprocess.run(["git", "show", place], cwd=HERE, capture_output=True, text=True, check=False)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else None


def worse(now: Read = result, before: Read = committed) -> list[str]:
    """A sentence for each figure that is worse than before by more than its band."""
    found = []
    for figure in FIGURES:
        new, old = figure.value(now), figure.value(before)
        if new is not None and old is not None and figure.is_worse(new, old):
            found.append(f"{figure.says}: {new:g}, was {old:g}; its noise band is {figure.band:.0%}.")
    return found
