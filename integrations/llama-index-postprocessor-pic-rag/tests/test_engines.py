"""PICCompressor and PICLLM in LlamaIndex's own engines, on a tiny random model."""

from __future__ import annotations

import asyncio

import llama_index.core
import pytest
from llama_index.core import PromptHelper, Settings, get_response_synthesizer
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import Field
from llama_index.core.evaluation import FaithfulnessEvaluator
from llama_index.core.llms import LLM, ChatMessage, MockLLM
from llama_index.core.query_engine import CitationQueryEngine, CustomQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer, ResponseMode
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.llms.pic_rag import PICLLM
from llama_index.postprocessor.pic_rag import PICCompressor

from pic_rag import escape_handles, find_handles

WITHOUT_CONTEXT = {ResponseMode.GENERATION, ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY}


class RecordingLLM(PICLLM):
    """PICLLM that keeps every prompt it reads."""

    prompts: list = Field(default_factory=list)

    def _read(self, prompt):
        self.prompts.append(prompt)
        return super()._read(prompt)

    @property
    def seen(self) -> str:
        return str(self.prompts)


class TextLLM(MockLLM):
    """An LLM that reads no memories, and keeps every prompt."""

    seen: list = Field(default_factory=list)

    def complete(self, prompt, formatted=False, **kwargs):
        self.seen.append(prompt)
        return super().complete(prompt, formatted, **kwargs)


@pytest.fixture
def recording(tiny_compressor, tiny_generator, store) -> RecordingLLM:
    return RecordingLLM(compressor=tiny_compressor, generator=tiny_generator, store=store, max_new_tokens=8)


class OwnEngine(CustomQueryEngine):
    """A query engine as LlamaIndex's documentation has users write them."""

    retriever: BaseRetriever
    compressor: PICCompressor
    llm: LLM | None = None
    response_synthesizer: BaseSynthesizer | None = None

    def custom_query(self, query_str: str):
        nodes = self.compressor.postprocess_nodes(self.retriever.retrieve(query_str), query_str=query_str)
        if self.response_synthesizer is not None:
            return str(self.response_synthesizer.synthesize(query_str, nodes))
        return str(self.llm.complete("\n\n".join(node.get_content(MetadataMode.LLM) for node in nodes)))


@pytest.mark.parametrize("part", ["llm", "response_synthesizer"])
def test_the_llm_of_an_engine_of_ones_own_is_known(index, compressor, recording, part, monkeypatch):
    """Whatever the settings name."""

    def ask(llm, **settings):
        answering = llm if part == "llm" else get_response_synthesizer(llm=llm)
        own = compressor.model_copy(update=settings)
        return OwnEngine(retriever=index.as_retriever(), compressor=own, **{part: answering}).query("Who?")

    text_llm = TextLLM()
    monkeypatch.setattr(Settings, "_llm", text_llm)
    ask(recording)
    assert find_handles(recording.seen)
    monkeypatch.setattr(Settings, "_llm", recording)
    ask(text_llm, fallback="text")
    assert text_llm.seen
    assert not find_handles(str(text_llm.seen))


@pytest.mark.parametrize("mode", list(ResponseMode))
@pytest.mark.parametrize("use_async", [False, True])
def test_the_llm_reads_memories_and_no_text_in_every_response_mode(
    index, compressor, recording, nodes, mode, use_async, monkeypatch
):
    monkeypatch.setattr(Settings, "_llm", recording)  # LlamaIndex itself asks for it where no LLM reads
    engine = index.as_query_engine(
        llm=recording, node_postprocessors=[compressor], response_mode=mode, similarity_top_k=4
    )
    response = asyncio.run(engine.aquery("Who?")) if use_async else engine.query("Who?")
    assert {node.text for node in response.source_nodes} == {node.text for node in nodes}
    assert not any(node.text in recording.seen for node in nodes)
    assert not find_handles(str(response))
    if mode not in WITHOUT_CONTEXT:
        assert len(set(find_handles(recording.seen))) == 4


def test_context_only_shows_the_text_because_no_llm_reads_it(index, compressor, nodes, monkeypatch):
    monkeypatch.setattr(Settings, "_llm", TextLLM())
    engine = index.as_query_engine(node_postprocessors=[compressor], response_mode="context_only")
    assert any(node.text in str(engine.query("Who?")) for node in nodes)


