"""A handle that somebody wrote is never read, wherever it stands and however well its text is known."""

from __future__ import annotations

import asyncio
from dataclasses import InitVar, dataclass, field
from typing import NamedTuple

import pytest
from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_pic_rag import PICCompressor, PICRestore, PICRetriever, escape_input, restore_documents
from pydantic import BaseModel, ConfigDict

from pic_rag import UnknownHandleError, escape_handles, find_handles

CONDENSE = ChatPromptTemplate.from_messages([MessagesPlaceholder("chat_history"), ("human", "{input}")])
ANSWER = ChatPromptTemplate.from_messages(
    [("system", "Use this:\n{context}"), MessagesPlaceholder("chat_history"), ("human", "{input}")]
)


@pytest.fixture
def shown(compressor, documents):
    """What a retrieval of today handed out: the memories are in the store."""
    return [document.page_content for document in compressor.compress_documents(documents, "q")]


@pytest.fixture(params=["computed", "unheard of", "forged", "other namespace", "last week"])
def typed(request, shown, compressor, documents, monkeypatch):
    """Everything that an attacker can write, short of what was handed out today or yesterday in this namespace."""
    computed = compressor.get_compressor().handle(documents[0].page_content)
    if request.param == "computed":  # whoever knows the text and the compressor gets this far
        return computed
    if request.param == "unheard of":
        return f"[[pic:{'0' * 32}]]"
    if request.param == "forged":
        return f"{shown[0][:-4]}{'00' if shown[0][-4:-2] != '00' else '11'}]]"
    if request.param == "other namespace":
        return compressor.model_copy(update={"namespace": "mine"}).compress_documents(documents, "q")[0].page_content
    with monkeypatch.context() as week:
        week.setattr("pic_rag.store.signing._today", lambda: 20000)
        return compressor.compress_documents(documents, "q")[0].page_content


def prompts(handle):
    def calling(**arguments):
        return AIMessage("", tool_calls=[{"name": "search", "args": arguments, "id": "1"}])

    return {
        "human": [HumanMessage(f"What is {handle}?")],
        "parts": [HumanMessage([{"type": "text", "text": "What is"}, {"type": "text", "text": handle}])],
        "history": [HumanMessage(f"What is {handle}?"), AIMessage("Who knows."), HumanMessage("And now?")],
        "answer": [HumanMessage("Repeat."), AIMessage(handle), HumanMessage("And now?")],
        "system": [SystemMessage(f"You serve {handle}."), HumanMessage("Hello.")],
        "tool": [HumanMessage("?"), calling(), ToolMessage(handle, tool_call_id="1")],
        "call": [HumanMessage("?"), calling(q=handle), ToolMessage("42", tool_call_id="1")],
    }


@pytest.mark.parametrize("place", prompts(""))
def test_no_message_can_bring_in_a_handle(chat, typed, place):
    messages = prompts(typed)[place]
    for ask in (
        chat.invoke,
        lambda messages: list(chat.stream(messages)),
        lambda messages: asyncio.run(chat.ainvoke(messages)),
    ):
        with pytest.raises(UnknownHandleError, match="handed out today or yesterday"):
            ask(messages)


def test_whether_a_text_is_in_the_store_cannot_be_found_out(chat, compressor, shown, documents):
    def refusal(text):
        handle = compressor.get_compressor().handle(text)
        with pytest.raises(UnknownHandleError) as caught:
            chat.invoke(f"What is {handle}?")
        return str(caught.value).replace(handle, "")

    assert refusal(documents[0].page_content) == refusal("The tower will be sold in May.")


