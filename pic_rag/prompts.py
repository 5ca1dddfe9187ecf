"""The prompts: of a retrieval-augmented question, the same for memories and text, and of a reconstruction.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Messages = list[dict[str, str]]
"""A chat, as templates take it."""

PromptShape = Callable[[str, Sequence[str]], Messages]
"""The prompt of a question and the passages shown with it, handles or texts."""

INSTRUCTION = "Use the documents to answer the question in a few words."


def repeat_messages(document: str) -> Messages:
    """One chat message that asks for a document (a handle) word for word: compressors are trained and checked on it."""
    return [{"role": "user", "content": f"{document}\n\nRepeat the document word for word."}]


def rag_messages(question: str, passages: Sequence[str]) -> Messages:
    """One chat message that shows the passages (handles or texts) and asks the question."""
    documents = "\n\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, 1))
    shown = f"Documents:\n{documents}\n\n" if passages else ""
    instruction = INSTRUCTION if passages else "Answer the question in a few words."
    return [{"role": "user", "content": f"{instruction}\n\n{shown}Question: {question}"}]


def filled_messages(template: str, question: str, passages: Sequence[str]) -> Messages:
    r"""One chat message as an application's template has it.

    Args:
        template: text with `{context}`, where the passages go, one below the other, and `{question}`.
        question: as asked.
        passages: handles or texts.

    >>> filled_messages("Context: {context} Question: {question}", "Who?", ["She.", "He."])
    [{'role': 'user', 'content': 'Context: She.\n\nHe. Question: Who?'}]
    """
    values = {"context": "\n\n".join(passages), "question": question}
    return [{"role": "user", "content": re.sub(r"\{(context|question)\}", lambda name: values[name[1]], template)}]


def map_texts(content: Any, change: Callable[[str], str]) -> Any:  # noqa: ANN401 - as chat templates take it
    """The content of a message with every text in it changed; parts that are no text, and no content, stay.

    >>> map_texts(["a", {"type": "text", "text": "b"}, {"type": "image"}], str.upper)
    ['A', {'type': 'text', 'text': 'B'}, {'type': 'image'}]
    """
    if isinstance(content, str):
        return change(content)
    if isinstance(content, Mapping):
        return {**content, "text": map_texts(content["text"], change)} if "text" in content else content
    return [map_texts(part, change) for part in content] if isinstance(content, Sequence) else content
