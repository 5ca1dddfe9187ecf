"""LlamaIndex's side of the tiny models: components, nodes and an index."""

from __future__ import annotations

import llama_index.core
import pytest
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from llama_index.llms.pic_rag import PICLLM
from llama_index.postprocessor.pic_rag import PICCompressor


@pytest.fixture
def compressor(tiny_compressor, store) -> PICCompressor:
    return PICCompressor(compressor=tiny_compressor, store=store)


@pytest.fixture
def llm(tiny_compressor, tiny_generator, store) -> PICLLM:
    return PICLLM(compressor=tiny_compressor, generator=tiny_generator, store=store, max_new_tokens=8)


@pytest.fixture
def nodes(texts) -> list[NodeWithScore]:
    return [
        NodeWithScore(
            node=TextNode(
                id_=f"passage-{number}",
                text=text,
                metadata={"file": "amsel.md", "page": number},
                excluded_llm_metadata_keys=["file"],
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="amsel")},
            ),
            score=1 / (1 + number),
        )
        for number, text in enumerate(texts)
    ]


@pytest.fixture
def index(nodes) -> VectorStoreIndex:
    return VectorStoreIndex([node.node for node in nodes], embed_model=MockEmbedding(embed_dim=8))


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch):
    """No test leaves a global LLM or tokenizer behind; the tokenizer counts bytes."""
    for name in ("_llm", "_embed_model", "_callback_manager"):
        monkeypatch.setattr(Settings, name, None)
    monkeypatch.setattr(llama_index.core, "global_tokenizer", lambda text: list(text.encode()))
