"""Experiment 3: what a step costs, in memory and in time, by backbone, batch and length of the texts.

Memory is that of live tensors at their peak, counted exactly, as a GPU's allocator would hold it; the process's is measured beside it.
Times are those of rounds in which a method and full fine-tuning take turns. T5 and RoBERTa-large have random weights, which cost the same.
``full`` has 315 measurements, about ten hours on two cores; those that need more memory than is free, or too long, fail and are listed.
On a larger machine ``deltatune study resume efficiency-full --again`` adds them. ``quick`` takes five minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from deltatune.methods import Adapter, BitFit, DiffPruning, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.basis import AP, BF, DIFF, FT, LR, PF, PT
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, Verdict, experiments
from deltatune.study.experiments.judging import all_of
from deltatune.study.plots.series import Points, draw_series
from deltatune.study.procedures.step import INFERENCE, PARTS
from deltatune.study.record import Record
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Mean, mean_of

DELTAS = (LR, AP, BF, PT, PF)
BATCHES, LENGTHS = (1, 8, 32, 64), (16, 32, 64, 128, 256, 480)
"""The paper's."""

LENGTH, SMALL, LARGE = 128, 8, 32
"""Tokens of a text where batches are compared; the largest small batch, and the smallest large one."""

PAPER = "roberta-large@random"
"""The backbone, at a batch of 1, whose times the paper's authors logged."""

FALLS = {PT: 0.44, BF: 0.27, AP: 0.10}
"""The least that the backward's time fell there, as a share of full fine-tuning's."""

CLEARLY = 1.1
"""Times a forward takes, from which on it is clearly slower."""

LACKING = "more memory than is free"
"""What the error of a measurement says that ended for want of memory."""

FEWEST = 4
"""Lengths below which no claim about times is decided."""


def design(profile: Profile) -> Study:
    """Full fine-tuning and six deltas; full: five backbones, the paper's batches at 128 tokens and its lengths at a batch of 1."""
    full = profile == "full"
    recipes = (LoRA(), Adapter(), BitFit(), PromptTuning(num_virtual_tokens=10), PrefixTuning(), DiffPruning())
    labels = (LR, AP, BF, PT, PF, DIFF)
    options = {"most_seconds": 300} if full else {"most_seconds": 60, "rounds": 3}
    entries = [Entry(FT, (FullFineTuning(),), procedure="cost", options={**options, "plain": True})]
    entries += [
        Entry(label, (recipe,), procedure="cost", options=options)
        for label, recipe in zip(labels, recipes, strict=True)
        if full or label in (LR, BF)
    ]
    cells = [(1, length) for length in LENGTHS] + [(batch, LENGTH) for batch in BATCHES[1:]]
    return Study(
        name=f"efficiency-{profile}",
        experiment="efficiency",
        profile=profile,
        backbones=("minilm", "smollm2-135m", "t5-base@random", "roberta-large@random", "t5-large@random") if full else ("minilm",),
        tasks=("glue-sst2",),
        methods=tuple(entries),
        points=tuple({"batch_size": batch, "max_length": length} for batch, length in (cells if full else [(1, 16), (8, LENGTH)])),
        baselines=False,
    )


def measured(evidence: Evidence) -> list[Record]:
    """The trials that were measured; they have no score."""
    return [record for record in evidence.records if record.state == "done" and "live_bytes" in record.numbers]


def batch_of(record: Record) -> int:
    """Rows."""
    return int(record.cell["batch_size"])


def length_of(record: Record) -> int:
    """Tokens of a row."""
    return int(record.cell["max_length"])


def shares(evidence: Evidence, methods: Sequence[str], fits: Callable[[int], bool]) -> list[tuple[Record, float]]:
    """The trials of these methods at batches that fit, each with its memory as a share of full fine-tuning's in the same cell."""
    found = measured(evidence)
    whole = {(one.backbone, batch_of(one), length_of(one)): one.numbers["live_bytes"] for one in found if one.method == FT}
    return [
        (one, one.numbers["live_bytes"] / whole[key])
        for one in found
        if one.method in methods and fits(batch_of(one)) and (key := (one.backbone, batch_of(one), length_of(one))) in whole
    ]


