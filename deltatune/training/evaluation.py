"""Score a backbone, with whatever deltas act on it, on the rows of a task: by scores of labels, or by answers it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deltatune.tasks import Rows
from deltatune.tasks.framing import Framing, Watch, by_length, moved, padded
from deltatune.tasks.metrics import compute
from deltatune.tasks.rows import Row
from deltatune.tasks.text2text import TextToTextFraming

LONGEST_ANSWER = 128
"""Most tokens of an answer."""


def score_rows(framing: Framing, backbone: nn.Module, rows: Rows, batch_size: int = 64, watch: Watch = iter) -> dict[str, float]:
    """Each of the task's metrics, and ``score``, the customary one; ``watch`` is given the batches."""
    references = framing.references(rows)
    if isinstance(framing, TextToTextFraming) and not framing.words:
        lengths = [len(ids) for ids in framing.tokenizer([str(text) for text in references], add_special_tokens=False)["input_ids"]]
        predictions: list[Any] = answers(framing, backbone, rows, batch_size, most=max(lengths) + 2, watch=watch)
    else:
        predictions = framing.predict(framing.score(backbone, rows, batch_size, watch))
    values = compute(framing.task.metrics, predictions, references)
    return {"score": values[framing.task.metric], **values}


def answers(
    framing: TextToTextFraming,
    backbone: Any,
    rows: Sequence[Row],
    batch_size: int = 64,
    most: int = LONGEST_ANSWER,
    watch: Watch = iter,
) -> list[str]:
    """What the model writes for each row, greedily, up to ``most`` tokens.

    Prompts of unequal length are padded in front for a decoder, so that each answer begins where its prompt ends.
    """
    from transformers import GenerationConfig

    tokenizer = framing.tokenizer
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=min(most, LONGEST_ANSWER),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=getattr(backbone.config, "decoder_start_token_id", None),
    )
    inputs = framing.encode_inputs(rows)
    prompts = [feature["input_ids"] for feature in inputs]
    written = [""] * len(prompts)
    training = backbone.training
    backbone.eval()
    for chosen in watch(by_length(inputs, batch_size)):
        batch = _padded([prompts[index] for index in chosen], tokenizer.pad_token_id or 0, front=not framing.encoder_decoder)
        tokens = backbone.generate(**moved(batch, backbone), generation_config=config, use_cache=True)
        new = tokens if framing.encoder_decoder else tokens[:, batch["input_ids"].shape[1] :]
        for index, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            written[index] = text.strip()
    backbone.train(training)
    return written


def _padded(prompts: Sequence[list[int]], pad: int, *, front: bool) -> dict[str, Tensor]:
    """Ids and mask (batch, longest)."""
    ids, mask = padded([prompt[::-1] if front else prompt for prompt in prompts], pad), padded([[1] * len(prompt) for prompt in prompts], 0)
    return {"input_ids": ids.flip(1) if front else ids, "attention_mask": mask.flip(1) if front else mask}
