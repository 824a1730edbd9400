from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from deltatune.errors import InvalidValue, Unsupported
from deltatune.tasks import Rows, Task, Template, Verbalizer
from deltatune.tasks.framing import IGNORED
from deltatune.tasks.text2text import TextToTextFraming
from tests.tasks.conftest import bytes_tokenizer


class Bigram(nn.Module):
    """A language model that takes no ``logits_to_keep``: the next token depends on the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 300)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids))


def llama() -> nn.Module:
    sizes = dict(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2))


def t5() -> nn.Module:
    sizes = dict(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


DECODERS = {"llama": llama, "gpt2": gpt2, "bigram": Bigram}


def brute_force(framing: TextToTextFraming, model: nn.Module, row: dict[str, object]) -> list[float]:
    """sum_t log p(w_t | prompt, w_<t), one forward per word, no padding, no shortcut."""
    prompt = framing.encode_inputs([row])[0]["input_ids"]
    scores = []
    for word in framing.words:
        ids = torch.tensor([prompt + word])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        scores.append(sum(logits[len(prompt) - 1 + step, token].item() for step, token in enumerate(word)))
    return scores


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("template", [0, 1])
def test_scores_equal_brute_force(films: Task, tokenizer: PreTrainedTokenizerBase, rows: Rows, name: str, template: int) -> None:
    torch.manual_seed(0)
    model = DECODERS[name]().eval()
    framing = TextToTextFraming(films, tokenizer, template=template)
    assert framing.is_single_token == (template == 0)
    scores = framing.score(model, rows, batch_size=2)
    with torch.no_grad():
        expected = torch.tensor([brute_force(framing, model, row) for row in rows])
    assert torch.allclose(scores, expected, atol=1e-4)
    assert scores.std() > 0


def test_one_forward_of_the_prompt_is_enough_for_single_tokens(films: Task, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    framing = TextToTextFraming(films, tokenizer, template=Template("{text} It is", Verbalizer(("bad", "fine"))))
    assert framing.is_single_token
    inputs = framing.encode_inputs(rows)
    pairs = [(feature["input_ids"], word) for feature in inputs for word in framing.words]
    with torch.no_grad():
        assert torch.allclose(framing.score_batch(model, inputs), framing._score_joined(model, pairs).view(3, 2), atol=1e-5)


def test_an_encoder_decoder(films: Task, rows: Rows) -> None:
    torch.manual_seed(0)
    tokenizer, model = bytes_tokenizer(bos=True), t5().eval()
    framing = TextToTextFraming(films, tokenizer, template=1, encoder_decoder=True)
    assert framing.auto_class == "AutoModelForSeq2SeqLM"
    scores = framing.score(model, rows, batch_size=3)
    with torch.no_grad():
        for index, row in enumerate(rows):
            prompt = framing.encode_inputs([row])[0]["input_ids"]
            for label, word in enumerate(framing.words):
                decoder = torch.tensor([[0, *word[:-1]]])
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0].log_softmax(-1)
                expected = sum(logits[step, token].item() for step, token in enumerate(word))
                assert scores[index, label].item() == pytest.approx(expected, abs=1e-4)
    batch = framing.collate(framing.encode(rows))
    assert batch["labels"][0].tolist()[: len(framing.words[1])] == framing.words[1] and 2 in batch["labels"][0].tolist()
    assert model(**batch).loss.isfinite()


def test_training_examples(films: Task, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
    framing = TextToTextFraming(films, tokenizer)
    assert framing.auto_class == "AutoModelForCausalLM"
    feature = framing.encode(rows)[0]
    assert tokenizer.decode(feature["input_ids"]) == "a fine film It is fine</s>"
    answer = [label for label in feature["labels"] if label != IGNORED]
    assert tokenizer.decode(answer) == " fine</s>" and feature["labels"][-len(answer) :] == answer
    assert len(feature["labels"]) == len(feature["input_ids"])
    batch = framing.collate(framing.encode(rows))
    assert batch["labels"].shape == batch["input_ids"].shape
    assert ((batch["labels"] == IGNORED) | (batch["labels"] == batch["input_ids"])).all()


def test_the_loss_is_the_scores_and_the_end(films: Task, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    framing = TextToTextFraming(films, tokenizer)
    one = rows[:1]
    feature = framing.encode(one)[0]
    with torch.no_grad():
        loss = model(**framing.collate([feature])).loss
        logits = model(input_ids=torch.tensor([feature["input_ids"]])).logits[0].log_softmax(-1)
    end = logits[-2, tokenizer.eos_token_id].item()
    expected = -(framing.score(model, one)[0, 1].item() + end) / (len(framing.words[1]) + 1)
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_special_tokens_stand_in_front_only() -> None:
    task = Task(
        "films",
        "classification",
        ("text",),
        "label",
        labels=("bad", "fine"),
        templates=(Template("{text} It is", Verbalizer(("bad", "fine"))),),
    )
    tokenizer = bytes_tokenizer(bos=True)
    ids = TextToTextFraming(task, tokenizer).encode_inputs([{"text": "a film"}])[0]["input_ids"]
    assert tokenizer.decode(ids) == "<s>a film It is"
    assert tokenizer.decode(
        TextToTextFraming(task, tokenizer, encoder_decoder=True).encode_inputs([{"text": "a film"}])[0]["input_ids"]
    ).endswith("</s>")


WORDS = st.lists(st.sampled_from(["a", "fine", "film", "é", "boring,", "\n", "not good:", "xyz"]), max_size=40).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(first=WORDS, second=WORDS, max_length=st.integers(26, 50))
def test_only_the_texts_are_cut_and_the_longer_first(first: str, second: str, max_length: int) -> None:
    task = Task(
        "pairs",
        "classification",
        ("a", "b"),
        "label",
        labels=("bad", "fine"),
        templates=(Template("A: {a} B: {b} It is", Verbalizer(("bad", "fine"))),),
    )
    tokenizer = bytes_tokenizer(bos=True)
    framing = TextToTextFraming(task, tokenizer, max_length)
    feature = framing.encode(Rows({"a": [first], "b": [second], "label": [1]}))[0]
    assert len(feature["input_ids"]) <= max_length
    text = tokenizer.decode(feature["input_ids"])
    assert text.startswith("<s>A: ") and " B: " in text and text.endswith(" It is fine</s>")
    kept_first, kept_second = text.removeprefix("<s>A: ").removesuffix(" It is fine</s>").split(" B: ")
    assert first.strip().startswith(kept_first.rstrip("\ufffd")) and second.strip().startswith(kept_second.rstrip("\ufffd"))
    if len(tokenizer(first.strip()).input_ids) < len(tokenizer(second.strip()).input_ids) and kept_second == second.strip():
        assert kept_first == first.strip()


def test_a_template_longer_than_the_limit(films: Task, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
    wanted = r"template of `films` and its answer need more than 6 tokens alone in 3 of 3 rows. Raise `max_length` to (\d+) or more"
    with pytest.raises(InvalidValue, match=wanted) as refused:
        TextToTextFraming(films, tokenizer, max_length=6, template=1).encode(rows)
    said = re.search(wanted, str(refused.value))
    assert said is not None
    least = int(said[1])
    assert max(len(one["input_ids"]) for one in TextToTextFraming(films, tokenizer, max_length=least, template=1).encode(rows)) <= least
    with pytest.raises(InvalidValue):
        TextToTextFraming(films, tokenizer, max_length=least - 1, template=1).encode(rows)


def test_generation_keeps_the_whole_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    task = Task("gen", "text2text", ("text",), "label", templates=(Template("{text} Short:"),))
    framing = TextToTextFraming(task, tokenizer, max_length=32)
    feature = framing.encode(Rows({"text": ["a fine film " * 20], "label": ["it is not good at all"]}))[0]
    assert len(feature["input_ids"]) == 32
    assert tokenizer.decode([label for label in feature["labels"] if label != IGNORED]) == " it is not good at all</s>"
    with pytest.raises(Unsupported, match="no label words to score"):
        framing.score(llama(), Rows({"text": ["a"], "label": ["b"]}))


def test_refusals(films: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Unsupported, match="has no template"):
        TextToTextFraming(replace(films, templates=()), tokenizer)
    with pytest.raises(InvalidValue, match="has 2 templates, numbered from 0; 2 was asked for"):
        TextToTextFraming(films, tokenizer, template=2)
    with pytest.raises(Unsupported, match="has no label words"):
        TextToTextFraming(films, tokenizer, template=Template("{text} It is"))
    with pytest.raises(InvalidValue, match="names the column `txt`"):
        TextToTextFraming(films, tokenizer, template=Template("{txt} It is", Verbalizer(("bad", "fine"))))
