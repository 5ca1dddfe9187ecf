"""LangChain's side of the tiny models: components and documents."""

from __future__ import annotations

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_pic_rag import ChatPIC, PICCompressor

from pic_rag import Compressor, PicConfig


class ListRetriever(BaseRetriever):
    """Finds the same documents for every query."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self.documents


@pytest.fixture(scope="session")
def other_compressor(tiny_generator, tiny_tokenizer) -> Compressor:
    """For the same generator, with another fingerprint."""
    return Compressor.from_base(tiny_generator.model, tiny_tokenizer, PicConfig(lora_rank=0, slots_per_chunk=2))


@pytest.fixture
def compressor(tiny_compressor, store) -> PICCompressor:
    return PICCompressor(compressor=tiny_compressor, store=store)


@pytest.fixture
def chat(tiny_compressor, tiny_generator, store) -> ChatPIC:
    return ChatPIC(compressor=tiny_compressor, generator=tiny_generator, store=store, max_tokens=12)


@pytest.fixture
def documents(texts) -> list[Document]:
    return [
        Document(id=f"passage-{number}", page_content=text, metadata={"source": "amsel.md", "score": 1 / (1 + number)})
        for number, text in enumerate(texts)
    ]


@pytest.fixture
def base_retriever(documents) -> ListRetriever:
    return ListRetriever(documents=documents)
