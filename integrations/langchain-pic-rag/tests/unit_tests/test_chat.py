"""ChatPIC reads memories in every role, tells what they cost, and resolves no handle but its own."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.storage import LocalFileStore
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.stores import InMemoryByteStore
from langchain_core.tools import create_retriever_tool, tool
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_pic_rag import ChatPIC, PICByteStore, PICCompressor, PICRetriever, escape_input
from langchain_pic_rag.messages import tool_chunk
from langchain_pic_rag.tools import CallWatch, format_calls, parse_calls, tool_instructions

from pic_rag import Generator, SQLiteStore, UnknownHandleError

PROMPT = ChatPromptTemplate.from_messages([("system", "Use this:\n{context}"), ("human", "{input}")])


@pytest.fixture
def handles(compressor, documents):
    return [document.page_content for document in compressor.compress_documents(documents, "q")]


@pytest.fixture
def pic_retriever(compressor, base_retriever):
    return PICRetriever(base_compressor=compressor, base_retriever=base_retriever)


def with_handle(role, handle):
    return {
        "system": [SystemMessage(handle), HumanMessage("?")],
        "human": [HumanMessage(f"{handle} ?")],
        "parts": [HumanMessage([{"type": "text", "text": handle}, {"type": "text", "text": "?"}])],
        "ai": [HumanMessage("?"), AIMessage(handle), HumanMessage("and?")],
        "tool": [
            HumanMessage("?"),
            AIMessage("", tool_calls=[{"name": "search", "args": {"q": "x"}, "id": "1"}]),
            ToolMessage(handle, tool_call_id="1"),
        ],
    }[role]


@pytest.mark.parametrize("role", ["system", "human", "parts", "ai", "tool"])
def test_a_handle_is_read_as_its_memory_in_every_role(chat, handles, documents, role):
    answers = {chat.invoke(with_handle(role, handle)).content for handle in handles}
    assert len(answers) > 1  # another memory, another answer
    message = chat.invoke(with_handle(role, handles[0]))
    text_tokens = len(documents[0].page_content)
    memory_tokens = -(-text_tokens // 4)
    assert message.usage_metadata["input_token_details"]["memory"] == memory_tokens
    assert message.response_metadata["tokens_saved"] == text_tokens - memory_tokens
    assert message.usage_metadata["input_tokens"] == chat.get_num_tokens_from_messages(with_handle(role, handles[0]))


def test_a_handle_counts_as_its_memory_tokens(chat, handles, documents):
    with_text = chat.get_num_tokens("see ") + -(-len(documents[0].page_content) // 4)
    assert chat.get_num_tokens(f"see {handles[0]}") == with_text
    assert len(chat.get_token_ids("see ")) == 4


def test_what_would_not_be_read_counts_as_text(chat, compressor, handles, documents, monkeypatch):
    """Counting is for trimming a conversation, in which a user may have typed anything."""
    computed = compressor.get_compressor().handle(documents[0].page_content)
    assert chat.get_num_tokens(f"{computed}!") >= len(computed)
    memory_tokens = -(-len(documents[0].page_content) // 4)
    both = chat.get_num_tokens_from_messages([HumanMessage(f"{computed}{handles[0]}")])
    assert both == chat.get_num_tokens_from_messages([HumanMessage(computed)]) + memory_tokens
    monkeypatch.setattr("pic_rag.store.signing._today", lambda: 40000)
    assert chat.get_num_tokens(handles[0]) >= len(handles[0])


def test_a_stream_joins_to_the_answer_and_reports_usage_once(chat, handles):
    answer = chat.invoke(handles[0])
    chunks = list(chat.stream(handles[0]))

    async def collect():
        return [chunk async for chunk in chat.astream(handles[0])]

    for parts in (chunks, asyncio.run(collect())):
        assert "".join(part.content for part in parts) == answer.content
        assert [part.usage_metadata for part in parts if part.usage_metadata] == [answer.usage_metadata]
        assert parts[-1].response_metadata["tokens_saved"] == answer.response_metadata["tokens_saved"]


def test_a_consumer_that_leaves_an_async_stream_leaves_the_model_free(chat):
    async def leave():
        async for _ in chat.bind(max_tokens=200).astream("tell me all"):
            break
        return await asyncio.wait_for(chat.ainvoke("short"), timeout=20)

    assert asyncio.run(leave()).content == chat.invoke("short").content


@pytest.mark.parametrize("way", ["ainvoke", "astream", "astream with tools"])
def test_a_cancelled_call_stops_the_model(chat, monkeypatch, way):
    stopped = threading.Event()

    def decode(prompts, completions, sampling):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not stopped.is_set():
            if completions[0].abandoned:
                stopped.set()
            time.sleep(0.01)

    def look(where: str) -> str:
        """Look somewhere."""
        return where

    monkeypatch.setattr(chat.generator._engine, "decode", decode)
    model = chat.bind_tools([look]) if "tools" in way else chat

    async def call():
        return await model.ainvoke("hi") if way == "ainvoke" else [chunk async for chunk in model.astream("hi")]

    async def cancel():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call(), timeout=0.5)

    asyncio.run(cancel())
    assert stopped.wait(10)


def test_32_concurrent_calls_answer_as_one_by_one(chat, compressor, documents, handles):
    prompts = [f"{number}: {handles[number % len(handles)]}" for number in range(32)]
    expected = [chat.invoke(prompt).content for prompt in prompts]

    async def together():
        return await asyncio.wait_for(asyncio.gather(*map(chat.ainvoke, prompts)), timeout=60)

    assert [message.content for message in asyncio.run(together())] == expected
    assert [message.content for message in chat.batch(prompts)] == expected


def test_32_concurrent_chains_compress_and_answer_as_one_by_one(chat, pic_retriever):
    chain = {"context": pic_retriever, "input": RunnablePassthrough()} | PROMPT | chat | StrOutputParser()
    questions = [f"Question {number}?" for number in range(32)]

    async def together():
        return await asyncio.wait_for(asyncio.gather(*map(chain.ainvoke, questions)), timeout=60)

    assert asyncio.run(together()) == [chain.invoke(question) for question in questions]


def test_stop_strings_of_the_call_and_of_the_model_end_the_answer(chat, handles):
    full = chat.invoke(handles[0]).content
    mark = full[5]
    stopped = chat.invoke(handles[0], stop=[mark])
    assert stopped.content == full[: full.index(mark)]
    assert stopped.response_metadata["finish_reason"] == "stop"
    assert chat.model_copy(update={"stop": [mark]}).invoke(handles[0]).content == stopped.content
    assert chat.invoke(handles[0], stop=full[5:8]).content == full[: full.index(full[5:8])]


def test_options_of_a_call_override_those_of_the_model_and_unknown_ones_are_named(chat):
    assert chat.invoke("hi", max_tokens=3).usage_metadata["output_tokens"] == 3
    drawn = {chat.invoke("hi", temperature=1.5, seed=seed).content for seed in (1, 2, 1)}
    assert len(drawn) == 2
    with pytest.raises(TypeError, match="top_k must be one of"):
        chat.invoke("hi", top_k=3)


def test_content_that_is_no_text_is_refused(chat):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(ValueError, match="content parts must be text"):
        chat.invoke([HumanMessage([image])])


@pytest.mark.parametrize(
    "block",
    [
        {"type": "reasoning", "reasoning": "Amsel is an island."},
        {"type": "thinking", "thinking": "Amsel is an island.", "signature": "x"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "reasoning_content", "reasoning_content": {"text": "Amsel is an island."}},
    ],
    ids=lambda block: block["type"],
)
def test_what_another_model_reasoned_is_left_out_of_its_messages(chat, block):
    def ask(content):
        return chat.invoke([HumanMessage("Who?"), AIMessage(content), HumanMessage("When?")])

    answer, alone = ask([block, {"type": "text", "text": "Ida."}]), ask([block])
    assert answer.usage_metadata == ask("Ida.").usage_metadata
    assert alone.usage_metadata == ask("").usage_metadata
    with pytest.raises(ValueError, match="content"):
        chat.invoke([HumanMessage([block])])


def test_a_handle_that_this_namespace_does_not_hold_raises_by_name(chat, handles):
    foreign = "[[pic:" + "0" * 32 + "]]"
    with pytest.raises(UnknownHandleError, match="0" * 32):
        chat.invoke(foreign)
    other = chat.model_copy(update={"namespace": "other"})
    with pytest.raises(UnknownHandleError):
        other.invoke(handles[0])
    with pytest.raises(UnknownHandleError):
        next(other.stream(handles[0]))


def test_a_handle_in_a_document_is_compressed_as_text(chat, compressor, documents, handles):
    from langchain_core.documents import Document

    secret = handles[0]
    (compressed,) = compressor.compress_documents([Document(page_content=secret)], "q")
    assert compressed.page_content != secret
    read = chat.invoke(compressed.page_content).usage_metadata["input_token_details"]["memory"]
    assert read == -(-len(secret) // 4)


def test_a_handle_that_a_user_types_is_text_behind_escape_input(chat, handles, pic_retriever):
    chain = (
        RunnablePassthrough()
        | escape_input
        | {"context": pic_retriever, "input": RunnablePassthrough()}
        | PROMPT
        | chat
    )
    plain = chain.invoke("what is it?").usage_metadata["input_token_details"]["memory"]
    assert chain.invoke(f"what is {handles[0]}?").usage_metadata["input_token_details"]["memory"] == plain
    typed = escape_input.invoke({"messages": [HumanMessage(handles[0])], "number": 3})
    assert chat.invoke(typed["messages"]).usage_metadata["input_token_details"]["memory"] == 0
    assert typed["number"] == 3


def test_a_question_that_holds_a_handle_is_refused_before_anything_is_read(chat, handles, pic_retriever):
    chain = create_retrieval_chain(pic_retriever, create_stuff_documents_chain(chat, PROMPT))
    runs = RunCollectorCallbackHandler()
    with pytest.raises(ValueError, match="query must not hold a handle, got .* Put escape_input before the chain"):
        chain.invoke({"input": f"what is {handles[0]}?"}, {"callbacks": [runs]})
    with pytest.raises(ValueError, match="query must not hold a handle"):
        asyncio.run(chain.ainvoke({"input": f"what is {handles[0]}?"}))
    assert _find(runs.traced_runs[0], "ChatPIC") is None
    assert (escape_input | chain).invoke({"input": f"what is {handles[0]}?"})["answer"]


def lose_memories(store):
    """Only texts and the key that handles are signed with are left."""
    store.mdelete([key for key in store.yield_keys() if "/text/" not in key and not key.endswith("/key")])


def test_a_memory_that_the_store_has_lost_is_made_again_from_the_text_it_keeps(chat, compressor, documents, store):
    expected = {}
    for ratio in (4, 16):
        made = compressor.model_copy(update={"ratio": ratio}).compress_documents(documents[:1], "q")
        expected[made[0].page_content] = chat.invoke(made[0].page_content).content
    lose_memories(store)
    assert {handle: chat.invoke(handle).content for handle in expected} == expected
    store.mdelete([key for key in store.yield_keys() if not key.endswith("/key")])
    with pytest.raises(UnknownHandleError, match=r"nor its text. Compress its document again"):
        chat.invoke(next(iter(expected)))


def test_a_text_of_another_namespace_or_compressor_makes_no_memory(chat, handles, store, other_compressor):
    lose_memories(store)
    for other in ({"namespace": "other"}, {"compressor": other_compressor}):
        with pytest.raises(UnknownHandleError):
            chat.model_copy(update=other).invoke(handles[0])


def test_with_a_list_of_handles_no_other_resolves(chat, handles):
    prompt = f"{handles[0]} {handles[1]} [[pic:{'0' * 32}]]"
    read = chat.invoke(prompt, handles=[handles[1]]).usage_metadata["input_token_details"]["memory"]
    assert read == chat.get_num_tokens(handles[1])
    assert chat.invoke(prompt, handles=[]).usage_metadata["input_token_details"]["memory"] == 0
    for wrong in ("".join(handles), ["an id"], [Document(page_content=handles[0])], [chat.signer.verify(handles[0])]):
        with pytest.raises(ValueError, match="handles must be a list of signed handles"):
            chat.invoke(prompt, handles=wrong)


def test_a_stuff_chain_and_a_retrieval_chain_read_memories(chat, pic_retriever, documents):
    chain = create_retrieval_chain(pic_retriever, create_stuff_documents_chain(chat, PROMPT))
    runs = RunCollectorCallbackHandler()
    result = chain.invoke({"input": "Who built it?"}, {"callbacks": [runs]})
    assert [document.id for document in result["context"]] == [document.id for document in documents]
    assert isinstance(result["answer"], str)
    llm_run = _find(runs.traced_runs[0], "ChatPIC")
    message = llm_run.outputs["generations"][0][0]["message"]
    assert message["kwargs"]["response_metadata"]["tokens_saved"] > 0
    assert message["kwargs"]["usage_metadata"]["input_token_details"]["memory"] > 0


def test_the_handles_of_a_retriever_tool_are_read(chat, pic_retriever):
    search = create_retriever_tool(pic_retriever, "search", "Searches the island.")
    call = {"name": "search", "args": {"query": "lamp"}, "id": "7", "type": "tool_call"}
    answer = chat.invoke([HumanMessage("lamp?"), AIMessage("", tool_calls=[call]), search.invoke(call)])
    assert answer.usage_metadata["input_token_details"]["memory"] > 0


def test_the_llm_cache_answers_again_and_never_for_another_ratio_checkpoint_or_namespace(
    chat, compressor, documents, other_compressor
):
    chat.cache = InMemoryCache()
    handle = compressor.compress_documents(documents, "q")[0].page_content
    first = chat.invoke(handle)
    assert chat.invoke(handle).usage_metadata.get("total_cost") == 0  # LangChain's mark of a cached answer
    coarse = compressor.model_copy(update={"ratio": 16}).compress_documents(documents, "q")[0].page_content
    again = chat.invoke(coarse)
    assert "total_cost" not in again.usage_metadata
    assert again.usage_metadata["input_tokens"] < first.usage_metadata["input_tokens"]

    retrained = chat.model_copy(update={"compressor": other_compressor})
    assert retrained._get_llm_string() != chat._get_llm_string()
    assert "total_cost" not in retrained.invoke("hi").usage_metadata
    with pytest.raises(UnknownHandleError):
        retrained.invoke(handle)
    with pytest.raises(UnknownHandleError):
        chat.model_copy(update={"namespace": "other"}).invoke(handle)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 3},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"seed": 1},
        {"stop": ["x"]},
        {"namespace": "other"},
        {"store": SQLiteStore("elsewhere.sqlite")},
    ],
)
def test_all_that_an_answer_depends_on_is_in_the_key_of_the_llm_cache(chat, change):
    assert chat.model_copy()._get_llm_string() == chat._get_llm_string()
    assert chat.model_copy(update=change)._get_llm_string() != chat._get_llm_string()


def test_a_store_of_files_has_the_same_key_of_the_llm_cache_in_every_process(chat, tmp_path):
    def key(store):
        return chat.model_copy(update={"store": store})._get_llm_string()

    assert key(LocalFileStore(tmp_path)) == key(LocalFileStore(tmp_path)) != key(LocalFileStore(tmp_path / "other"))
    wrapped, same = PICByteStore(LocalFileStore(tmp_path)), PICByteStore(LocalFileStore(tmp_path))
    assert key(wrapped) == key(same)
    assert key(PICByteStore(tmp_path / "a.sqlite")) == key(SQLiteStore(tmp_path / "a.sqlite"))
    stores = [InMemoryByteStore(), InMemoryByteStore()]
    assert len({key(store) for store in stores} | {key(PICByteStore(store)) for store in stores}) == 2


def test_a_compressor_and_a_generator_that_do_not_belong_together_are_refused(tiny_compressor, tiny_generator):
    other = Generator(tiny_generator.model, tiny_generator.tokenizer, name="tiny", generator_positions="spread")
    with pytest.raises(
        ValueError, match="generator must be .*, which the compressor makes memories for, got .*~spread"
    ):
        ChatPIC(compressor=tiny_compressor, generator=other)


def test_tool_calls_are_read_out_of_the_answer_and_written_back():
    use = parse_calls('Well. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><tool_call>{"a"</tool_call>')
    assert use.text == "Well."
    assert (use.calls[0]["name"], use.calls[0]["args"]) == ("add", {"a": 1})
    assert use.invalid[0]["args"] == '<tool_call>{"a"</tool_call>'
    assert parse_calls("no call <tool_call>").text == "no call <tool_call>"
    written = format_calls([{"function": {"name": "add", "arguments": '{"a": 1}'}}])
    assert parse_calls(written).calls[0]["args"] == {"a": 1}


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "look", "arguments": {bad}}',
        '{"name": null, "arguments": {}}',
        '{"name": 5}',
        '{"name": "look", "arguments": [[1, 2]]}',
        '{"name": "look", "arguments": "{bad"}',
        '[{"name": "look"}, 5]',
        '"look"',
    ],
)
def test_a_malformed_call_is_an_invalid_one_in_an_answer_and_in_a_stream(call):
    answer = f"Well. <tool_call>{call}</tool_call>"
    use = parse_calls(answer)
    message = AIMessage(use.text, tool_calls=use.calls, invalid_tool_calls=use.invalid)
    streamed = tool_chunk(answer).message
    for said in (message, streamed, streamed + AIMessageChunk("", chunk_position="last")):
        assert (said.content, said.tool_calls) == ("Well.", [])
        assert [invalid["args"] for invalid in said.invalid_tool_calls] == [f"<tool_call>{call}</tool_call>"]


CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize(
    "answer",
    [
        f"Let me see. \n{CALL}",
        f"{CALL} and {CALL}",
        f"So.\n{CALL}\nAnd more.",
        "a < b <tool",
        "a <tool_call> b",
        " Yes. ",
        "",
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_stream_with_tools_says_what_the_whole_answer_says_and_no_part_of_a_call(answer, size):
    watch = CallWatch(may_call=True)
    shown = [watch.add(answer[start : start + size]) for start in range(0, len(answer), size)]
    rest = parse_calls(watch.rest(answer))
    whole = parse_calls(answer)
    assert "".join(shown) + rest.text == whole.text
    assert [call["args"] for call in rest.calls] == [call["args"] for call in whole.calls]
    assert not any("<tool_call>" in piece for piece in shown)


def test_an_answer_streams_though_tools_are_bound(chat):
    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    async def collect():
        return [part.content async for part in bound.astream("1+1?")]

    bound = chat.bind_tools([add])
    pieces = [part.content for part in bound.stream("1+1?")]
    assert "".join(pieces) == bound.invoke("1+1?").content
    assert sum(map(bool, pieces)) > 1
    assert asyncio.run(collect()) == pieces


def test_arguments_may_be_the_json_of_an_object():
    use = parse_calls('<tool_call>{"name": "look", "arguments": "{\\"x\\": 1}"}</tool_call>')
    assert [(call["name"], call["args"]) for call in use.calls] == [("look", {"x": 1})]


def test_bound_tools_stand_in_the_prompt_in_one_call_and_in_a_stream(chat):
    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    bound = chat.bind_tools([add], tool_choice="any")
    messages = [SystemMessage("Be brief."), HumanMessage("1+1?")]
    read = bound.invoke(messages).usage_metadata["input_tokens"]
    assert read > chat.invoke(messages).usage_metadata["input_tokens"] + len("Add two numbers.")
    assert sum(part.usage_metadata["input_tokens"] for part in bound.stream(messages) if part.usage_metadata) == read


def test_a_structured_answer_that_the_model_does_not_give_is_none(chat):
    schema = {
        "title": "Answer",
        "description": "An answer.",
        "type": "object",
        "properties": {"year": {"type": "integer"}},
    }
    structured = chat.with_structured_output(schema, include_raw=True)
    assert structured.invoke("When?")["parsed"] is None
    assert asyncio.run(structured.ainvoke("When?"))["parsing_error"] is None


def _find(run, name):
    if run.name == name:
        return run
    return next((found for child in run.child_runs if (found := _find(child, name))), None)


def test_a_lost_memory_is_made_again_whatever_the_generator_was_loaded_with(checkpoints, store, documents):
    loading = {"model_name": checkpoints[0], "device": "cpu", "dtype": "float32", "store": store}
    [shown] = PICCompressor(**loading).compress_documents(documents[:1], "Who?")
    chat = ChatPIC(**loading, model_kwargs={"merge_calls": True}, max_tokens=2)
    before = chat.invoke(shown.page_content)
    [kept] = chat.get_memory_cache().keys()
    chat.get_memory_cache().delete([kept])
    assert chat.invoke(shown.page_content).content == before.content


def test_a_damaged_memory_is_made_again_where_its_text_is_kept(chat, compressor, documents, caplog):
    whole, damaged = (document.page_content for document in compressor.compress_documents(documents[:2], "q"))
    before = chat.invoke(f"{whole} {damaged}").content
    _, handle = chat.signer.verify(whole), chat.signer.verify(damaged)
    [key] = [key for key in chat.store.yield_keys() if key.endswith(handle[6:38])][:1]
    chat.store.mset([(key, b"damaged")])
    assert chat.invoke(f"{whole} {damaged}").content == before
    assert "damaged memory is made again" in caplog.text


def test_a_key_for_langchains_cache_loads_no_model(checkpoints, store, monkeypatch):
    monkeypatch.setattr("langchain_pic_rag.chat.shared_generator", None)
    assert ChatPIC(model_name=checkpoints[0], store=store)._get_llm_string()


@pytest.mark.parametrize(
    ("choice", "must"),
    [
        (True, "You must call a function."),
        ("required", "You must call a function."),
        ({"type": "function", "function": {"name": "look"}}, "You must call look."),
        ({"type": "tool", "name": "look"}, "You must call look."),
        ({"type": "any"}, "You must call a function."),
        (False, None),
        ("none", None),
    ],
    ids=str,
)
def test_every_form_of_tool_choice_says_what_it_means(chat, choice, must):
    def look(where: str) -> str:
        """Look somewhere."""
        return where

    bound = chat.bind_tools([look], tool_choice=choice, strict=True, parallel_tool_calls=False)
    instructions = tool_instructions(bound.kwargs["tools"], bound.kwargs["tool_choice"])
    assert instructions.endswith(must or "</tool_call>")
    assert bound.invoke("Where?").usage_metadata["output_tokens"] > 0


def test_no_message_is_an_error_that_says_so(chat):
    with pytest.raises(ValueError, match="messages must hold at least one, got none"):
        chat.invoke([])


def test_text_that_is_not_unicode_is_an_error_that_says_so(chat):
    with pytest.raises(ValueError, match="prompt must be valid Unicode, got a lone surrogate"):
        chat.invoke("What is \ud800?")


def test_no_messages_take_no_tokens(chat):
    """Memories that drop messages until the rest fits may drop all of them."""
    assert chat.get_num_tokens_from_messages([]) == 0
