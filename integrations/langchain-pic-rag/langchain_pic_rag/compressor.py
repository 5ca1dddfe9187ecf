"""PICCompressor: retrieved documents in, the same documents with handles in place of their text out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.config import (
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
)
from pydantic import Field, model_validator

from langchain_pic_rag.guard import reads_handles, watch
from langchain_pic_rag.restoring import restore_document
from langchain_pic_rag.settings import Compressed, CompressionSettings, label
from pic_rag import escape_handles, find_handles


class PICCompressor(CompressionSettings, BaseDocumentCompressor):
    """Compresses retrieved documents; ids, order and metadata stay, `page_content` becomes a handle.

    Only `ChatPIC` reads handles. A compressor does not see which LLM comes after it: name it as `llm`, and an LLM that
    cannot read handles is an error at construction, or gets the text (`fallback="text"`). One that is not named is
    stopped when it is about to get them (`HandleGuard`).

    Memories do not depend on the query, so one memory serves every question. A query that holds a handle is refused:
    chains print the same words into the prompt, where it would stand for a memory that nobody retrieved.

    Raises:
        ValueError: `llm` does not read handles and `fallback` is "error", or `fallback` is "text" without `llm`.
    """

    top_n: int | None = Field(default=None, ge=1)
    """Documents to keep, from the first; None: all."""

    llm: Any = Field(default=None, exclude=True, repr=False)
    """The LLM that will read the documents, to check that it can."""

    fallback: Literal["error", "text"] = "error"
    """What an `llm` that cannot read handles gets: an error now, or the original text with handle syntax escaped."""

    @model_validator(mode="after")
    def _check_llm(self) -> PICCompressor:
        if self.llm is None and self.fallback == "text":
            raise ValueError(
                "llm must be given with fallback='text', got None: a compressor does not see the LLM after it. "
                "Pass llm=, or put PICRestore() between the prompt and the LLM."
            )
        if self.llm is not None and self.fallback == "error" and not reads_handles(self.llm):
            raise ValueError(
                f"llm must read handles, as ChatPIC does, got {type(self.llm).__name__}. Use ChatPIC, or pass "
                "fallback='text' to give it the original text."
            )
        return self

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Compress documents.

        Args:
            documents: retrieved documents, best first. One that was compressed before is compressed from its source.
            query: not needed; a trace shows it. It must not hold a handle.
            callbacks: get a run named after this class whose outputs say how many tokens were saved.

        Raises:
            ValueError: the compressor does not serve the ratio, or the query holds a handle.
            UnknownHandleError: a document was compressed before, and its text is nowhere to be found.
        """
        refuse_handles(query)
        _check_documents(documents)
        if not documents:
            return []
        manager = get_callback_manager_for_config(_config(callbacks))
        run = manager.on_chain_start(None, self._inputs(documents, query), name=type(self).__name__)
        try:
            compressed = self._compress(documents)
        except BaseException as error:
            run.on_chain_error(error)
            raise
        run.on_chain_end(compressed.report())
        return compressed.documents

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """`compress_documents` in a thread of its own: the event loop is never blocked."""
        refuse_handles(query)
        _check_documents(documents)
        if not documents:
            return []
        manager = get_async_callback_manager_for_config(_config(callbacks))
        run = await manager.on_chain_start(None, self._inputs(documents, query), name=type(self).__name__)
        try:
            compressed = await asyncio.to_thread(self._compress, documents)
        except BaseException as error:
            await run.on_chain_error(error)
            raise
        await run.on_chain_end(compressed.report())
        return compressed.documents

    def as_runnable(self) -> Runnable[Any, list[Document]]:
        """The compressor as a step of a chain: takes documents, or a dict with `documents` and perhaps `query`."""

        def compress(value: Any, config: RunnableConfig) -> list[Document]:
            return list(self.compress_documents(*_documents_and_query(value), callbacks=config.get("callbacks")))

        async def acompress(value: Any, config: RunnableConfig) -> list[Document]:
            return list(await self.acompress_documents(*_documents_and_query(value), callbacks=config.get("callbacks")))

        return RunnableLambda(compress, acompress, name=type(self).__name__)

    def _inputs(self, documents: Sequence[Document], query: str) -> dict[str, Any]:
        return {"query": query, "documents": [label(document, number) for number, document in enumerate(documents)]}

    def _compress(self, documents: Sequence[Document]) -> Compressed:
        kept = list(documents)[: self.top_n]
        if self.llm is not None and not reads_handles(self.llm):
            return Compressed([self._as_text(document) for document in kept])
        sources, signer = self.sources, self.signer
        compressed = self.compress_originals([restore_document(document, sources, signer) for document in kept])
        watch(document.page_content for document in compressed.documents)
        return compressed

    def _as_text(self, document: Document) -> Document:
        original = restore_document(document, self.sources, self.signer)
        return original.model_copy(update={"page_content": escape_handles(original.page_content)})


def refuse_handles(query: str) -> None:
    """Raise ValueError when a query holds a handle."""
    if handles := find_handles(query or ""):
        raise ValueError(
            f"query must not hold a handle, got {handles[0]}. Put escape_input before the chain: users type text."
        )


def _config(callbacks: Callbacks | None) -> RunnableConfig:
    """The given callbacks, or those of the runnable this is called in."""
    return ensure_config(None if callbacks is None else {"callbacks": callbacks})


def _documents_and_query(value: Any) -> tuple[Sequence[Document], str]:
    documents: Any = value.get("documents") if isinstance(value, dict) else value
    _check_documents(documents)
    return documents, value.get("query", "") if isinstance(value, dict) else ""


def _check_documents(documents: Any) -> None:
    if not isinstance(documents, (list, tuple)) or not all(isinstance(document, Document) for document in documents):
        raise TypeError(
            f"input must be a list of Documents or a dict with the key 'documents', got {documents!r:.80}. "
            "Put the retriever before the compressor."
        )
