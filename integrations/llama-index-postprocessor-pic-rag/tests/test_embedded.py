"""A RAG app with the embedded models: SmolLM2-135M-Instruct reads memories, MiniLM retrieves, LlamaIndex does the rest.

`PIC_RAG_TEST_COMPRESSOR` names another compressor than the shipped one. Where none is shipped, an untrained one makes
the same journeys: what is tested here is what the frameworks do with handles, not how well an answer reads.
"""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.evaluation import FaithfulnessEvaluator, RelevancyEvaluator
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import MetadataMode
from llama_index.llms.pic_rag import PICLLM
from llama_index.postprocessor.pic_rag import PICCompressor, PICTransform, restore_nodes

from pic_rag import Compressor, Generator, SQLiteStore, find_handles
from pic_rag.models.embedded import EmbeddedModelError, retriever_path

pytestmark = pytest.mark.embedded

DOCUMENTS = [
    Document(
        id_="lighthouse",
        text="The lighthouse of Amsel was built in 1887 by the engineer Ida Brandt, after the wreck of the brig Falke. "
        "Its lamp burned rape oil until 1921, when the harbour board paid 4,300 crowns for a gas burner.",
        metadata={"file": "amsel.md"},
    ),
    Document(
        id_="museum",
        text="The keeper's house is a museum today. It opens at nine in the morning, is closed on Mondays, and shows "
        "the first keeper's logbook, a brass barometer and the oars of the rescue boat.",
        metadata={"file": "museum.md"},
    ),
    Document(
        id_="seals",
        text="Grey seals rest on the rocks below the tower from June to September. Visitors keep a distance of fifty "
        "metres, and dogs are not allowed on the beach while the pups are there.",
        metadata={"file": "seals.md"},
    ),
]
QUESTION = "Who built the lighthouse of Amsel?"
LLM_MODES = [
    pytest.param(mode, marks=() if mode is ResponseMode.COMPACT else pytest.mark.slow)
    for mode in ResponseMode
    if mode not in (ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY)
]


class MiniLM(BaseEmbedding):
    """The embedded retriever as a LlamaIndex embedding model."""

    _model = PrivateAttr(default=None)

    def _embed(self, text: str) -> list[float]:
        if self._model is None:
            from sentence_transformers import SentenceTransformer

            self._model = SentenceTransformer(str(retriever_path()), device="cpu")
        return self._model.encode(text, show_progress_bar=False).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._embed, query)


@pytest.fixture(scope="module")
def real_compressor() -> Compressor:
    try:
        return Compressor.from_pretrained(os.environ.get("PIC_RAG_TEST_COMPRESSOR"))
    except EmbeddedModelError:
        return Compressor.from_base()


@pytest.fixture(scope="module")
def real_generator(real_compressor) -> Generator:
    return Generator.from_pretrained(real_compressor.generator.name, reader=real_compressor.reader)


@pytest.fixture(scope="module")
def real_store(tmp_path_factory) -> SQLiteStore:
    return SQLiteStore(tmp_path_factory.mktemp("store") / "memories.sqlite")


@pytest.fixture(scope="module")
def real_llm(real_compressor, real_generator, real_store) -> PICLLM:
    return PICLLM(compressor=real_compressor, generator=real_generator, store=real_store, max_new_tokens=12)


@pytest.fixture(scope="module")
def real_postprocessor(real_compressor, real_store) -> PICCompressor:
    return PICCompressor(compressor=real_compressor, store=real_store)


@pytest.fixture(scope="module")
def real_index() -> VectorStoreIndex:
    return VectorStoreIndex.from_documents(DOCUMENTS, embed_model=MiniLM())


@pytest.fixture(autouse=True)
def _count_as_the_generator_does(monkeypatch, real_llm):
    import llama_index.core

    monkeypatch.setattr(llama_index.core, "global_tokenizer", real_llm.tokenize)


