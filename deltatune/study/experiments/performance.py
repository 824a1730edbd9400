"""Experiment 1, first part: how well does each method do over all tasks, beside full fine-tuning and the baselines, and what does it train?

All tables of this part are of the head form, on an encoder; the second part, ``text-to-text``, has the answers in words, on a decoder.
Full: 117 tasks of eleven categories with one seed, 22 of them with three, eight methods on all and diff pruning on eight tasks. Left out of
the tasks at hand are those whose answers are places in a text (``reading``), most whose rows have over 64 tokens, and a third of BLiMP.
"""

from __future__ import annotations

from dataclasses import replace

from deltatune.study.design import Profile, Study
from deltatune.study.experiments.basis import AP, BF, DIFF, FT, LAST, LR, PF, PROBE, PT, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import all_of, better, lacking, level, ordered, reaches
from deltatune.study.report.comparison import comparison
from deltatune.study.statistics import complete, over_tasks

REPEATED = (
    "glue-cola", "glue-sst2", "glue-mrpc", "stsb", "glue-mnli", "glue-qnli", "glue-rte", "subj", "trec-coarse", "atis-intent", "sms-spam",
    "emotion", "tweet-eval-hate", "tweet-sentiment", "rotten-tomatoes", "snli", "sick-entailment", "creak", "super-glue-wic", "wikigold",
    "boolq", "blimp-determiner-noun-agreement-1",
)  # fmt: skip
"""Tasks of ten categories that are done with three seeds."""

PRUNED = REPEATED[:8]
"""Tasks on which diff pruning is tried, which costs as much as twice full fine-tuning."""

OTHERS = (
    # topic
    "clickbait", "stackoverflow-titles", "liar", "scicite", "ag-news", "acl-arc-citation-intent", "reuters-r8", "bbc-news",
    # question type and intent
    "hwu64", "clinc150-plus", "query-wellformedness", "trec-fine",
    # emotion, hate, irony
    "xed-english", "hatecheck", "meld-emotion", "emorynlp-emotion", "go-emotions", "tweet-eval-emoji", "ethos-binary",
    "tweet-eval-emotion", "hate-speech-offensive", "tweet-eval-offensive", "tweet-eval-stance-abortion", "tweet-eval-stance-atheism",
    "tweet-eval-stance-climate", "tweet-eval-stance-feminist", "tweet-eval-stance-hillary",
    # sentiment
    "poem-sentiment", "meld-sentiment", "yelp-labelled-sentences", "vader-amazon", "vader-tweets", "vader-nyt", "sst5",
    "absa-semeval14-restaurant", "absa-semeval14-laptop", "absa-acl14-twitter", "tweet-eval-sentiment", "financial-phrasebank",
    "crowdflower-tweets",
    # common sense
    "strategyqa", "csqa2", "numersense", "comve-a-validation", "com2sense", "super-glue-copa", "mc-taco", "definite-pronoun-resolution",
    # inference
    "med", "fracas", "snli-cad", "joci", "add-one-rte", "glue-wnli", "super-glue-cb",
    # paraphrase and similarity
    "sick-relatedness", "sts12", "sts13", "sts14", "sts15", "sts16", "stsb-de",
    # questions with choices or passages
    "trec-qa", "pubmedqa", "openbookqa",
    # labels of words
    "atis-slots", "broad-twitter-corpus", "sciie-ner", "wnut17", "ncbi-disease", "bc5cdr", "semeval2010-task8", "sciie-relation",
    # acceptability
    "complex-single", "complex-multi",
    "blimp-adjunct-island", "blimp-animate-subject-passive", "blimp-coordinate-structure-constraint-object-extraction",
    "blimp-distractor-agreement-relational-noun", "blimp-drop-argument", "blimp-ellipsis-n-bar-1", "blimp-existential-there-quantifiers-1",
    "blimp-inchoative", "blimp-intransitive", "blimp-irregular-plural-subject-verb-agreement-1",
    "blimp-left-branch-island-echo-question", "blimp-only-npi-scope", "blimp-passive-1", "blimp-principle-a-case-1",
    "blimp-principle-a-domain-1", "blimp-regular-plural-subject-verb-agreement-1", "blimp-sentential-negation-npi-licensor-present",
    "blimp-tough-vs-raising-1", "blimp-wh-questions-object-gap", "blimp-wh-vs-that-with-gap",
)  # fmt: skip
"""Tasks that are done with one seed."""


