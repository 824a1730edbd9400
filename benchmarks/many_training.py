"""What does a training step of many jobs cost that share one forward and backward? PEFT's steps in turn beside ours.

The figures T1 to T6 of issue 6, on models with random weights: Llamas of width 256 with 6 layers and of width 768 with 8, LoRA of
rank 8 on all seven linear maps, AdamW, clipping and a schedule on either side. Jobs have rows of their own (b a step, T tokens each), a
seed of their own, and every token is learnt. A step of ours is ``Company.round``: data, forward, backward and every job's own
optimiser step. PEFT's side is one adapter that takes N steps with N optimisers, which spares it switching.

T4 is one LoRA step beside a forward and backward of all weights (OPT-like, width 512); T5 the largest difference from separate runs
after 50 steps; T6 the peak of resident memory of one process with 16 jobs, beside 16 processes with one each.
The floor of T1 to T3 is the plain backbone's forward and backward over the rows of all jobs; nobody's optimiser is in it.
``many_training.py --smoke`` only sees that everything runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from paired import interleave, ratio, report, timed
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, get_scheduler

import deltatune as dt
from deltatune.methods import LoRA
from deltatune.multi.together.company import Company
from deltatune.multi.together.shells import Shells
from deltatune.multi.together.tally import Tally
from deltatune.multi.together.wanted import wanted
from deltatune.tasks import Rows, Task, TaskData
from deltatune.training.borrowed import trainer_modules
from deltatune.training.measure import most_memory

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROLES = ["attention.*", "feed_forward.*"]
VOCABULARY, RANK = 4000, 8


@dataclass(frozen=True)
class Shape:
    """A backbone, and what a step of all jobs is.

    Attributes:
        width: of the backbone.
        layers: its depth.
        jobs: N.
        rows: b, of each job a step.
        tokens: T, of each row.
        bar: PEFT's steps in turn / ours.
    """

    width: int
    layers: int
    jobs: int
    rows: int
    tokens: int
    bar: float


SHAPES = {
    "T1, N=32 b=1 T=16": Shape(256, 6, 32, 1, 16, 5.0),
    "T1, N=8 b=1 T=16": Shape(256, 6, 8, 1, 16, 3.5),
    "T1, N=8 b=1 T=64": Shape(256, 6, 8, 1, 64, 2.0),
    "T2, N=8 b=1 T=16": Shape(768, 8, 8, 1, 16, 2.8),
    "T2, N=16 b=1 T=32": Shape(768, 8, 16, 1, 32, 2.1),
    "T3, N=4 b=8 T=128": Shape(256, 6, 4, 8, 128, 1.0),
}
SMOKE = {"smoke": Shape(32, 2, 3, 1, 8, 0.0)}
BARS = {"T4": 0.80, "T5": 1e-5, "T6": 0.15}


def backbone(shape: Shape) -> LlamaForCausalLM:
    heads = max(shape.width // 64, 1)
    sizes = dict(hidden_size=shape.width, intermediate_size=int(shape.width * 2.6875), num_hidden_layers=shape.layers)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=heads, max_position_embeddings=256, **sizes))


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word."""
    words = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(VOCABULARY - 2))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=256, pad_token="[PAD]", unk_token="[UNK]")


