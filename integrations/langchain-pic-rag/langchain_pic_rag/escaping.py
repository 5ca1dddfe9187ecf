"""escape_input: what users say, with its handles turned into text."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue
from langchain_core.runnables import Runnable, RunnableLambda

from langchain_pic_rag.texts import map_content
from pic_rag import escape_handles


def escape(value: Any) -> Any:
    """A text, a prompt, messages or anything made of them, with its handles turned into text."""
    if isinstance(value, str):
        return escape_handles(value)
    if isinstance(value, StringPromptValue):
        return StringPromptValue(text=escape_handles(value.text))
    if isinstance(value, PromptValue):
        return ChatPromptValue(messages=escape(value.to_messages()))
    if isinstance(value, BaseMessage):
        changed = {"content": map_content(value, escape_handles)}
        if isinstance(value, AIMessage):
            changed["tool_calls"] = escape(value.tool_calls)
        return value.model_copy(update=changed)
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(escape(item) for item in value)
    return value


escape_input: Runnable[Any, Any] = RunnableLambda(escape, name="escape_input")
"""A step at the entrance of a chain: handles in the user's text, messages or dict of them become text.

A handle that nobody handed out is refused without it too. With it the chain answers instead of raising, and one that a
user was shown and copied is text as well."""
