"""What pic-rag writes into a document's metadata. JSON values only, so documents pickle and serialise as before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document

if TYPE_CHECKING:
    from pic_rag import Memory

MEMORY = "pic_memory"  # the handle
SOURCE_TEXT = "pic_source_text"
TEXT_TOKENS = "pic_text_tokens"
MEMORY_TOKENS = "pic_memory_tokens"
RATIO = "pic_ratio"
KEYS = (MEMORY, SOURCE_TEXT, TEXT_TOKENS, MEMORY_TOKENS, RATIO)


def with_memory(document: Document, memory: Memory, text: str | None) -> Document:
    """A copy of the document with the handle for its text; the text goes into the metadata unless it is None."""
    metadata = without_memory(document) | memory_metadata(memory)
    if text is not None:
        metadata[SOURCE_TEXT] = text
    return document.model_copy(update={"page_content": memory.handle, "metadata": metadata})


def memory_metadata(memory: Memory) -> dict[str, str | int]:
    """Handle, tokens and ratio of a memory."""
    return {
        MEMORY: memory.handle,
        TEXT_TOKENS: memory.text_tokens,
        MEMORY_TOKENS: memory.memory_tokens,
        RATIO: memory.ratio,
    }


def without_memory(document: Document) -> dict[str, Any]:
    """The metadata that pic-rag did not write."""
    return {key: value for key, value in document.metadata.items() if key not in KEYS}


def holds_handle(document: Document) -> bool:
    """Whether the content is a handle that pic-rag put there.

    The metadata decides, which the application writes: a handle that stands in the text of a document is text.
    """
    return MEMORY in document.metadata and document.metadata[MEMORY] == document.page_content
