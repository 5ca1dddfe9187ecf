"""Fidelity: how much of a text its memory kept, in the eyes of the generator that reads the memory.

The generator reads a memory, is asked to repeat the document, and is shown the true words one by one: a token that it
expects was kept. Numbers, names and dates are lost first and matter most to answers, so they are counted apart.

This file compares memories with texts. It does not know how memories are made or kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pic_rag.chunking import text_windows, tokenize
from pic_rag.generation.generator import Generator
from pic_rag.handles import placeholder
from pic_rag.memory import Memory, hash_text
from pic_rag.prompts import repeat_messages

_WORD = re.compile(r"\w+(?:[.,:/'’-]\w+)*")
_SENTENCE_START = re.compile(r"(?:^|[.!?:][\"'”’)\]]*\s+|\n)[\"'“‘(\[]*$")
_LOOK_BACK = 8  # characters before a word that tell whether a sentence starts with it


@dataclass(frozen=True)
class Fidelity:
    """What the generator knows of a text from its memory.

    Attributes:
        loss: mean cross-entropy of the text's tokens, in nats; 0 for a text without tokens.
        telling_loss: the same over the tokens of numbers, names and dates; `loss` where there are none.
        recall: mean probability of the text's tokens, 0 to 1; 1 for a text without tokens.
        telling_recall: the same over the tokens of numbers, names and dates; `recall` where there are none.
    """

    loss: float
    telling_loss: float
    recall: float
    telling_recall: float

    @property
    def score(self) -> float:
        """The figure that `min_fidelity` is compared with, 0 to 1: `telling_recall`."""
        return self.telling_recall

    @classmethod
    def of_tokens(cls, log_probs: torch.Tensor, is_telling: torch.Tensor) -> Fidelity:
        """From `(text_tokens,)` log-probabilities and whether each token is telling.

        >>> log_probs = torch.tensor([1.0, 0.5, 0.5, 1.0]).log()
        >>> fidelity = Fidelity.of_tokens(log_probs, torch.tensor([False, True, True, False]))
        >>> fidelity.recall, fidelity.telling_recall
        (0.75, 0.5)
        """
        if not len(log_probs):
            return cls(0.0, 0.0, 1.0, 1.0)
        log_probs = log_probs.clamp(max=0.0)  # rounding can put a sure token a hair above
        telling = log_probs[is_telling] if is_telling.any() else log_probs
        return cls(
            -log_probs.mean().item(), -telling.mean().item(), log_probs.exp().mean().item(), telling.exp().mean().item()
        )


class FidelityCheck:
    """Measures memories against their texts, with the generator that reads them (its reader on, as in an answer).

    Args:
        generator: the one the memories are made for.
        segment_tokens: the compressor's: a long document is checked by segments, each from its own memory tokens.
        batch_size: segments checked together.
    """

    def __init__(self, generator: Generator, segment_tokens: int = 512, batch_size: int = 8) -> None:
        self.generator = generator
        self.segment_tokens = segment_tokens
        self.batch_size = batch_size

    def measure(self, texts: Sequence[str], memories: Sequence[Memory]) -> list[Fidelity]:
        """The fidelity of each memory to its text, in one teacher-forced forward a batch of segments.

        Raises:
            ValueError: when a memory is of another text or tokenizer, or made for another generator.
        """
        tokens = [_Tokens.of(text, self.generator.tokenizer) for text in texts]
        for text, memory, own in zip(texts, memories, tokens, strict=True):
            _check_match(text, memory, own)
        targets = [part for own in tokens for part in _split(own.ids, self.segment_tokens)]
        parts = [
            (memory, part)
            for memory in memories
            for part in _split(memory.embeddings, self.segment_tokens // memory.ratio)
        ]
        pieces = [
            replace(memory, embeddings=part, text_tokens=len(target))
            for (memory, part), target in zip(parts, targets, strict=True)
        ]
        handles = list(map(placeholder, range(len(pieces))))  # pieces of one memory share its own
        log_probs = self.generator.score(
            [repeat_messages(handle) for handle in handles],
            targets,
            dict(zip(handles, pieces, strict=True)),
            batch_size=self.batch_size,
        )
        known = torch.cat([torch.empty(0), *log_probs]).split([len(own.ids) for own in tokens])
        return [Fidelity.of_tokens(part, own.is_telling) for part, own in zip(known, tokens, strict=True)]

    def mark(self, texts: Sequence[str], memories: Sequence[Memory]) -> list[Memory]:
        """The memories with their fidelity's score in them. Raises what `measure` raises."""
        measured = self.measure(texts, memories)
        return [replace(memory, fidelity=own.score) for memory, own in zip(memories, measured, strict=True)]


@dataclass(frozen=True, eq=False)
class _Tokens:
    """`(text_tokens,)` token ids of a text as the compressor cuts it, and whether each is part of a telling word."""

    ids: torch.Tensor
    is_telling: torch.Tensor

    @classmethod
    def of(cls, text: str, tokenizer: Any) -> _Tokens:  # noqa: ANN401 - any Hugging Face tokenizer
        ids: list[int] = []
        is_telling: list[bool] = []
        for window in text_windows(text):
            encoded = tokenize(window, tokenizer, return_offsets_mapping=True)
            telling = np.zeros(len(window) + 1, dtype=bool)
            for start, stop in telling_spans(window):
                telling[start:stop] = True
            ids += encoded["input_ids"]
            is_telling += [bool(telling[start:stop].any()) for start, stop in encoded["offset_mapping"]]
        return cls(torch.tensor(ids, dtype=torch.long), torch.tensor(is_telling, dtype=torch.bool))


def telling_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where the numbers, dates and names of a text are: words with a digit, and capitalised ones inside a sentence.

    >>> text = "The tram of 1887 cost 2.50 and ran to Amsel. It was red."
    >>> [text[start:stop] for start, stop in telling_spans(text)]
    ['1887', '2.50', 'Amsel']
    """
    for word in _WORD.finditer(text):
        before = text[max(0, word.start() - _LOOK_BACK) : word.start()]
        named = word.group()[0].isupper() and not _SENTENCE_START.search(before)
        if named or any(map(str.isdigit, word.group())):
            yield word.span()


def _split(rows: torch.Tensor, most: int) -> Sequence[torch.Tensor]:
    """Parts of `most` rows, the last one shorter: those of one segment each. No rows, no parts."""
    return rows.split(most) if len(rows) else ()


def _check_match(text: str, memory: Memory, tokens: _Tokens) -> None:
    """A memory checked against another text would get a number that means nothing."""
    label = memory.source or memory.handle
    if memory.source_hash != hash_text(text):
        raise ValueError(
            f"Memory of {label} must be of the text it is checked against, got another. Compress the text."
        )
    if memory.text_tokens != len(tokens.ids):
        raise ValueError(
            f"generator must share the compressor's tokenizer, got {len(tokens.ids)} tokens for a text of "
            f"{memory.text_tokens} in the memory of {label}. Leave min_fidelity out for this generator."
        )
