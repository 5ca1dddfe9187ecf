"""Questions with documents of an exact number of tokens, no document twice."""

from __future__ import annotations

from itertools import count, cycle, islice
from pathlib import Path

from pic_rag.evaluation.shortening import Shortener
from pic_rag.questions import Context, Question

CORPUS = Path(__file__).parents[1] / "demo"
_ATTEMPTS = 50
_STRIDE = 97  # words between the beginnings of two documents; no divisor of the corpus's length


class Workload:
    """Makes questions for one tokenizer out of the words of the demo corpus, repeated as long as need be.

    Args:
        shortener: of the generator's tokenizer.
    """

    def __init__(self, shortener: Shortener) -> None:
        self._shortener = shortener
        self._words = " ".join(path.read_text(encoding="utf-8") for path in sorted(CORPUS.glob("*.md"))).split()
        self._numbers = count(1)

    def questions(self, number: int, context_tokens: int, document_tokens: int) -> list[Question]:
        """So many questions, each with documents of its own that have `context_tokens` together."""
        full, rest = divmod(context_tokens, document_tokens)
        sizes = [document_tokens] * full + [rest] * (rest > 0)
        return [
            Question(f"bench-{at}", "What does the first record tell?", (), tuple(map(self._context, sizes)))
            for at in range(number)
        ]

    def document(self, tokens: int) -> str:
        """A new text of exactly so many tokens.

        Raises:
            ValueError: when the tokenizer makes that number of no beginning that was tried.
        """
        number = next(self._numbers)
        for attempt in range(_ATTEMPTS):
            start = (number * _STRIDE + attempt) % len(self._words)
            words = islice(cycle(self._words), start, start + tokens)  # a token a word at least
            text = self._shortener.truncate(f"{number}: {' '.join(words)}", tokens)
            if self._shortener.count_tokens(text) == tokens:
                return text
        raise ValueError(f"tokens must be a number that the tokenizer can make a text of, got {tokens}.")

    def _context(self, tokens: int) -> Context:
        return Context("", self.document(tokens), True)
