"""A document is cut into passages: what a retriever finds and shows.

This file does not know what is done with a passage afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from langchain_text_splitters import RecursiveCharacterTextSplitter

from pic_rag.checks import check_whole
from pic_rag.retrieval.documents import Document

PASSAGE_CHARACTERS = 1000
"""The most a passage holds: 1,000 characters of English are about the 256 tokens that all-MiniLM-L6-v2 reads."""

OVERLAP_CHARACTERS = 100
"""How much of a passage the next one may repeat."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document: what the retriever finds.

    Attributes:
        id: the document's id and the passage's number in it.
        text: the piece.
        source: the document's.
        metadata: the document's, and `start_character`: where the piece starts in the document.
        hash: of origin and text; a passage of the same hash is kept once.
    """

    id: str
    text: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    hash: str = ""

    def __post_init__(self) -> None:
        """Fill in the hash."""
        if not self.hash:
            content = "\0".join((*filter(None, origin(self)), self.text)).encode("utf-8", "surrogatepass")
            object.__setattr__(self, "hash", hashlib.sha256(content).hexdigest())


def origin(item: Document | Passage) -> tuple[str, str | None]:
    """What tells documents apart: the source, and where it was loaded from a file also the absolute path."""
    path = item.metadata.get("path")
    return item.source, None if path is None else str(path)


class PassageSplitter:
    """Cuts documents at paragraphs, else at lines, sentences, words.

    Args:
        passage_characters: the most a passage holds.
        overlap_characters: how much of a passage the next one may repeat.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self, passage_characters: int = PASSAGE_CHARACTERS, overlap_characters: int = OVERLAP_CHARACTERS
    ) -> None:
        self.passage_characters = check_whole("passage_characters", passage_characters)
        self.overlap_characters = check_whole("overlap_characters", overlap_characters, 0)
        if self.overlap_characters >= self.passage_characters:
            raise ValueError(
                f"overlap_characters must be below passage_characters={passage_characters}, got {overlap_characters}."
            )
        self._splitter = RecursiveCharacterTextSplitter(
            chunk_size=self.passage_characters,
            chunk_overlap=self.overlap_characters,
            separators=["\n\n", "\n", ". ", " ", ""],
            keep_separator="end",
            add_start_index=True,
        )

    def split(self, document: Document) -> list[Passage]:
        """Return the passages of one document, in order.

        Raises:
            TypeError: `document` is not a `Document`.
        """
        if not isinstance(document, Document):
            raise TypeError(
                f"documents must be pic_rag.Document objects, got {type(document).__name__}. "
                "Use Document.from_text(text, source=...) or load_documents(paths)."
            )
        return [
            Passage(
                id=f"{document.id}-{number}",
                text=piece.page_content,
                source=document.source,
                metadata={**document.metadata, "start_character": piece.metadata["start_index"]},
            )
            for number, piece in enumerate(self._splitter.create_documents([document.text]))
        ]