def ratios(evidence: Evidence, method: str, parts: Sequence[str], backbone: str | None = None) -> list[float]:
    """Of each cell at a batch of 1, the median over rounds of the parts' time as a share of full fine-tuning's in the same round."""
    return [
        ratio_of(one, parts)
        for one in measured(evidence)
        if one.method == method and batch_of(one) == 1 and one.numbers["rounds"] and backbone in (None, one.backbone)
    ]


def ratio_of(record: Record, parts: Sequence[str]) -> float:
    """Median over the rounds of a trial."""
    rounds = record.numbers["rounds"]
    return float(median(sum(one[part][0] for part in parts) / sum(one[part][1] for part in parts) for one in rounds))


def _where(record: Record) -> str:
    return f"{record.method} on {record.backbone} at {batch_of(record)} x {length_of(record)}"


def saves_most(evidence: Evidence) -> Judgement:
    """The largest saving at small batches is about three quarters."""
    found = shares(evidence, DELTAS, lambda batch: batch <= SMALL)
    if len({one.backbone for one, _ in found}) < 2:
        return Judgement("undecided", "Fewer than two backbones were measured at small batches beside full fine-tuning.")
    one, least = min(found, key=lambda pair: pair[1])
    return Judgement("holds" if 1 - least >= 0.7 else "does not hold", f"The most is saved by {_where(one)}: {1 - least:.1%}.")


def saves_a_third(evidence: Evidence) -> Judgement:
    """Each delta saves a third at each large batch."""
    found = shares(evidence, DELTAS, lambda batch: batch >= LARGE)
    if len({one.backbone for one, _ in found}) < 2:
        return Judgement("undecided", "Fewer than two backbones were measured at large batches beside full fine-tuning.")
    one, most = max(found, key=lambda pair: pair[1])
    there = sum(share <= 2 / 3 for _, share in found)
    said = f"A third is saved in {there} of {len(found)} measurements; the least by {_where(one)}: {1 - most:.1%}."
    return Judgement("holds" if there == len(found) else "does not hold", said)


def _interval(evidence: Evidence, method: str, parts: Sequence[str], backbone: str | None = None) -> Mean | None:
    found = ratios(evidence, method, parts, backbone)
    return mean_of(found) if len(found) >= FEWEST else None


def backward_falls(evidence: Evidence) -> Judgement:
    """By what the authors' log says, or more, for each of its three methods."""
    told = []
    for method, least in FALLS.items():
        mean = _interval(evidence, method, ("backward",), PAPER)
        if mean is None:
            return Judgement("undecided", f"{method} on {PAPER} was timed at fewer than {FEWEST} lengths.")
        low, high = 1 - mean.high, 1 - mean.low
        said = f"{method}: {1 - mean.value:.0%} less ({low:.0%} to {high:.0%}; the paper at least {least:.0%})."
        told.append(Judgement("holds" if low >= least else "does not hold" if high < least else "undecided", said))
    return all_of(told)


def only_the_adapter_slows(evidence: Evidence) -> Judgement:
    """Of the log's three methods, the adapter alone makes inference clearly slower."""
    told = []
    for method in (AP, BF, PT):
        mean = _interval(evidence, method, (INFERENCE,), PAPER)
        if mean is None:
            return Judgement("undecided", f"{method} on {PAPER} was timed at fewer than {FEWEST} lengths.")
        slower, not_slower = mean.low > CLEARLY, mean.high < CLEARLY
        as_said, against = (slower, not_slower) if method == AP else (not_slower, slower)
        said = f"{method} takes {mean.value:.2f} times as long ({mean.low:.2f} to {mean.high:.2f})."
        told.append(Judgement("holds" if as_said else "does not hold" if against else "undecided", said))
    return all_of(told)


