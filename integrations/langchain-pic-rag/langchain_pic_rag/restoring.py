"""The way back: source texts in place of handles, in documents and in prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, convert_to_messages
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue
from langchain_core.runnables import RunnableConfig, RunnableSerializable

import pic_rag
from langchain_pic_rag.metadata import SOURCE_TEXT, is_compressed, without_memory
from langchain_pic_rag.settings import StoreSettings
from langchain_pic_rag.sources import SourceTexts
from pic_rag import HandleSigner, MemoryStore, UnknownHandleError, escape_handles, shared_store

_REMEDY = (
    "Neither the document's metadata nor this namespace of the store has its text. Pass the store or cache_folder, and "
    "the namespace, that the compressor uses, or compress the original again."
)


def restore_documents(
    documents: Iterable[Document],
    *,
    store: MemoryStore | None = None,
    namespace: str = "default",
    cache_folder: str | None = None,
) -> list[Document]:
    """The documents as they were before they were compressed: text, ids, order and metadata.

    The text comes back exactly as it was. Where a prompt of `ChatPIC` is to show it, escape it with
    `pic_rag.escape_handles`.

    Args:
        documents: documents with or without handles.
        store: where texts are looked up that the metadata does not hold; None: the default store.
        namespace: of these documents in the store.
        cache_folder: folder of the default store; None: pic-rag's cache folder.

    Raises:
        UnknownHandleError: a document's text is in neither place.
    """
    store = store if store is not None else shared_store(cache_folder)
    sources, signer = SourceTexts(store, namespace), HandleSigner(store, namespace)
    return [restore_document(document, sources, signer, any_age=True) for document in documents]


def restore_document(
    document: Document, sources: SourceTexts, signer: HandleSigner, *, any_age: bool = False
) -> Document:
    """One document as it was before it was compressed.

    Raises:
        UnknownHandleError: its metadata does not hold its text, and no signature entitles it to one of the store's.
    """
    text = document.page_content
    if is_compressed(document):
        kept = document.metadata.get(SOURCE_TEXT)
        text = str(kept) if isinstance(kept, str) else _stored_text(text, sources, signer, any_age)
    return document.model_copy(update={"page_content": text, "metadata": without_memory(document)})


def _stored_text(signed: str, sources: SourceTexts, signer: HandleSigner, any_age: bool) -> str:
    handle = signer.verify(signed, any_age=any_age)
    text = None if handle is None else sources.get([handle]).get(handle)
    if text is None:
        raise UnknownHandleError(signed, 0, _REMEDY)
    return text


class PICRestore(StoreSettings, RunnableSerializable[Any, Any]):
    """A step before an LLM that reads no memories: puts the source texts back in place of their handles.

    Takes a prompt as a chat model takes it (a prompt value, a string, or messages, also as `("user", "text")` or dicts
    with a role) or documents, and returns the same kind. It loads no model. Handle syntax inside a source text comes
    back escaped.
    """

    reads_handles: ClassVar[bool] = True

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Restore a prompt or documents.

        Raises:
            UnknownHandleError: a handle was not handed out in this namespace lately, or its text is not in the store.
        """
        return self._call_with_config(self._restore, input, config, **kwargs)

    def _restore(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._restore_prompt(value)
        if isinstance(value, StringPromptValue):
            return StringPromptValue(text=self._restore_prompt(value.text))
        if isinstance(value, PromptValue):
            return ChatPromptValue(messages=self._restore_messages(value.to_messages()))
        if isinstance(value, BaseMessage):
            return self._restore_messages([value])[0]
        if isinstance(value, Document):
            document = restore_document(value, self.sources, self.signer)
            return document.model_copy(update={"page_content": escape_handles(document.page_content)})
        if isinstance(value, (list, tuple)):
            if all(isinstance(item, (str, Document)) for item in value):
                return [self._restore(item) for item in value]
            return self._restore_messages(_messages(value))
        raise _wrong_input(value)

    def _restore_messages(self, messages: Sequence[BaseMessage]) -> list[BaseMessage]:
        restored = self._restore_prompt([{"role": each.type, "content": each.content} for each in messages])
        return [
            message.model_copy(update={"content": text["content"]})
            for message, text in zip(messages, restored, strict=True)
        ]

    def _restore_prompt(self, prompt: Any) -> Any:
        read, handles = self.signer.unsign(prompt)
        return pic_rag.restore(read, self.sources.get(handles))


def _messages(value: Sequence[Any]) -> list[BaseMessage]:
    try:
        return convert_to_messages(value)
    except NotImplementedError:
        raise _wrong_input(value) from None


def _wrong_input(value: Any) -> TypeError:
    return TypeError(
        f"input must be a prompt, messages, text or documents, got {value!r:.80}. "
        "Put PICRestore between the prompt and the LLM."
    )
