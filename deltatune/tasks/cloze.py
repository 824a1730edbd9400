"""The cloze framing: a prompt whose answer is masked, filled in by an encoder's own masked-language-model head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import Unsupported
from deltatune.tasks.framing import Answer, Framing, How, framings
from deltatune.tasks.prompts import Prompts, chosen, distinct, special_tokens
from deltatune.tasks.rows import Row
from deltatune.tasks.task import Task
from deltatune.tasks.template import Template
from deltatune.tasks.tensors import IGNORED, Features, Watch, batched, in_batches, moved, without

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _has_words(task: Task) -> bool:
    return bool(task.templates and task.labels) and task.kind.spoken.is_closed(task)


class ClozeFraming(Framing):
    """score(label | x) = sum_t log p(w_t at mask t | prompt of x with as many masks as the label's word has tokens).

    Args:
        task: with label words.
        tokenizer: with a mask token.
        max_length: most tokens of one input.
        template: one of the task's templates by its number, or another one; the mask stands in the answer's place.
        manual: with the template; without, the columns stand alone.

    Raises:
        Unsupported: the tokenizer has no mask, or the task's answers are no label words.
    """

    name = "cloze"
    fits = staticmethod(_has_words)
    template: Template

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 256, *, template: int | Template = 0, manual: bool = True
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise Unsupported(
                f"The cloze framing of `{task.name}` was asked for, but {type(tokenizer).__name__} has no mask token. Use an encoder that "
                "was pretrained as a masked language model, or another framing."
            )
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.template = chosen(task, template, manual=manual)
        words = (task.kind.spoken.options(task, self.template, {}) or ()) if task.labels and task.kind.spoken.is_closed(task) else ()
        if not words:
            raise Unsupported(f"The cloze framing of `{task.name}` was asked for, but a {task.type} task has no label words. Use a head.")
        self.prompts = Prompts(task, self.template, tokenizer, self.max_length)
        self.words = self.prompts.tokens([f" {word}" for word in words])
        distinct(task, dict(zip(words, self.words, strict=True)))
        self._before, self._after = special_tokens(tokenizer)

    @classmethod
    def make(cls, task: Task, tokenizer: PreTrainedTokenizerBase, how: How) -> ClozeFraming:
        """The framing of an encoder."""
        how.refuse_packing(cls.name)
        if how.kind != "encoder":
            raise Unsupported(f"The cloze framing was asked for, but a {how.kind} fills in no masks. Use the text2text framing.")
        return cls(task, tokenizer, how.max_length, template=how.template, manual=how.manual)

    @property
    def backbone_options(self) -> dict[str, Any]:
        """The head has to be the backbone's own."""
        return {"trained_head": True}

    @property
    def auto_class(self) -> str:
        """A masked LM."""
        return "AutoModelForMaskedLM"

    def encode(self, rows: Sequence[Row]) -> list[Features]:
        """Prompt with masks, ``labels`` the word's tokens at the masks and -100 elsewhere."""
        words = [self.words[row[self.task.label]] for row in rows]
        return [self._filled(prompt, word) for prompt, word in zip(self._prompts(rows), words, strict=True)]

    def encode_inputs(self, rows: Sequence[Row]) -> list[Features]:
        """The prompts before they get their masks."""
        return [{"input_ids": prompt} for prompt in self._prompts(rows)]

    def _prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        room = self.max_length - len(self._before) - len(self._after) - max(map(len, self.words))
        return self.prompts.encode(rows, [room] * len(rows))

    def _filled(self, prompt: Sequence[int], word: Sequence[int]) -> Features:
        masks = [int(self.tokenizer.mask_token_id)] * len(word)
        labels = [*[IGNORED] * (len(self._before) + len(prompt)), *word, *[IGNORED] * len(self._after)]
        return {"input_ids": [*self._before, *prompt, *masks, *self._after], "labels": labels}

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and, where there are any, ``labels``, all (batch, length)."""
        return batched(features, self.tokenizer.pad_token_id)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """Cross-entropy at the masks."""
        logits = model(**without(batch)).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")

    def score(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, watch: Watch = iter) -> Tensor:
        """Log-probabilities of the label words at the masks: (rows, labels)."""
        inputs = self.encode_inputs(rows)
        scores = torch.empty(len(inputs), len(self.words))
        for batch in in_batches(model, inputs, batch_size, watch):
            for size in sorted({len(word) for word in self.words}):  # one forward for each number of masks
                scored = [index for index, word in enumerate(self.words) if len(word) == size]
                found = self._fillings(model, [inputs[index]["input_ids"] for index in batch], [self.words[index] for index in scored])
                scores[torch.tensor(batch)[:, None], torch.tensor(scored)] = found
        return scores

    def _fillings(self, model: nn.Module, prompts: Sequence[list[int]], words: Sequence[list[int]]) -> Tensor:
        """(prompts, words) for words of one length."""
        features = [self._filled(prompt, words[0]) for prompt in prompts]
        batch = moved(self.collate(features), model)
        places = batch["labels"] != IGNORED  # (batch, length), as many in each row
        logits: Tensor = model(**without(batch)).logits.float()
        shares = logits[places].view(len(prompts), len(words[0]), -1).log_softmax(-1)
        tokens = torch.tensor(words, device=shares.device).T  # (masks, words)
        return shares[:, torch.arange(len(tokens), device=shares.device)[:, None], tokens].sum(1).cpu()

    def answers(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, most: int | None = None, watch: Watch = iter
    ) -> list[Answer]:
        """The likeliest label."""
        scored = self.score(model, rows, batch_size, watch)
        return [Answer(int(row.argmax()), dict(zip(self.task.labels, row.softmax(-1).tolist(), strict=True))) for row in scored]

    @classmethod
    def shown(cls, task: Task, row: Row) -> list[tuple[str, str]]:
        """The prompt with a mask, and the right word, of each template."""
        return [(f"{template.render(row)} [MASK]", task.kind.spoken.say(task, template, row)) for template in task.templates]


framings.register("cloze")(ClozeFraming)
