"""Documents in, handles out: nothing else about them changes, and they can be restored."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import FakeListChatModel
from langchain_core.load import dumpd, load
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableConfig, RunnableLambda
from langchain_core.stores import InMemoryByteStore
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_pic_rag import (
    ChatPIC,
    PICByteStore,
    PICCompressor,
    PICDocumentTransformer,
    PICRestore,
    PICRetriever,
    restore_documents,
)
from langchain_text_splitters import CharacterTextSplitter

from pic_rag import Compressor, UnknownHandleError, find_handles


def test_ids_order_and_metadata_survive_and_the_content_is_one_handle(compressor, documents):
    compressed = compressor.compress_documents(documents, "who?")
    assert [document.id for document in compressed] == [document.id for document in documents]
    for before, after in zip(documents, compressed, strict=True):
        assert find_handles(after.page_content) == [after.page_content]
        assert before.metadata.items() <= after.metadata.items()
        assert after.metadata["pic_memory_tokens"] == -(-len(before.page_content) // 4)
    assert len({document.page_content for document in compressed}) == len(documents)


def test_the_given_documents_are_not_changed(compressor, documents):
    before = [document.model_copy(deep=True) for document in documents]
    compressor.compress_documents(documents, "")
    assert documents == before


def test_async_and_every_way_into_a_chain_give_what_the_sync_call_gives(compressor, documents):
    expected = compressor.compress_documents(documents, "q")
    step = compressor.as_runnable()
    assert asyncio.run(compressor.acompress_documents(documents, "q")) == expected
    assert step.invoke(documents) == step.invoke({"documents": documents, "query": "q"}) == expected
    assert asyncio.run(step.ainvoke(documents)) == expected
    assert step.batch([documents, documents[:1]]) == [expected, expected[:1]]


@pytest.mark.parametrize("way", ["classic", "pipeline", "pic"])
def test_retrievers_and_pipelines_return_the_compressed_documents(compressor, documents, base_retriever, way):
    wrapped = {
        "classic": lambda: ContextualCompressionRetriever(base_compressor=compressor, base_retriever=base_retriever),
        "pipeline": lambda: ContextualCompressionRetriever(
            base_compressor=DocumentCompressorPipeline(transformers=[compressor]), base_retriever=base_retriever
        ),
        "pic": lambda: PICRetriever(base_compressor=compressor, base_retriever=base_retriever),
    }[way]()
    expected = compressor.compress_documents(documents, "q")
    assert wrapped.invoke("q") == expected
    assert asyncio.run(wrapped.ainvoke("q")) == expected


def test_a_pipeline_may_split_before_it_compresses(compressor, documents):
    splitter = CharacterTextSplitter(separator=" ", chunk_size=30, chunk_overlap=0)
    pipeline = DocumentCompressorPipeline(transformers=[splitter, compressor])
    pieces = pipeline.compress_documents(documents, "q")
    assert len(pieces) > len(documents)
    assert [piece.page_content for piece in restore_documents(pieces, store=compressor.store)] == [
        piece.page_content for piece in splitter.split_documents(documents)
    ]


def test_no_documents_give_no_documents(compressor, base_retriever):
    assert compressor.compress_documents([], "q") == []
    assert compressor.as_runnable().invoke([]) == []
    assert (
        PICDocumentTransformer(compressor=compressor.compressor, store=compressor.store).transform_documents([]) == []
    )
    empty = base_retriever.model_copy(update={"documents": []})
    assert PICRetriever(base_compressor=compressor, base_retriever=empty).invoke("q") == []
    assert restore_documents([]) == []


def test_an_empty_document_stays_a_document(compressor):
    empty = Document(page_content="", id="nothing")
    (compressed,) = compressor.compress_documents([empty], "q")
    assert compressed.metadata["pic_memory_tokens"] == 0
    assert restore_documents([compressed], store=compressor.store) == [empty]


@pytest.mark.parametrize("keep_source", [True, False])
def test_restored_documents_are_the_original_ones_unless_the_source_was_not_kept(compressor, documents, keep_source):
    compressor.keep_source = keep_source
    compressed = compressor.compress_documents(documents, "q")
    assert ("pic_source_text" in compressed[0].metadata) is keep_source
    if keep_source:
        assert restore_documents(compressed, store=compressor.store) == documents
        for document in compressed:
            del document.metadata["pic_source_text"]
        assert restore_documents(compressed, store=compressor.store) == documents  # out of the store
        with pytest.raises(UnknownHandleError):
            restore_documents(compressed, store=compressor.store, namespace="other")
    else:
        with pytest.raises(UnknownHandleError):
            restore_documents(compressed, store=compressor.store)


def test_compressing_twice_is_compressing_once_and_another_ratio_starts_from_the_source(compressor, documents):
    once = compressor.compress_documents(documents, "q")
    assert compressor.compress_documents(once, "q") == once
    coarse = compressor.model_copy(update={"ratio": 16})
    assert coarse.compress_documents(once, "q") == coarse.compress_documents(documents, "q") != once


def test_a_compressed_document_whose_text_is_nowhere_cannot_be_compressed_again(compressor, documents):
    compressor.keep_source = False
    once = compressor.compress_documents(documents, "q")
    with pytest.raises(UnknownHandleError, match="compress the original again"):
        compressor.compress_documents(once, "q")


def test_top_n_keeps_the_first_documents(compressor, documents):
    best = compressor.model_copy(update={"top_n": 2}).compress_documents(documents, "q")
    assert [document.id for document in best] == ["passage-0", "passage-1"]


def test_documents_with_handles_survive_pickle_and_json(compressor, documents):
    compressed = compressor.compress_documents(documents, "q")
    assert pickle.loads(pickle.dumps(compressed)) == compressed
    assert [load(json.loads(json.dumps(dumpd(document)))) for document in compressed] == compressed
    assert [Document.model_validate_json(document.model_dump_json()) for document in compressed] == compressed


def test_documents_with_handles_are_read_and_restored_in_another_process(compressor, documents, checkpoints, tmp_path):
    settings = {"model_name": checkpoints[0], "dtype": "float32", "cache_folder": str(tmp_path)}
    compressed = PICCompressor(**settings).compress_documents(documents, "q")
    (tmp_path / "documents.pickle").write_bytes(pickle.dumps((settings, compressed)))
    code = (
        "import pathlib, pickle, sys; from langchain_pic_rag import ChatPIC, restore_documents; "
        "settings, documents = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()); "
        "answer = ChatPIC(**settings, max_tokens=2).invoke(documents[0].page_content); "
        "print(answer.usage_metadata['input_token_details']['memory'], restore_documents(documents)[0].page_content)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "documents.pickle")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    text = documents[0].page_content
    assert printed == f"{-(-len(text) // 4)} {text}"


def test_metadata_printed_into_a_prompt_holds_neither_text_nor_handle(compressor, documents):
    for document in compressor.compress_documents(documents, "q"):
        printed = f"Source: {document.metadata}"
        assert document.metadata["pic_source_text"] not in printed
        assert find_handles(printed) == []
        assert f"<{len(document.metadata['pic_source_text'])} characters>" in printed


def test_min_fidelity_lets_each_text_keep_what_it_needs(compressor, documents, tiny_generator, chat):
    checking = compressor.model_copy(update={"min_fidelity": 1.0, "generator": tiny_generator})
    raw = checking.compress_documents(documents, "q")
    assert {document.metadata["pic_ratio"] for document in raw} == {1}
    assert {document.metadata["pic_fidelity"] for document in raw} == {1.0}
    coarse = checking.model_copy(update={"min_fidelity": 0.0}).compress_documents(documents, "q")
    assert {document.metadata["pic_ratio"] for document in coarse} == {64}
    assert restore_documents([*raw, *coarse], store=compressor.store) == documents * 2
    assert chat.invoke(raw[0].page_content).usage_metadata["input_token_details"]["memory"] == len(
        documents[0].page_content
    )
    with pytest.raises(ValueError, match="min_fidelity"):
        PICCompressor(min_fidelity=1.5)


def test_min_fidelity_is_checked_by_the_generator_that_chat_pic_shares(checkpoints, store, documents):
    settings = {"model_name": checkpoints[0], "dtype": "float32", "store": store}
    compressed = PICCompressor(**settings, min_fidelity=0.0).compress_documents(documents[:1], "q")
    assert 0 <= compressed[0].metadata["pic_fidelity"] < 1
    checking = PICDocumentTransformer(**settings, min_fidelity=0.0)
    assert checking._checking_generator() is ChatPIC(**settings).get_generator()


def test_a_component_given_by_settings_pickles():
    settings = PICCompressor(model_name="some/compressor", ratio=8, namespace="team", top_n=2)
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize("make", [InMemoryByteStore, lambda: PICByteStore(InMemoryByteStore())])
def test_any_byte_store_of_langchain_keeps_the_memories(compressor, chat, documents, make):
    other = make()
    compressed = compressor.model_copy(update={"store": other}).compress_documents(documents, "q")
    assert len(list(other.yield_keys(prefix="default/"))) == 2 * len(documents) + 1  # memories, texts, the key
    assert chat.model_copy(update={"store": other}).invoke(compressed[0].page_content)
    assert list(compressor.store.yield_keys()) == []


def test_at_rest_decides_the_bytes_in_the_store(compressor, documents):
    def stored_bytes(**settings):
        compressor.model_copy(update=settings).compress_documents(documents, "q")
        return sum(map(len, compressor.store.mget(list(compressor.store.yield_keys(prefix=settings["namespace"])))))

    assert stored_bytes(namespace="small", at_rest="int4") < stored_bytes(namespace="whole")


def test_the_trace_shows_how_many_tokens_were_saved_and_whose_child_the_run_is(compressor, documents, base_retriever):
    runs = RunCollectorCallbackHandler()
    chain = PICRetriever(base_compressor=compressor, base_retriever=base_retriever)
    for call in (chain.invoke, lambda *args: asyncio.run(chain.ainvoke(*args))):
        runs.traced_runs.clear()
        call("q", {"callbacks": [runs]})
        (root,) = runs.traced_runs
        run = next(child for child in root.child_runs if child.name == "PICCompressor")
        text_tokens = sum(len(document.page_content) for document in documents)
        memory_tokens = sum(-(-len(document.page_content) // 4) for document in documents)
        assert run.outputs["tokens_saved"] == text_tokens - memory_tokens
    assert run.outputs["cached_documents"] == len(documents)


class Passing(BaseRetriever):
    """Passes its arguments on to a retriever and reorders what that finds, as a reranker's does."""

    base: BaseRetriever

    def _get_relevant_documents(self, query, *, run_manager, **kwargs):
        return self.base.invoke(query, **kwargs)[::-1]


