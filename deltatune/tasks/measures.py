"""Every metric of the package; importing this registers them. Libraries compute them where a kept one has them."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from deltatune.errors import missing_extra
from deltatune.tasks.metrics import correlation, enter, mean_of, right_ones, sklearn_score
from deltatune.tasks.rewriting import gleu, sari
from deltatune.tasks.rows import text_of


def exact_match(prediction: Any, reference: Any) -> float:
    """1 where the prediction equals the reference, or one of several, blanks around and case aside.

    >>> exact_match("The  Cat", "the cat"), exact_match("dog", ["cat", "Dog"]), exact_match("x", "y")
    (1.0, 1.0, 0.0)
    """
    return float(_spaced(prediction) in {_spaced(one) for one in right_ones(reference)})


def _spaced(text: Any) -> str:
    return " ".join(str(text).lower().split())


def final_answer(prediction: Any, reference: Any) -> float:
    """1 where the last numbers agree: that behind ``####``, else the last in the text.

    >>> final_answer("So 6 * 7 = 42. #### 42", "It is 42. #### 42"), final_answer("about 1,000", "#### 1000"), final_answer("7", "#### 8")
    (1.0, 1.0, 0.0)
    """
    return float(any(_last_number(prediction) == _last_number(one) is not None for one in right_ones(reference)))


def _last_number(text: Any) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", str(text).rpartition("####")[2])
    return float(found[-1].replace(",", "")) if found else None


def squad_f1(prediction: Any, reference: Any) -> float:
    """F1 of the words in common, as SQuAD's script has it; the best over several right answers.

    >>> squad_f1("the black cat", ["a cat", "dog"])
    0.6666666666666666
    """
    return max(_overlap(_squad_words(prediction), _squad_words(one)) for one in right_ones(reference))


def _squad_words(text: Any) -> list[str]:
    """Lower case, without punctuation and articles."""
    plain = re.sub(r"[!-/:-@\[-`{-~]", "", str(text).lower())
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _overlap(said: Sequence[Any], wanted: Sequence[Any]) -> float:
    if not said or not wanted:
        return float(not said and not wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _pieces(value: Any) -> Counter[str]:
    """The entries of ``a; b; c``, blanks and case aside; ``none`` has no entry."""
    parts = [_spaced(part) for part in str(value).split(";")]
    return Counter(part for part in parts if part and part != "none")


def piece_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Micro-F1 of the entries of ``kind: span; kind: span``, each counted as often as it is said.

    >>> piece_f1(["food: pizza; place: bar"], ["food: pizza; food: wine"])
    0.5
    """
    right = said = wanted = 0
    for prediction, reference in zip(predictions, references, strict=True):
        best = max(map(_pieces, right_ones(reference)), key=lambda one: (_pieces(prediction) & one).total())
        right, said, wanted = right + (_pieces(prediction) & best).total(), said + _pieces(prediction).total(), wanted + best.total()
    return 2 * right / (said + wanted) if said + wanted else 1.0


def span_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Micro-F1 of spans: of tags by seqeval (a span counts by kind and place), of texts by their entries."""
    if not hasattr(references[0], "tags"):
        return piece_f1(predictions, references)
    try:
        import seqeval.metrics
    except ImportError as cause:
        raise missing_extra("seqeval", "train") from cause
    pairs = [_level(one.tags, other.tags) for one, other in zip(predictions, references, strict=True)]
    if all(tag == "O" for pair in pairs for tags in pair for tag in tags):
        return 1.0  # nothing to be named, and nothing named
    return float(seqeval.metrics.f1_score([wanted for _, wanted in pairs], [said for said, _ in pairs], zero_division=0))


def _level(said: Sequence[str], wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """Both of one length: what was named beyond the words is named wrongly."""
    length = max(len(said), len(wanted))
    return [*said, *["O"] * (length - len(said))], [*wanted, *["O"] * (length - len(wanted))]


def per_question(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Share of questions all of whose answers are judged rightly (MultiRC); rows of one question differ in their last text only."""
    right: dict[Any, bool] = defaultdict(lambda: True)
    for prediction, (reference, row) in zip(predictions, references, strict=True):
        texts = [text_of(value) for value in row.values() if isinstance(value, str)]
        right[tuple(texts[:-1])] &= prediction == reference
    return sum(right.values()) / len(right)


WORD = r"[\w.$]+"
_SLOT = re.compile(r"([\w ]+)=(?:'([^']*)'|([^;)]*))")
_SAID_FREELY = {"dont_care", "dontcare", "none", "yes", "no", "true", "false", "?", ""}


def slot_values(act: str) -> list[str]:
    """The values of a dialogue act that have to stand in its sentence word by word.

    >>> slot_values("inform(name='chez maman';pricerange=moderate;kidsallowed=yes)")
    ['chez maman', 'moderate']
    """
    values = [(quoted or bare).strip().lower() for _, quoted, bare in _SLOT.findall(act)]
    return [value for value in values if value not in _SAID_FREELY]


