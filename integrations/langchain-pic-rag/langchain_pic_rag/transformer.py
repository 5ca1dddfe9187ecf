"""PICDocumentTransformer: compression at ingestion, so that no question has to wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from langchain_core.documents import BaseDocumentTransformer, Document
from pydantic import model_validator

from langchain_pic_rag.settings import CompressionSettings


class PICDocumentTransformer(CompressionSettings, BaseDocumentTransformer):
    """Compresses documents when they are ingested. Use it after the text splitter.

    A vector store embeds `page_content`, so the documents stay as they are and only the store is filled: at question
    time `PICCompressor` with the same settings finds every memory ready.
    """

    @model_validator(mode="after")
    def _check_ratio(self) -> PICDocumentTransformer:
        if isinstance(self.ratio, tuple):
            raise ValueError(
                f"ratio must be one number at ingestion, got {self.ratio}: ranks are known when a question is asked. "
                "Transform once with each of them."
            )
        return self

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """The documents as they are, once their memories are in the store."""
        documents = list(documents)
        if documents:
            self.compress_originals(documents)
        return documents

    async def atransform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """`transform_documents` in a thread of its own."""
        return await asyncio.to_thread(self.transform_documents, documents, **kwargs)
