"""An LLM that cannot read handles never gets them; models are loaded once a process, and late."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import ClassVar

import pytest
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_pic_rag import (
    ChatPIC,
    HandleGuard,
    PICCompressor,
    PICDocumentTransformer,
    PICRestore,
    PICRetriever,
    guard,
    reads_handles,
)

from pic_rag import Compressor, unload_shared

PLAIN = FakeListChatModel(responses=["yes"])


def test_who_reads_handles_is_seen_through_the_usual_wrappers(chat, store):
    restore = PICRestore(store=store)
    readers = [
        chat,
        chat.bind(stop=["x"]),
        chat.with_retry(),
        chat.with_config(tags=["t"]),
        chat.with_fallbacks([chat]),
        chat.configurable_fields(seed=ConfigurableField(id="seed")),
        chat.configurable_alternatives(ConfigurableField(id="m"), default_key="pic", other=chat.bind(stop=["x"])),
        restore | PLAIN,
        ChatPromptTemplate.from_template("{x}") | chat,
        chat.with_structured_output({"title": "A", "description": "A.", "type": "object"}, include_raw=True),
    ]
    others = [
        PLAIN,
        PLAIN.bind(stop=["x"]),
        chat.with_fallbacks([PLAIN]),
        chat.configurable_alternatives(ConfigurableField(id="m"), default_key="pic", other=PLAIN),
        chat.configurable_alternatives(ConfigurableField(id="m"), default_key="pic", other=lambda: chat),
        PLAIN.configurable_fields(sleep=ConfigurableField(id="sleep")) | chat,
        PLAIN | restore,
        PLAIN.bind(stop=["x"]) | chat,
        RunnableParallel(one=chat, other=PLAIN),
        RunnableLambda(lambda value: chat.invoke(value)),
    ]
    assert [reads_handles(llm) for llm in readers] == [True] * len(readers)
    assert [reads_handles(llm) for llm in others] == [False] * len(others)


class PassingToo(FakeListChatModel):
    """The same, said as a field of pydantic's."""

    reads_handles: bool = True


@pytest.mark.parametrize("llm", [PLAIN, FakeListLLM(responses=["yes"])])
def test_the_guard_stops_handles_before_any_other_llm_and_lets_all_else_pass(compressor, documents, chat, llm):
    handle = compressor.compress_documents(documents, "q")[0].page_content
    config = {"callbacks": [HandleGuard()]}
    for call in (llm.invoke, lambda *args: asyncio.run(llm.ainvoke(*args)), lambda *args: list(llm.stream(*args))):
        with pytest.raises(ValueError, match="llm must read handles"):
            call(handle, config)
    assert llm.invoke("no handle", config)
    assert (PICRestore(store=compressor.store) | llm).invoke(handle, config)
    assert chat.invoke(handle, config).content == chat.invoke(handle).content


class Passing(FakeListChatModel):
    """A model of somebody's that passes its prompts on to `ChatPIC`, and says so."""

    reads_handles: ClassVar[bool] = True


@pytest.mark.parametrize("llm", [PLAIN, FakeListLLM(responses=["yes"])])
def test_a_chain_that_ends_in_another_llm_is_stopped_without_asking_for_it(compressor, base_retriever, llm):
    retriever = PICRetriever(base_retriever=base_retriever, base_compressor=compressor)
    prompt = {"context": retriever, "question": RunnablePassthrough()} | PromptTemplate.from_template(
        "{context} {question}"
    )
    chain = prompt | llm
    for ask in (chain.invoke, lambda text: asyncio.run(chain.ainvoke(text)), lambda text: list(chain.stream(text))):
        with pytest.raises(ValueError, match=f"llm must read handles, as ChatPIC does, got {type(llm).__name__}"):
            ask("Who?")
    assert (prompt | PICRestore(store=compressor.store) | llm).invoke("Who?")


def test_nothing_that_somebody_types_stops_another_chain(compressor, documents):
    handle = compressor.compress_documents(documents, "q")[0].page_content
    computed = compressor.get_compressor().handle(documents[0].page_content)
    for typed in (computed, f"{handle[:-4]}00]]", f"[[pic:{'0' * 64}]]"):
        assert PLAIN.invoke(typed).content == "yes"


@pytest.mark.parametrize("kind", [Passing, PassingToo])
def test_a_model_that_says_it_reads_handles_gets_them(compressor, documents, kind):
    handle = compressor.compress_documents(documents, "q")[0].page_content
    for config in ({}, {"callbacks": [HandleGuard()]}):
        assert kind(responses=["yes"]).invoke(handle, config).content == "yes"


def test_the_watch_forgets_the_oldest_handles(monkeypatch):
    monkeypatch.setattr(guard, "_WATCHED_HANDLES", 2)
    watcher = guard._Watch()
    watcher.add(["a", "b", "a", "c"])
    assert [watcher._concerns(handle) for handle in "abc"] == [True, False, True]


def test_equal_settings_share_what_they_load(checkpoints, tmp_path):
    settings = {"model_name": checkpoints[0], "dtype": "float32", "cache_folder": str(tmp_path)}
    compressor, chat = PICCompressor(**settings), ChatPIC(**settings)
    assert compressor.get_compressor() is PICDocumentTransformer(**settings, ratio=8).get_compressor()
    assert chat.get_generator() is ChatPIC(**settings, namespace="other").get_generator()
    assert chat.get_checkpoint() is compressor.get_checkpoint()
    assert chat.get_store() is compressor.get_store()
    other = PICCompressor(**settings, model_kwargs={"attn_implementation": "eager"})
    assert other.get_compressor() is not compressor.get_compressor()


def test_a_chat_model_that_only_reads_memories_loads_no_compressor(checkpoints, store, documents, monkeypatch):
    settings = {"model_name": checkpoints[0], "dtype": "float32", "store": store}
    handle = PICCompressor(**settings).compress_documents(documents, "q")[0].page_content
    unload_shared()
    monkeypatch.setattr(Compressor, "__init__", lambda *_, **__: pytest.fail("loaded a compressor"))
    answer = ChatPIC(**settings, max_tokens=2).invoke(handle)
    assert answer.usage_metadata["input_token_details"]["memory"] > 0


def test_a_ready_compressor_counts_for_more_than_the_name(tiny_compressor):
    chat = ChatPIC(model_name="/no/such/folder", compressor=tiny_compressor)
    assert chat.get_checkpoint().fingerprint == tiny_compressor.fingerprint


def test_importing_and_constructing_load_no_torch():
    code = (
        "import sys, langchain_pic_rag as p; p.PICCompressor(); p.ChatPIC(); p.PICDocumentTransformer(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_misspelt_setting_is_refused():
    for component in (PICCompressor, PICDocumentTransformer, PICRestore, ChatPIC):
        with pytest.raises(ValueError, match=r"Unknown setting 'namespase'. \w+ has: .*namespace, .*store"):
            component(namespase="a")
    with pytest.raises(ValueError, match="namespace"):
        PICCompressor(namespace="a/b")
    assert ChatPIC(timeout=3, max_retries=2, streaming=True, model="m").model_name == "m"
