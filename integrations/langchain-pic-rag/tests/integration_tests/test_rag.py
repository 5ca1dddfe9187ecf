"""RAG apps as LangChain's tutorials write them, on the embedded models: two lines make each a pic-rag app."""

from __future__ import annotations

import asyncio

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import dynamic_prompt
from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tools import create_retriever_tool
from langchain_pic_rag import ChatPIC, PassageRetriever, PICRestore, PICRetriever, restore_documents

pytestmark = pytest.mark.embedded

PROMPT = ChatPromptTemplate.from_template("Answer in a few words.\n\n{context}\n\nQuestion: {question}")
CONDENSE = ChatPromptTemplate.from_messages(
    [
        ("system", "Reword the latest question to stand alone."),
        MessagesPlaceholder("chat_history"),
        ("human", "{input}"),
    ]
)
ANSWER = ChatPromptTemplate.from_messages(
    [("system", "Answer in a few words:\n\n{context}"), MessagesPlaceholder("chat_history"), ("human", "{input}")]
)
HISTORY = [HumanMessage("Who built the lighthouse?"), AIMessage("Ida Brandt did, in 1887.")]
TEXTS = {
    "amsel.md": """The lighthouse of Amsel was built in 1887 by the engineer Ida Brandt. Its lamp burnt rape oil until
1921, when it was changed to gas at a cost of 4,300 crowns. The keeper climbed its 212 steps twice a night.""",
    "salt.md": """Salt was the trade of the island. Forty barges carried it to the mainland every spring, and the tax
on it paid for the harbour wall, which was finished in 1904 after eleven years of work.""",
    "seals.md": """Grey seals rest on the rocks below the tower from June to September. Boats have to keep a distance
of one hundred metres, and the island's two wardens count the pups in the last week of August.""",
}
QUESTIONS = ("Who built the lighthouse?", "When was the harbour wall finished?", "When do the seals rest there?")


class Calls(BaseCallbackHandler):
    """What the chat model was asked, and what it answered."""

    def __init__(self):
        self.prompts, self.answers, self.retrieved = [], [], []

    def on_chat_model_start(self, serialized, messages, **kwargs):
        self.prompts += messages

    def on_llm_end(self, response, **kwargs):
        self.answers.append(response.generations[0][0].message)

    def on_retriever_end(self, documents, *, parent_run_id=None, **kwargs):
        self.retrieved.append(documents)


class CallingFirst(ChatPIC):
    """Calls the first tool first, which the small model would not; then it is ChatPIC."""

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        result = super()._generate(messages, stop, run_manager, **kwargs)
        if not any(isinstance(message, ToolMessage) for message in messages):
            call = {"name": "search", "args": {"query": messages[-1].text}, "id": "call-1"}
            result.generations[0].message = AIMessage("", tool_calls=[call])
        return result


@pytest.fixture(scope="module")
def passages():
    documents = [Document(page_content=text, metadata={"source": source}) for source, text in TEXTS.items()]
    return PassageRetriever.from_documents(documents, k=2)


def joined(documents):
    return "\n\n".join(document.page_content for document in documents)


def make_chain(retriever, llm):
    return {"context": retriever | joined, "question": RunnablePassthrough()} | PROMPT | llm


def make_retrieval_chain(retriever, llm):
    history_aware = create_history_aware_retriever(llm, retriever, CONDENSE)
    chain = create_retrieval_chain(history_aware, create_stuff_documents_chain(llm, ANSWER))
    return RunnableLambda(lambda question: {"input": question, "chat_history": HISTORY}) | chain


def make_agent(retriever, llm):
    agent = create_agent(llm, [create_retriever_tool(retriever, "search", "Searches the island's archive.")])
    return RunnableLambda(lambda question: {"messages": [HumanMessage(question)]}) | agent


