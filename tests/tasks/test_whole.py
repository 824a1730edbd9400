"""Plain texts and chats: what is learnt of them, packing, and where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from deltatune.errors import DataError, InvalidValue, Unsupported
from deltatune.tasks import Task, task_from_file
from deltatune.tasks.framing import IGNORED, How, framings
from deltatune.tasks.loading import encode_rows
from deltatune.tasks.metrics import compute
from deltatune.tasks.tensors import items
from deltatune.tasks.whole import ChatFraming, PlainFraming
from tests.tasks.conftest import bytes_tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
PLAIN = Task("texts", "plain", ("text",), "text", metrics=("log_likelihood",))
CHATS = Task("chats", "conversation", ("messages",), "messages", metrics=("log_likelihood",))
CHAT = [
    {"role": "user", "content": "a fine film"},
    {"role": "assistant", "content": "not good"},
    {"role": "user", "content": "boring"},
    {"role": "assistant", "content": "it is bad"},
]


@pytest.fixture
def chatting() -> PreTrainedTokenizerBase:
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = 512
    return tokenizer


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=512)).eval()


def test_only_the_assistants_turns_are_learnt(chatting: PreTrainedTokenizerBase) -> None:
    [feature] = ChatFraming(CHATS, chatting, 512).encode([{"messages": CHAT}])
    learnt = [token for token in feature["labels"] if token != IGNORED]
    assert chatting.decode(learnt) == "not good</s>it is bad</s>"
    assert all(label in (IGNORED, token) for label, token in zip(feature["labels"], feature["input_ids"], strict=True))
    text = chatting.decode(feature["input_ids"])
    assert text.startswith("<s>user: a fine film</s>") and "<s>assistant: it is bad</s>" in text


def test_of_a_long_chat_the_oldest_is_left_out(chatting: PreTrainedTokenizerBase) -> None:
    [feature] = ChatFraming(CHATS, chatting, 12).encode([{"messages": CHAT}])
    assert len(feature["input_ids"]) == 12
    assert chatting.decode([token for token in feature["labels"] if token != IGNORED]).endswith("it is bad</s>")


def test_a_template_that_rewrites_earlier_turns(chatting: PreTrainedTokenizerBase) -> None:
    chatting.chat_template = "{% for m in messages[-2:] %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    with pytest.raises(DataError, match="writes earlier turns otherwise"):
        ChatFraming(CHATS, chatting).encode([{"messages": CHAT}])


def test_packed_texts_do_not_see_each_other() -> None:
    tokenizer, model = bytes_tokenizer(), llama()
    rows = [{"text": text} for text in ("a fine film", "boring", "the plot is thin but the cast is fine", "not good: it is bad")]
    alone, together = (PlainFraming(PLAIN, tokenizer, 20, packing=packing) for packing in (False, True))
    features = together.encode(rows)
    assert 1 < len(features) < 4 and all(len(feature["input_ids"]) <= 20 for feature in features)
    single, packed = alone.collate(alone.encode(rows)), together.collate(features)
    assert "attention_mask" not in packed
    assert items(single) == items(packed)
    with torch.no_grad():
        assert together.loss(model, packed).item() == pytest.approx(alone.loss(model, single).item(), abs=1e-3)


def test_a_long_text_is_learnt_in_pieces() -> None:
    tokenizer = bytes_tokenizer()
    features = PlainFraming(PLAIN, tokenizer, 10).encode([{"text": "the plot is thin but the cast is fine " * 4}])
    assert len(features) > 2 and max(len(feature["input_ids"]) for feature in features) == 10
    assert features[-1]["input_ids"][-1] == tokenizer.eos_token_id
    assert all(feature["labels"] == [IGNORED, *feature["input_ids"][1:]] for feature in features)


def test_likelihoods_are_those_of_the_model() -> None:
    tokenizer, model = bytes_tokenizer(), llama()
    framing = PlainFraming(PLAIN, tokenizer, 40)
    rows = [{"text": "a fine film"}, {"text": "boring"}]
    said = framing.likelihoods(model, rows)
    batch = framing.collate(framing.encode(rows))
    with torch.no_grad():
        mean = framing.loss(model, batch).item() / int(items(batch))
    assert compute("log_likelihood", said, framing.references(rows))["log_likelihood"] == pytest.approx(-mean, abs=1e-4)
    assert compute("perplexity", said, framing.references(rows))["perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-3)
    assert isinstance(framing.answers(model, rows, most=3)[0].value, str)


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_type_of_a_file_is_seen_from_its_columns(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": f"{k}"}, {"role": "assistant", "content": "so"}]} for k in range(20)]
    kinds = {
        "conversation": chats,
        "generation": [{"prompt": f"{k} is", "completion": "a number"} for k in range(20)],
        "plain": [{"text": f"number {k}"} for k in range(20)],
        "classification": [{"text": f"number {k}", "label": str(k % 2)} for k in range(20)],
    }
    for kind, rows in kinds.items():
        data = task_from_file(lines(tmp_path / f"{kind}.jsonl", rows))
        assert data.task.type == kind and sum(map(len, data.splits.values())) == 20
    row = {"prompt": "2 is", "completion": "a number"}
    task = task_from_file(tmp_path / "generation.jsonl").task
    assert task.templates[0].render(row) == "2 is" and task.kind.spoken.say(task, task.templates[0], row) == "a number"


def test_bad_chats_and_backbones(tmp_path: Path, chatting: PreTrainedTokenizerBase) -> None:
    for bad, message in (
        ([{"role": "user", "content": "x"}], "no turn of the assistant"),
        ("hello", "has no chat in `messages`"),
        ([{"role": "robot", "content": "x"}], "roles are system, user, assistant, tool"),
    ):
        with pytest.raises(DataError, match=message):
            encode_rows(CHATS, [{"messages": bad}])
    with pytest.raises(Unsupported, match="has no chat template"):
        ChatFraming(CHATS, bytes_tokenizer())
    with pytest.raises(Unsupported, match="the backbone is an encoder"):
        framings["chat"].make(CHATS, chatting, How())
    with pytest.raises(InvalidValue, match="`packing` was asked for, but the head framing"):
        framings["head"].make(Task("x", "regression", ("text",)), chatting, How(packing=True))