@pytest.mark.parametrize("mode", LLM_MODES)
def test_every_response_mode_answers_and_keeps_its_sources(real_index, real_postprocessor, real_llm, mode):
    engine = real_index.as_query_engine(llm=real_llm, node_postprocessors=[real_postprocessor], response_mode=mode)
    response = engine.query(QUESTION)
    assert str(response).strip()
    assert not find_handles(str(response))
    assert "Ida Brandt" in response.source_nodes[0].text
    assert response.source_nodes[0].score > 0.3
    assert response.source_nodes[0].metadata["file"] == "amsel.md"


def test_the_prompt_shrinks_by_the_ratio(real_index, real_postprocessor, real_llm, real_compressor):
    found = real_index.as_retriever(similarity_top_k=3).retrieve(QUESTION)
    text_tokens = sum(len(real_llm.tokenize(node.get_content(MetadataMode.LLM))) for node in found)
    compressed = real_postprocessor.postprocess_nodes(found)
    memory_tokens = sum(len(real_llm.tokenize(node.get_content(MetadataMode.LLM))) for node in compressed)
    ratio = real_compressor.config.ratio
    assert text_tokens / ratio <= memory_tokens <= text_tokens / ratio + len(found)
    prompt = "\n".join(node.get_content(MetadataMode.LLM) for node in compressed)
    assert real_llm.complete(prompt).raw["usage"]["memory_tokens"] == memory_tokens


class RecordingLLM(PICLLM):
    """PICLLM that keeps each prompt, and what its answer cost."""

    asked: list = Field(default_factory=list)

    def _answer(self, make_prompt, settings):
        response = super()._answer(make_prompt, settings)
        self.asked.append(("\n".join(message["content"] for message in make_prompt()), response.raw["usage"]))
        return response


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["compact", "tree_summarize", "context", "condense_plus_context"])
def test_two_lines_change_the_documents_in_the_prompt_and_nothing_else(
    real_index, real_postprocessor, real_llm, real_compressor, ask
):
    def run(postprocessors):
        llm = RecordingLLM(**{name: getattr(real_llm, name) for name in real_llm.model_fields_set})
        settings = {"llm": llm, "node_postprocessors": postprocessors, "similarity_top_k": 2}
        if "context" in ask:
            response = real_index.as_chat_engine(chat_mode=ask, **settings).chat(QUESTION)
        else:
            response = real_index.as_query_engine(response_mode=ask, **settings).query(QUESTION)
        return response, *llm.asked[-1]

    without, text, text_usage = run([])
    with_memories, shown, usage = run([real_postprocessor])
    for node in with_memories.source_nodes:
        original = restore_nodes([node])[0].node.get_content(MetadataMode.LLM)
        assert shown.count(node.metadata["pic_memory"]) == 1
        shown = shown.replace(node.metadata["pic_memory"], original)
    assert shown == text
    assert restore_nodes(with_memories.source_nodes) == without.source_nodes  # text, ids, scores, order, metadata
    saved = text_usage["prompt_tokens"] - usage["prompt_tokens"]
    ratio = real_compressor.config.ratio
    assert (usage["memory_tokens"] + saved) / usage["memory_tokens"] == pytest.approx(ratio, rel=0.1)
    assert str(with_memories).strip()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["context", "condense_question", "condense_plus_context"])
def test_chat_engines_answer_two_turns(real_index, real_postprocessor, real_llm, mode):
    engine = real_index.as_chat_engine(chat_mode=mode, llm=real_llm, node_postprocessors=[real_postprocessor])
    assert engine.chat(QUESTION).source_nodes
    assert str(engine.chat("And in which year?")).strip()
    assert len(engine.chat_history) == 4


@pytest.mark.slow
def test_the_citation_engine_numbers_sources_that_are_text(real_index, real_compressor, real_store, real_llm):
    numbered = PICCompressor(compressor=real_compressor, store=real_store, label="Source {number}:")
    engine = CitationQueryEngine.from_args(real_index, llm=real_llm, node_postprocessors=[numbered], similarity_top_k=2)
    response = engine.query(QUESTION)
    assert str(response).strip()
    assert "Ida Brandt" in response.source_nodes[0].text
    assert response.source_nodes[0].text.startswith("Source 1:")