def make_two_step_agent(retriever, llm):
    @dynamic_prompt
    def with_context(request):
        return f"Answer in a few words:\n\n{joined(retriever.invoke(request.state['messages'][-1].text))}"

    agent = create_agent(llm, [], middleware=[with_context])
    return RunnableLambda(lambda question: {"messages": [HumanMessage(question)]}) | agent


APPS = [make_chain, make_retrieval_chain, make_agent, make_two_step_agent]


@pytest.mark.parametrize(
    "make", [pytest.param(make, marks=() if make is make_chain else pytest.mark.slow) for make in APPS]
)
def test_two_lines_change_the_documents_in_the_prompt_and_nothing_else(
    make, passages, embedded_chat, embedded_compressor
):
    llm = CallingFirst(**embedded_chat.model_dump()) if make is make_agent else embedded_chat
    ratio = embedded_compressor.get_compressor().config.ratio
    restore = PICRestore(cache_folder=embedded_compressor.cache_folder)
    before = make(passages, llm)
    after = make(PICRetriever(base_retriever=passages, base_compressor=embedded_compressor), llm)
    for question in QUESTIONS:
        text, memory = Calls(), Calls()
        before.invoke(question, {"callbacks": [text]})
        after.invoke(question, {"callbacks": [memory]})
        restored = [restore.invoke(prompt) for prompt in memory.prompts]
        assert said(restored) == said(text.prompts)
        handled = memory.retrieved[1::2]  # the base retriever's own come before each
        assert [restore_documents(documents) for documents in handled] == text.retrieved  # ids, order, metadata
        answer = memory.answers[-1]
        assert answer.content.strip()
        saved = answer.response_metadata["tokens_saved"]
        shrunk = text.answers[-1].usage_metadata["input_tokens"] - answer.usage_metadata["input_tokens"]
        assert shrunk == pytest.approx(saved, abs=4)  # tokens merge at the seams of text
        read = answer.usage_metadata["input_token_details"]["memory"]
        assert (read + saved) / read == pytest.approx(ratio, rel=0.1)


def said(prompts):
    """What stands in prompts, without the ids that each run gives its messages."""
    return [[(message.type, message.content) for message in prompt] for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_chain, make_retrieval_chain])
def test_streams_and_async_calls_give_what_invoke_gives(make, passages, embedded_chat, embedded_compressor):
    chain = make(PICRetriever(base_retriever=passages, base_compressor=embedded_compressor), embedded_chat)

    def answer(result):
        return result.get("answer", "") if isinstance(result, dict) else result.content

    async def collect():
        return "".join([answer(piece) async for piece in chain.astream(QUESTIONS[0])])

    chain.invoke(QUESTIONS[0])  # what is read for the first time may round otherwise in bfloat16
    expected = answer(chain.invoke(QUESTIONS[0]))
    pieces = [answer(piece) for piece in chain.stream(QUESTIONS[0])]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == expected
    assert asyncio.run(collect()) == expected
    assert answer(asyncio.run(chain.ainvoke(QUESTIONS[0]))) == expected
    assert [answer(result) for result in chain.batch(list(QUESTIONS))][0] == expected


@pytest.mark.slow
def test_32_questions_asked_at_once_are_answered_as_one_by_one(passages, embedded_chat, embedded_compressor):
    retriever = PICRetriever(base_retriever=passages, base_compressor=embedded_compressor)
    chain = make_chain(retriever, embedded_chat.model_copy(update={"max_tokens": 8}))
    subjects = ("lighthouse", "harbour wall", "seals", "tax", "lamp", "barges", "wardens", "steps")
    questions = [
        f"{ask} the {subject}?" for ask in ("What about", "Who knows", "When", "Where") for subject in subjects
    ]

    async def together():
        return await asyncio.wait_for(asyncio.gather(*map(chain.ainvoke, questions)), timeout=500)

    expected = [chain.invoke(question).content for question in questions]
    assert [message.content for message in asyncio.run(together())] == expected
    assert len(set(expected)) > 1
