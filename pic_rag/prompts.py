"""The prompt of a retrieval-augmented question, the same for memories and for text. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

INSTRUCTION = "Use the documents to answer the question in a few words."


def rag_messages(question: str, passages: Sequence[str]) -> list[dict[str, str]]:
    """One chat message that shows the passages (handles or texts) and asks the question."""
    documents = "\n\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, 1))
    shown = f"Documents:\n{documents}\n\n" if passages else ""
    instruction = INSTRUCTION if passages else "Answer the question in a few words."
    return [{"role": "user", "content": f"{instruction}\n\n{shown}Question: {question}"}]
