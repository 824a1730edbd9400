"""``write``: train, open the finished run anew, and let it go on writing from openings that have nothing to do with its task."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deltatune.errors import InvalidValue
from deltatune.study.diversity import distinct, self_bleu
from deltatune.study.procedures.procedure import procedures
from deltatune.study.procedures.train import RUN, train
from deltatune.study.trial import Outcome, Trial
from deltatune.tasks import get_task
from deltatune.tasks.rows import text_of
from deltatune.tasks.sampling import subset
from deltatune.tasks.tensors import moved
from deltatune.training.job import kind_of
from deltatune.training.predict import Predictor
from deltatune.training.run import load_data

SHOWN = 3
"""Texts that are kept."""


@dataclass(frozen=True)
class Writing:
    """What is to be written.

    Attributes:
        prompts: the task whose test rows give the openings.
        rows: so many of them.
        words: of each opening.
        tokens: written behind it; always so many, since longer texts repeat more.
    """

    prompts: str
    rows: int = 64
    words: int = 6
    tokens: int = 40


@procedures.register("write")
def write(trial: Trial, folder: Path) -> Outcome:
    """``train``, then texts drawn at temperature 1, in ``numbers["written"]``: ``distinct-1``, ``distinct-2``, ``self-bleu``.

    Options: the fields of ``Writing``.

    Raises:
        InvalidValue: options that cannot be, or a model that writes nothing.
        UnknownName: a task nobody knows.
    """
    began, run = time.perf_counter(), trial.run
    wanted = writing(trial)
    outcome = train(trial, folder)
    predictor = Predictor.open(folder / RUN)
    tokens, texts = written(predictor, openings(wanted), wanted, run.settings.eval_batch_size, run.settings.seed)
    measures: dict[str, Any] = {"distinct-1": distinct(tokens, 1), "distinct-2": distinct(tokens, 2), "self-bleu": self_bleu(texts)}
    numbers = {**outcome.numbers, "written": {**measures, "texts": len(texts), "shown": texts[:SHOWN]}}
    return replace(outcome, numbers=numbers, seconds=round(time.perf_counter() - began, 3))


def writing(trial: Trial) -> Writing:
    """What the options ask for.

    Raises:
        InvalidValue: they cannot be, or the model writes nothing.
        UnknownName: a task nobody knows.
    """
    told, settings = dict(trial.options), trial.run.settings
    numbers = [value for name, value in told.items() if name in ("rows", "words", "tokens") and type(value) is int and value > 0]
    if not isinstance(told.get("prompts"), str) or len(numbers) + 1 < len(told):
        raise InvalidValue(
            f"The procedure `write` of `{trial.said}` was given {told}. It wants `prompts`, the name of a task, and may have numbers above "
            "0 of `rows`, `words` and `tokens`."
        )
    if kind_of(trial.run.backbone) != "decoder" or settings.framing == "head":
        raise InvalidValue(f"`{trial.said}` cannot write: it wants a decoder such as `smollm2-135m`, without a head.")
    get_task(told["prompts"])
    return Writing(**told)


def openings(wanted: Writing) -> list[str]:
    """The first words of the first text of each row."""
    data = load_data(wanted.prompts)
    rows = subset(data.task, data.test, wanted.rows)
    return [" ".join(text_of(row[data.task.text[0]]).split()[: wanted.words]) for row in rows]


@torch.no_grad()
def written(predictor: Predictor, prompts: Sequence[str], wanted: Writing, batch_size: int, seed: int) -> tuple[list[list[int]], list[str]]:
    """Tokens and texts that the model draws behind the prompts, all of one length."""
    from transformers import GenerationConfig

    tokenizer, model = predictor.tokenizer, predictor.backbone
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=wanted.tokens,
        max_new_tokens=wanted.tokens,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokens: list[list[int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            read = tokenizer(list(prompts[start : start + batch_size]), padding=True, padding_side="left", return_tensors="pt")
            batch = moved({name: read[name] for name in ("input_ids", "attention_mask")}, model)
            made = model.generate(**batch, generation_config=config)  # type: ignore[operator]
            tokens += made[:, batch["input_ids"].shape[1] :].tolist()
    return tokens, [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
