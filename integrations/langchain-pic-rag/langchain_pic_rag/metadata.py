"""What pic-rag writes into a document's metadata. JSON values only, so documents pickle and serialise as before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document

from pic_rag import find_handles

if TYPE_CHECKING:
    from pic_rag import Memory

SOURCE_TEXT = "pic_source_text"
TEXT_TOKENS = "pic_text_tokens"
MEMORY_TOKENS = "pic_memory_tokens"
RATIO = "pic_ratio"
FIDELITY = "pic_fidelity"
KEYS = (SOURCE_TEXT, TEXT_TOKENS, MEMORY_TOKENS, RATIO, FIDELITY)


class SourceText(str):
    """A text that `repr` only sums up.

    Applications print `document.metadata` into prompts, LangChain's tutorials do: the text would stand there in full.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} characters>"


def with_memory(document: Document, memory: Memory, signed_handle: str, text: str | None) -> Document:
    """A copy of the document with the handle for its text; the text goes into the metadata unless it is None."""
    metadata = without_memory(document) | {
        TEXT_TOKENS: memory.text_tokens,
        MEMORY_TOKENS: memory.memory_tokens,
        RATIO: memory.ratio,
    }
    if memory.fidelity is not None:
        metadata[FIDELITY] = memory.fidelity
    if text is not None:
        metadata[SOURCE_TEXT] = SourceText(text)
    return document.model_copy(update={"page_content": signed_handle, "metadata": metadata})


def without_memory(document: Document) -> dict[str, Any]:
    """The metadata that pic-rag did not write."""
    return {key: value for key, value in document.metadata.items() if key not in KEYS}


def is_compressed(document: Document) -> bool:
    """Whether the content is a handle that stands for the document's text; in other documents a handle is text."""
    return RATIO in document.metadata and find_handles(document.page_content) == [document.page_content]