def design(profile: Profile) -> Study:
    """Quick: two tasks and seven methods, a few steps each. Full: the tasks above and nine methods."""
    base = basis(profile)
    if profile == "quick":
        return base
    methods = tuple(replace(entry, tasks=PRUNED) if entry.label == DIFF else entry for entry in base.methods)
    return replace(base, tasks=(*REPEATED, *OTHERS), methods=methods, seeds=(0, 1, 2), repeated=REPEATED)


def count_does_not_rule(evidence: Evidence) -> Judgement:
    """The method that trains most of the deltas is not the best, and counts do not order scores."""
    own = [label for label in evidence.methods if label in (LR, AP, PF, PT, BF)]
    if (found := lacking(evidence.scores(), own)) is not None or len(own) < 4:
        return found or Judgement("undecided", f"Only {', '.join(own)} have scores; four deltas are needed.")
    scores = complete(evidence.scores(), own)
    means = {label: over_tasks(scores, label).value for label in own}
    counts = {label: next(record.trained or 0 for record in evidence.done if record.method == label) for label in own}
    most, best = max(counts, key=counts.__getitem__), max(means, key=means.__getitem__)
    said = ", ".join(f"{label} {counts[label]:,} -> {means[label]:.3f}" for label in sorted(own, key=counts.__getitem__))
    return Judgement("does not hold" if most == best else "holds", f"{said}. {most} trains most, {best} is best.")


def deltas_beat_full(evidence: Evidence) -> Judgement:
    """Each of the three close methods is better than full fine-tuning on a tenth of the tasks or more."""
    if (found := lacking(evidence.scores(), (FT, LR, AP, PF))) is not None:
        return found
    scores = complete(evidence.scores(), (FT, LR, AP, PF))
    shares = {method: sum(row[method] > row[FT] for row in scores.values()) / len(scores) for method in (LR, AP, PF)}
    said = ", ".join(f"{method} on {share:.0%}" for method, share in shares.items())
    return Judgement("holds" if min(shares.values()) >= 0.1 else "does not hold", f"Better than {FT}: {said} of {len(scores)} tasks.")


CLAIMS = (
    Claim("E2", "The ranking is FT > LoRA > adapter > prefix > prompt.", lambda evidence: ordered(evidence.scores(), (FT, LR, AP, PF, PT))),
    Claim(
        "E2",
        "LoRA, adapter and prefix tuning are close to each other (within 0.03).",
        lambda evidence: all_of(
            [level(evidence.scores(), LR, AP, 0.03), level(evidence.scores(), LR, PF, 0.03), level(evidence.scores(), AP, PF, 0.03)]
        ),
    ),
    Claim("E2", "Each of these three is sometimes better than FT (on a tenth of the tasks or more).", deltas_beat_full),
    Claim("E3", "Quality is not tied to how many parameters train: structure matters.", count_does_not_rule),
    Claim("E23", "BitFit reaches 95 % of FT.", lambda evidence: reaches(evidence.scores(), BF, FT, 0.95)),
    Claim("E23", "BitFit is better than a frozen backbone with a trained head.", lambda evidence: better(evidence.scores(), BF, PROBE)),
    Claim("E23", "BitFit is level with diff pruning (within 0.03).", lambda evidence: level(evidence.scores(), BF, DIFF, 0.03)),
    Claim(
        "C6",
        "Training the last quarter of the layers reaches about 90 % of FT (at least 88 %).",
        lambda evidence: reaches(evidence.scores(), LAST, FT, 0.88),
    ),
    Claim("E25", "LoRA matches FT (at least 97 %) on an encoder.", lambda evidence: reaches(evidence.scores(), LR, FT, 0.97)),
)

experiments.register("performance")(
    Experiment("performance", "How well does each method do over all tasks, and how much does it train?", design, CLAIMS, comparison)
)
