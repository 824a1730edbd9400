"""Prompt tuning's starts: random, frequent tokens, label words, a text; spelled by ``dt.train``, refused unspelled."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import deltatune as dt
from deltatune.backbones import load_tokenizer
from deltatune.errors import InvalidValue
from deltatune.methods import PromptTuning
from deltatune.methods.addition.prompt_tuning import frequent_words
from deltatune.methods.making import make, settings_of
from tests.models import MODELS, output
from tests.training import tiny


class Letters:
    """A tokenizer of single letters, so of no whole words: a blank is a token of its own."""

    def get_vocab(self) -> dict[str, int]:
        return {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 32 for letter in text]}


class Marked(Letters):
    """One that writes a blank into the word behind it."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = super().__call__(text.lstrip(), add_special_tokens)["input_ids"]
        return {"input_ids": [ids[0] - 30, *ids[1:]] if text.startswith(" ") else ids}


def test_label_words_become_the_means_of_their_tokens() -> None:
    spelled = PromptTuning(4, init="labels").spell(Letters(), ["no", "y"])
    assert spelled == PromptTuning(4, init_ids=(78, 79, 89), init_lengths=(2, 1))
    assert spelled.spell(Letters(), ["other"]) is spelled
    model, _ = MODELS["bert"]()
    table = model.get_input_embeddings().weight
    P = dt.attach(model, spelled).patches[0].P
    assert P.shape == (4, 32)
    torch.testing.assert_close(P[0], (table[78] + table[79]) / 2)
    assert torch.equal(P[1], table[89])
    assert all((table == row).all(-1).any() for row in P[2:])


def test_a_word_is_read_as_it_stands_in_a_text() -> None:
    assert PromptTuning(2, init="labels").spell(Marked(), ["no"]).init_ids == (48, 79)


@pytest.mark.parametrize("method", [PromptTuning(50), PromptTuning(50, init="labels"), PromptTuning(50, init="text", init_text="the goal")])
def test_frequent_tokens_are_whole_words_to_who_has_a_tokenizer(method: PromptTuning) -> None:
    """The words of BERT's vocabulary begin with `the` at 1996: unused entries, marks and single characters stand ahead of it."""
    tokenizer = load_tokenizer("minilm")
    torch.manual_seed(0)
    spelled = method.spell(tokenizer, ["sport", "money"])
    assert spelled.spell(tokenizer, []) is spelled, "spelled to the end"
    assert len(spelled.init_lengths or spelled.init_ids) == 50
    drawn = tokenizer.convert_ids_to_tokens(list(spelled.init_ids[2:]))
    assert len(set(drawn)) > 40
    assert all(word.isalpha() and len(word) > 1 for word in drawn)


def test_the_commonest_words_come_in_the_order_of_their_ids() -> None:
    found = frequent_words(load_tokenizer("minilm"), 5000)
    assert found[:3] == [1996, 1997, 1998] and found == sorted(set(found)) and len(found) == 5000
    assert found[-1] < 10_000, "none of the rare ones"
    tokenizer = tiny.tokenizer()
    words = {*tiny.COMMON, *tiny.LABELS, "Topic", *(word for group in tiny.WORDS.values() for word in group)} - {"a"}
    assert set(tokenizer.convert_ids_to_tokens(frequent_words(tokenizer, 5000))) == words


def test_a_short_prompt_takes_as_many_words_as_fit() -> None:
    assert PromptTuning(1, init="labels").spell(Letters(), ["no", "y"]) == PromptTuning(1, init_ids=(78, 79), init_lengths=(2,))


def test_a_text_comes_first_and_frequent_tokens_behind_it() -> None:
    spelled = PromptTuning(5, init="text", init_text="go on").spell(Letters(), [])
    assert spelled == PromptTuning(5, init_ids=(71, 79, 0, 79, 78))
    model, _ = MODELS["t5"]()
    P = dt.attach(model, spelled).patches[0].P
    assert torch.equal(P, model.get_input_embeddings()(torch.tensor([71, 79, 0, 79, 78])))
    with pytest.raises(InvalidValue, match="5 tokens for 4 virtual ones"):
        PromptTuning(4, init="text", init_text="go on").spell(Letters(), [])


