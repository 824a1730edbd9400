"""Does the estimate before a run tell what its steps need?

Each configuration is a backbone, a method, rows and tokens, in processes of its own, forked behind the imports. What is found: the
process's peak in two steps beyond its size when the backbone was loaded and read once; the high-water mark of live tensors by torch's
profiler, which counts every allocation, those within operations too; seconds of a step, the median of three. What is predicted:
``training.forecast``, which has seen no step of that many rows where rows were few enough to be continued on a line. The steps here are
written out anew and share nothing with those of the forecast. One thread; time is in processor seconds, since other work shares the
cores, and by the clock.
A configuration that is there already is not measured again; ``--again`` measures all.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paired import machine
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

import deltatune as dt
from deltatune.backbones import load_backbone
from deltatune.methods.making import make
from deltatune.training import trainer  # noqa: F401 - what a run has imported by then
from deltatune.training.forecast import SECONDS, at_rest, forecast
from deltatune.training.freed import keeping_freed
from deltatune.training.live import held_bytes
from deltatune.training.measure import most_memory, peak_memory, resident
from deltatune.training.settings import Settings
from deltatune.training.steps import Steps

RESULTS = Path(__file__).parent / "results" / "estimates.json"
BAR = 0.15
STEPS = 3


def minilm() -> nn.Module:
    return load_backbone("minilm", auto_class="AutoModelForSequenceClassification", num_labels=2)


def smollm2() -> nn.Module:
    return load_backbone("smollm2-135m", auto_class="AutoModelForCausalLM")


def opt() -> nn.Module:
    shape = dict(hidden_size=512, ffn_dim=2048, num_hidden_layers=8, num_attention_heads=8, word_embed_proj_dim=512)
    return OPTForCausalLM(OPTConfig(vocab_size=8000, max_position_embeddings=256, **shape))


def t5() -> nn.Module:
    shape = dict(d_model=512, d_ff=2048, d_kv=64, num_layers=4, num_decoder_layers=4, num_heads=8)
    return T5ForConditionalGeneration(T5Config(vocab_size=8000, decoder_start_token_id=0, **shape))


BACKBONES: dict[str, Callable[[], nn.Module]] = {"minilm": minilm, "smollm2-135m": smollm2, "opt": opt, "t5": t5}
CONFIGURATIONS = (
    ("minilm", "lora", 8, 64),
    ("minilm", "full", 8, 32),
    ("minilm", "bitfit", 4, 128),
    ("minilm", "prefix-tuning", 8, 32),
    ("opt", "lora", 4, 64),
    ("opt", "full", 2, 64),
    ("t5", "lora", 4, 64),
    ("t5", "adapter", 8, 32),
    ("opt", "ia3", 4, 96),
    ("t5", "full", 4, 32),
    ("minilm", "adapter", 16, 32),
    ("smollm2-135m", "lora", 1, 64),
    ("smollm2-135m", "bitfit", 2, 32),
)
CONTINUED = {"minilm, adapter, 16 x 32": 0.3, "t5, adapter, 8 x 32": 0.25}
"""Configuration -> seconds that a step of its trial may take, so few that fewer rows are continued on a line."""


def batch_of(backbone: nn.Module, rows: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 5000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    encoder = "SequenceClassification" in type(backbone).__name__
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2 if encoder else ids}


def stepper(backbone: nn.Module, delta: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One optimiser step, written out."""
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-6))
    parameters = list(delta.parameters())

    def step() -> None:
        backbone(**batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def attached(backbone: nn.Module, method: str) -> Any:
    torch.manual_seed(0)
    return dt.attach(backbone.train(), make(method, {}), head=False)


def found_memory(backbone: nn.Module, method: str, rows: int, tokens: int) -> dict[str, Any]:
    """Peaks of the process and of live tensors."""
    batch = batch_of(backbone, rows, tokens)
    for parameter in backbone.parameters():  # weights in mapped files are in memory once they are read
        parameter.sum()
    before = resident()
    assert before is not None
    with keeping_freed(), peak_memory() as peak:
        delta = attached(backbone, method)
        step = stepper(backbone, delta, batch)
        for _ in range(2):
            step()
        process = most_memory() - before
    del step, peak
    dt.detach(delta)
    del delta
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step = stepper(backbone, attached(backbone, method), batch)
        step()
        step()
    return {"resident_bytes": process, "live_bytes": high_water(seen)}


def high_water(seen: Any) -> int:
    """The most that lived at once of what was allocated while the profiler looked."""
    live = most = 0
    for event in sorted((one for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"), key=lambda one: one.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def predicted(backbone: nn.Module, method: str, rows: int, tokens: int, seconds: float) -> dict[str, Any]:
    """The forecast, how long it took, and right behind it what a step takes."""
    held, before = held_bytes(), at_rest(backbone)
    delta = attached(backbone, method)
    began = time.process_time()
    steps = Steps(backbone, [delta], lambda model, batch: model(**batch).loss, Settings())
    batch, delta_bytes = partial(batch_of, backbone, tokens=tokens), held_bytes() - held
    told = forecast(steps, batch, rows, delta_bytes=delta_bytes, before=before, seconds=seconds)
    took = time.process_time() - began
    step = stepper(backbone, delta, batch_of(backbone, rows, tokens))
    clock, processor = [], []
    with keeping_freed():
        step()
        for _ in range(STEPS):
            start = time.perf_counter(), time.process_time()
            step()
            clock.append(time.perf_counter() - start[0])
            processor.append(time.process_time() - start[1])
    found = {"seconds": round(statistics.median(clock), 5), "processor_seconds": round(statistics.median(processor), 5)}
    return {"predicted": told.to_json(), "took_processor_seconds": round(took, 2), "found": found}


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work gives in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with os.fdopen(writer, "w") as out:
                json.dump(work(), out)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as told:
        text = told.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a measurement failed; its error stands above")
    return dict(json.loads(text))


def measure(name: str, method: str, rows: int, tokens: int) -> dict[str, Any]:
    torch.manual_seed(0)
    backbone = BACKBONES[name]()
    memory = forked(lambda: found_memory(backbone, method, rows, tokens))
    seconds = CONTINUED.get(said(name, method, rows, tokens), SECONDS)
    line = forked(lambda: predicted(backbone, method, rows, tokens, seconds))
    line["found"] |= memory
    line["predicted / found"] = {what: round(line["predicted"][what] / value, 3) for what, value in line["found"].items()}
    return line


def said(name: str, method: str, rows: int, tokens: int) -> str:
    return f"{name}, {method}, {rows} x {tokens}"


def lines() -> dict[str, Any]:
    """What was measured so far."""
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))["configurations"]) if RESULTS.exists() else {}


def main(words: Sequence[str], again: bool) -> None:
    """Measure the configurations that hold one of the words, or all, and write each as it is done."""
    importlib.import_module("torch._dynamo")  # behind the fork, each configuration would import it anew
    names = {said(*one): one for one in CONFIGURATIONS}
    for name, one in names.items():
        if (words and not any(word in name for word in words)) or (name in lines() and not again):
            continue
        found = {**lines(), name: forked(lambda one=one: measure(*one))}  # type: ignore[misc]
        found = {**found, **{other: line for other, line in lines().items() if other != name}}
        print(name, found[name]["predicted / found"], file=sys.stderr, flush=True)
        ordered = {name: found[name] for name in names if name in found}
        report = {"question": "memory and time of a step, predicted / found", "bar": BAR, "configurations": ordered, "machine": machine()}
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of the configurations that are wanted; all if left out")
    parser.add_argument("--again", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # so that nothing has threads when it forks
    main(asked.words, asked.again)
