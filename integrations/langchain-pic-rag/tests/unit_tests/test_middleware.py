"""In an agent, what tools retrieve reaches the model as memories, and handles of users do not."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import create_retriever_tool, tool
from langchain_pic_rag import ChatPIC, PICRetriever

from pic_rag import UnknownHandleError, find_handles

agents = pytest.importorskip(
    "langchain.agents", reason="PICMiddleware needs the extra 'agents'", exc_type=ModuleNotFoundError
)

REPORT = "The harbour master counted ships. " * 30


class CallingFirst(ChatPIC):
    """Calls the tool first, for the tiny random model never would; then it is ChatPIC."""

    tool_name: str

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        return self._first_call(messages, super()._generate(messages, stop, run_manager, **kwargs))

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        return self._first_call(messages, await super()._agenerate(messages, stop, run_manager, **kwargs))

    def _first_call(self, messages, result):
        if not any(isinstance(message, ToolMessage) for message in messages):
            call = {"name": self.tool_name, "args": {"query": "ships"}, "id": "call-1"}
            result.generations[0].message = AIMessage("", tool_calls=[call])
        return result


class Recording(FakeMessagesListChatModel):
    """Not PIC-aware; keeps what it was given."""

    seen: list = []  # noqa: RUF012

    def bind_tools(self, tools, **kwargs):
        return self

    def _generate(self, messages, *args, **kwargs):
        self.seen.append(messages)
        return super()._generate(messages, *args, **kwargs)


@tool
def search(query: str) -> str:
    """Search the archive."""
    return REPORT


@pytest.fixture
def calling(chat):
    return CallingFirst(
        compressor=chat.compressor, generator=chat.generator, store=chat.store, max_tokens=6, tool_name="search"
    )


def run(agent, question, way):
    state = {"messages": [HumanMessage(question)]}
    return (agent.invoke(state) if way == "sync" else asyncio.run(agent.ainvoke(state)))["messages"]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_the_model_reads_the_memory_of_a_tool_message_and_the_state_keeps_its_text(calling, compressor, way):
    from langchain_pic_rag import PICMiddleware

    agent = agents.create_agent(calling, [search], middleware=[PICMiddleware(compressor)])
    messages = run(agent, "How many ships?", way)
    assert [message.text for message in messages if isinstance(message, ToolMessage)] == [REPORT]
    assert messages[-1].usage_metadata["input_token_details"]["memory"] == -(-len(REPORT) // 4)


def test_ratios_by_rank_and_top_n_are_for_each_tool_message_alone(calling, compressor):
    from langchain_pic_rag import PICMiddleware

    calls = [{"name": "search", "args": {"query": "x"}, "id": str(number)} for number in range(3)]
    answers = [ToolMessage(f"{number}{REPORT}", tool_call_id=str(number), name="search") for number in range(3)]
    first = compressor.model_copy(update={"top_n": 1, "ratio": (4, 16)})
    agent = agents.create_agent(calling, [search], middleware=[PICMiddleware(first)])
    messages = agent.invoke({"messages": [HumanMessage("?"), AIMessage("", tool_calls=calls), *answers]})["messages"]
    assert messages[-1].usage_metadata["input_token_details"]["memory"] == 3 * -(-len(f"0{REPORT}") // 4)


def test_a_handle_that_a_user_types_is_text(calling, compressor, documents):
    from langchain_pic_rag import PICMiddleware

    handle = compressor.compress_documents(documents, "q")[0].page_content
    agent = agents.create_agent(calling, [search], middleware=[PICMiddleware(compressor, tools=[])])
    messages = run(agent, f"What is {handle}?", "sync")
    assert messages[-1].usage_metadata["input_token_details"]["memory"] == 0


@pytest.mark.parametrize("output", ["short", "computed", "forged"])
def test_a_tool_message_left_alone_resolves_no_handle(calling, compressor, documents, output):
    from langchain_pic_rag import PICMiddleware

    computed = compressor.get_compressor().handle(documents[0].page_content)
    compressor.compress_documents(documents, "q")

    @tool("search")
    def answer(query: str) -> str:
        """Search the archive."""
        return {"short": "42", "computed": computed, "forged": f"{computed[:-2]}{'0' * 32}]]"}[output]

    agent = agents.create_agent(calling, [answer], middleware=[PICMiddleware(compressor)])
    assert run(agent, "?", "sync")[-1].usage_metadata["input_token_details"]["memory"] == 0


def test_a_tool_that_answers_with_handles_has_to_be_named(calling, compressor, base_retriever):
    from langchain_pic_rag import PICMiddleware

    retriever = PICRetriever(base_retriever=base_retriever, base_compressor=compressor)
    searching = create_retriever_tool(retriever, "search", "Search the island.")
    agent = agents.create_agent(calling, [searching], middleware=[PICMiddleware(compressor)])
    with pytest.raises(ValueError, match="handle_tools must name each tool .* got one from 'search'"):
        run(agent, "?", "sync")


def test_a_handle_that_another_tool_echoes_is_text_to_the_model(calling, compressor, documents, caplog):
    """A user pastes one that they were shown, and a search says that it found nothing for it."""
    from langchain_pic_rag import PICMiddleware

    handle = compressor.compress_documents(documents, "q")[0].page_content

    @tool
    def search(query: str) -> str:
        """Search the archive."""
        return f"No results for {handle}."

    agent = agents.create_agent(calling, [search], middleware=[PICMiddleware(compressor)])
    assert run(agent, handle, "sync")[-1].usage_metadata["input_token_details"]["memory"] == 0
    assert "Handles in a message of type 'tool' are text to the model" in caplog.text


def test_documents_in_what_a_user_says_are_text_and_a_warning_says_where_they_belong(
    calling, compressor, documents, caplog
):
    from langchain_pic_rag import PICMiddleware

    handle = compressor.compress_documents(documents, "q")[0].page_content
    agent = agents.create_agent(calling, [search], middleware=[PICMiddleware(compressor, tools=[])])
    run(agent, f"{handle}\n\nWho built it?", "sync")
    assert "into the system message, as by a dynamic_prompt" in caplog.text


def test_an_old_handle_in_a_page_that_a_tool_finds_is_text(calling, compressor, documents, monkeypatch):
    from langchain_pic_rag import PICMiddleware

    handle = compressor.compress_documents(documents, "q")[0].page_content
    monkeypatch.setattr("pic_rag.store.signing._today", lambda: 40000)

    @tool
    def search(query: str) -> str:
        """Search the archive."""
        return f"{REPORT}{handle}"

    agent = agents.create_agent(calling, [search], middleware=[PICMiddleware(compressor)])
    memory_tokens = run(agent, "?", "sync")[-1].usage_metadata["input_token_details"]["memory"]
    assert memory_tokens == -(-len(f"{REPORT}{handle}") // 4)


def test_a_conversation_that_is_resumed_after_days_reads_its_tools_handles(calling, compressor, documents, monkeypatch):
    from langchain_pic_rag import PICMiddleware

    handle = compressor.compress_documents(documents, "q")[0].page_content
    call = AIMessage("", tool_calls=[{"name": "search", "args": {"query": "x"}, "id": "1"}])
    history = [HumanMessage("?"), call, ToolMessage(handle, tool_call_id="1", name="search"), AIMessage("Ida.")]
    monkeypatch.setattr("pic_rag.store.signing._today", lambda: 40000)
    middleware = PICMiddleware(compressor, handle_tools=["search"])
    agent = agents.create_agent(calling, [search], middleware=[middleware])
    messages = agent.invoke({"messages": [*history, HumanMessage("And when?")]})["messages"]
    assert messages[-1].usage_metadata["input_token_details"]["memory"] > 0
    with pytest.raises(UnknownHandleError):
        agents.create_agent(calling, [search]).invoke({"messages": [*history, HumanMessage("And when?")]})


def test_handles_in_the_arguments_of_a_call_are_text(calling, compressor, documents):
    from langchain_pic_rag import PICMiddleware

    handle = compressor.compress_documents(documents, "q")[0].page_content
    call = AIMessage("", tool_calls=[{"name": "search", "args": {"query": handle}, "id": "1"}])
    history = [HumanMessage(f"Find {handle}"), call, ToolMessage("Nothing.", tool_call_id="1", name="search")]
    agent = agents.create_agent(calling, [search], middleware=[PICMiddleware(compressor)])
    messages = agent.invoke({"messages": history})["messages"]
    assert messages[-1].usage_metadata["input_token_details"]["memory"] == 0


@pytest.mark.parametrize("argument", ["tools", "handle_tools"])
def test_names_of_tools_are_a_list(compressor, argument):
    from langchain_pic_rag import PICMiddleware

    with pytest.raises(TypeError, match=rf"{argument} must be a list of names, got 'search'. Write \['search'\]"):
        PICMiddleware(compressor, **{argument: "search"})


def test_each_tool_can_have_a_middleware_of_its_own(calling, compressor):
    from langchain_pic_rag import PICMiddleware

    coarse = compressor.model_copy(update={"ratio": 16})
    first = PICMiddleware(coarse, tools=["news"])
    second = PICMiddleware(compressor, tools=["law"], handle_tools=["news"])
    calls = [{"name": name, "args": {"query": "x"}, "id": name} for name in ("news", "law")]
    answers = [ToolMessage(REPORT, tool_call_id=name, name=name) for name in ("news", "law")]
    agent = agents.create_agent(calling, [search], middleware=[first, second])
    messages = agent.invoke({"messages": [HumanMessage("?"), AIMessage("", tool_calls=calls), *answers]})["messages"]
    memory_tokens = -(-len(REPORT) // 16) - (-len(REPORT) // 4)
    assert messages[-1].usage_metadata["input_token_details"]["memory"] == memory_tokens


def test_the_handles_of_a_retriever_tool_are_trusted_by_name(calling, compressor, base_retriever):
    from langchain_pic_rag import PICMiddleware

    retriever = PICRetriever(base_retriever=base_retriever, base_compressor=compressor)
    searching = create_retriever_tool(retriever, "search", "Search the island.")
    agent = agents.create_agent(
        calling, [searching], middleware=[PICMiddleware(compressor, handle_tools=["search"], min_characters=1)]
    )
    messages = run(agent, "?", "sync")
    (shown,) = [message.text for message in messages if isinstance(message, ToolMessage)]
    assert len(find_handles(shown)) == 4
    assert messages[-1].usage_metadata["input_token_details"]["memory"] > 0


def test_another_model_gets_an_error_or_the_text(compressor, base_retriever, documents, caplog):
    from langchain_pic_rag import PICMiddleware

    call = AIMessage("", tool_calls=[{"name": "search", "args": {"query": "x"}, "id": "1"}])
    retriever = PICRetriever(base_retriever=base_retriever, base_compressor=compressor)
    searching = create_retriever_tool(retriever, "search", "Search the island.")
    model = Recording(responses=[call, AIMessage("done")])
    refusing = agents.create_agent(model, [searching], middleware=[PICMiddleware(compressor)])
    with pytest.raises(ValueError, match="model must read handles"):
        run(refusing, "?", "sync")
    assert "model must read handles" in caplog.text  # a middleware may take the error for an outage, and fall back
    middleware = PICMiddleware(compressor, handle_tools=["search"], fallback="text")
    run(agents.create_agent(model, [searching], middleware=[middleware]), "?", "sync")
    assert documents[0].page_content in model.seen[-1][-1].text
    assert find_handles(model.seen[-1][-1].text) == []


def test_the_middleware_compresses_only_long_text_of_the_named_tools(compressor):
    from langchain_pic_rag import PICMiddleware

    middleware = PICMiddleware(compressor, tools=["search"])
    image = [{"type": "text", "text": REPORT}, {"type": "image_url", "image_url": {"url": "data:"}}]
    messages = [
        ToolMessage(REPORT, tool_call_id="1", name="search"),
        ToolMessage(REPORT, tool_call_id="2", name="other"),
        ToolMessage(image, tool_call_id="3", name="search"),
        HumanMessage(REPORT),
    ]
    assert [middleware._compresses(message) for message in messages] == [True, False, False, False]
    assert compressor.compress_documents([Document(page_content=REPORT)], "")


def test_blocks_of_a_tool_message_are_compressed_as_the_model_would_read_them_uncompressed(calling, compressor):
    from langchain_pic_rag import PICMiddleware

    blocks = [{"type": "text", "text": "12"}, {"type": "text", "text": "5 euros. " * 60}]

    @tool
    def search(query: str) -> list:
        """Search the archive."""
        return blocks

    run(agents.create_agent(calling, [search], middleware=[PICMiddleware(compressor)]), "How much?", "sync")
    assert list(compressor.sources.get([compressor.get_compressor().handle(f"12\n{'5 euros. ' * 60}")]))


@pytest.mark.parametrize("response_format", ["content", "content_and_artifact"])
def test_a_tool_that_writes_around_its_documents_has_to_be_named(calling, compressor, base_retriever, response_format):
    """As the retriever tools of LangChain's documentation do."""
    from langchain_pic_rag import PICMiddleware

    retriever = PICRetriever(base_retriever=base_retriever, base_compressor=compressor)

    @tool(response_format=response_format)
    def search(query: str):
        """Search the island."""
        found = retriever.invoke(query)
        written = "\n\n".join(f"Source: {each.metadata}\nContent: {each.page_content}" for each in found)
        return written if response_format == "content" else (written, found)

    agent = agents.create_agent(calling, [search], middleware=[PICMiddleware(compressor)])
    with pytest.raises(ValueError, match="handle_tools must name each tool .* got one from 'search'"):
        run(agent, "?", "sync")
    named = agents.create_agent(calling, [search], middleware=[PICMiddleware(compressor, handle_tools=["search"])])
    assert run(named, "?", "sync")[-1].usage_metadata["input_token_details"]["memory"] > 0


