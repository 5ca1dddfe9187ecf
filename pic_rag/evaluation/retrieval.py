"""Open retrieval: a question's passages are searched among all passages of a file, in place of those it came with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sentence_transformers import SentenceTransformer

from pic_rag.questions import Context, Question
from pic_rag.retrieval.documents import Document
from pic_rag.retrieval.retriever import Retriever


@dataclass(frozen=True)
class Retrieved:
    """Questions with the passages found for them.

    Attributes:
        questions: `is_gold` of a passage says whether it was a gold one of that very question.
        passages: distinct passages that were searched.
        recall: share of the questions with at least one of their gold passages among those found.
        recall_all: share with all of them: what a question over several passages needs.
    """

    questions: list[Question]
    passages: int
    recall: float
    recall_all: float


def retrieve(
    questions: Sequence[Question],
    pool: Iterable[Question],
    top_k: int,
    *,
    embedder: str | Path | SentenceTransformer | None = None,
    progress: bool | None = None,
) -> Retrieved:
    """Replace each question's contexts by the `top_k` nearest of the pool's, best first.

    A passage is embedded whole, as the file has it; what is beyond the embedder's limit (256 tokens for MiniLM) is
    read by the generator but not searched.

    Args:
        questions: what is asked.
        pool: questions whose contexts are searched, as a rule those of the whole file.
        top_k: passages for each question.
        embedder: a sentence-transformers model, its folder or hub id; None: the embedded MiniLM.
        progress: of embedding: True shows a bar, False none; None shows it on a terminal.

    Raises:
        ValueError: when the pool holds no text.
    """
    contexts = list({context.document: context for asked in pool for context in asked.contexts}.values())
    longest = max((len(context.document) for context in contexts), default=0)
    if not longest:
        raise ValueError("pool must hold questions with contexts to search, got none. Leave retrieval out.")
    retriever = Retriever(embedder, passage_characters=longest, overlap_characters=0)
    retriever.add(
        (
            Document.from_text(context.document, source=str(number), metadata={"number": number})
            for number, context in enumerate(contexts)
        ),
        progress=progress,
    )
    found = [_answerable(asked, retriever, contexts, top_k) for asked in questions]
    hits = [_hits(*pair) for pair in zip(questions, found, strict=True)]
    return Retrieved(
        found,
        len(retriever),
        sum(some for some, _ in hits) / max(1, len(hits)),
        sum(every for _, every in hits) / max(1, len(hits)),
    )


def _answerable(asked: Question, retriever: Retriever, contexts: Sequence[Context], top_k: int) -> Question:
    gold = _gold(asked)
    chosen = [contexts[hit.passage.metadata["number"]] for hit in retriever.search(asked.question, top_k)]
    return replace(asked, contexts=tuple(replace(context, is_gold=context.document in gold) for context in chosen))


def _hits(asked: Question, found: Question) -> tuple[bool, bool]:
    """Whether one, and whether every gold passage was found."""
    gold, there = _gold(asked), _gold(found)
    return bool(there), bool(gold) and gold <= there


def _gold(asked: Question) -> set[str]:
    return {context.document for context in asked.contexts if context.is_gold}
