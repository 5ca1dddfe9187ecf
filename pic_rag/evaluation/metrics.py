"""Scores of an answer, as SQuAD defines them: pure functions of strings, each a share from 0 to 1.

Normalisation, F1 and exact match are those of SQuAD's official scorer (Rajpurkar et al., arXiv 1606.05250).
"""

from __future__ import annotations

import re
import string
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and extra space, in this order.

    >>> normalise(" The  cat's  whiskers, an inch. ")
    'cats whiskers inch'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall, against the answer that fits best.

    >>> f1("the Denver Broncos team", ["Carolina Panthers", "Denver Broncos"])
    0.8
    >>> f1("none", ["Denver Broncos"])
    0.0
    """
    return _best(_f1, prediction, answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is one of the answers after normalisation, else 0.

    >>> exact_match("The Broncos!", ["broncos"]), exact_match("Denver Broncos", ["broncos"])
    (1.0, 0.0)
    """
    return _best(lambda said, answer: float(normalise(said) == normalise(answer)), prediction, answers)


def contains_answer(prediction: str, answers: Sequence[str]) -> float:
    """1 when the words of an answer occur in the prediction, next to each other and in order; else 0.

    Whole words, so "art" is not in "party"; an answer without words is in nothing.

    >>> contains_answer("It was the Denver Broncos.", ["Denver Broncos"])
    1.0
    >>> contains_answer("a party", ["art"]), contains_answer("Broncos of Denver", ["Denver Broncos"])
    (0.0, 0.0)
    """
    return _best(_contains, prediction, answers)


def agreement(prediction: str, full_text_answer: str) -> float:
    """F1 against what the same generator says when it reads the full text.

    >>> agreement("in Denver", "Denver")
    0.6666666666666666
    """
    return f1(prediction, [full_text_answer])


def auroc(scores: Sequence[float], is_positive: Sequence[bool]) -> float:
    """Share of pairs of a positive and a negative in which the positive has the higher score; a tie counts half.

    The area under the ROC curve, by ranks (Mann and Whitney 1947). 0.5 is chance.

    >>> auroc([0.9, 0.8, 0.3, 0.1], [True, False, True, False])
    0.75
    >>> auroc([0.5, 0.5], [True, False])
    0.5
    """
    positive = [score for score, yes in zip(scores, is_positive, strict=True) if yes]
    negative = sorted(score for score, yes in zip(scores, is_positive, strict=True) if not yes)
    if not positive or not negative:
        raise ValueError(f"is_positive must hold both true and false, got {len(positive)} true of {len(scores)}.")
    wins = sum(bisect_left(negative, score) + bisect_right(negative, score) for score in positive)
    return wins / (2 * len(positive) * len(negative))


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    if isinstance(answers, str):
        raise TypeError(f"answers must be a list of strings, got the string {answers!r}. Write [answer].")
    if not answers:
        raise ValueError("answers must hold at least one string, got none. Leave unanswerable questions out.")
    return max(score(prediction, answer) for answer in answers)


def _f1(prediction: str, answer: str) -> float:
    said, wanted = normalise(prediction).split(), normalise(answer).split()
    if not said or not wanted:
        return float(said == wanted)
    same = sum((Counter(said) & Counter(wanted)).values())
    return 2 * same / (len(said) + len(wanted))


def _contains(prediction: str, answer: str) -> float:
    wanted = normalise(answer)
    return float(bool(wanted) and f" {wanted} " in f" {normalise(prediction)} ")
