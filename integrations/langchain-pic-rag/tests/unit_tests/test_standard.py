"""LangChain's own suites, on the tiny models."""

from __future__ import annotations

import pytest
from langchain_pic_rag import ChatPIC, PICByteStore, PICRetriever
from langchain_tests.integration_tests import BaseStoreAsyncTests, BaseStoreSyncTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests


class TestChatPIC(ChatModelUnitTests):
    @property
    def chat_model_class(self):
        return ChatPIC

    @property
    def chat_model_params(self):
        return {"model": "some/compressor"}


class TestPICRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _components(self, base_retriever, compressor):
        self.components = {"base_retriever": base_retriever, "base_compressor": compressor}

    @property
    def retriever_constructor(self):
        return PICRetriever

    @property
    def retriever_constructor_params(self):
        return self.components

    @property
    def retriever_query_example(self):
        return "Who built the lighthouse?"


class TestPICByteStore(BaseStoreSyncTests[bytes]):
    @pytest.fixture
    def three_values(self):
        return b"one", b"two", b"three"

    @pytest.fixture
    def kv_store(self, store):
        return PICByteStore(store)


class TestPICByteStoreAsync(BaseStoreAsyncTests[bytes]):
    @pytest.fixture
    def three_values(self):
        return b"one", b"two", b"three"

    @pytest.fixture
    async def kv_store(self, store):
        return PICByteStore(store)