@pytest.mark.parametrize("way", ["sync", "async"])
def test_documents_in_the_system_message_are_read_or_restored(chat, compressor, base_retriever, documents, way):
    """LangChain's two-step chain: a prompt of every call that retrieves."""
    from langchain.agents.middleware import dynamic_prompt
    from langchain_pic_rag import PICMiddleware

    retriever = PICRetriever(base_retriever=base_retriever, base_compressor=compressor)

    @dynamic_prompt
    def with_documents(request):
        found = retriever.invoke(request.state["messages"][-1].text)
        return "\n\n".join(document.page_content for document in found)

    middleware = [with_documents, PICMiddleware(compressor, fallback="text")]
    messages = run(agents.create_agent(chat, [], middleware=middleware), "Who?", way)
    assert messages[-1].usage_metadata["input_token_details"]["memory"] > 0
    model = Recording(responses=[AIMessage("done")])
    run(agents.create_agent(model, [], middleware=middleware), "Who?", way)
    assert model.seen[-1][0].text == "\n\n".join(document.page_content for document in documents)


def test_a_tool_may_repeat_a_handle_that_it_was_called_with(calling, compressor, documents):
    from langchain_pic_rag import PICMiddleware

    handle = compressor.compress_documents(documents, "q")[0].page_content
    call = AIMessage("", tool_calls=[{"name": "search", "args": {"query": handle}, "id": "1"}])
    answer = ToolMessage(f"Nothing is known of {handle}.", tool_call_id="1", name="search")
    agent = agents.create_agent(calling, [search], middleware=[PICMiddleware(compressor)])
    messages = agent.invoke({"messages": [HumanMessage("?"), call, answer]})["messages"]
    assert messages[-1].usage_metadata["input_token_details"]["memory"] == 0
