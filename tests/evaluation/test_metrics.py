"""The scores are SQuAD's: torchmetrics computes the same from the same strings."""

from __future__ import annotations

import random

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.text import squad

from pic_rag.evaluation.metrics import agreement, auroc, contains_answer, exact_match, f1, normalise

WORDS = [
    "The",
    "the",
    "a",
    "an",
    "Denver",
    "denver",
    "Broncos.",
    "U.S.",
    "U.S",
    "1,000",
    "1000",
    "cat's",
    "theatre",
    "é",
]
PAIRS = [
    ("Denver Broncos", ["Denver Broncos"]),
    ("the Denver Broncos team", ["Carolina Panthers", "Denver Broncos"]),
    ("The U.S., a country", ["US country"]),
    ("cats cats cats", ["cats dogs", "cats cats"]),
    ("well-known", ["well known", "wellknown"]),
    ("anthem theatre", ["them atre"]),
    ("", ["Denver"]),
    ("Denver", [""]),
    ("the", ["a"]),
    ("  \n\tDenver\u00a0Broncos ", ["denver broncos"]),
]


def reference(prediction: str, answers: list[str]) -> tuple[float, float]:
    """F1 and exact match of torchmetrics, as shares."""
    target = {"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": "1"}
    scores = squad([{"prediction_text": prediction, "id": "1"}], [target])
    return float(scores["f1"]) / 100, float(scores["exact_match"]) / 100


@pytest.mark.parametrize(("prediction", "answers"), PAIRS)
def test_f1_and_exact_match_are_those_of_squad_on_hard_strings(prediction: str, answers: list[str]) -> None:
    assert (f1(prediction, answers), exact_match(prediction, answers)) == pytest.approx(reference(prediction, answers))


def test_f1_and_exact_match_are_those_of_squad_on_random_word_sequences() -> None:
    draw = random.Random(0)
    pairs = [
        (" ".join(draw.choices(WORDS, k=draw.randrange(5))), [" ".join(draw.choices(WORDS, k=draw.randrange(4)))])
        for _ in range(300)
    ]
    ours = [(f1(*pair), exact_match(*pair)) for pair in pairs]
    assert ours == [pytest.approx(reference(*pair)) for pair in pairs]
    assert len({score for score, _ in ours}) > 5
    assert {0.0, 1.0} == {match for _, match in ours}


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("A theory of the an-them", "theory of anthem"),
        ("the.", ""),
        ("THE\nEnd\u00a0!", "end"),
    ],
)
def test_normalising_drops_articles_but_not_their_letters_in_words(text: str, normalised: str) -> None:
    assert normalise(text) == normalised


@pytest.mark.parametrize(
    ("prediction", "answers", "contained"),
    [
        ("It was in the New York City, I think", ["York, New", "the New York city"], 1.0),
        ("New in York City", ["New York"], 0.0),
        ("a party", ["art"], 0.0),
        ("1000", ["100", "000"], 0.0),
        ("anything at all", ["the"], 0.0),
        ("", ["the"], 0.0),
    ],
)
def test_an_answer_is_contained_as_whole_words_in_order(prediction: str, answers: list[str], contained: float) -> None:
    assert contains_answer(prediction, answers) == contained


def test_agreement_is_f1_against_one_answer() -> None:
    assert agreement("the Denver team", "Denver") == f1("the Denver team", ["Denver"]) == pytest.approx(2 / 3)
    assert agreement("", "") == 1.0


@pytest.mark.parametrize("score", [f1, exact_match, contains_answer])
def test_a_score_refuses_one_string_for_a_list_and_an_empty_list(score: object) -> None:
    with pytest.raises(TypeError, match="answers must be a list of strings"):
        score("Denver", "Denver")
    with pytest.raises(ValueError, match="answers must hold at least one string"):
        score("Denver", [])


@pytest.mark.parametrize("levels", [3, 10**6])
def test_auroc_is_that_of_torchmetrics_with_ties_and_without(levels: int) -> None:
    random_numbers = torch.Generator().manual_seed(0)
    scores = torch.randint(levels, (50,), generator=random_numbers).double() / levels
    is_positive = torch.rand(50, generator=random_numbers) < 0.4
    expected = binary_auroc(scores, is_positive.long()).item()
    assert auroc(scores.tolist(), is_positive.tolist()) == pytest.approx(expected)


def test_auroc_of_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="is_positive must hold both true and false, got 2 true of 2"):
        auroc([0.1, 0.2], [True, True])
