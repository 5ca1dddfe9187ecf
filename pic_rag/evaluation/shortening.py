"""Text cut to a number of tokens: its beginning, or its sentences that are most similar to a question."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from pic_rag.chunking import count_tokens, tokenize
from pic_rag.models.embedded import retriever_path

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


class Shortener:
    """Cuts documents for one tokenizer.

    Args:
        tokenizer: the generator's, a fast one.
        embedder: a sentence-transformers model, its folder or hub id; None: the embedded MiniLM. Loaded when needed.
    """

    def __init__(self, tokenizer: Any, embedder: str | Path | SentenceTransformer | None = None) -> None:  # noqa: ANN401
        self.tokenizer = tokenizer
        self._embedder = embedder
        self._sentences: dict[str, tuple[list[str], torch.Tensor]] = {}

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without special ones."""
        return count_tokens(text, self.tokenizer)

    def truncate(self, text: str, tokens: int) -> str:
        """The longest beginning of a text that has at most so many tokens."""
        encoded = tokenize(text, self.tokenizer, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        if len(ends) <= tokens:
            return text
        for kept in range(tokens, 0, -1):  # a cut word may have more tokens than it had as a part of the whole
            beginning = text[: ends[kept - 1]]
            if self.count_tokens(beginning) <= tokens:
                return beginning
        return ""

    def extract(
        self, questions: Sequence[str], documents: Sequence[Sequence[str]], tokens: Sequence[int]
    ) -> list[list[str]]:
        """The best sentences of each question's documents, at most so many tokens together.

        Sentences are taken by similarity, wherever they stand, until the tokens are used up; the last one is cut.

        Args:
            questions: what is asked.
            documents: texts for each question.
            tokens: room for each question.

        Returns:
            For each question the documents that have a sentence left, sentences in the order of the text.
        """
        self._embed(text for texts in documents for text in texts)
        queries = self._model.encode_query(list(questions), **_ENCODING)  # (questions, width)
        return [self._select(*each) for each in zip(queries, documents, tokens, strict=True)]

    def _select(self, query: torch.Tensor, texts: Sequence[str], room: int) -> list[str]:
        scored = [
            (-score, document, place)
            for document, text in enumerate(texts)
            if text in self._sentences
            for place, score in enumerate((self._sentences[text][1] @ query).tolist())
        ]
        chosen: dict[int, dict[int, str]] = {}
        for _, document, place in sorted(scored):
            piece = self.truncate(f" {self._sentences[texts[document]][0][place]}", room)  # the space joins it
            if not piece.strip():
                break
            chosen.setdefault(document, {})[place] = piece.strip()
            room -= self.count_tokens(piece)
        return [" ".join(sentences[place] for place in sorted(sentences)) for _, sentences in sorted(chosen.items())]

    def _embed(self, texts: Iterable[str]) -> None:
        """Split and embed the documents not seen before; all in one go, so that batches are full."""
        split = {text: _split_sentences(text) for text in texts if text not in self._sentences}
        fresh = {text: sentences for text, sentences in split.items() if sentences}
        if fresh:
            flat = [sentence for sentences in fresh.values() for sentence in sentences]
            embeddings = self._model.encode_document(flat, **_ENCODING)  # (sentences, width)
            parts = embeddings.split([len(sentences) for sentences in fresh.values()])
            self._sentences.update(zip(fresh, zip(fresh.values(), parts, strict=True), strict=True))

    @cached_property
    def _model(self) -> SentenceTransformer:
        if isinstance(self._embedder, SentenceTransformer):
            return self._embedder
        return SentenceTransformer(str(self._embedder or retriever_path()))


_ENCODING: dict[str, Any] = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}


def _split_sentences(text: str) -> list[str]:
    r"""Sentences and lines of a text.

    >>> _split_sentences("Bees\nThey dance. Why? To point.")
    ['Bees', 'They dance.', 'Why?', 'To point.']
    """
    return [sentence.strip() for sentence in _SENTENCE_END.split(text) if sentence.strip()]
