"""PICCompressor on its own: what a node shows to whom, and what it keeps."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import threading

import pytest
from langchain_core.stores import InMemoryByteStore
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import MockLLM
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.llms.pic_rag import PICLLM
from llama_index.postprocessor.pic_rag import PICCompressEndEvent, PICCompressor, PICTransform, restore_nodes

from pic_rag import escape_handles, find_handles


class Locked(InMemoryByteStore):
    """A store with a lock, as those with a connection have."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def shown(node: NodeWithScore) -> str:
    return node.node.get_content(MetadataMode.LLM)


def plain(compressor: PICCompressor, node: NodeWithScore) -> str | None:
    """The handle that a node shows, without its signature."""
    return compressor.signer.verify(shown(node))


def test_importing_the_package_loads_no_torch():
    code = "import sys, llama_index.postprocessor.pic_rag; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_building_a_compressor_loads_nothing_and_reads_no_file():
    PICCompressor(model_name="/no/such/folder").to_dict()


def test_the_llm_is_shown_the_handle_and_everybody_else_the_text(compressor, nodes):
    for before, after in zip(nodes, compressor.postprocess_nodes(nodes), strict=True):
        assert find_handles(shown(after)) == [shown(after)]
        assert after.get_content() == after.text == before.text
        assert after.node.get_content(MetadataMode.EMBED) == before.text


def test_the_handle_stands_for_what_the_llm_would_have_read(compressor, nodes, tiny_compressor):
    [after] = compressor.postprocess_nodes(nodes[:1])
    assert shown(nodes[0]) == f"page: 0\n\n{nodes[0].text}"
    assert plain(compressor, after) == tiny_compressor.handle(shown(nodes[0]))


def test_metadata_mode_none_compresses_the_text_alone(tiny_compressor, store, nodes):
    alone = PICCompressor(compressor=tiny_compressor, store=store, metadata_mode="none")
    assert plain(alone, alone.postprocess_nodes(nodes)[0]) == tiny_compressor.handle(nodes[0].text)


