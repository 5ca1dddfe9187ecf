"""LangChain's own suites, on the embedded models."""

from __future__ import annotations

import os

import pytest
from langchain_core.documents import Document
from langchain_pic_rag import ChatPIC, PassageRetriever, PICRetriever
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests

pytestmark = [pytest.mark.embedded, pytest.mark.slow]


class TestChatPIC(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatPIC

    @property
    def chat_model_params(self):
        return {"model": os.environ.get("PIC_RAG_TEST_COMPRESSOR"), "max_tokens": 40}

    @property
    def supports_model_override(self):
        return False  # memories belong to one generator


class TestPICRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _components(self, embedded_compressor, passages):
        self.components = {"base_retriever": passages, "base_compressor": embedded_compressor}

    @pytest.fixture(scope="class")
    def passages(self):
        return PassageRetriever.from_documents(
            [Document(page_content=f"Ship number {number} carried {number} tons of salt.") for number in range(6)]
        )

    @property
    def retriever_constructor(self):
        return PICRetriever

    @property
    def retriever_constructor_params(self):
        return self.components

    @property
    def retriever_query_example(self):
        return "Which ship carried salt?"
