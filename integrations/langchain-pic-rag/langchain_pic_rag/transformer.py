"""PICDocumentTransformer: compression at ingestion, so that no question has to wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from langchain_core.documents import BaseDocumentTransformer, Document

from langchain_pic_rag.compressor import CompressionSettings
from langchain_pic_rag.metadata import SOURCE_TEXT
from langchain_pic_rag.restoring import restore_document


class PICDocumentTransformer(CompressionSettings, BaseDocumentTransformer):
    """Compresses documents when they are ingested.

    A vector store embeds `page_content`, so the text stays there and only the store is filled: at question time
    `PICCompressor` with the same settings finds every memory ready. Use it after the text splitter.
    """

    replace_content: bool = False
    """Put the handle in place of the text, for documents that are not embedded afterwards."""

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """The documents with `pic_memory` and token counts in their metadata; ids, order and the rest stay."""
        if not documents:
            return []
        originals = [restore_document(document, self.sources) for document in documents]
        compressed = self.compress_originals(originals).documents
        if self.replace_content:
            return compressed
        return [_with_text(document, original) for document, original in zip(compressed, originals, strict=True)]

    async def atransform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """`transform_documents` in a thread of its own."""
        return await asyncio.to_thread(self.transform_documents, documents, **kwargs)


def _with_text(document: Document, original: Document) -> Document:
    metadata = {key: value for key, value in document.metadata.items() if key != SOURCE_TEXT}
    return document.model_copy(update={"page_content": original.page_content, "metadata": metadata})