def test_streamed_answers_are_the_whole_answers(index, compressor, llm):
    whole = str(index.as_query_engine(llm=llm, node_postprocessors=[compressor]).query("Who?"))
    engine = index.as_query_engine(llm=llm, node_postprocessors=[compressor], streaming=True)
    assert "".join(engine.query("Who?").response_gen) == whole

    async def stream() -> str:
        response = await engine.aquery("Who?")
        return "".join([piece async for piece in response.async_response_gen()])

    assert asyncio.run(stream()) == whole


@pytest.mark.parametrize("mode", ["context", "condense_question", "condense_plus_context"])
def test_chat_engines_read_memories_in_every_turn(index, compressor, recording, nodes, mode):
    engine = index.as_chat_engine(chat_mode=mode, llm=recording, node_postprocessors=[compressor])
    engine.chat("Who?")
    recording.prompts.clear()
    answer = engine.chat("And when?")
    assert answer.source_nodes[0].text in {node.text for node in nodes}
    assert find_handles(recording.seen)
    assert not any(node.text in recording.seen for node in nodes)
    assert "".join(engine.stream_chat("Why?").response_gen) == engine.chat_history[-1].content
    assert asyncio.run(engine.achat("Where?")).source_nodes


def test_citations_number_the_handles_and_the_sources_are_text(index, tiny_compressor, store, recording, nodes):
    compressor = PICCompressor(compressor=tiny_compressor, store=store, label="Source {number}:")
    engine = CitationQueryEngine.from_args(index, llm=recording, node_postprocessors=[compressor], similarity_top_k=2)
    response = engine.query("Who?")
    for number, node in enumerate(response.source_nodes, 1):
        assert node.text.startswith(f"Source {number}:")
        assert any(own.text in node.text for own in nodes)
        assert f"Source {number}:\\n{node.node.metadata['pic_memory']}" in recording.seen
    assert not any(node.text in recording.seen for node in nodes)


def test_evaluators_read_the_original_text(index, compressor, llm, nodes):
    response = index.as_query_engine(llm=llm, node_postprocessors=[compressor]).query("Who?")
    judge = TextLLM()
    FaithfulnessEvaluator(llm=judge).evaluate_response(query="Who?", response=response)
    assert response.source_nodes[0].text in str(judge.seen)
    assert not find_handles(str(judge.seen))


def test_the_global_tokenizer_lets_a_small_window_hold_what_fits(index, compressor, recording, monkeypatch):
    monkeypatch.setattr(llama_index.core, "global_tokenizer", recording.tokenize)
    engine = index.as_query_engine(llm=recording, node_postprocessors=[compressor], similarity_top_k=4)
    engine.query("Who?")
    [prompt] = [prompt for prompt in recording.prompts if find_handles(str(prompt))]
    assert len(find_handles(str(prompt))) == 4


REFINING = ["compact", "refine"]  # they answer "Empty Response" when the LLM raises ValueError or TypeError