class Filtering(BaseRetriever):
    """Has an argument of its own, and no `k`."""

    found: list

    def _get_relevant_documents(self, query, *, run_manager, kind=None):
        return self.found


def test_k_cuts_what_is_found_and_reaches_only_a_retriever_whose_own_number_it_is(compressor, documents):
    store = InMemoryVectorStore.from_documents(documents, DeterministicFakeEmbedding(size=8))
    one = store.as_retriever(search_kwargs={"k": 1})
    for retriever, expected in (
        (one, store.similarity_search("q", k=3)),
        (Passing(base=store.as_retriever(search_kwargs={"k": 4})), store.similarity_search("q", k=4)[::-1][:3]),
        (Filtering(found=documents), documents[:3]),
        (SearchingInThread(found=documents), documents[:3]),
        (SearchingInThread(found=documents, own=1), documents[:3]),
        (SearchingInThread(found=documents, own=1).with_retry(), documents[:3]),
    ):
        made = PICRetriever(base_compressor=compressor, base_retriever=retriever, k=3)
        for shown in (made.invoke("q"), asyncio.run(made.ainvoke("q"))):
            restored = restore_documents(shown, store=compressor.store)
            assert [document.page_content for document in restored] == [each.page_content for each in expected]


class Searching(BaseRetriever):
    """Has a number of its own and keeps what it was asked."""

    found: list
    asked: Any

    def _get_relevant_documents(self, query, *, run_manager, k=4, kind=None):
        self.asked.append((k, kind))
        return self.found[:k]

    async def _aget_relevant_documents(self, query, *, run_manager, k=4, kind=None):
        return self._get_relevant_documents(query, run_manager=run_manager, k=k, kind=kind)