def test_the_formula_in_double_precision() -> None:
    """X <- [P; X] ahead of the positions, and the outputs of P left out."""
    model, inputs = MODELS["llama"]()
    plain, mask = copy.deepcopy(model.double()), inputs["attention_mask"]
    delta = dt.attach(model, PromptTuning(4))
    P = delta.patches[0].double().P
    X = torch.cat([P.expand(len(mask), -1, -1), plain.get_input_embeddings()(inputs["input_ids"])], dim=1)
    expected = plain(inputs_embeds=X, attention_mask=torch.cat([mask.new_ones(len(mask), 4), mask], dim=1)).logits[:, 4:]
    real = mask.bool()
    torch.testing.assert_close(output(model, inputs)[real], expected[real], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("name", "tokens"), [("llama", 1), ("llama", 20), ("llama", 150), ("t5", 5), ("t5", 150)])
def test_any_length(name: str, tokens: int) -> None:
    model, inputs = MODELS[name]()
    plain, delta = output(model, inputs), dt.attach(model, PromptTuning(tokens, init_ids=(7,)))
    assert delta.patches[0].P.shape == (tokens, 32)
    assert not torch.equal(output(model, inputs), plain)


def test_an_unspelled_recipe_is_refused_before_anything_is_touched() -> None:
    model, _ = MODELS["bert"]()
    with pytest.raises(InvalidValue, match=r"init='labels'\) is written in words.*method.spell\(tokenizer, labels\)"):
        dt.attach(model, PromptTuning(4, init="labels"))
    assert not hasattr(model, "deltatune")


def test_a_spelled_recipe_is_written_and_read() -> None:
    spelled = PromptTuning(4, init="labels").spell(Letters(), ["no", "y"])
    assert make("prompt-tuning", json.loads(json.dumps(settings_of(spelled)))) == spelled
    assert make("prompt-tuning", {"init_ids": "78,79,89", "init_lengths": "2,1", "num_virtual_tokens": "4"}) == spelled


def test_contradicting_fields_are_named() -> None:
    with pytest.raises(InvalidValue, match="`init_text` with init='text'"):
        PromptTuning(init="text")
    with pytest.raises(InvalidValue, match="`init_text` with init='text'"):
        PromptTuning(init_text="words")
    with pytest.raises(InvalidValue, match="either `init_ids` or"):
        PromptTuning(init="labels", init_ids=(1,))
    with pytest.raises(InvalidValue, match="add up to the number"):
        PromptTuning(init_ids=(1, 2), init_lengths=(1,))
    with pytest.raises(InvalidValue, match="without labels"):
        PromptTuning(init="labels").spell(Letters(), [])
    with pytest.raises(InvalidValue, match="has no tokens"):
        PromptTuning(init="labels").spell(lambda text, add_special_tokens: {"input_ids": []}, ["no"])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_training_spells_the_recipe_and_saves_it_so(name: str, tmp_path: Path) -> None:
    model, tokenizer = tiny.backbone(name), tiny.tokenizer()
    model.name_or_path = ""
    method = PromptTuning(4, init="labels")
    result = dt.train(model, tiny.data(), method, tokenizer=tokenizer, max_steps=1, batch_size=4, out=tmp_path / "run", progress="none")
    ids = tuple(tokenizer.convert_tokens_to_ids(list(tiny.LABELS)))
    spelled = result.deltas[0].method
    assert isinstance(spelled, PromptTuning)
    assert (spelled.init, spelled.init_ids[:3], spelled.init_lengths) == ("vocabulary", ids, (1, 1, 1, 1))
    saved = json.loads((tmp_path / "run" / "delta" / "delta.json").read_text())
    assert str(list(spelled.init_ids)).replace(" ", "") in json.dumps(saved).replace(" ", "")
