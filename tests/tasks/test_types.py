"""What each task type says of its answers: rows, splits, words, heads, and the constant predictor."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerBase,
)

from deltatune.errors import DataError, InvalidValue, UnknownName
from deltatune.tasks import Rows, Task, Template, Verbalizer
from deltatune.tasks.framing import HeadFraming
from deltatune.tasks.loading import build, encode_rows
from deltatune.tasks.task import Choices
from deltatune.tasks.tensors import items
from deltatune.tasks.text2text import TextToTextFraming
from deltatune.tasks.types import task_types
from deltatune.tasks.types.tagging import Tags
from tests.tasks.conftest import bytes_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
ASK = Template("{text}\nAnswer:")
GOAL = Task(
    "goals",
    "choice",
    ("goal",),
    "label",
    choices=Choices(columns=("sol1", "sol2")),
    templates=(Template("{goal}\n{options}\nAnswer:"), Template("{goal} Do it like this:"), Template("{goal} By {options:or}?")),
)
CITY = Task(
    "cities",
    "tagging",
    ("tokens",),
    "tags",
    labels=("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
    templates=(Template("{tokens}\nNames:", Verbalizer(("person", "place"))),),
)
PIECE = Task(
    "pieces", "span", ("question", "context"), "answers", context="context", templates=(Template("{context}\n{question}\nAnswer:"),)
)
FEELING = Task(
    "feelings", "multilabel", ("text",), "label", labels=("joy", "fear"), templates=(replace(ASK, verbalizer=Verbalizer(("joy", "fear"))),)
)
DEGREE = Task("degrees", "regression", ("text",), "score", range=(0.0, 5.0), templates=(ASK,))
SHORTER = Task("shorter", "generation", ("text",), "target", references="all", templates=(ASK,))


def model_of(kind: type[nn.Module], outputs: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(BertConfig(**SIZES, num_labels=outputs))  # type: ignore[call-arg]
    return model.eval()


def test_registry() -> None:
    assert {"classification", "multilabel", "regression", "choice", "tagging", "span", "generation"} <= set(task_types)
    assert task_types["text2text"].name == "generation"
    with pytest.raises(UnknownName, match=r"No task type is called `choise`. Did you mean `choice`"):
        Task("x", "choise", ("text",))


def goals(count: int = 2) -> Rows:
    raw = [{"goal": "boring film", "sol1": "leave it", "sol2": "a fine one is good", "label": index % 2} for index in range(count)]
    return Rows.of(encode_rows(GOAL, raw), GOAL.kind.columns(GOAL))


@pytest.mark.parametrize(
    ("choices", "row", "index"),
    [
        (Choices(columns=("a", "b")), {"a": "x", "b": "y", "label": 1}, 1),
        (Choices(columns=("a", "b"), first="1"), {"a": "x", "b": "y", "label": "2"}, 1),
        (Choices(columns=("a", "b")), {"a": "x", "b": "y", "label": "0"}, 0),
        (Choices(list="o", first="A"), {"o": ["A)x", "B)y"], "label": "B"}, 1),
        (Choices(list="c.text", keys="c.label"), {"c": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "label": "3"}, 2),
    ],
)
def test_options_of_every_form(choices: Choices, row: dict[str, Any], index: int) -> None:
    task = replace(GOAL, text=(), choices=choices, templates=())
    [found] = encode_rows(task, [row])
    assert found == {"options": ["x", "y", "z"][: len(found["options"])], "label": index}


def test_minimal_pairs_do_not_give_the_answer_away_by_their_order() -> None:
    task = Task("pairs", "choice", (), choices=Choices(right="good", wrong="bad"), templates=(Template("{options}\nBetter:"),))
    rows = encode_rows(task, [{"good": f"she sees {index}", "bad": f"her see {index}"} for index in range(200)])
    assert 60 < sum(row["label"] for row in rows) < 140
    assert all(row["options"][row["label"]].startswith("she") for row in rows)
    assert task.kind.inputs(task) == ("options",)


def test_a_label_that_is_no_option() -> None:
    with pytest.raises(DataError, match=r"label 'C' in `label`; its options go by A, B"):
        encode_rows(
            replace(GOAL, choices=Choices(columns=("sol1", "sol2"), first="A")), [{"goal": "", "sol1": "", "sol2": "", "label": "C"}]
        )
    with pytest.raises(InvalidValue, match="has one of the forms"):
        Choices(columns=("a", "b"), list="c")


def test_choice_in_words(tokenizer: PreTrainedTokenizerBase) -> None:
    row, spoken = goals()[1], GOAL.kind.spoken
    listed, bare, inline = GOAL.templates
    assert listed.render(row) == "boring film\nA. leave it\nB. a fine one is good\nAnswer:"
    assert inline.render(row) == "boring film By leave it or a fine one is good?"
    assert [spoken.say(GOAL, template, row) for template in GOAL.templates] == ["B", "a fine one is good", "a fine one is good"]
    assert spoken.understand(GOAL, listed, row, "(b)") == 1 and spoken.understand(GOAL, bare, row, "Leave it") == 0
    assert spoken.understand(GOAL, listed, row, "C") == -1
    assert Template("{option2} or {option1}?").render(row) == "a fine one is good or leave it?"
    options = TextToTextFraming(GOAL, tokenizer).encode_inputs([row])[0]["options"]
    assert [tokenizer.decode(word) for word in options] == [" A", " B"]


def test_a_choice_head_scores_each_option_with_its_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    framing, model = HeadFraming(GOAL, tokenizer), model_of(BertForSequenceClassification, 1)
    rows = [*goals(3), {"goal": "too long", "options": ["bad", "good", "it is"], "label": 2}]
    scores = framing.score(model, rows, batch_size=2)
    assert scores.shape == (4, 3) and scores[:3, 2].isneginf().all() and scores[3].isfinite().all()
    texts = tokenizer("too long\ngood")["input_ids"]
    assert scores[3, 1].item() == pytest.approx(model(input_ids=torch.tensor([texts])).logits.item(), abs=1e-5)
    batch = framing.collate(framing.encode(rows))
    expected = F.cross_entropy(scores, torch.tensor([row["label"] for row in rows]), reduction="sum")
    assert framing.loss(model, batch).item() == pytest.approx(expected.item(), abs=1e-4)
    assert items(batch) == 4
    answer = framing.answers(model, rows)[3]
    assert answer.value == int(scores[3].argmax()) and set(answer.shares) == {"bad", "good", "it is"}


WORDS = {"tokens": ["Ann", "Lee", "left", "Rome", "for", "Rome"], "tags": [1, 2, 0, 3, 0, 0]}


def test_tagging_in_words() -> None:
    spoken, [template] = CITY.kind.spoken, CITY.templates
    assert template.render(WORDS) == "Ann Lee left Rome for Rome\nNames:"
    assert spoken.say(CITY, template, WORDS) == "person: Ann Lee; place: Rome"
    assert spoken.understand(CITY, template, WORDS, "person: Ann Lee; place: Rome") == CITY.kind.reference(CITY, WORDS)
    said = spoken.understand(CITY, template, WORDS, "place: Rome; place: Rome; person: Bob; thing: left; person:")
    assert said == Tags(("O", "O", "O", "B-LOC", "O", "B-LOC", "B-PER"))
    assert spoken.understand(CITY, template, WORDS, "none") == Tags(("O",) * 6)
    assert CITY.kind.named(CITY, WORDS, CITY.kind.reference(CITY, WORDS)) == ["PER: Ann Lee", "LOC: Rome"]


def test_a_tagging_head_reads_each_word_at_its_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    framing, model = HeadFraming(CITY, tokenizer), model_of(BertForTokenClassification, 5)
    [feature] = framing.encode([WORDS])
    pieces = [tokenizer.decode([token]) for token in feature["input_ids"]]
    begins = {word: "".join(pieces[place:]).strip() for word, place in enumerate(feature["firsts"])}
    assert all(text.startswith(" ".join(WORDS["tokens"][word:])) for word, text in begins.items()) and len(begins) == 6
    assert [feature["labels"][place] for place in feature["firsts"]] == WORDS["tags"]
    batch = framing.collate(framing.encode([WORDS, {"tokens": ["Rome"], "tags": [3]}]))
    assert items(batch) == 7
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    assert framing.loss(model, batch).item() == pytest.approx(expected.item(), abs=1e-4)
    answer = framing.answers(model, [WORDS])[0].value
    assert len(answer.tags) == 6 and set(answer.tags) <= set(CITY.labels)


def test_words_that_were_cut_off_are_outside(tokenizer: PreTrainedTokenizerBase) -> None:
    framing = HeadFraming(CITY, tokenizer, max_length=8)
    long = {"tokens": WORDS["tokens"] * 5, "tags": WORDS["tags"] * 5}
    [feature] = framing.encode([long])
    seen = sum(place >= 0 for place in feature["firsts"])
    assert len(feature["input_ids"]) == 8 and seen < len(feature["firsts"]) == 30
    tags = framing.answers(model_of(BertForTokenClassification, 5), [long])[0].value.tags
    assert len(tags) == 30 and set(tags[seen:]) == {"O"}


def test_tags_that_cannot_be() -> None:
    with pytest.raises(InvalidValue, match="the tag `PER`"):
        replace(CITY, labels=("O", "PER"), templates=())
    with pytest.raises(DataError, match="no list of words"):
        encode_rows(CITY, [{"tokens": ["a"], "tags": [0, 1]}])


CONTEXT = "the plot is thin but the cast is fine and good"


def asked(answer: str, start: int, context: str = CONTEXT) -> dict[str, Any]:
    return {"question": "not good?", "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def test_a_span_head_finds_a_piece_wherever_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    framing = HeadFraming(PIECE, tokenizer)
    context = "boring " * 120 + CONTEXT + " too long" * 100
    rows = encode_rows(PIECE, [asked("cast is fine", 25), asked("plot", 3), asked("cast is fine", context.index("cast"), context)])
    for feature in framing.encode(rows):
        assert len(feature["input_ids"]) <= 64
        start, end = feature["labels"]
        assert tokenizer.decode(feature["input_ids"][start : end + 1]).strip() in ("cast is fine", "plot")
    features = framing.encode_inputs(rows)
    assert len(features[0]["several"]) == 1 < len(features[2]["several"])
    seen = {place for window in features[2]["several"] for place in range(window["first"], window["first"] + window["count"])}
    assert seen == set(range(len(features[2]["places"])))


class Pointer(nn.Module):
    """Knows which tokens begin and end the answer."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.tokens, self.dummy = (first, last), nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.stack([(input_ids == token).float() for token in self.tokens], dim=-1))


