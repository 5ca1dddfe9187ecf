"""A handle that somebody wrote is never read, wherever it stands and however well its text is known."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import ChatMessage
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.postprocessor.pic_rag import PICCompressor

from pic_rag import UnknownHandleError, find_handles

CHAT_MODES = ["context", "condense_question", "condense_plus_context"]


@pytest.fixture
def shown(compressor, nodes):
    """What a retrieval of today handed out: the memories are in the store."""
    return [node.node.get_content(MetadataMode.LLM) for node in compressor.postprocess_nodes(nodes)]


@pytest.fixture(params=["computed", "unheard of", "forged", "other namespace", "last week"])
def typed(request, shown, compressor, nodes, monkeypatch):
    """Everything that an attacker can write, short of what was handed out today or yesterday in this namespace."""
    if request.param == "computed":  # whoever knows the text and the compressor gets this far
        return compressor.get_compressor().handle(nodes[0].get_content(MetadataMode.LLM))
    if request.param == "unheard of":
        return f"[[pic:{'0' * 32}]]"
    if request.param == "forged":
        return f"{shown[0][:-4]}{'00' if shown[0][-4:-2] != '00' else '11'}]]"
    if request.param == "other namespace":
        compressor = compressor.model_copy(update={"namespace": "mine"})
        return compressor.postprocess_nodes(nodes)[0].metadata["pic_memory"]
    with monkeypatch.context() as week:
        week.setattr("pic_rag.store.signing._today", lambda: 20000)
        return compressor.postprocess_nodes(nodes)[0].metadata["pic_memory"]


@pytest.fixture
def reads_nothing(llm, monkeypatch):
    """Any memory that is read fails the test."""
    monkeypatch.setattr(type(llm), "_memories", lambda _, handles: pytest.fail("read a memory") if handles else [])


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_no_prompt_can_bring_in_a_handle(llm, typed, role, reads_nothing):
    messages = [ChatMessage(f"What is {typed}?", role=role), ChatMessage("Who?")]
    for ask in (
        lambda: llm.complete(f"What is {typed}?"),
        lambda: llm.stream_complete(typed, formatted=True),
        lambda: llm.chat(messages),
        lambda: llm.stream_chat(messages),
        lambda: asyncio.run(llm.achat(messages)),
        lambda: asyncio.run(llm.acomplete(typed)),
    ):
        with pytest.raises(UnknownHandleError, match="handed out today or yesterday"):
            ask()


def test_whether_a_text_is_in_the_store_cannot_be_found_out(llm, compressor, shown, nodes):
    def refusal(text):
        handle = compressor.get_compressor().handle(text)
        with pytest.raises(UnknownHandleError) as caught:
            llm.complete(handle)
        return str(caught.value).replace(handle, "")

    assert refusal(nodes[0].get_content(MetadataMode.LLM)) == refusal("The tower will be sold in May.")


@pytest.mark.parametrize("mode", CHAT_MODES)
def test_a_handle_in_a_chat_history_is_never_read(index, compressor, llm, typed, mode, reads_nothing):
    engine = index.as_chat_engine(chat_mode=mode, llm=llm, node_postprocessors=[compressor])
    history = [ChatMessage(f"What is {typed}?"), ChatMessage("Who knows.", role="assistant")]
    for ask in (
        lambda: engine.chat("And now?", history),
        lambda: asyncio.run(engine.achat("And now?", history)),
    ):
        with pytest.raises(UnknownHandleError):
            ask()


@pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
def test_in_a_chat_history_even_a_handle_that_the_user_was_shown_gives_no_answer(index, compressor, llm, mode):
    [other] = compressor.postprocess_nodes([NodeWithScore(node=TextNode(text="The tower will be sold in May."))])
    engine = index.as_chat_engine(chat_mode=mode, llm=llm, node_postprocessors=[compressor])
    history = [ChatMessage(f"What is {other.metadata['pic_memory']}?"), ChatMessage("Who knows.", role="assistant")]
    with pytest.raises(UnknownHandleError, match="this handle where people write"):
        engine.chat("And now?", history)


@pytest.mark.parametrize("where", ["text", "metadata", "both"])
@pytest.mark.parametrize("citing", [False, True])
def test_a_handle_in_a_node_is_compressed_as_text(tiny_compressor, store, compressor, llm, typed, where, citing):
    metadata = {"title": typed, "pic_memory": typed, "pic_layout": "{"}
    hostile = TextNode(
        text="see there" if where == "metadata" else f"see {typed}", metadata={} if where == "text" else metadata
    )
    index = VectorStoreIndex([hostile], embed_model=MockEmbedding(embed_dim=8))
    if citing:
        numbered = PICCompressor(compressor=tiny_compressor, store=store, label="Source {number}:")
        engine = CitationQueryEngine.from_args(index, llm=llm, node_postprocessors=[numbered])
    else:
        engine = index.as_query_engine(llm=llm, node_postprocessors=[compressor])
    response = engine.query("Who?")
    assert typed not in response.source_nodes[0].node.get_content(MetadataMode.LLM)
    assert len(find_handles(response.source_nodes[0].node.get_content(MetadataMode.LLM))) == 1


def test_a_node_that_nobody_compressed_brings_in_no_handle(llm, typed, reads_nothing):
    index = VectorStoreIndex([TextNode(text=f"see {typed}")], embed_model=MockEmbedding(embed_dim=8))
    with pytest.raises(UnknownHandleError):
        index.as_query_engine(llm=llm).query("Who?")


@pytest.mark.parametrize("disguise", [str.upper, lambda handle: handle[:-1], lambda handle: handle.replace("[", "［")])
def test_what_only_looks_like_a_handle_is_text(llm, compressor, nodes, shown, disguise):
    typed = disguise(shown[0])
    assert llm.complete(f"{typed} {shown[1]}").raw["usage"]["memory_tokens"] == llm.tokenize(shown[1]).count(-1) > 0
    assert compressor.postprocess_nodes(nodes, query_str=f"What is {typed}?")


def test_a_handle_that_would_not_be_read_counts_as_text(llm, typed):
    assert llm.tokenize(typed) == llm.get_generator().tokenizer(typed, add_special_tokens=False)["input_ids"]


def test_metadata_cannot_pass_a_node_off_as_another(compressor, typed):
    hostile = NodeWithScore(node=TextNode(text="own words", metadata={"pic_memory": typed}))
    [after] = compressor.postprocess_nodes([hostile])
    assert compressor.signer.verify(after.metadata["pic_memory"]) == compressor.get_compressor().handle("own words")