def slot_error(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """ERR = (missing + redundant slots) / slots (Wen et al., 2015), of the values of the act that can be looked for in the sentence.

    A value that the sentence has more often than the act is redundant, one that it has less often is missing.
    """
    wrong = slots = 0
    for prediction, (_, row) in zip(predictions, references, strict=True):
        act = Counter(slot_values(next(text for text in row.values() if isinstance(text, str))))
        said = _worded(prediction)
        for value, times in act.items():
            found = said.count(_worded(value))
            wrong += abs(found - times) if found < times or len(value) > 3 else 0
        slots += act.total()
    return wrong / max(slots, 1)


def _worded(text: Any) -> str:
    """Words with single blanks between and around them."""
    return f" {' '.join(re.findall(WORD, str(text).lower()))} "


def bleu(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Corpus BLEU of sacrebleu (13a tokens, exponential smoothing), from 0 to 1."""
    return _sacrebleu("corpus_bleu", predictions, references, force=True)  # some references are tokenised: no need to warn


def chrf(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Corpus chrF of sacrebleu, from 0 to 1."""
    return _sacrebleu("corpus_chrf", predictions, references)


def _sacrebleu(function: str, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> float:
    try:
        import sacrebleu
    except ImportError as cause:
        raise missing_extra("sacrebleu", "train") from cause
    right = [right_ones(reference) for reference in references]
    most = max(map(len, right))
    columns = [[row[k] if k < len(row) else None for row in right] for k in range(most)]  # sacrebleu leaves None out
    return float(getattr(sacrebleu, function)([str(one) for one in predictions], columns, **options).score) / 100


def rouge(kind: str) -> Any:
    """F-measure of rouge-score for a row, without stemming; the best over several right answers."""

    def each(prediction: Any, reference: Any) -> float:
        scorer = _rouge_scorer(kind)
        return float(max(scorer.score(one, str(prediction))[kind].fmeasure for one in right_ones(reference)))

    return each


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as cause:
        raise missing_extra("rouge-score", "train") from cause
    return RougeScorer([kind], use_stemmer=False)


def _sari(prediction: Any, reference: Any) -> float:
    right, row = reference
    source = next(text for text in row.values() if isinstance(text, str))
    return sari(source, str(prediction), right_ones(right))


def _gleu(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    sources = [next(text for text in row.values() if isinstance(text, str)) for _, row in references]
    return gleu(sources, [str(one) for one in predictions], [right_ones(right) for right, _ in references])


def log_likelihood(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Mean log-probability of a token; predictions are (sum of log-probabilities, tokens) of each row."""
    return float(sum(total for total, _ in predictions) / max(sum(count for _, count in predictions), 1))


def perplexity(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """exp(-mean log-probability of a token)."""
    return math.exp(min(-log_likelihood(predictions, references), 700.0))


def _equal(prediction: Any, reference: Any) -> float:
    return float(prediction == reference)


def _safe(kind: str) -> Any:
    return sklearn_score("f1_score", average=kind, zero_division=0.0)


enter("accuracy", "label", sklearn_score("accuracy_score"), each=_equal)
enter("f1", "label", _safe("binary"))
enter("f1_macro", "label labels", _safe("macro"))
enter("f1_micro", "label labels", _safe("micro"))
enter("f1_weighted", "label labels", _safe("weighted"))
enter("recall_macro", "label labels", sklearn_score("recall_score", average="macro", zero_division=0.0))
enter("matthews", "label", sklearn_score("matthews_corrcoef"))
enter("pearson", "number", correlation("pearsonr"))
enter("spearman", "number", correlation("spearmanr"))
enter("exact_match", "text tags", each=exact_match)
enter("exact_match_per_question", "label", per_question, reads=True)
enter("final_answer_exact_match", "text", each=final_answer)
enter("squad_f1", "text", each=squad_f1)
enter("span_f1", "text tags", span_f1)
enter("triplet_f1", "text", piece_f1)
enter("slot_error", "text", slot_error, best=0.0, higher=False, reads=True, exact=False)
enter("log_likelihood", "likelihood", log_likelihood, best=0.0)
enter("perplexity", "likelihood", perplexity, higher=False)
enter("bleu", "text", bleu)
enter("chrf", "text", chrf)
enter("rouge1", "text", each=rouge("rouge1"))
enter("rouge2", "text", each=rouge("rouge2"))
enter("rougeL", "text", each=rouge("rougeL"))
enter("sari", "text", each=_sari, reads=True, alone=False, exact=False)
enter("gleu", "text", _gleu, reads=True, alone=False)

__all__ = ["bleu", "chrf", "exact_match", "final_answer", "mean_of", "piece_f1", "slot_error", "span_f1", "squad_f1"]