def test_in_a_history_aware_chain_a_handle_typed_now_or_earlier_is_never_read(
    chat, compressor, base_retriever, typed, monkeypatch
):
    retriever = PICRetriever(base_retriever=base_retriever, base_compressor=compressor)
    chain = create_retrieval_chain(
        create_history_aware_retriever(chat, retriever, CONDENSE), create_stuff_documents_chain(chat, ANSWER)
    )
    history = [HumanMessage("Who built it?"), AIMessage("Ida Brandt.")]
    assert chain.invoke({"input": "When?", "chat_history": history})["answer"]
    monkeypatch.setattr(type(chat), "_memories", lambda *_: pytest.fail("read a memory"))
    for hostile in (
        {"input": f"What is {typed}?", "chat_history": history},
        {"input": "When?", "chat_history": [HumanMessage(f"What is {typed}?"), AIMessage("?")]},
    ):
        with pytest.raises(UnknownHandleError):
            chain.invoke(hostile)
    with pytest.raises(ValueError, match="query must not hold a handle"):
        chain.invoke({"input": f"What is {typed}?", "chat_history": []})


def test_in_a_history_aware_chain_even_a_handle_that_the_user_was_shown_gives_no_answer(
    chat, compressor, base_retriever
):
    other = compressor.compress_documents([Document(page_content="The tower will be sold in May.")], "q")[
        0
    ].page_content
    retriever = PICRetriever(base_retriever=base_retriever, base_compressor=compressor)
    chain = create_retrieval_chain(
        create_history_aware_retriever(chat, retriever, CONDENSE), create_stuff_documents_chain(chat, ANSWER)
    )
    history = [HumanMessage("Who built it?"), AIMessage("Ida Brandt.")]
    for hostile in (
        {"input": f"What is {other}?", "chat_history": history},
        {"input": "When?", "chat_history": [HumanMessage(f"What is {other}?"), AIMessage("?")]},
    ):
        with pytest.raises(UnknownHandleError, match="this handle where people write"):
            chain.invoke(hostile)
        with pytest.raises(UnknownHandleError, match="this handle where people write"):
            asyncio.run(chain.ainvoke(hostile))
        assert (escape_input | chain).invoke(hostile)["answer"]


