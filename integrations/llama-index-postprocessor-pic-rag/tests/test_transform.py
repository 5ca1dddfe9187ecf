"""PICTransform in an ingestion pipeline: memories are made once, and never served stale."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document, MetadataMode, NodeWithScore, TextNode
from llama_index.postprocessor.pic_rag import PICTransform, restore_nodes

from pic_rag import Compressor, MemoryCache, find_handles

DOCUMENT = Document(text="The lighthouse was built in 1887. " * 8, metadata={"title": "Amsel"})


@pytest.fixture
def transform(tiny_compressor, store) -> PICTransform:
    return PICTransform(compressor=tiny_compressor, store=store)


def test_nodes_carry_handles_that_nobody_is_shown(transform):
    node = TextNode(text="Seals rest here.", metadata={"page": 1})
    [after] = transform([node])
    assert find_handles(after.metadata["pic_memory"])
    for mode in (MetadataMode.LLM, MetadataMode.EMBED, MetadataMode.NONE):
        assert after.get_content(mode) == node.get_content(mode)
    assert "pic_memory" not in node.metadata
    assert restore_nodes([after]) == [node]


def test_the_memories_are_in_the_store_before_the_first_question(transform, compressor, nodes, store, monkeypatch):
    carrying = transform([node.node for node in nodes])
    monkeypatch.setattr(type(compressor.compressor), "compress", lambda *_: pytest.fail("compressed again"))
    shown = compressor.postprocess_nodes([NodeWithScore(node=node) for node in carrying])
    signer = compressor.signer
    handles = [signer.verify(node.node.get_content(MetadataMode.LLM)) for node in shown]
    assert handles == [node.metadata["pic_memory"] for node in carrying]


def test_ranks_are_not_known_at_ingestion():
    with pytest.raises(ValueError, match="ratio must be one number at ingestion, got .4, 16."):
        PICTransform(ratio=[4, 16])


def test_an_empty_input_and_an_empty_node_are_no_error(transform):
    assert transform([]) == []
    assert transform([TextNode(text="")])[0].metadata == {}


def test_the_async_twin_gives_the_same_nodes(transform):
    node = TextNode(text="Seals rest here.")
    assert asyncio.run(transform.acall([node])) == transform([node])


def test_a_second_run_is_served_by_the_ingestion_cache(transform, tiny_compressor, monkeypatch):
    pipeline = IngestionPipeline(
        transformations=[
            SentenceSplitter(chunk_size=64, chunk_overlap=0),
            transform,
        ],
        cache=IngestionCache(),
    )
    first = pipeline.run(documents=[DOCUMENT])
    monkeypatch.setattr(type(tiny_compressor), "compress", lambda *_: pytest.fail("compressed again"))
    second = pipeline.run(documents=[DOCUMENT])
    assert len(first) > 1
    assert [node.metadata for node in second] == [node.metadata for node in first]


def test_memories_that_a_cached_run_lacks_are_made_by_the_postprocessor(
    transform, compressor, store, llm, tiny_compressor
):
    pipeline = IngestionPipeline(transformations=[transform], cache=IngestionCache())
    pipeline.run(documents=[DOCUMENT])
    cache = MemoryCache(store, tiny_compressor.fingerprint)
    cache.delete(list(cache.keys()))
    nodes = pipeline.run(documents=[DOCUMENT])
    assert list(cache.keys()) == []
    index = VectorStoreIndex(nodes, embed_model=MockEmbedding(embed_dim=8))
    assert index.as_query_engine(llm=llm, node_postprocessors=[compressor]).query("When?").source_nodes
    assert list(cache.keys()) == [nodes[0].metadata["pic_memory"]]


@pytest.mark.parametrize(
    "change",
    [{"ratio": 16}, {"at_rest": "int8"}, {"namespace": "b"}, {"metadata_mode": "none"}, {"min_fidelity": 0.5}],
)
def test_every_setting_that_changes_memories_changes_the_cache_key(tiny_compressor, change):
    node = TextNode(text="Seals rest here.")
    plain, changed = (PICTransform(compressor=tiny_compressor, **settings) for settings in ({}, change))
    assert get_transformation_hash([node], plain) == get_transformation_hash(
        [node], PICTransform(compressor=tiny_compressor)
    )
    assert get_transformation_hash([node], plain) != get_transformation_hash([node], changed)


def test_other_weights_change_the_cache_key_and_the_memories(checkpoints, store):
    cache = IngestionCache()
    handles = []
    for folder in checkpoints:
        transform = PICTransform(model_name=folder, dtype="float32", store=store)
        [node] = IngestionPipeline(transformations=[transform], cache=cache).run(documents=[DOCUMENT])
        handles.append(node.metadata["pic_memory"])
    assert handles[0] != handles[1]


def test_other_weights_or_another_dtype_under_the_same_name_change_the_cache_key(checkpoints):
    node = TextNode(text="Seals rest here.")
    keys = set()
    for folder, dtype in ((checkpoints[0], "float32"), (checkpoints[1], "float32"), (checkpoints[1], "bfloat16")):
        transform = PICTransform(model_name="mine", compressor=Compressor.from_pretrained(folder, dtype=dtype))
        keys.add(get_transformation_hash([node], transform))
    assert len(keys) == 3


def test_settings_survive_json(transform):
    assert PICTransform.from_dict({**transform.to_dict(), "ratio": 8}).ratio == 8