class SearchingInThread(BaseRetriever):
    """Has a number of its own, and of LangChain the asynchronous call, which has none."""

    found: list
    own: int = 4

    def _get_relevant_documents(self, query, *, run_manager, k=None):
        return self.found[: k or self.own]


def wrapped(retriever):
    return {
        "itself": retriever,
        "bind": retriever.bind(k=1),
        "retry": retriever.with_retry(),
        "config": retriever.with_config(tags=["t"]),
        "fallbacks": retriever.with_fallbacks([retriever]),
        "fields": retriever.configurable_fields(found=ConfigurableField(id="found")),
        "sequence": RunnableLambda(str.strip) | retriever,
        "lambda": RunnableLambda(retriever.invoke),
    }


@pytest.mark.parametrize("way", wrapped(Searching(found=[], asked=[])))
def test_a_retriever_may_be_any_runnable_and_k_reaches_it_through_the_usual_wrappers(compressor, documents, way):
    asked = []
    base = wrapped(Searching(found=documents, asked=asked))[way]
    made = PICRetriever(base_retriever=base, base_compressor=compressor, k=2)
    for shown in (made.invoke("q"), asyncio.run(made.ainvoke("q"))):
        restored = restore_documents(shown, store=compressor.store)
        assert [document.page_content for document in restored] == [each.page_content for each in documents[:2]]
    assert asked == [(4 if way in ("sequence", "lambda") else 2, None)] * 2