def test_the_best_span_over_all_windows_is_read_from_the_context(tokenizer: PreTrainedTokenizerBase) -> None:
    context = "boring " * 120 + CONTEXT + " too long" * 100
    first, last = (tokenizer(word, add_special_tokens=False)["input_ids"][at] for word, at in ((" plot", 0), (" thin", -1)))
    row = encode_rows(PIECE, [asked("plot is thin", context.index("plot"), context)])[0]
    assert HeadFraming(PIECE, tokenizer).answers(Pointer(first, last), [row])[0].value == "plot is thin"


def test_the_loss_of_a_span_head(tokenizer: PreTrainedTokenizerBase) -> None:
    framing, model = HeadFraming(PIECE, tokenizer), model_of(BertForTokenClassification, 2)
    rows = encode_rows(PIECE, [asked("cast is fine", 25), asked("plot", 3)])
    batch = framing.collate(framing.encode(rows))
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hidden = ~batch["readable"]
    expected = sum(
        F.cross_entropy(logits.masked_fill(hidden, -torch.inf), batch["labels"][:, side], reduction="sum")
        for side, logits in enumerate(output.logits.unbind(-1))
    )
    torch.testing.assert_close(framing.loss(model, batch), expected)
    assert framing.answers(model, rows)[0].value in CONTEXT