def diff_pruning_takes_more(evidence: Evidence) -> Judgement:
    """In every measurement."""
    found = shares(evidence, (DIFF,), lambda batch: True)
    if len({one.backbone for one, _ in found}) < 2:
        return Judgement("undecided", "Fewer than two backbones were measured with diff pruning beside full fine-tuning.")
    more, values = sum(share > 1 for _, share in found), [share for _, share in found]
    said = f"It takes more in {more} of {len(found)} measurements, {min(values):.2f} to {max(values):.2f} times as much."
    return Judgement("holds" if more == len(found) else "does not hold", said)


def trains_faster(evidence: Evidence) -> Judgement:
    """A step of the adapter takes at most 60 % of a step of full fine-tuning, over all backbones and lengths."""
    mean = _interval(evidence, AP, PARTS)
    if mean is None:
        return Judgement("undecided", f"{AP} was timed at fewer than {FEWEST} lengths.")
    others = [f"{method} {one.value:.2f}" for method in DELTAS if method != AP and (one := _interval(evidence, method, PARTS))]
    said = f"A step of {AP} takes {mean.value:.2f} of a step of {FT} ({mean.low:.2f} to {mean.high:.2f})."
    verdict: Verdict = "holds" if mean.high <= 0.6 else "does not hold" if mean.low > 0.6 else "undecided"
    return Judgement(verdict, f"{said} Others: {'; '.join(others)}." if others else said)


def memory_lines(evidence: Evidence, backbone: str) -> dict[str, Points]:
    """Method -> (batch, gigabytes of live tensors) at 128 tokens."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for one in sorted(measured(evidence), key=batch_of):
        if one.backbone == backbone and length_of(one) == LENGTH:
            value = one.numbers["live_bytes"] / 1e9
            lines.setdefault(one.method, []).append((float(batch_of(one)), value, value, value))
    return dict(lines)


def time_lines(evidence: Evidence, backbone: str, part: str) -> dict[str, Points]:
    """Method -> (length, milliseconds, with the interval over rounds) of a part at a batch of 1."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for one in sorted(measured(evidence), key=length_of):
        if one.backbone == backbone and batch_of(one) == 1 and one.numbers["rounds"]:
            mean = mean_of([1e3 * each[part][0] for each in one.numbers["rounds"]])
            lines.setdefault(one.method, []).append((float(length_of(one)), mean.value, mean.low, mean.high))
    return dict(lines)


def sections(evidence: Evidence) -> list[Section]:
    """Of each backbone: memory by batch, then times by length."""
    there = {one.backbone for one in measured(evidence)}
    backbones = [one for one in evidence.study.backbones if one in there]
    pairs = [(_memory(evidence, name, number), _times(evidence, name, number)) for number, name in enumerate(backbones)]
    return [*(section for pair in pairs for section in pair), *([_fits(evidence)] if pairs else [])]


def _fits(evidence: Evidence) -> Section:
    """E8: each backbone and batch in a line, with the memory of every method, or that it does not fit."""
    methods = _order(evidence)
    cells = {(one.backbone, batch_of(one), one.method): one for one in evidence.records if length_of(one) == LENGTH}
    rows = []
    for backbone, batch in dict.fromkeys((backbone, batch) for backbone, batch, _ in cells):
        told = [held(cells.get((backbone, batch, method))) for method in methods]
        if any(one != "-" for one in told):
            rows.append((backbone, str(batch), *told))
    note = (
        f"GB of live tensors in a training step, texts of {LENGTH} tokens, fp32, AdamW. What takes more memory than was free where it was "
        "tried does not fit. Nothing is offloaded: that takes a GPU, whose memory the CPU's would help out."
    )
    return Section("What fits", "", (Table(("backbone", "batch", *methods), rows, left=2, note=note),))


def held(record: Record | None) -> str:
    """GB of a measurement, ``does not fit``, or a dash where neither is known."""
    if record is not None and "live_bytes" in record.numbers:
        return f"{record.numbers['live_bytes'] / 1e9:.2f}"
    return "does not fit" if record is not None and LACKING in (record.error or "") else "-"


