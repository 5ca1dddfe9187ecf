"""A RAG app as LangChain's tutorial writes it, on the embedded models: two lines make it a pic-rag app."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_pic_rag import PassageRetriever, PICRetriever

pytestmark = pytest.mark.embedded

PROMPT = ChatPromptTemplate.from_template("Answer in a few words.\n\n{context}\n\nQuestion: {question}")
TEXTS = {
    "amsel.md": """The lighthouse of Amsel was built in 1887 by the engineer Ida Brandt. Its lamp burnt rape oil until
1921, when it was changed to gas at a cost of 4,300 crowns. The keeper climbed its 212 steps twice a night.""",
    "salt.md": """Salt was the trade of the island. Forty barges carried it to the mainland every spring, and the tax
on it paid for the harbour wall, which was finished in 1904 after eleven years of work.""",
    "seals.md": """Grey seals rest on the rocks below the tower from June to September. Boats have to keep a distance
of one hundred metres, and the island's two wardens count the pups in the last week of August.""",
}
QUESTIONS = ("Who built the lighthouse?", "When was the harbour wall finished?", "When do the seals rest there?")


@pytest.fixture(scope="module")
def passages():
    documents = [Document(page_content=text, metadata={"source": source}) for source, text in TEXTS.items()]
    return PassageRetriever.from_documents(documents, k=2)


def joined(documents):
    return "\n\n".join(document.page_content for document in documents)


def make_chain(retriever, llm):
    return {"context": retriever | joined, "question": RunnablePassthrough()} | PROMPT | llm


def test_two_lines_change_and_the_prompt_shrinks_by_the_ratio(passages, embedded_chat, embedded_compressor):
    before = make_chain(passages, embedded_chat)
    retriever = PICRetriever(base_retriever=passages, base_compressor=embedded_compressor)
    after = make_chain(retriever, embedded_chat)
    for question in QUESTIONS:
        text, memory = before.invoke(question), after.invoke(question)
        saved = text.usage_metadata["input_tokens"] - memory.usage_metadata["input_tokens"]
        assert memory.content.strip()
        assert saved == pytest.approx(memory.response_metadata["tokens_saved"], abs=4)  # tokens merged at the seams
        read = memory.usage_metadata["input_token_details"]["memory"]
        ratio = embedded_compressor.get_compressor().config.ratio
        assert (read + saved) / read == pytest.approx(ratio, rel=0.1)
        sources = [document.metadata["source"] for document in retriever.invoke(question)]
        assert sources == [document.metadata["source"] for document in passages.invoke(question)]


@pytest.mark.slow
def test_32_questions_asked_at_once_are_answered_as_one_by_one(passages, embedded_chat, embedded_compressor):
    retriever = PICRetriever(base_retriever=passages, base_compressor=embedded_compressor)
    chain = make_chain(retriever, embedded_chat.bind(max_tokens=4))
    subjects = ("lighthouse", "harbour wall", "seals", "tax", "lamp", "barges", "wardens", "steps")
    questions = [
        f"{ask} the {subject}?" for ask in ("What about", "Who knows", "When", "Where") for subject in subjects
    ]

    async def together():
        return await asyncio.wait_for(asyncio.gather(*map(chain.ainvoke, questions)), timeout=500)

    expected = [chain.invoke(question).content for question in questions]
    assert [message.content for message in asyncio.run(together())] == expected
    assert len(set(expected)) > 1