def test_a_span_is_looked_for_near_its_place() -> None:
    [row] = encode_rows(PIECE, [asked("the", 20)])
    assert row["answers"] == {"text": ["the"], "answer_start": [21]}
    assert encode_rows(PIECE, [asked("nowhere", 3)])[0]["answers"]["answer_start"] == [-1]
    assert encode_rows(PIECE, [{**asked("", 0), "answers": {"text": [], "answer_start": []}}]) == []
    with pytest.raises(InvalidValue, match="none of its texts"):
        replace(PIECE, context="passage")


def test_several_labels_in_words() -> None:
    spoken, [template] = FEELING.kind.spoken, FEELING.templates
    for labels, words in (([0, 1], "joy, fear"), ([1], "fear"), ([], "none")):
        assert spoken.say(FEELING, template, {"text": "x", "label": labels}) == words
        assert spoken.understand(FEELING, template, {"text": "x"}, f" {words.upper()}") == labels
    assert encode_rows(FEELING, [{"text": "x", "label": ["fear", "joy"]}])[0]["label"] == [0, 1]
    with pytest.raises(DataError, match="which is no list"):
        encode_rows(FEELING, [{"text": "x", "label": "joy"}])


def test_numbers_in_words() -> None:
    spoken = DEGREE.kind.spoken
    assert spoken.say(DEGREE, ASK, {"text": "x", "score": 3.25}) == "3.2"
    assert [spoken.understand(DEGREE, ASK, {}, text) for text in ("3.4", "about 4", "9", "no idea")] == [3.4, 4.0, 5.0, 2.5]
    assert HeadFraming(DEGREE, bytes_tokenizer()).predict(torch.tensor([[-1.0], [2.5]])) == [0.0, 2.5]
    with pytest.raises(InvalidValue, match="least number, then the largest"):
        replace(DEGREE, range=(5.0, 0.0))