def test_k_reaches_fallbacks_only_if_it_is_the_own_number_of_each(compressor, documents):
    asked = []
    reranking = Passing(base=Searching(found=documents, asked=asked))
    base = reranking.with_fallbacks([Searching(found=documents, asked=asked)])
    PICRetriever(base_retriever=base, base_compressor=compressor, k=2).invoke("q")
    assert asked == [(4, None)]


@pytest.mark.parametrize("way", ["itself", "retry"])
def test_all_other_arguments_of_a_call_go_to_the_base_retriever(compressor, documents, way):
    asked = []
    base = wrapped(Searching(found=documents, asked=asked))[way]
    made = PICRetriever(base_retriever=base, base_compressor=compressor)
    made.invoke("q", kind="page")
    asyncio.run(made.ainvoke("q", kind="page", k=1))
    assert asked == [(4, "page"), (1, "page")]


def test_the_configuration_of_a_call_reaches_the_base_retriever(compressor, documents):
    seen = []

    def search(query: str, config: RunnableConfig) -> list[Document]:
        seen.append((config["tags"], config["metadata"]["user"], config.get("run_name")))
        return [each for each in documents if each.id == config["configurable"]["only"]]

    made = PICRetriever(base_retriever=RunnableLambda(search), base_compressor=compressor)
    config = {"configurable": {"only": documents[1].id}, "tags": ["t"], "metadata": {"user": "u"}, "run_name": "mine"}
    [alone] = made.invoke("q", config)
    [[first], [other]] = made.batch(["q", "q"], [config, {**config, "configurable": {"only": documents[2].id}}])
    [bound] = made.with_config(config).invoke("q")
    [awaited] = asyncio.run(made.ainvoke("q", config))
    [chained] = (RunnableLambda(str.strip) | made).invoke("q", config)
    assert {each.id for each in (alone, first, bound, awaited, chained)} == {documents[1].id}
    assert other.id == documents[2].id
    assert [(set(tags), user, name) for tags, user, name in seen] == [({"t"}, "u", None)] * 6


