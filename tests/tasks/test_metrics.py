from __future__ import annotations

import pytest
import sklearn.metrics

from deltatune.errors import DataError, UnknownName
from deltatune.tasks.measures import slot_values
from deltatune.tasks.metrics import compute, is_degenerate, measure, metrics
from deltatune.tasks.rewriting import gleu, sari
from deltatune.tasks.types.tagging import Tags

TRUTH = [0, 1, 2, 2, 1, 0]
GUESS = [0, 2, 2, 2, 1, 1]
PERFECT = {
    "label": [0, 1, 1, 0],
    "labels": [[0], [], [1, 2]],
    "number": [0.5, 1.0, 3.0],
    "text": ["the cat sat on the big mat 2", "the cat is on the big mat 3"],
    "likelihood": [(0.0, 3), (0.0, 2)],
    "tags": [Tags(("B-A", "I-A", "O")), Tags(("O",))],
}


def test_against_values_worked_out_by_hand() -> None:
    assert compute("accuracy", GUESS, TRUTH)["accuracy"] == pytest.approx(4 / 6)
    # f1 of class 0: 2/3, of class 1: 1/2, of class 2: 4/5
    assert compute("f1_macro", GUESS, TRUTH)["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 4 / 5) / 3)
    assert compute("recall_macro", GUESS, TRUTH)["recall_macro"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert compute("matthews", [1, 1, 0, 0], [1, 0, 1, 0])["matthews"] == 0.0
    assert compute("f1", [1, 1, 0, 0], [1, 0, 0, 1])["f1"] == pytest.approx(0.5)
    assert compute("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0])["pearson"] == pytest.approx(1.0)
    assert compute("spearman", [1.0, 2.0, 30.0], [3.0, 2.0, 1.0])["spearman"] == pytest.approx(-1.0)


@pytest.mark.parametrize("name", list(metrics))
def test_a_perfect_predictor_reaches_the_best_value(name: str) -> None:
    values = PERFECT[next(kind for kind in PERFECT if kind in metrics[name].of)]
    rows = [{"text": "inform(name=the cat;place=the big mat)", "label": value} for value in values]
    assert compute(name, values, values, rows)[name] == pytest.approx(metrics[name].best)


@pytest.mark.parametrize("name", list(metrics))
def test_every_metric_has_an_interval_and_tells_one_who_always_says_the_same(name: str) -> None:
    values = PERFECT[next(kind for kind in PERFECT if kind in metrics[name].of)] * 3
    rows = [{"text": "inform(name=the cat;place=the big mat)", "label": value} for value in values]
    perfect, constant = (measure(name, said, values, rows, resamples=50)[name] for said in (values, [values[0]] * len(values)))
    for found in (perfect, constant):
        assert found.low <= found.value <= found.high
    assert constant.degenerate and not perfect.degenerate
    assert constant.value == compute(name, [values[0]] * len(values), values, rows)[name]


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_a_constant_predictor_has_no_correlation(name: str) -> None:
    assert compute(name, [1, 1, 1], [0, 1, 1]) == {name: 0.0}


def test_several_labels_per_row() -> None:
    truth, guess = [[0, 2], [1], []], [[0], [1], [2]]
    matrix = [[1, 0, 1], [0, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    expected = sklearn.metrics.f1_score(*matrix, average="micro")
    assert compute("f1_micro", guess, truth)["f1_micro"] == pytest.approx(expected) == pytest.approx(2 / 3)


def test_exact_match_with_several_right_answers() -> None:
    assert compute("exact_match", ["The  Cat", "dog", "x"], ["the cat", ["cat", "Dog"], "y"]) == {"exact_match": pytest.approx(2 / 3)}


def test_errors() -> None:
    with pytest.raises(UnknownName, match=r"No metric is called `acuracy`. Did you mean `accuracy`"):
        compute("acuracy", [1], [1])
    with pytest.raises(DataError, match="1 predictions for 2 references"):
        compute("accuracy", [1], [1, 0])
    with pytest.raises(DataError, match="0 predictions"):
        compute("accuracy", [], [])


SPECIES = "About 95 species are currently accepted ."
REWRITTEN = ["About 95 species are currently known .", "About 95 species are now accepted .", "95 species are now accepted ."]


@pytest.mark.parametrize(
    ("said", "published"),
    [
        ("About 95 you now get in .", 0.2682782411698074),
        ("About 95 species are now agreed .", 0.5889995423074248),
        ("About 95 species are currently agreed .", 0.5071608864657479),
    ],
)
def test_sari_has_the_values_of_its_authors_script(said: str, published: float) -> None:
    assert sari(SPECIES, said, REWRITTEN) == pytest.approx(published)
    rows = [{"original": SPECIES, "target": said}]
    assert compute("sari", [said], [REWRITTEN], rows)["sari"] == pytest.approx(published)


def test_gleu_by_hand() -> None:
    # of "a b c d", the reference "a b c e": 3 of 4, 2 of 3, 1 of 2, 0 of 1 n-grams match, and what was kept wrongly is taken off
    assert gleu(["a b c d"], ["a b c d"], [["a b c e"]]) == 0.0
    # 1-grams (5 - 1) / 6, 2-grams (4 - 1) / 5, 3-grams (3 - 1) / 4, 4-grams (2 - 1) / 3
    source, reference = "a b c d e x", "a b c d e f"
    assert gleu([source], [source], [[reference]]) == pytest.approx((4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert gleu([source], [reference], [[reference]]) == 1.0


def test_bleu_and_chrf_take_unequally_many_references() -> None:
    import sacrebleu

    said = ["the cat sat on the mat today", "it is a dog of mine"]
    right = [["the cat sat on a mat today", "the cat sat on the mat"], ["it is a dog of mine"]]
    expected = sacrebleu.corpus_bleu(said, [[one[0] for one in right], [right[0][1], None]]).score / 100
    assert compute("bleu", said, right)["bleu"] == pytest.approx(expected)
    assert 0.8 < compute("chrf", said, right)["chrf"] <= 1.0


def test_spans_of_tags_and_of_texts() -> None:
    truth = [Tags(("B-PER", "I-PER", "O", "B-LOC")), Tags(("O", "O"))]
    said = [Tags(("B-PER", "O", "O", "B-LOC")), Tags(("O", "O", "B-LOC"))]  # one span too short, one that is not in the row
    assert compute("span_f1", said, truth)["span_f1"] == pytest.approx(2 * 1 / (2 + 3))
    assert compute("span_f1", ["food: pizza; place: bar"], ["food: pizza"])["span_f1"] == pytest.approx(2 / 3)
    assert compute("span_f1", ["none"], ["none"])["span_f1"] == 1.0
    triplets = ["food | fresh | positive; staff | rude | negative"]
    assert compute("triplet_f1", triplets, ["food | fresh | positive"])["triplet_f1"] == pytest.approx(2 / 3)


def test_squad_f1_and_final_answers() -> None:
    assert compute("squad_f1", ["The cat, of course!"], [["cat", "dog"]])["squad_f1"] == pytest.approx(2 / 4)
    answers = compute("final_answer_exact_match", ["2+2=4 #### 4", "so five", "1,200"], ["... #### 4", "#### 5", "#### 1200.0"])
    assert answers["final_answer_exact_match"] == pytest.approx(2 / 3)


def test_slot_error_counts_missing_and_redundant_values() -> None:
    assert slot_values("?compare(name=satellite priapus 99;type=dont_care)") == ["satellite priapus 99"]
    rows = [{"act": "inform(name='chez maman';food=french)"}] * 2
    said = ["chez maman serves french food", "chez maman serves chez maman"]  # the second lacks one value and doubles another
    assert compute("slot_error", said, ["", ""], rows)["slot_error"] == pytest.approx(2 / 4)


def test_questions_with_several_answers() -> None:
    rows = [{"paragraph": "p", "question": question, "answer": str(k)} for k, question in enumerate(["a", "a", "b"])]
    assert compute("exact_match_per_question", [1, 0, 1], [1, 1, 1], rows)["exact_match_per_question"] == 0.5
    with pytest.raises(DataError, match="looks at what was asked"):
        compute("exact_match_per_question", [1], [1])


def test_intervals_cover_what_they_should() -> None:
    truth = [0, 1] * 100
    guess = [label if index % 5 else 1 - label for index, label in enumerate(truth)]
    found = measure(["accuracy", "f1_macro"], guess, truth)
    for name, one in found.items():
        assert one.value == pytest.approx(compute(name, guess, truth)[name])
        assert one.low < one.value < one.high
    assert found["accuracy"].high - found["accuracy"].low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 200) ** 0.5, rel=0.15)
    assert found == measure(["accuracy", "f1_macro"], guess, truth)
    perfect = measure("accuracy", truth, truth)["accuracy"]
    assert (perfect.low, perfect.value, perfect.high, perfect.degenerate) == (1.0, 1.0, 1.0, False)


def test_a_predictor_that_says_one_thing_is_degenerate() -> None:
    assert measure("accuracy", [1, 1, 1], [0, 1, 1])["accuracy"].degenerate
    assert is_degenerate([[0], [0]], [[0], [1]]) and not is_degenerate([1, 1], [1, 1])