@pytest.mark.slow
@pytest.mark.parametrize("evaluator", [FaithfulnessEvaluator, RelevancyEvaluator])
def test_an_evaluator_reads_the_source_text(real_index, real_postprocessor, real_llm, evaluator):
    response = real_index.as_query_engine(llm=real_llm, node_postprocessors=[real_postprocessor]).query(QUESTION)
    verdict = evaluator(llm=real_llm).evaluate_response(query=QUESTION, response=response)
    assert verdict.contexts == [node.text for node in response.source_nodes]
    assert "Ida Brandt" in verdict.contexts[0]


@pytest.mark.slow
def test_streaming_gives_the_whole_answer_in_pieces(real_index, real_postprocessor, real_llm):
    asking = real_index.as_query_engine(llm=real_llm, node_postprocessors=[real_postprocessor])
    _, whole = (str(asking.query(QUESTION)) for _ in range(2))  # what is read first may round otherwise in bfloat16
    engine = real_index.as_query_engine(llm=real_llm, node_postprocessors=[real_postprocessor], streaming=True)
    pieces = [piece for piece in engine.query(QUESTION).response_gen if piece]
    assert len(pieces) > 1
    assert "".join(pieces) == whole


@pytest.mark.slow
def test_thirty_two_concurrent_queries_answer_as_one_by_one(real_index, real_postprocessor, real_llm):
    brief = real_llm.model_copy(update={"max_new_tokens": 8})
    engine = real_index.as_query_engine(llm=brief, node_postprocessors=[real_postprocessor], similarity_top_k=1)
    subjects = ("lighthouse", "museum", "seals", "dogs", "lamp", "oars", "wreck", "pups")
    questions = [
        f"{ask} the {subject}?" for ask in ("What about", "Who knows", "When", "Where") for subject in subjects
    ]
    expected = [str(engine.query(question)) for question in questions]

    async def all_at_once() -> list[str]:
        answers = await asyncio.wait_for(asyncio.gather(*map(engine.aquery, questions)), timeout=300)
        return [str(answer) for answer in answers]

    assert asyncio.run(all_at_once()) == expected
    assert len(set(expected)) > 1


@pytest.mark.slow
def test_an_async_answer_leaves_the_event_loop_free(real_index, real_postprocessor, real_llm):
    engine = real_index.as_query_engine(llm=real_llm, node_postprocessors=[real_postprocessor])
    engine.query(QUESTION)  # loads

    async def longest_pause() -> float:
        answer = asyncio.create_task(engine.aquery(QUESTION))
        pauses = [0.0]
        while not answer.done():
            begin = time.perf_counter()
            await asyncio.sleep(0)
            pauses.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        await answer
        return max(pauses)

    begin = time.perf_counter()
    pause = asyncio.run(longest_pause())
    assert pause < (time.perf_counter() - begin) / 2


@pytest.mark.slow
def test_an_index_on_disk_answers_without_compressing_again(
    real_compressor, real_store, real_postprocessor, real_llm, tmp_path, monkeypatch
):
    pipeline = IngestionPipeline(
        transformations=[
            SentenceSplitter(chunk_size=256, chunk_overlap=0),
            PICTransform(compressor=real_compressor, store=real_store),
            MiniLM(),
        ],
        cache=IngestionCache(),
    )
    nodes = pipeline.run(documents=DOCUMENTS)
    assert all(find_handles(node.metadata["pic_memory"]) for node in nodes)
    VectorStoreIndex(nodes, embed_model=MiniLM()).storage_context.persist(str(tmp_path))
    index = load_index_from_storage(StorageContext.from_defaults(persist_dir=str(tmp_path)), embed_model=MiniLM())
    monkeypatch.setattr(Compressor, "compress", lambda *_: pytest.fail("compressed again"))
    response = index.as_query_engine(llm=real_llm, node_postprocessors=[real_postprocessor]).query(QUESTION)
    assert "Ida Brandt" in response.source_nodes[0].text
    assert restore_nodes(response.source_nodes)[0].node.get_content(MetadataMode.LLM).startswith("file: amsel.md")