def test_configurable_fields_of_the_base_retriever_are_set_by_a_call(compressor, documents):
    found = Searching(found=documents, asked=[]).configurable_fields(found=ConfigurableField(id="found"))
    made = PICRetriever(base_retriever=found, base_compressor=compressor)
    assert len(made.invoke("q", {"configurable": {"found": documents[:1]}})) == 1
    assert len(made.invoke("q")) == len(documents)


def test_ratios_go_to_documents_by_their_rank(compressor, documents):
    ranked = compressor.model_copy(update={"ratio": PICCompressor(ratio=[4, 16]).ratio})
    fine, coarse = (compressor.model_copy(update={"ratio": ratio}) for ratio in (4, 16))
    shown, *others = (
        [document.page_content for document in each.compress_documents(documents, "q")]
        for each in (ranked, fine, coarse)
    )
    assert shown == [others[0][0], *others[1][1:]]
    assert [document.metadata["pic_ratio"] for document in ranked.compress_documents(documents, "q")][:2] == [4, 16]


def test_ranks_are_not_known_at_ingestion():
    with pytest.raises(ValueError, match="ratio must be one number at ingestion, got .4, 16."):
        PICDocumentTransformer(ratio=[4, 16])


def test_a_failure_ends_the_traced_run_with_the_error(compressor, documents):
    class Errors(BaseCallbackHandler):
        seen: list[BaseException] = []  # noqa: RUF012

        def on_chain_error(self, error, **kwargs):
            self.seen.append(error)

    errors = Errors()
    with pytest.raises(ValueError, match="ratio must be one of"):
        compressor.model_copy(update={"ratio": 5}).compress_documents(documents, "q", callbacks=[errors])
    assert len(errors.seen) == 1


def test_the_wrong_input_of_a_chain_step_is_named(compressor):
    with pytest.raises(TypeError, match="list of Documents"):
        compressor.as_runnable().invoke("a question")


def test_ingestion_keeps_the_text_to_embed_and_leaves_nothing_to_compress_at_question_time(compressor, documents):
    ingest = PICDocumentTransformer(compressor=compressor.compressor, store=compressor.store)
    ingested = ingest.transform_documents(documents)
    assert ingested == documents
    assert asyncio.run(ingest.atransform_documents(documents)) == ingested
    assert ingest.transform_documents(iter(documents)) == ingested  # type: ignore[arg-type]
    runs = RunCollectorCallbackHandler()
    compressor.as_runnable().invoke(ingested, {"callbacks": [runs]})
    assert runs.traced_runs[0].child_runs[0].outputs["cached_documents"] == len(documents)


def test_an_llm_that_cannot_read_handles_is_an_error_at_the_compressor_or_gets_the_text(compressor, documents):
    llm = FakeListChatModel(responses=["yes"])
    settings = {"compressor": compressor.compressor, "store": compressor.store, "llm": llm}
    with pytest.raises(ValueError, match="llm must read handles"):
        PICCompressor(**settings)
    with pytest.raises(ValueError, match="llm must be given"):
        PICCompressor(fallback="text")
    as_text = PICCompressor(**settings, fallback="text")
    assert as_text.compress_documents(documents, "q") == documents
    compressed = compressor.compress_documents(documents, "q")
    assert as_text.compress_documents(compressed, "q") == documents


def test_fallback_text_comes_with_its_handle_syntax_escaped(compressor):
    hostile = Document(page_content=f"read [[pic:{'0' * 32}]] please")
    as_text = PICCompressor(llm=FakeListChatModel(responses=["yes"]), fallback="text")
    assert find_handles(as_text.compress_documents([hostile], "q")[0].page_content) == []
    assert hostile.page_content == restore_documents(compressor.compress_documents([hostile], "q"))[0].page_content