def _order(evidence: Evidence) -> list[str]:
    return [entry.label for entry in evidence.study.entries]


def _memory(evidence: Evidence, backbone: str, number: int) -> Section:
    own = [one for one in measured(evidence) if one.backbone == backbone and length_of(one) == LENGTH]
    batches = sorted({batch_of(one) for one in own})
    live = {(one.method, batch_of(one)): one for one in own}
    rows = []
    for method in _order(evidence):
        cells = [method]
        for batch in batches:
            found, whole = live.get((method, batch)), live.get((FT, batch))
            cells.append("-" if found is None else f"{found.numbers['live_bytes'] / 1e9:.2f}")
            saved = None if found is None or whole is None else 1 - found.numbers["live_bytes"] / whole.numbers["live_bytes"]
            cells.append("-" if saved is None else f"{saved:.0%}")
            cells.append("-" if found is None else f"{(found.peak_memory_bytes or 0) / 1e9:.2f}")
        rows.append(cells)
    columns = ("method", *(f"{what} at {batch}" for batch in batches for what in ("GB", "saved", "process")))
    note = (
        f"Texts of {LENGTH} tokens, fp32, AdamW. GB of live tensors at their peak in a training step, what is saved beside {FT}, and GB of "
        "the process beyond its libraries. A dash: not measured; see the failures."
    )
    picture = Picture(
        f"memory-{number}",
        draw_series(memory_lines(evidence, backbone), _order(evidence), "rows of a batch", "GB of live tensors"),
        f"Peak memory by batch on {backbone}, {LENGTH} tokens.",
    )
    return Section(f"Memory, {backbone}", "", (Table(columns, rows, note=note), picture))


def _times(evidence: Evidence, backbone: str, number: int) -> Section:
    parts = (*PARTS, INFERENCE)
    lines = {part: time_lines(evidence, backbone, part) for part in parts}
    lengths = sorted({x for line in lines["forward"].values() for x, *_ in line})
    rows = []
    for method in (one for one in _order(evidence) if one in lines["forward"]):
        found = {(part, x): value for part in parts for x, value, *_ in lines[part].get(method, ())}
        rows.append([method, *(" / ".join(f"{found[part, x]:.1f}" for part in parts) if ("forward", x) in found else "-" for x in lengths)])
    if not rows:
        return Section(f"Time, {backbone}", "No cell was quick enough to be timed.")
    pictures = tuple(
        Picture(
            f"{part}-{number}",
            draw_series(lines[part], _order(evidence), "tokens of a text", f"milliseconds, {part}"),
            f"Time of the {part} by length on {backbone}, a batch of 1.",
        )
        for part in ("backward", INFERENCE)
    )
    note = f"Milliseconds of {' / '.join(parts)}, means over rounds at a batch of 1. Comparisons use the ratios within a round."
    return Section(f"Time, {backbone}", "", (Table(("method", *(f"{x:g}" for x in lengths)), rows, note=note), *pictures))


CLAIMS = (
    Claim("E6", "At small batches (1, 8) delta tuning saves up to three quarters of the memory (at least 70 %).", saves_most),
    Claim("E6", "At large batches (32, 64) it saves at least a third.", saves_a_third),
    Claim(
        "E7",
        "On RoBERTa-large at a batch of 1 the backward is 44 % shorter with prompt tuning, 27 % with BitFit, 10 % with the adapter.",
        backward_falls,
    ),
    Claim("E7", "Of adapter, BitFit and prompt tuning only the adapter slows inference clearly (by a tenth).", only_the_adapter_slows),
    Claim("E24", "Diff pruning takes more memory than full fine-tuning.", diff_pruning_takes_more),
    Claim("F1", "An adapter's training step takes at most 60 % of full fine-tuning's (40 % less).", trains_faster),
)

experiments.register("efficiency")(Experiment("efficiency", "What does a step cost, in memory and in time?", design, CLAIMS, sections))
