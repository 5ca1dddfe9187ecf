"""Open retrieval: a question's passages are searched among all passages of a file, in place of those it came with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

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
        recall: of the questions that have a gold passage, the share with at least one among those found; None where no
            question has one.
        recall_all: likewise, with all of them: what a question over several passages needs.
    """

    questions: list[Question]
    passages: int
    recall: float | None
    recall_all: float | None


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
        pool: questions whose contexts are searched, as a rule all of the file, unanswerable ones too.
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
    pairs = [(_gold(asked), _gold(got)) for asked, got in zip(questions, found, strict=True)]
    hits = [(bool(there), gold <= there) for gold, there in pairs if gold]
    some, every = (fmean(flags) for flags in zip(*hits, strict=True)) if hits else (None, None)
    return Retrieved(found, len(retriever), recall=some, recall_all=every)


def _answerable(asked: Question, retriever: Retriever, contexts: Sequence[Context], top_k: int) -> Question:
    gold = _gold(asked)
    chosen = [contexts[hit.passage.metadata["number"]] for hit in retriever.search(asked.question, top_k)]
    return replace(asked, contexts=tuple(replace(context, is_gold=context.document in gold) for context in chosen))


def _gold(asked: Question) -> set[str]:
    return {context.document for context in asked.contexts if context.is_gold}