def texts(tokens: int, seed: int, rows: int = 64) -> TaskData:
    """Rows of so many tokens."""
    draw = torch.randint(0, VOCABULARY - 2, (rows, tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    task = Task("made-up-texts", "plain", (), "text", metrics=("log_likelihood",))
    made = Rows({"text": [" ".join(f"w{number}" for number in row) for row in draw]})
    return TaskData(task, made, made.select(range(2)), made.select(range(2)), f"made up {tokens} {seed}")


def jobs(shape: Shape, **settings: Any) -> list[dt.Job]:
    fixed = {"batch_size": shape.rows, "evaluations": 0, "max_length": shape.tokens, "max_steps": 10_000, "lr": 1e-3} | settings
    return [
        dt.Job(texts(shape.tokens, number), LoRA(rank=RANK), name=f"job-{number}", where=ROLES, seed=number, **fixed)
        for number in range(shape.jobs)
    ]


def company(shape: Shape, model: nn.Module, tokens: int | None) -> Company:
    """All jobs have joined."""
    own = tokenizer()
    asked = [wanted(job, job.name, model, own, None, overwrite=False) for job in jobs(shape)]
    made = Company(Shells(model), asked, own, Tally(shape.jobs, "none"), shape.jobs, tokens)
    for one in asked:
        made.join(one)
    return made


def theirs(shape: Shape) -> Callable[[], None]:
    """One round of PEFT: N steps, each with an optimiser and a schedule of its own."""
    config = peft.LoraConfig(r=RANK, target_modules=list(TARGETS))
    model = peft.get_peft_model(backbone(shape), config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = [torch.optim.AdamW(trained, lr=1e-3) for _ in range(shape.jobs)]
    schedules = [get_scheduler("linear", optimizer, 1000, 10_000) for optimizer in optimizers]
    ids = torch.randint(2, VOCABULARY, (shape.rows, shape.tokens))

    def turn() -> None:
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    return turn


def floor(shape: Shape) -> Callable[[], None]:
    """The frozen backbone's forward and backward over all jobs' rows at once, with one bias at the bottom that trains, and nothing else."""
    model = backbone(shape).requires_grad_(False).train()
    bias = torch.zeros(shape.width, requires_grad=True)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + bias)
    ids = torch.randint(2, VOCABULARY, (shape.jobs * shape.rows, shape.tokens))

    def turn() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        bias.grad = None

    return turn


def steps(shape: Shape, rounds: int) -> dict[str, Any]:
    """T1 to T3; the planner is on for T3, and everything shares one forward else."""
    planned = shape.bar == 1.0
    ours = company(shape, backbone(shape), None if planned else shape.jobs * shape.rows * (shape.tokens + 1))
    turn, least = theirs(shape), floor(shape)
    for work in (ours.round, ours.round, ours.round, turn, least):  # at first plans are made, and the planner probes
        work()
    seconds = interleave({"ours": lambda: timed(ours.round), "peft": lambda: timed(turn), "floor": lambda: timed(least)}, rounds)
    for member in ours.members:
        member.stack.close()
    gc.collect()  # or the next figure pays for what this one leaves
    return {
        "PEFT in turn / ours": round(ratio(seconds["peft"], seconds["ours"]), 2),
        "bar": shape.bar,
        "ours / floor": round(ratio(seconds["ours"], seconds["floor"]), 2),
        "milliseconds": {name: round(1e3 * statistics.median(times), 1) for name, times in seconds.items()},
    }


def one_step(rounds: int, *, smoke: bool) -> dict[str, float]:
    """T4: a LoRA step beside forward and backward of all weights; its floor is the frozen backbone's, without a step."""
    width, layers, rows, tokens = (32, 2, 2, 8) if smoke else (512, 8, 4, 128)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=width, ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=max(width // 64, 1),
        word_embed_proj_dim=width, dropout=0.0,
    )  # fmt: skip
    ids = torch.randint(2, VOCABULARY, (rows, tokens))
    whole, frozen = OPTForCausalLM(config).train(), OPTForCausalLM(config).train()
    plain, bias = OPTForCausalLM(config).requires_grad_(False).train(), torch.zeros(width, requires_grad=True)
    plain.get_input_embeddings().register_forward_hook(lambda module, args, output: output + bias)
    delta = dt.attach(frozen, LoRA(rank=RANK), ROLES)
    optimizer = torch.optim.AdamW(delta.parameter_groups(lr=1e-3))

    def full() -> None:
        whole(input_ids=ids, labels=ids).loss.backward()
        whole.zero_grad()

    def low() -> None:
        frozen(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def least() -> None:
        plain(input_ids=ids, labels=ids).loss.backward()
        bias.grad = None

    for work in (full, low, least):
        work()
    seconds = interleave({"full": lambda: timed(full), "LoRA": lambda: timed(low), "floor": lambda: timed(least)}, rounds)
    return {name: round(ratio(seconds[of], seconds["full"]), 3) for name, of in (("T4", "LoRA"), ("floor of T4", "floor"))}


def difference(shape: Shape, number: int) -> float:
    """T5: fused against separate runs, losses and weights."""
    model, own = backbone(shape), tokenizer()
    asked = jobs(Shape(shape.width, shape.layers, 3, 2, shape.tokens, 0.0), max_steps=number)
    found = []
    for outcome, job in zip(dt.train_together(asked, model, tokenizer=own, tokens=10**6, progress="none"), asked, strict=True):
        assert outcome.result is not None and outcome.apart is None
        alone = dt.train(backbone(shape), job.task, job.methods, where=ROLES, tokenizer=own, progress="none", **job.settings.to_dict())
        found += [abs(a["loss"] - b["loss"]) for a, b in zip(outcome.result.history, alone.history, strict=True)]
        states = [result.deltas[0].state_dict() for result in (outcome.result, alone)]
        found += [float((states[0][name] - states[1][name]).abs().max()) for name in states[0]]
    return max(found)


def memory(shape: Shape) -> dict[str, Any]:
    """T6: peaks of resident memory of processes of their own."""
    found = {}
    for side in ("ours", "peft"):
        words = [sys.executable, __file__, "--memory", side, json.dumps(shape.__dict__)]
        found[side] = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {
        "T6": round(found["ours"] / (shape.jobs * found["peft"]), 3),
        "megabytes": {side: round(size / 1e6) for side, size in found.items()},
    }


def resident(side: str, shape: Shape) -> int:
    """Peak of this process behind three steps of all jobs, or of one job by PEFT."""
    if side == "peft":
        turn = theirs(Shape(shape.width, shape.layers, 1, shape.rows, shape.tokens, 0.0))
    else:
        turn = company(shape, backbone(shape), 10**6).round
    for _ in range(3):
        turn()
    return most_memory()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", nargs="*", help="T1 to T6; all if left out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="a tiny backbone, once")
    options = parser.parse_args()
    with trainer_modules():
        if options.memory:
            print(resident(options.memory[0], Shape(**json.loads(options.memory[1]))))
            sys.exit()
        chosen = options.figures or ["T1", "T2", "T3", "T4", "T5", "T6"]
        rounds = 1 if options.smoke else options.rounds
        shapes = SMOKE if options.smoke else {name: shape for name, shape in SHAPES.items() if name[:2] in chosen}
        alone = one_step(rounds, smoke=options.smoke) if "T4" in chosen else {}  # first, in a process with nothing else in it
        found: dict[str, Any] = {name: steps(shape, rounds) for name, shape in shapes.items()} | alone
        small = next(iter(SMOKE.values()))
        if "T5" in chosen:
            found["T5"] = difference(small if options.smoke else SHAPES["T1, N=8 b=1 T=16"], 5 if options.smoke else 50)
        if "T6" in chosen:
            found |= memory(small if options.smoke else Shape(768, 8, 16, 1, 32, 0.0))
    report("training steps of many jobs together beside PEFT's in turn, medians of paired ratios", **found, bars=BARS)
