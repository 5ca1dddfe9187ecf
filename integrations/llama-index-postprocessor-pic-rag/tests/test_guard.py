"""Nodes that are postprocessed by hand may be given to any LLM: one that reads no memories is stopped."""

from __future__ import annotations

import asyncio
import pickle

import pytest
from llama_index.core import get_response_synthesizer
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import MetadataMode
from llama_index.postprocessor.pic_rag import restore_nodes

from pic_rag import find_handles

READING = set(ResponseMode) - {ResponseMode.GENERATION, ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY}


@pytest.fixture
def shown(compressor, nodes):
    return compressor.postprocess_nodes(nodes)


@pytest.fixture(params=[MockLLM, MockFunctionCallingLLM], ids=["complete", "chat"])
def other(request):
    return request.param()


@pytest.mark.parametrize("mode", sorted(READING))
@pytest.mark.parametrize("use_async", [False, True])
def test_a_synthesizer_with_another_llm_is_stopped_before_the_llm_is_called(shown, other, mode, use_async):
    synthesizer = get_response_synthesizer(llm=other, response_mode=mode)
    with pytest.raises(RuntimeError, match=f"must read memories, as PICLLM does, got {type(other).__name__}"):
        asyncio.run(synthesizer.asynthesize("Who?", shown)) if use_async else synthesizer.synthesize("Who?", shown)


def test_an_llm_that_is_handed_a_prompt_of_handles_is_stopped(shown, other):
    prompt = "\n".join(node.node.get_content(MetadataMode.LLM) for node in shown)
    messages = [ChatMessage(prompt, role="system"), ChatMessage("Who?")]
    for ask in (
        lambda: other.complete(prompt),
        lambda: other.chat(messages),
        lambda: list(other.stream_chat(messages)),
        lambda: list(other.stream_complete(prompt)),
        lambda: asyncio.run(other.acomplete(prompt)),
        lambda: asyncio.run(other.achat(messages)),
    ):
        with pytest.raises(RuntimeError, match="must read memories"):
            ask()


def test_it_may_have_the_text_and_its_own_words_and_handles_that_nobody_handed_out(shown, other, nodes):
    synthesizer = get_response_synthesizer(llm=other)
    assert nodes[0].text in str(synthesizer.synthesize("Who?", restore_nodes(shown)))
    assert find_handles(str(other.complete(f"What is [[pic:{'0' * 64}]]?")))


def test_one_that_reads_memories_gets_them_also_after_another_was_stopped(shown, llm, other):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must read memories"):
            get_response_synthesizer(llm=other).synthesize("Who?", shown)
        assert get_response_synthesizer(llm=llm).synthesize("Who?", shown).source_nodes == shown


def test_an_llm_that_is_watched_can_still_be_copied_and_pickled(shown, other):
    other.complete("Who?")
    assert pickle.loads(pickle.dumps(other)).complete("Who?").text == other.complete("Who?").text
    assert other.model_copy(deep=True).complete("Who?").text == "Who?"
