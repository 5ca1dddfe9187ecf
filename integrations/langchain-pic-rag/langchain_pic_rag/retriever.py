"""PICRetriever: any retriever, its documents compressed; and pic-rag's own index as a LangChain retriever."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStoreRetriever
from pydantic import ConfigDict, Field

import pic_rag
from langchain_pic_rag.compressor import PICCompressor, refuse_handles

if TYPE_CHECKING:
    from pic_rag import Retriever
else:
    Retriever = Any  # pydantic reads annotations at import, when torch must not be loaded yet


class PICRetriever(BaseRetriever):
    """Retrieves documents and compresses them: each comes back with a handle in place of its text.

    `ContextualCompressionRetriever` does the same; this one needs no `langchain-classic` and has `k`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    base_retriever: BaseRetriever
    """Finds the documents."""

    base_compressor: PICCompressor = Field(default_factory=PICCompressor)
    """Compresses them."""

    k: int | None = Field(default=None, ge=1)
    """Documents to return at most; None: as many as the base retriever finds. `invoke(query, k=...)` overrides it."""

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        refuse_handles(query)
        k = self.k if k is None else k
        found = self.base_retriever.invoke(query, {"callbacks": run_manager.get_child()}, **self._limit(k))
        kept = found[:k]
        return list(self.base_compressor.compress_documents(kept, query, callbacks=run_manager.get_child()))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        refuse_handles(query)
        k = self.k if k is None else k
        found = await self.base_retriever.ainvoke(query, {"callbacks": run_manager.get_child()}, **self._limit(k))
        kept = found[:k]
        return list(await self.base_compressor.acompress_documents(kept, query, callbacks=run_manager.get_child()))

    def _limit(self, k: int | None) -> dict[str, int]:
        """What the base retriever is told of `k`, where that is its own number of results.

        One that passes it on to others would have a reranker choose among `k` documents; it is cut afterwards.
        """
        own = inspect.signature(self.base_retriever._get_relevant_documents).parameters
        takes = isinstance(self.base_retriever, VectorStoreRetriever) or "k" in own
        return {"k": k} if takes and k is not None else {}


class PassageRetriever(BaseRetriever):
    """pic-rag's own retriever (passages, MiniLM or another embedder, FAISS) as a LangChain one; no compression."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    retriever: Retriever
    """A `pic_rag.Retriever`, in memory or from `pic_rag.Retriever.load`."""

    k: int = Field(default=4, ge=1)
    """Passages to return at most."""

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Document],
        *,
        k: int = 4,
        **options: Any,
    ) -> PassageRetriever:
        """Index documents.

        Args:
            documents: what to search. `metadata["source"]`, else the id, names a document.
            k: passages to return at most.
            **options: of `pic_rag.Retriever`: `embedder`, `passage_characters`, `overlap_characters`, `device`.
        """
        retriever = pic_rag.Retriever(**options)
        retriever.add(_to_pic(document, number) for number, document in enumerate(documents))
        return cls(retriever=retriever, k=k)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        return self._search(query, k)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        return await asyncio.to_thread(self._search, query, k)

    def _search(self, query: str, k: int | None) -> list[Document]:
        return [
            Document(
                id=hit.passage.id,
                page_content=hit.passage.text,
                metadata={**hit.passage.metadata, "source": hit.passage.source},
            )
            for hit in self.retriever.search(query, self.k if k is None else k)
        ]


def _to_pic(document: Document, number: int) -> pic_rag.Document:
    source = str(document.metadata.get("source") or document.id or f"document {number}")
    made = pic_rag.Document.from_text(document.page_content, source=source, metadata=document.metadata)
    return pic_rag.Document(document.id, made.text, source, made.metadata) if document.id else made