def test_restore_puts_the_text_into_any_kind_of_prompt(compressor, documents):
    from langchain_core.prompts import ChatPromptTemplate, PromptTemplate

    handle, other, *_ = (document.page_content for document in compressor.compress_documents(documents, "q"))
    restore = PICRestore(store=compressor.store)
    text = documents[0].page_content
    assert restore.invoke(f"<{handle}>") == f"<{text}>"
    assert (PromptTemplate.from_template("<{c}>") | restore).invoke({"c": handle}).to_string() == f"<{text}>"
    chat_prompt = ChatPromptTemplate.from_messages([("system", "{c}"), ("human", "?")]) | restore
    assert chat_prompt.invoke({"c": handle}).to_messages()[0].content == text
    messages = [
        HumanMessage([{"type": "text", "text": handle}]),
        ToolMessage(handle, tool_call_id="1"),
    ]
    restored = restore.invoke(messages)
    assert [message.text for message in restored] == [text, text]
    assert asyncio.run(restore.ainvoke(messages)) == restored
    with pytest.raises(UnknownHandleError, match="this handle where people write"):
        restore.invoke([ToolMessage(handle, tool_call_id="1"), HumanMessage(f"What is {other}?")])
    with pytest.raises(UnknownHandleError):
        PICRestore(store=compressor.store, namespace="other").invoke(handle)


def test_a_source_text_that_is_damaged_in_the_store_is_not_given_out_and_is_kept_anew(compressor, documents, caplog):
    def compress():
        return compressor.compress_documents(documents, "q")[0].page_content

    handle = compress()
    restore = PICRestore(store=compressor.store)
    [(key, kept)] = [
        (key, value)
        for key in compressor.store.yield_keys()
        for value in compressor.store.mget([key])
        if value.endswith(documents[0].page_content.encode())
    ]
    for damaged in (kept[:-1] + b"?", kept[:-1], b""):
        compressor.store.mset([(key, damaged)])
        with pytest.raises(UnknownHandleError):
            restore.invoke(handle)
    assert "source text of [[pic:" in caplog.text
    assert compress() == handle
    assert restore.invoke(handle) == documents[0].page_content


@pytest.mark.parametrize(
    "write",
    [
        lambda handle: [("system", f"Use {handle}."), ("user", "Who?")],
        lambda handle: [{"role": "system", "content": f"Use {handle}."}, {"role": "user", "content": "Who?"}],
        lambda handle: [SystemMessage(f"Use {handle}."), "Who?"],
    ],
)
def test_restore_takes_messages_in_every_form_that_a_chat_model_takes(compressor, documents, write):
    handle = compressor.compress_documents(documents, "q")[0].page_content
    expected = [SystemMessage(f"Use {documents[0].page_content}."), HumanMessage("Who?")]
    assert PICRestore(store=compressor.store).invoke(write(handle)) == expected


def test_restore_keeps_texts_and_documents_and_refuses_what_is_no_prompt(compressor, documents):
    compressed = compressor.compress_documents(documents, "q")
    restore = PICRestore(store=compressor.store)
    assert restore.invoke([compressed[0].page_content, "Who?"]) == [documents[0].page_content, "Who?"]
    assert restore.invoke(compressed) == documents
    assert restore.invoke([]) == []
    for wrong in (3, [3], [compressed[0], HumanMessage("Who?")]):
        with pytest.raises(TypeError, match="input must be a prompt, messages, text or documents, got"):
            restore.invoke(wrong)


def test_a_namespace_reads_its_own_memories_and_writes_none_elsewhere(compressor, chat, documents, store, monkeypatch):
    own = compressor.model_copy(update={"namespace": "mine"})
    [shown, *_] = own.compress_documents(documents, "q")
    kept = list(store.yield_keys())
    assert all(key.startswith("mine/") for key in kept)
    monkeypatch.setattr(Compressor, "compress", None)  # whose memory is there needs nothing made again
    reply = chat.model_copy(update={"namespace": "mine"}).invoke(f"{shown.page_content}\nWho built it?")
    assert reply.response_metadata["memory_tokens"] == shown.metadata["pic_memory_tokens"]
    assert list(store.yield_keys()) == kept


async def test_a_query_that_holds_a_handle_is_refused_in_coroutines_too(compressor, documents):
    [shown, *_] = compressor.compress_documents(documents, "q")
    with pytest.raises(ValueError, match="query must not hold a handle"):
        await compressor.acompress_documents(documents, f"What is {shown.page_content}?")