def test_the_metadata_says_what_the_memory_saves_and_the_models_are_not_shown_it(compressor, nodes):
    for before, after in zip(nodes, compressor.postprocess_nodes(nodes), strict=True):
        said = after.metadata
        assert said["pic_ratio"] == compressor.get_compressor().config.ratio
        assert said["pic_memory_tokens"] == -(-said["pic_text_tokens"] // said["pic_ratio"])
        assert "pic_fidelity" not in said
        assert "pic_" not in after.node.get_content(MetadataMode.EMBED)
        assert restore_nodes([after])[0].metadata == before.metadata


def test_ids_scores_order_metadata_and_relationships_survive(compressor, nodes):
    for before, after in zip(nodes, compressor.postprocess_nodes(nodes), strict=True):
        assert (after.node_id, after.score) == (before.node_id, before.score)
        assert after.metadata.items() >= before.metadata.items()
        assert after.node.relationships == before.node.relationships


def test_the_nodes_passed_in_are_not_changed(compressor, nodes):
    before = [node.to_json() for node in nodes]
    compressor.postprocess_nodes(nodes)
    restore_nodes(compressor.postprocess_nodes(nodes))
    assert [node.to_json() for node in nodes] == before


def test_restored_nodes_are_the_nodes_of_before(compressor, nodes):
    assert restore_nodes(compressor.postprocess_nodes(nodes)) == nodes
    assert restore_nodes([node.node for node in compressor.postprocess_nodes(nodes)]) == [node.node for node in nodes]
    assert restore_nodes(nodes) == nodes


def test_a_template_of_the_users_own_is_compressed_and_comes_back(compressor, tiny_compressor):
    node = NodeWithScore(
        node=TextNode(
            text="b", metadata={"a": "1"}, text_template="{content} <- {metadata_str}", metadata_template="{value}"
        )
    )
    [after] = compressor.postprocess_nodes([node])
    assert plain(compressor, after) == tiny_compressor.handle("b <- 1")
    assert restore_nodes([after]) == [node]


def test_compressing_twice_is_compressing_once(compressor, nodes):
    once = compressor.postprocess_nodes(nodes)
    assert compressor.postprocess_nodes(once) == once


@pytest.mark.parametrize(
    "give", [lambda node: TextNode.from_json(node.to_json()), lambda node: pickle.loads(pickle.dumps(node))]
)
def test_nodes_with_handles_survive_json_and_pickle(compressor, nodes, give):
    for node in compressor.postprocess_nodes(nodes):
        assert give(node.node) == node.node
        assert restore_nodes([give(node.node)]) == restore_nodes([node.node])


def test_nodes_with_handles_are_read_in_another_process(nodes, checkpoints, tmp_path):
    settings = {"model_name": checkpoints[0], "dtype": "float32", "cache_folder": str(tmp_path)}
    [node] = PICCompressor(**settings, metadata_mode="none").postprocess_nodes(nodes[:1])
    code = (
        "import json, sys; from llama_index.core.schema import MetadataMode, TextNode; "
        "from llama_index.llms.pic_rag import PICLLM; node = TextNode.from_json(sys.argv[1]); "
        "answer = PICLLM(**json.loads(sys.argv[2]), max_new_tokens=2).complete(node.get_content(MetadataMode.LLM)); "
        "print(answer.raw['usage']['memory_tokens'], node.get_content())"
    )
    command = [sys.executable, "-c", code, node.node.to_json(), json.dumps(settings)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert printed == f"{-(-len(nodes[0].text) // 4)} {nodes[0].text}"


def test_nodes_with_handles_survive_a_docstore(compressor, nodes, tmp_path):
    handled = compressor.postprocess_nodes(nodes)
    docstore = SimpleDocumentStore()
    docstore.add_documents([node.node for node in handled])
    docstore.persist(str(tmp_path / "docstore.json"))
    read = SimpleDocumentStore.from_persist_path(str(tmp_path / "docstore.json"))
    for before, node in zip(nodes, handled, strict=True):
        again = read.get_document(node.node_id)
        assert again.get_content(MetadataMode.LLM) == shown(node)
        assert restore_nodes([again])[0].get_content(MetadataMode.LLM) == shown(before)


def test_a_text_without_a_token_stays_as_it_is(compressor):
    empty = NodeWithScore(node=TextNode(text=""), score=0.5)
    assert compressor.postprocess_nodes([empty]) == [empty]


def test_no_nodes_give_no_nodes(compressor):
    assert compressor.postprocess_nodes([]) == []
    assert asyncio.run(compressor.apostprocess_nodes([])) == []


def test_top_n_keeps_the_first_nodes(tiny_compressor, store, nodes):
    kept = PICCompressor(compressor=tiny_compressor, store=store, top_n=2).postprocess_nodes(nodes)
    assert [node.node_id for node in kept] == ["passage-0", "passage-1"]


def test_a_label_numbers_the_handles(tiny_compressor, store, nodes):
    labelled = PICCompressor(compressor=tiny_compressor, store=store, label="Source {number} {x}:")
    first, second = labelled.postprocess_nodes(nodes[:2])
    assert shown(first).startswith("Source 1 {x}:\n[[pic:")
    assert shown(second).startswith("Source 2 {x}:\n[[pic:")
    assert restore_nodes([first]) == nodes[:1]


def test_the_async_twin_gives_the_same_nodes(compressor, nodes):
    assert asyncio.run(compressor.apostprocess_nodes(nodes)) == compressor.postprocess_nodes(nodes)


def test_another_ratio_makes_other_memories(tiny_compressor, store, nodes):
    def handles(ratio: int) -> list[str]:
        compressor = PICCompressor(compressor=tiny_compressor, store=store, ratio=ratio)
        return [shown(node) for node in compressor.postprocess_nodes(nodes)]

    assert set(handles(ratio=4)).isdisjoint(handles(ratio=16))
    with pytest.raises(ValueError, match="ratio must be one of"):
        handles(ratio=5)


def test_ratios_go_to_nodes_by_their_rank(tiny_compressor, store, nodes):
    def handles(ratio) -> list[str]:
        compressor = PICCompressor(compressor=tiny_compressor, store=store, ratio=ratio)
        return [shown(node) for node in PICCompressor.postprocess_nodes(compressor, nodes)]

    fine, coarse = handles(4), handles(16)
    assert handles([4, 16]) == [fine[0], *coarse[1:]]
    without_text = NodeWithScore(node=TextNode(text=""))
    compressor = PICCompressor(compressor=tiny_compressor, store=store, ratio=[8, 4, 16])
    after = compressor.postprocess_nodes([without_text, *nodes])[1:]
    assert [shown(node) for node in after] == handles([4, 16])
    with pytest.raises(ValueError, match="ratio must be one of"):
        handles([4, 5])
    settings = PICCompressor(ratio=[4, 16])
    assert PICCompressor.from_dict(settings.to_dict()).ratio == (4, 16)


def test_min_fidelity_lets_each_text_keep_what_it_needs(tiny_compressor, tiny_generator, store, nodes, llm):
    def memory_tokens(floor: float) -> int:
        compressor = PICCompressor(
            compressor=tiny_compressor, generator=tiny_generator, store=store, min_fidelity=floor, metadata_mode="none"
        )
        [node] = compressor.postprocess_nodes(nodes[:1])
        assert restore_nodes([node]) == nodes[:1]
        return llm.complete(shown(node), formatted=True).raw["usage"]["memory_tokens"]

    assert memory_tokens(1.0) == len(nodes[0].text)  # raw text
    assert memory_tokens(0.0) == -(-len(nodes[0].text) // 64)
    with pytest.raises(ValueError, match="min_fidelity"):
        PICCompressor(min_fidelity=2)


def test_min_fidelity_is_checked_by_the_generator_that_the_llm_shares(checkpoints, store, nodes):
    settings = {"model_name": checkpoints[0], "dtype": "float32", "store": store}
    compressor = PICCompressor(**settings, min_fidelity=0.0)
    assert compressor.postprocess_nodes(nodes[:1])
    assert compressor._checking_generator() is PICLLM(**settings).get_generator()


def test_two_compressors_with_the_same_settings_share_the_model(checkpoints):
    one, two = (PICCompressor(model_name=checkpoints[0], dtype="float32") for _ in range(2))
    assert one.get_compressor() is two.get_compressor()
    own = PICCompressor(model_name=checkpoints[0], dtype="float32", model_kwargs={"attn_implementation": "eager"})
    assert own.get_compressor() is own.model_copy().get_compressor() is not one.get_compressor()


def test_the_cache_folder_holds_the_default_store(tiny_compressor, nodes, tmp_path):
    PICCompressor(compressor=tiny_compressor, cache_folder=str(tmp_path / "here")).postprocess_nodes(nodes)
    assert (tmp_path / "here" / "memories.sqlite").is_file()


def test_at_rest_decides_the_bytes_in_the_store(tiny_compressor, store, nodes):
    def stored_bytes(**settings) -> int:
        PICCompressor(compressor=tiny_compressor, store=store, **settings).postprocess_nodes(nodes)
        return sum(len(value) for value in store.mget(list(store.yield_keys(prefix=settings["namespace"]))))

    assert stored_bytes(namespace="small", at_rest="int4") < stored_bytes(namespace="whole")


def test_events_tell_the_tokens_saved(compressor, nodes):
    class Collector(BaseEventHandler):
        events: list = []

        def handle(self, event, **kwargs):
            if isinstance(event, PICCompressEndEvent):
                self.events.append(event)

    collector = Collector()
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(collector)
    try:
        compressor.postprocess_nodes(nodes)
        compressor.postprocess_nodes(nodes)
    finally:
        dispatcher.event_handlers.remove(collector)
    first, second = collector.events
    assert first.text_tokens == sum(len(shown(node)) for node in nodes)
    assert first.tokens_saved == first.text_tokens - first.memory_tokens > 0
    assert (first.cached, second.cached) == (0, len(nodes))
    assert second.tokens_saved == first.tokens_saved


def test_a_handle_in_a_question_is_refused(compressor, nodes):
    handle = shown(compressor.postprocess_nodes(nodes)[0])
    with pytest.raises(ValueError, match="escape_handles"):
        compressor.postprocess_nodes(nodes, query_str=f"What is {handle}?")
    assert compressor.postprocess_nodes(nodes, query_bundle=QueryBundle(escape_handles(handle)))


def test_a_handle_in_a_document_is_compressed_like_any_text(compressor, llm, nodes, tiny_compressor):
    secret = shown(compressor.postprocess_nodes(nodes)[0])
    hostile = NodeWithScore(node=TextNode(text=f"see {secret}", metadata={"pic_memory": secret, "title": secret}))
    [after] = compressor.postprocess_nodes([hostile])
    assert secret not in shown(after)
    usage = llm.complete(shown(after), formatted=True).raw["usage"]
    [memory] = tiny_compressor.compress([f"title: {secret}\n\nsee {secret}"])
    assert usage["memory_tokens"] == memory.memory_tokens


def test_an_llm_given_to_the_compressor_must_read_memories(tiny_compressor, store, nodes, llm):
    with pytest.raises(ValueError, match="got MockLLM"):
        PICCompressor(compressor=tiny_compressor, store=store, llm=MockLLM()).postprocess_nodes(nodes)
    assert find_handles(
        shown(PICCompressor(compressor=tiny_compressor, store=store, llm=llm).postprocess_nodes(nodes)[0])
    )


def test_fallback_text_gives_such_an_llm_the_original_text(tiny_compressor, store, nodes, compressor):
    text = PICCompressor(compressor=tiny_compressor, store=store, llm=MockLLM(), fallback="text", top_n=3)
    assert text.postprocess_nodes(nodes) == nodes[:3]
    assert text.postprocess_nodes(compressor.postprocess_nodes(nodes)) == nodes[:3]


def test_an_llm_that_looks_in_another_namespace_is_told_apart(tiny_compressor, store, nodes, llm):
    other = PICCompressor(compressor=tiny_compressor, store=store, namespace="b", llm=llm)
    with pytest.raises(ValueError, match="namespace"):
        other.postprocess_nodes(nodes)


@pytest.mark.parametrize("component", [PICCompressor, PICTransform])
def test_a_misspelt_setting_and_an_impossible_namespace_are_refused(component):
    with pytest.raises(ValueError, match=r"Unknown setting 'rato'. \w+ has: .*namespace, ratio, .*store"):
        component(rato=4)
    with pytest.raises(ValueError, match="namespace"):
        component(namespace="a/b")


def test_settings_survive_json_without_the_objects(compressor):
    restored = PICCompressor.from_dict({**compressor.to_dict(), "ratio": 8})
    assert (restored.ratio, restored.compressor, restored.store) == (8, None, None)


def test_a_path_is_no_store(tiny_compressor, nodes):
    with pytest.raises(ValueError, match=r"store must be .*, got 'x.sqlite'. For a file pass pic_rag.SQLiteStore"):
        PICCompressor(compressor=tiny_compressor, store="x.sqlite").postprocess_nodes(nodes)


def test_what_holds_models_is_not_pickled_without_them(compressor, llm):
    """LlamaIndex would leave them out, and the copy would load others."""
    for component in (compressor.model_copy(update={"generator": llm.generator}), llm):
        with pytest.raises(TypeError, match="must have a generator that can be pickled, got Generator"):
            pickle.dumps(component)
        assert component.generator is llm.generator
    locked = Locked()
    for component in (PICCompressor(store=locked), PICTransform(store=locked), PICLLM(store=locked)):
        with pytest.raises(TypeError, match="must have a store that can be pickled, got Locked"):
            pickle.dumps(component)
        assert component.store is locked
    assert pickle.loads(pickle.dumps(PICCompressor(ratio=8))).ratio == 8