@pytest.mark.parametrize("mode", REFINING)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("use_async", [False, True])
def test_errors_of_the_llm_reach_who_asked(index, compressor, llm, mode, streaming, use_async, monkeypatch):
    monkeypatch.setattr(llama_index.core, "global_tokenizer", lambda text: text.split())  # and so plans too much

    def ask(llm: PICLLM, question: str) -> None:
        settings = {"node_postprocessors": [compressor], "response_mode": mode, "streaming": streaming}
        engine = index.as_query_engine(llm=llm, **settings)

        async def consume() -> None:
            response = await engine.aquery(question)
            if streaming:
                async for _ in response.async_response_gen():
                    pass

        if use_async:
            asyncio.run(consume())
        else:
            str(engine.query(question))

    with pytest.raises(RuntimeError, match="prompt tokens .* must be at most the generator's context of"):
        ask(llm, "Who? " * (llm.metadata.context_window // 4))
    with pytest.raises(RuntimeError, match="temperature must be 0 or more, got -1"):
        ask(llm.model_copy(update={"generate_kwargs": {"temperature": -1}}), "Who?")


@pytest.mark.parametrize("mode", REFINING)
def test_a_memory_that_llama_index_cuts_is_an_error_that_says_what_to_do(compressor, llm, texts, mode):
    shown = compressor.postprocess_nodes([NodeWithScore(node=TextNode(text=" ".join(texts)))])
    for chunk_tokens in (20, 33, shown[0].metadata["pic_memory_tokens"] - 1):
        helper = PromptHelper(context_window=2048, chunk_size_limit=chunk_tokens, tokenizer=llm.tokenize)
        synthesizer = get_response_synthesizer(llm=llm, response_mode=mode, prompt_helper=helper)
        with pytest.raises(RuntimeError, match="handles must be whole, .* raise context_window or chunk_size_limit"):
            synthesizer.synthesize("Who?", shown)


@pytest.mark.parametrize("call", ["query", "chat", "aquery", "achat", "settings"])
def test_an_engine_whose_llm_reads_no_memories_gets_an_error_or_the_text(
    index, tiny_compressor, store, call, monkeypatch
):
    def ask(fallback: str, llm: TextLLM) -> str:
        postprocessors = [PICCompressor(compressor=tiny_compressor, store=store, fallback=fallback)]
        if call == "settings":
            monkeypatch.setattr(Settings, "_llm", llm)
            return str(index.as_query_engine(node_postprocessors=postprocessors).query("Who?"))
        if "chat" in call:
            engine = index.as_chat_engine(chat_mode="context", llm=llm, node_postprocessors=postprocessors)
        else:
            engine = index.as_query_engine(llm=llm, node_postprocessors=postprocessors)
        answer = getattr(engine, call)("Who?")
        return str(asyncio.run(answer) if call.startswith("a") else answer)

    refused = TextLLM()
    with pytest.raises(ValueError, match="got TextLLM.*fallback="):
        ask("error", refused)
    assert refused.seen == []
    given = TextLLM()
    ask("text", given)
    assert "museum" in str(given.seen)
    assert not find_handles(str(given.seen))


def test_an_engines_own_llm_counts_for_more_than_the_one_in_settings(index, compressor, llm, monkeypatch):
    monkeypatch.setattr(Settings, "_llm", MockLLM())
    assert index.as_query_engine(llm=llm, node_postprocessors=[compressor]).query("Who?").source_nodes


def test_a_handle_smuggled_into_a_question_never_reaches_the_llm(index, compressor, recording):
    engine = index.as_query_engine(llm=recording, node_postprocessors=[compressor])
    handle = find_handles(str(engine.query("Who?").source_nodes[0].metadata))[0]
    recording.prompts.clear()
    with pytest.raises(ValueError, match="query must not hold a handle"):
        engine.query(f"Repeat {handle}")
    assert recording.prompts == []


@pytest.mark.parametrize("mode", ["context", "condense_question", "condense_plus_context"])
def test_a_handle_smuggled_into_a_chat_is_never_answered(index, compressor, llm, mode):
    def engine():
        return index.as_chat_engine(chat_mode=mode, llm=llm, node_postprocessors=[compressor])

    talking = engine()
    handle = find_handles(str(talking.chat("Who?").source_nodes[0].metadata))[0]
    smuggled = f"Repeat {handle}"
    history = [ChatMessage("Who?"), ChatMessage("Ida Brandt.", role="assistant")]
    for call in (
        lambda: talking.chat(smuggled),  # after a turn: an LLM condenses the question before anything is retrieved
        lambda: engine().stream_chat(smuggled, history),
        lambda: asyncio.run(engine().achat(smuggled, history)),
        lambda: asyncio.run(engine().astream_chat(smuggled, history)),
    ):
        with pytest.raises(ValueError, match="query must not hold a handle"):
            call()
    assert talking.chat(escape_handles(smuggled)).source_nodes


def test_thirty_two_concurrent_queries_answer_as_one_by_one(index, compressor, llm):
    engine = index.as_query_engine(llm=llm, node_postprocessors=[compressor], similarity_top_k=2)
    questions = [f"Question {number}?" for number in range(32)]
    expected = [str(engine.query(question)) for question in questions]

    async def all_at_once() -> list[str]:
        answers = await asyncio.wait_for(asyncio.gather(*map(engine.aquery, questions)), timeout=60)
        return [str(answer) for answer in answers]

    assert asyncio.run(all_at_once()) == expected
    assert len(set(expected)) > 1


def test_thirty_two_concurrent_streams_answer_as_one_by_one(index, compressor, llm):
    engine = index.as_query_engine(llm=llm, node_postprocessors=[compressor], streaming=True)
    questions = [f"Question {number}?" for number in range(32)]
    expected = ["".join(engine.query(question).response_gen) for question in questions]

    async def stream(question: str) -> str:
        response = await engine.aquery(question)
        return "".join([piece async for piece in response.async_response_gen()])

    async def all_at_once() -> list[str]:
        return list(await asyncio.wait_for(asyncio.gather(*map(stream, questions)), timeout=60))

    assert asyncio.run(all_at_once()) == expected
