"""The way back: source texts in place of handles, in documents and in prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue
from langchain_core.runnables import RunnableConfig, RunnableSerializable

import pic_rag
from langchain_pic_rag.metadata import SOURCE_TEXT, holds_handle, without_memory
from langchain_pic_rag.settings import StoreSettings
from langchain_pic_rag.sources import SourceTexts
from langchain_pic_rag.texts import content_handles, map_content
from pic_rag import MemoryStore, UnknownHandleError, shared_store


def restore_documents(
    documents: Iterable[Document], *, store: MemoryStore | None = None, namespace: str = "default"
) -> list[Document]:
    """The documents as they were before they were compressed: text, ids, order and metadata.

    The text comes back exactly as it was. Where a prompt of `ChatPIC` is to show it, escape it with
    `pic_rag.escape_handles`.

    Args:
        documents: documents with or without handles.
        store: where texts are looked up that the metadata does not hold; None: the default store.
        namespace: of these documents in the store.

    Raises:
        UnknownHandleError: a document's text is in neither place.
    """
    sources = SourceTexts(store if store is not None else shared_store(), namespace)
    return [restore_document(document, sources) for document in documents]


def restore_document(document: Document, sources: SourceTexts) -> Document:
    """One document as it was before it was compressed.

    Raises:
        UnknownHandleError: neither its metadata nor the store holds its text.
    """
    text = _source_text(document, sources) if holds_handle(document) else document.page_content
    return document.model_copy(update={"page_content": text, "metadata": without_memory(document)})


def _source_text(document: Document, sources: SourceTexts) -> str:
    if isinstance(text := document.metadata.get(SOURCE_TEXT), str):
        return text
    handle = document.page_content
    found = sources.get([handle])
    if handle not in found:
        raise UnknownHandleError(handle, 0)
    return found[handle]


class PICRestore(StoreSettings, RunnableSerializable[Any, Any]):
    """A step before an LLM that reads no memories: puts the source texts back in place of their handles.

    Takes a prompt as a chat model takes it (a prompt value, messages or a string) or documents, and returns the same
    kind. It loads no model. Handle syntax inside a source text comes back escaped.
    """

    reads_handles: ClassVar[bool] = True

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Restore a prompt or documents.

        Raises:
            UnknownHandleError: a handle's text is not in this namespace of the store.
        """
        return self._call_with_config(self._restore, input, config, **kwargs)

    def _restore(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._restore_text(value)
        if isinstance(value, StringPromptValue):
            return StringPromptValue(text=self._restore_text(value.text))
        if isinstance(value, PromptValue):
            return ChatPromptValue(messages=[self._restore_message(message) for message in value.to_messages()])
        if isinstance(value, BaseMessage):
            return self._restore_message(value)
        if isinstance(value, Document):
            return restore_document(value, self.sources)
        if isinstance(value, (list, tuple)):
            return [self._restore(item) for item in value]
        raise TypeError(
            f"input must be a prompt, messages, text or documents, got {type(value).__name__}. "
            "Put PICRestore between the prompt and the LLM."
        )

    def _restore_text(self, text: str) -> str:
        return str(pic_rag.restore(text, self.sources.get(pic_rag.find_handles(text))))

    def _restore_message(self, message: BaseMessage) -> BaseMessage:
        if not content_handles(message):
            return message
        return message.model_copy(update={"content": map_content(message, self._restore_text)})