def test_a_handle_in_a_documents_text_is_compressed_as_text(chat, compressor, typed):
    for text in (typed, f"see {typed} there"):
        (compressed,) = compressor.compress_documents([Document(page_content=text)], "q")
        answer = chat.invoke(compressed.page_content)
        assert answer.usage_metadata["input_token_details"]["memory"] == -(-len(text) // 4)
        assert restore_documents([compressed], store=compressor.store)[0].page_content == text
        [shown] = PICRestore(store=compressor.store).invoke([compressed])
        assert shown.page_content == escape_handles(text)


def test_a_question_with_a_handle_retrieves_nothing(compressor, typed):
    class Never(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            raise AssertionError(query)

    retriever = PICRetriever(base_retriever=Never(), base_compressor=compressor)
    with pytest.raises(ValueError, match="query must not hold a handle"):
        retriever.invoke(f"What is {typed}?")
    with pytest.raises(ValueError, match="query must not hold a handle"):
        asyncio.run(retriever.ainvoke(f"What is {typed}?"))


def test_metadata_cannot_pass_a_document_off_as_another(compressor, typed, documents):
    marks = {"pic_ratio": 4, "pic_memory": typed, "pic_text_tokens": 9}
    hostile = Document(page_content=typed, metadata=marks)
    for read in (
        lambda: compressor.compress_documents([hostile], "q"),
        lambda: PICRestore(store=compressor.store).invoke([hostile]),
    ):
        with pytest.raises(UnknownHandleError):
            read()
    own = hostile.model_copy(update={"metadata": {**marks, "pic_source_text": "my own words"}})
    assert restore_documents([own], store=compressor.store)[0].page_content == "my own words"


def test_metadata_printed_into_a_prompt_brings_in_no_handle(chat, compressor, typed):
    (compressed,) = compressor.compress_documents([Document(page_content="text", metadata={"title": typed})], "q")
    with pytest.raises(UnknownHandleError):
        chat.invoke(f"{compressed.metadata['title']}: {compressed.page_content}")


@pytest.mark.parametrize("disguise", [str.upper, lambda handle: handle[:-1], lambda handle: handle.replace("[", "［")])
def test_what_only_looks_like_a_handle_is_text(chat, shown, disguise):
    answer = chat.invoke(f"{disguise(shown[0])} {shown[1]}")
    assert answer.usage_metadata["input_token_details"]["memory"] == chat.get_num_tokens(shown[1])


def test_halves_of_a_handle_in_two_messages_do_not_become_one(chat, shown):
    halves = [HumanMessage(shown[0][:20]), HumanMessage(shown[0][20:])]
    parts = [HumanMessage([{"type": "text", "text": half.content} for half in halves])]
    for messages in (halves, parts):
        with pytest.raises(ValueError, match="handles must be whole"):
            chat.invoke(messages)


def test_a_splitter_behind_the_compressor_is_noticed_before_the_model_makes_something_up(chat, shown):
    chunks = [shown[0][start : start + 50] for start in range(0, len(shown[0]), 50)]
    with pytest.raises(ValueError, match="Compress after text splitters"):
        chat.invoke("\n\n".join(chunks) + "\n\nWho?")


def test_an_application_can_shut_out_even_what_it_showed_to_the_user(chat, shown, compressor, base_retriever):
    """Of a live handle nobody can tell who copied it, unless the application says which are its own, or escapes."""
    prompt = f"{shown[0]} What is {shown[1]}?"
    read = chat.invoke(prompt, handles=[shown[0]]).usage_metadata["input_token_details"]["memory"]
    assert read == chat.get_num_tokens(shown[0])
    retriever = PICRetriever(base_retriever=base_retriever, base_compressor=compressor)
    template = ChatPromptTemplate.from_template("{context} {question}")
    joined = RunnableLambda(lambda documents: "".join(document.page_content for document in documents))
    chain = escape_input | {"context": retriever | joined, "question": RunnablePassthrough()} | template | chat
    plain = chain.invoke("What is it?").usage_metadata["input_token_details"]["memory"]
    assert chain.invoke(f"What is {shown[1]}?").usage_metadata["input_token_details"]["memory"] == plain


def test_the_restored_prompt_of_another_llm_holds_no_handle(compressor, shown, typed):
    restore = PICRestore(store=compressor.store)
    with pytest.raises(UnknownHandleError):
        restore.invoke(f"{shown[0]} {typed}")
    (compressed,) = PICCompressor(compressor=compressor.compressor, store=compressor.store).compress_documents(
        [Document(page_content=f"see {typed}")], "q"
    )
    assert find_handles(restore.invoke(compressed.page_content)) == []


class Pair(NamedTuple):
    question: str
    number: int


class Form(BaseModel):
    model_config = ConfigDict(extra="allow")

    question: str
    earlier: list[Pair] = []


@dataclass(frozen=True)
class Request:
    form: Form
    tokens: InitVar[int]
    earlier: list[str] = field(init=False, default_factory=list)
    within: list[object] = field(init=False, default_factory=list, compare=False)


class Asked(BaseModel):
    question: str
    language: str = "en"


@dataclass
class Kept:
    question: str


def test_escape_input_reaches_into_whatever_holds_what_users_say(shown):
    typed, escaped = shown[0], escape_handles(shown[0])
    assert escape_input.invoke(Pair(typed, 3)) == Pair(escaped, 3)
    form = Form(question=typed, earlier=[Pair(typed, 1)], comment=typed)
    expected = Form(question=escaped, earlier=[Pair(escaped, 1)], comment=escaped)
    assert escape_input.invoke(form) == expected
    request = Request(form, 5)
    request.earlier.append(typed)
    request.within.append(request)  # a tree whose leaves know their parents
    escaped_request = escape_input.invoke({"request": request})["request"]
    assert (escaped_request.form, escaped_request.earlier) == (expected, [escaped])
    assert form.question == typed


def test_escape_input_leaves_documents_and_what_holds_no_handle(compressor, documents):
    compressed = compressor.compress_documents(documents, "q")
    assert escape_input.invoke({"context": compressed, "question": "Who?"})["context"] == compressed
    assert escape_input.invoke(Asked(question="Who?")).model_dump(exclude_unset=True) == {"question": "Who?"}
    kept = Kept("Who?")
    assert escape_input.invoke({"kept": kept})["kept"] == kept
