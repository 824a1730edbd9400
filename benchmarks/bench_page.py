"""Write ``docs/benchmarks.md`` and its pictures from ``results``: tables, plots, the machine, peers' versions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from bench_figures import FROZEN, KERNEL, MANY, METHODS, SAVED, STEP, TOGETHER, WHOLE, Figure, Read, result
from bench_plots import pictures, said

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "benchmarks"

HEAD = """# Benchmarks

Written by `benchmarks/bench.py page` from the JSON in `benchmarks/results`; `make bench` measures the set again within 20 minutes, writes
this page, and fails where a figure is worse than the last committed one by more than its *band*, the share by which it moves from run to
run. Competitors take turns in one process, and what is quoted are medians of paired ratios, because ratios outlive a change of machine
and a busy neighbour, and milliseconds do not. The *bar* is what the project set itself; **bold** figures reach it, and what does not is
left to be seen. `benchmarks/NOTES.md` tells what was predicted, found and learnt.

{machine}

"""

PARTS: tuple[tuple[str, str, str, tuple[Figure, ...]], ...] = (
    (
        "A training step",
        "LoRA of rank 8 on all linear maps, fp32, optimiser included. The *floor* is what no delta can avoid: the frozen forward and the "
        "backward of its activations, measured by training one bias at the bottom.",
        "step",
        STEP,
    ),
    (
        "A training step of other methods",
        "With their own sites, DoRA and VeRA on all linear maps; the floor of prompts has their longer rows. PEFT where it has the method.",
        "",
        METHODS,
    ),
    (
        "Whole runs",
        "LoRA on real texts of uneven lengths, scoring included, beside Trainer and PEFT with their defaults; and the optimiser's share "
        "where very many small tensors train.",
        "",
        WHOLE,
    ),
    (
        "Activations kept for the backward",
        "Bytes of the distinct tensors that autograd keeps in one forward with LoRA on all linear maps, as a ratio to the floor's.",
        "",
        SAVED,
    ),
    (
        "Frozen layers, computed once",
        "A step of MiniLM (16 x 128) against one that is given what the layers below the delta give (`keep_frozen`), in processor seconds.",
        "",
        FROZEN,
    ),
    (
        "Many deltas in one batch",
        "Each row of a batch with its own delta, inference. S is a Llama of width 512 with 8 layers, M one of width 1024 with 12, random "
        "weights; 32 rows, 32 LoRAs.",
        "routed",
        MANY,
    ),
    (
        "Many jobs trained together",
        "N jobs of b rows of T tokens each, one step of all, against PEFT's steps in turn.",
        "",
        TOGETHER,
    ),
    ("Attaching, switching, files, import", "Ratios, and seconds for the import.", "", KERNEL),
)

ESTIMATES = """## Estimates before a run

`deltatune tune --dry-run` and `dt.estimate` tell memory and time of a step before it is trained; predicted / found, each configuration in
a fresh process on one thread. *Live* is the high-water mark of live tensors, found by torch's profiler; *process* is the peak of resident
memory beyond the loaded backbone. Time is in processor seconds, since other work shared the cores. Two numbers of *timed rows*: the
forecast tried so few and went on along a line. **Bold**: within {bar:.0%}.

![Predicted against found memory](benchmarks/estimates.svg)

| backbone, method, rows x tokens | live, MB | live | process, MB | process | step, s | step | timed rows |
|---|--:|--:|--:|--:|--:|--:|--:|
"""


def page(read: Read = result) -> str:
    """The whole page."""
    parts = [HEAD.format(machine=_machine(read))]
    for title, words, picture, figures in PARTS:
        rows = [_row(figure, value) for figure in figures if (value := figure.value(read)) is not None]
        if not rows:
            continue
        shown = f"![{title}](benchmarks/{picture}.svg)\n\n" if picture else ""
        parts.append(f"## {title}\n\n{fill(words, 140)}\n\n{shown}| | found | bar | band |\n|---|--:|--:|--:|\n" + "".join(rows) + "\n")
    parts += [_milliseconds(read), _estimates(read)]
    return "".join(parts).rstrip() + "\n"


def _row(figure: Figure, value: float) -> str:
    holds = figure.holds(value)
    found = f"**{said(value)}**" if holds else said(value)
    sign = "" if figure.bar is None else f"{'>=' if figure.more else '<='} {figure.bar:g}"
    return f"| {figure.says} | {found} | {sign} | {figure.band:.0%} |\n"


def _machine(read: Read) -> str:
    """What the results were taken on; those of one kind of machine in one sentence."""
    names = dict.fromkeys(figure.result for *_, figures in PARTS for figure in figures)
    kinds: dict[str, list[str]] = {}
    for name in [*names, "estimates"]:
        found = read(name)
        if found is not None:
            kinds.setdefault(_described(found.get("machine", {})), []).append(f"`{name}`")
    return "\n".join(f"- {', '.join(files)}: {words}" for words, files in kinds.items())


def _described(machine: Mapping[str, Any]) -> str:
    known = {"torch": "torch {}", "python": "Python {}", "transformers": "transformers {}", "peft": "PEFT {}", "threads": "{} threads"}
    versions = [text.format(machine[name]) for name, text in known.items() if name in machine]
    if "peft" not in machine:
        versions.append(f"PEFT {_pinned('peft')} as pinned")
    place = "two cores of a shared machine"
    if "processor" in machine:
        place = f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gb']} GB"
    return f"{place}; {', '.join([*([machine['gpu']] if 'gpu' in machine else []), *versions])}"


def _pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "?"


def _milliseconds(read: Read) -> str:
    """The times behind the first ratios."""
    found = read("step")
    if found is None:
        return ""
    rows = {name: entry["milliseconds"] for name, entry in found.items() if isinstance(entry, Mapping) and "milliseconds" in entry}
    who = list(next(iter(rows.values())))
    lines = [f"| {name} | {' | '.join(f'{times[one]:,.0f}' for one in who)} |" for name, times in rows.items()]
    table = _table(["milliseconds a step", *who], lines)
    return f"## The times behind the steps\n\n{table}\n\n"


def _table(heads: Sequence[str], lines: Iterable[str]) -> str:
    return "\n".join([f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}", *lines])


def _estimates(read: Read) -> str:
    found = read("estimates")
    if found is None:
        return ""
    bar = found["bar"]
    rows = []
    for name, line in found["configurations"].items():
        ratios = {key: f"**{value:.2f}**" if abs(value - 1) <= bar else f"{value:.2f}" for key, value in line["predicted / found"].items()}
        sizes = line["found"]
        timed = " and ".join(map(str, line["predicted"]["timed_rows"]))
        rows.append(
            f"| {name} | {sizes['live_bytes'] / 1e6:,.0f} | {ratios['live_bytes']} | {sizes['resident_bytes'] / 1e6:,.0f} | "
            f"{ratios['resident_bytes']} | {sizes['processor_seconds']:.2f} | {ratios['processor_seconds']} | {timed} |"
        )
    return ESTIMATES.format(bar=bar) + "\n".join(rows) + "\n"


def written(read: Read = result) -> dict[Path, str]:
    """The files that are made of the results, and what is to stand in them."""
    return {PAGE: page(read), **{PICTURES / f"{name}.svg": text for name, text in pictures(read).items()}}


def write() -> None:
    """Write the page and its pictures."""
    PICTURES.mkdir(exist_ok=True)
    for file, text in written().items():
        file.write_text(text, encoding="utf-8")
