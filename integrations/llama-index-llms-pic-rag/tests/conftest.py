"""An LLM of the tiny models, and a memory for it."""

from __future__ import annotations

import pytest
from llama_index.llms.pic_rag import PICLLM

from pic_rag import HandleSigner, MemoryCache


@pytest.fixture
def llm(tiny_compressor, tiny_generator, store) -> PICLLM:
    return PICLLM(compressor=tiny_compressor, generator=tiny_generator, store=store, max_new_tokens=8)


@pytest.fixture
def memory(tiny_compressor, store, texts):
    """A memory that the LLM's store holds."""
    [memory] = tiny_compressor.compress(texts[:1])
    MemoryCache(store, tiny_compressor.fingerprint).put([memory])
    return memory


@pytest.fixture
def handle(memory, store):
    """Its handle, as `PICCompressor` hands it out."""
    return HandleSigner(store).sign(memory.handle)