def test_all_right_texts_are_kept() -> None:
    rows = encode_rows(SHORTER, [{"text": "x", "target": "b", "all": ["a", "b"]}, {"text": "y", "target": "c", "all": []}])
    assert [SHORTER.kind.reference(SHORTER, row) for row in rows] == [["a", "b"], ["c"]]
    assert [SHORTER.kind.perfect(SHORTER, row) for row in rows] == ["b", "c"]


def test_the_constant_predictor() -> None:
    def constant(task: Task, *values: Any) -> Any:
        return task.kind.constant(task, [{task.label: value} for value in values])

    assert constant(FEELING, [0], [0], [1]) == [0]
    assert constant(DEGREE, 1.0, 2.0) == 1.5
    assert constant(SHORTER, "b", "a", "b") == "b"
    assert constant(GOAL, 1, 0, 1) == 1
    assert constant(CITY, [1, 0]) == Tags(()) and constant(PIECE, {}) == ""


@pytest.mark.parametrize("task", [GOAL, CITY, PIECE, FEELING, DEGREE, SHORTER], ids=lambda task: task.name)
def test_every_type_is_split_and_keeps_its_columns(task: Task) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "goals": [{"goal": f"{k}", "sol1": "a", "sol2": "b", "label": k % 2} for k in range(40)],
        "cities": [{"tokens": [f"{k}", "Rome"], "tags": [0, 3]} for k in range(40)],
        "pieces": [asked("plot", 3, f"{CONTEXT} {k}") for k in range(40)],
        "feelings": [{"text": f"{k}", "label": [k % 2]} for k in range(40)],
        "degrees": [{"text": f"{k}", "score": k / 10} for k in range(40)],
        "shorter": [{"text": f"{k}", "target": "t", "all": ["t"]} for k in range(40)],
    }
    data = build(task, {"train": rows[task.name]}, "made up")
    assert sum(map(len, data.splits.values())) == 40 and len(data.fingerprint) == 64
    assert tuple(data.train.columns) == task.kind.columns(task)
    assert data.notes == ("validation is cut from train", "test is cut from train")
