"""Questions that a text asks about itself, without annotators: gaps in its sentences, what follows, what it is about.

They teach a compressor to keep names, numbers and dates of any corpus. For training only, never for reporting.
Standard library only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

PASSAGE_CHARACTERS = (300, 1300)
"""Shortest and longest passage cut out of a text."""

QUESTIONS_PER_PASSAGE = 5
PASSAGES_PER_TEXT = 2

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_FACT = re.compile(
    rf"(?:\d{{1,2}} )?(?:{_MONTH})(?: \d{{1,2}},)?(?: \d{{4}})?\b"  # a date
    r"|\d[\d,.]*\d(?:th|st|nd|rd)?\b|\b\d\b"  # a number
    r"|(?<=[a-z,;] )[A-Z][\w'-]+(?: (?:of |the |de |van |von )?[A-Z][\w'-]+)*"  # a name, not at a sentence's beginning
)
_GAP = "_____"
_GAP_FORMS = (
    'Complete the sentence from the document: "{}"',
    'What belongs in the gap? "{}"',
    'Which words are missing here: "{}"',
    "{}\n\nFill in the blank.",
)
_NEXT_FORMS = ('Which sentence follows "{}"', 'What does the document say right after "{}"')
_ABOUT_FORMS = ("What is the document about?", "What is the subject of the text?", "Give the text a title.")
_SUMMARY_FORMS = ("Summarise the document in one sentence.", "In one sentence: what does the document say?")


@dataclass(frozen=True)
class SyntheticPassage:
    """A passage of a text, and (question, answer) pairs about it."""

    text: str
    questions: list[tuple[str, str]]


def passages(text: str, title: str = "") -> Iterator[SyntheticPassage]:
    """A few passages of a text with their questions; the same text gives the same ones.

    >>> [passage] = passages("The mill was built by Anna Holm in 1840. " * 8)
    >>> passage.questions[0][1] in ("Anna Holm", "1840")
    True
    """
    draw = random.Random(text)
    cuts = list(_cut([sentence for line in text.splitlines() for sentence in _SENTENCE_END.split(line.strip())]))
    starts = [0, *draw.sample(range(1, len(cuts)), min(len(cuts), PASSAGES_PER_TEXT) - 1)] if cuts else []
    for number in starts:
        sentences = cuts[number]
        asked = list(_gaps(sentences, draw))
        draw.shuffle(asked)
        asked = asked[: QUESTIONS_PER_PASSAGE - 1] + list(_whole(sentences, title if number == 0 else "", draw))
        if asked:
            yield SyntheticPassage(" ".join(sentences), asked)


def _cut(sentences: Iterable[str]) -> Iterator[list[str]]:
    """Neighbouring sentences that make passages within `PASSAGE_CHARACTERS`."""
    shortest, longest = PASSAGE_CHARACTERS
    kept: list[str] = []
    for sentence in sentences:
        if kept and sum(map(len, kept)) + len(sentence) > longest:
            if sum(map(len, kept)) >= shortest:
                yield kept
            kept = []
        if sentence and len(sentence) <= longest:
            kept.append(sentence)
    if sum(map(len, kept)) >= shortest:
        yield kept


def _gaps(sentences: Sequence[str], draw: random.Random) -> Iterator[tuple[str, str]]:
    """One fact cut out of every sentence of 40 to 400 characters that has some."""
    for sentence in sentences:
        facts = [fact for fact in _FACT.finditer(sentence) if sentence.count(fact.group()) == 1]
        if facts and 40 <= len(sentence) <= 400:
            fact = draw.choice(facts)
            gapped = f"{sentence[: fact.start()]}{_GAP}{sentence[fact.end() :]}"
            yield draw.choice(_GAP_FORMS).format(gapped), fact.group()


def _whole(sentences: Sequence[str], title: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    """A question about the passage as a whole: its subject or gist where the text begins here, else what follows."""
    if title and draw.random() < 0.5:
        yield draw.choice(_ABOUT_FORMS), title
    elif title and draw.random() < 0.5:
        yield draw.choice(_SUMMARY_FORMS), sentences[0]
    elif len(sentences) > 1 and draw.random() < 0.3:
        number = draw.randrange(len(sentences) - 1)
        yield draw.choice(_NEXT_FORMS).format(sentences[number]), sentences[number + 1]
