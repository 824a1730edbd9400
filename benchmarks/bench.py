"""``make bench``: measure the set again in at most 20 minutes, write ``docs/benchmarks.md``, and say what became worse.

Each script runs with settings that are quick enough, in the order of what it tells; one that no longer fits is left out and keeps its
last result. What it finds goes into ``results``. A figure that is worse than the last committed one by more than its noise band makes the
command fail, after everything is written. ``bench.py page`` only writes the page from the results that are there, ``bench.py check`` only
compares. Stop other work first: the bands are those of a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_figures import RESULTS, committed, result, worse
from bench_page import write

HERE = Path(__file__).parent
LIMIT = 20 * 60
"""Seconds of a whole run."""


@dataclass(frozen=True)
class Script:
    """A measurement with quick settings.

    Attributes:
        name: of the script and of its result.
        arguments: that make it quick.
        seconds: it takes about so long on two free cores.
        prints: it prints its result; else it writes it itself.
    """

    name: str
    arguments: tuple[str, ...] = ()
    seconds: int = 60
    prints: bool = True


SCRIPTS = (
    Script("step", ("--rounds", "3"), 180),
    Script("memory", seconds=60),
    Script("estimates", ("--again",), 200, prints=False),
    Script("many", ("S", "--rounds", "5"), 150),
    Script("many_training", ("T1", "T3", "--rounds", "5"), 90),
    Script("many_tensors", ("--rounds", "3"), 45),
    Script("uneven", ("minilm, head, news", "--rounds", "1"), 90),
    Script("step_methods", ("bitfit", "ia3", "dora", "--backbones", "minilm", "--rounds", "3"), 60),
    Script("frozen", seconds=90),
    Script("import_time", seconds=30),
    Script("attach_speed", seconds=30),
    Script("thousand_deltas", seconds=30),
    Script("many_real", ("--rounds", "3"), 120),
)
"""In the order of what they tell; together they take less than ``LIMIT``."""


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new values over the old ones, key by key: quick settings leave out what the last whole run has found.

    >>> merged({"S": {"S1": 4, "S2": 1}, "M": 2}, {"S": {"S1": 5}})
    {'S': {'S1': 5, 'S2': 1}, 'M': 2}
    """
    both = {
        key: merged(old[key], value) if isinstance(value, Mapping) and isinstance(old.get(key), Mapping) else value
        for key, value in new.items()
    }
    return {**old, **both}


def run(script: Script, left: float) -> str:
    """Measure, and put what was found into the results.

    Returns:
        What went wrong; nothing where all is well.
    """
    if script.seconds > left:
        return f"{script.name} was left out: about {script.seconds} s do not fit into the {left:.0f} s that are left."
    command = [sys.executable, str(HERE / f"{script.name}.py"), *script.arguments]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=left)
    except subprocess.TimeoutExpired:
        return f"{script.name} did not end within the {left:.0f} s that were left; its last result stays."
    if done.returncode:
        return f"{script.name} failed; its error stands above, and its last result stays."
    if script.prints:
        file, found = RESULTS / f"{script.name}.json", merged(result(script.name) or {}, json.loads(done.stdout))
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return ""


def measure(limit: float) -> list[str]:
    """Run the whole set; what went wrong, in sentences."""
    began, wrong = time.monotonic(), []
    for script in SCRIPTS:
        print(f"== {script.name}", file=sys.stderr, flush=True)
        wrong.append(run(script, limit - (time.monotonic() - began)))
    print(f"{time.monotonic() - began:.0f} s in all", file=sys.stderr)
    return [sentence for sentence in wrong if sentence]


def main() -> int:
    """The command; 1 where a figure is worse or a script failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "page", "check"], nargs="?", default="run")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of the whole run")
    asked = parser.parse_args()
    wrong = measure(asked.limit) if asked.verb == "run" else []
    if asked.verb != "check":
        write()
    if asked.verb != "page":
        wrong += worse(result, committed)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
