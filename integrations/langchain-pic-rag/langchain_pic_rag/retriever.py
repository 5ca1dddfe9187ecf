"""PICRetriever: any retriever, its documents compressed; and pic-rag's own index as a LangChain retriever."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from langchain_core.runnables import RunnableConfig, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import ensure_config, patch_config
from langchain_core.runnables.configurable import RunnableConfigurableFields
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

    `ContextualCompressionRetriever` does the same; this one needs no `langchain-classic` and has `k`. All other
    arguments of a call go to the base retriever.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    base_retriever: RetrieverLike
    """Finds the documents: a retriever, or any runnable that takes a query and returns documents."""

    base_compressor: PICCompressor = Field(default_factory=PICCompressor)
    """Compresses them."""

    k: int | None = Field(default=None, ge=1)
    """Documents to return at most; None: as many as the base retriever finds. `invoke(query, k=...)` overrides it."""

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """The base retriever's documents with handles in. It gets the configuration of the call, filters included."""
        return super().invoke(input, config, call_config=ensure_config(config), **kwargs)

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """`invoke` for coroutines: the event loop is never blocked."""
        return await super().ainvoke(input, config, call_config=ensure_config(config), **kwargs)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        call_config: RunnableConfig | None = None,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        refuse_handles(query)
        k = self.k if k is None else k
        config = patch_config(call_config, callbacks=run_manager.get_child())
        limit = _limit(self.base_retriever, "_get_relevant_documents", k)
        found = self.base_retriever.invoke(query, config, **limit, **kwargs)
        kept = found[:k]
        return list(self.base_compressor.compress_documents(kept, query, callbacks=run_manager.get_child()))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        call_config: RunnableConfig | None = None,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        refuse_handles(query)
        k = self.k if k is None else k
        config = patch_config(call_config, callbacks=run_manager.get_child())
        limit = _limit(self.base_retriever, "_aget_relevant_documents", k)
        if not limit and (limit := _limit(self.base_retriever, "_get_relevant_documents", k)):
            # it has `k` in its blocking method only
            config = patch_config(call_config, callbacks=run_manager.get_sync().get_child())
            found = await asyncio.to_thread(self.base_retriever.invoke, query, config, **limit, **kwargs)
        else:
            found = await self.base_retriever.ainvoke(query, config, **limit, **kwargs)
        kept = found[:k]
        return list(await self.base_compressor.acompress_documents(kept, query, callbacks=run_manager.get_child()))


def _limit(retriever: RetrieverLike, method: str, k: int | None) -> dict[str, int]:
    """What a retriever is told of `k`, where that is its own number of results.

    One that passes it on to others would have a reranker choose among `k` documents; it is cut afterwards.
    """
    return {"k": k} if k is not None and _takes_k(retriever, method) else {}


def _takes_k(retriever: object, method: str) -> bool:
    """Whether the method of a retriever has `k` by name, seen through the usual wrappers."""
    if isinstance(retriever, RunnableBindingBase):
        return _takes_k(retriever.bound, method)
    if isinstance(retriever, RunnableConfigurableFields):
        return _takes_k(retriever.default, method)
    if isinstance(retriever, RunnableWithFallbacks):
        return all(_takes_k(each, method) for each in retriever.runnables)
    if isinstance(retriever, VectorStoreRetriever):
        return True
    return isinstance(retriever, BaseRetriever) and "k" in inspect.signature(getattr(retriever, method)).parameters


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
