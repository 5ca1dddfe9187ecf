"""An LLM that cannot read handles never gets them; models are loaded once a process, and late."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from pic_rag import Compressor

from langchain_pic_rag import ChatPIC, HandleGuard, PICCompressor, PICRestore, reads_handles, unload_models

PLAIN = FakeListChatModel(responses=["yes"])


def test_who_reads_handles_is_seen_through_the_usual_wrappers(chat, store):
    restore = PICRestore(store=store)
    readers = [
        chat,
        chat.bind(stop=["x"]),
        chat.with_retry(),
        chat.with_config(tags=["t"]),
        chat.with_fallbacks([chat]),
        restore | PLAIN,
        ChatPromptTemplate.from_template("{x}") | chat,
    ]
    others = [
        PLAIN,
        PLAIN.bind(stop=["x"]),
        chat.with_fallbacks([PLAIN]),
        PLAIN | restore,
        RunnableLambda(lambda value: chat.invoke(value)),
    ]
    assert [reads_handles(llm) for llm in readers] == [True] * len(readers)
    assert [reads_handles(llm) for llm in others] == [False] * len(others)


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


def test_equal_settings_share_one_compressor_however_many_threads_ask_first(monkeypatch, tiny_compressor):
    loads = []

    def load(*args, **kwargs):
        loads.append((args, kwargs))
        return tiny_compressor

    monkeypatch.setattr(Compressor, "from_pretrained", load)
    unload_models()
    components = [PICCompressor(model_name="a"), ChatPIC(model="a"), PICCompressor(model_name="a", ratio=8)]
    threads = [threading.Thread(target=part.get_compressor) for part in components * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    PICCompressor(model_name="a", dtype="float32").get_compressor()
    assert len(loads) == 2
    unload_models()


def test_importing_and_constructing_load_no_torch():
    code = (
        "import sys, langchain_pic_rag as p; p.PICCompressor(); p.ChatPIC(); p.PICDocumentTransformer(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_misspelt_setting_is_refused():
    with pytest.raises(ValueError, match="ration"):
        PICCompressor(ration=8)
    with pytest.raises(ValueError, match="namespace"):
        PICCompressor(namespace="a/b")
