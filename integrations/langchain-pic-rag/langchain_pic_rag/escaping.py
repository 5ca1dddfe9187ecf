"""escape_input: what users say, with its handles turned into text."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import BaseModel

from langchain_pic_rag.texts import map_content
from pic_rag import escape_handles


def escape(value: Any) -> Any:
    """A text, a prompt, messages or anything made of them, with its handles turned into text.

    Documents stay: theirs are what a retriever found, not what a user said.
    """
    return _escape(value, ())


def _escape(value: Any, within: tuple[int, ...]) -> Any:
    """`within`: ids of what the value is a part of; what holds itself stays as it is there."""
    if isinstance(value, str):
        return escape_handles(value)
    if isinstance(value, (PromptValue, BaseMessage)):
        return _escape_prompt(value)
    if id(value) in within or isinstance(value, Document):
        return value
    part = partial(_escape, within=(*within, id(value)))
    if isinstance(value, dict):
        return {key: part(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = map(part, value)
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, BaseModel):
        return value.model_copy(update=_changes(value, [*type(value).model_fields, *(value.model_extra or ())], part))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        escaped: Any = copy.copy(value)  # `dataclasses.replace` would run its __init__
        for name, field in _changes(value, [field.name for field in dataclasses.fields(value)], part).items():
            object.__setattr__(escaped, name, field)
        return escaped
    return value


def _escape_prompt(value: PromptValue | BaseMessage) -> PromptValue | BaseMessage:
    if isinstance(value, StringPromptValue):
        return StringPromptValue(text=escape_handles(value.text))
    if isinstance(value, PromptValue):
        return ChatPromptValue(messages=escape(value.to_messages()))
    changed: dict[str, Any] = {"content": map_content(value, escape_handles)}
    if isinstance(value, AIMessage):
        changed["tool_calls"] = escape(value.tool_calls)
    return value.model_copy(update=changed)


def _changes(value: object, names: Iterable[str], part: Callable[[Any], Any]) -> dict[str, Any]:
    """The fields that escaping changes."""
    fields = ((name, getattr(value, name)) for name in names if hasattr(value, name))
    return {name: escaped for name, field in fields if (escaped := part(field)) is not field}


escape_input: Runnable[Any, Any] = RunnableLambda(escape, name="escape_input")
"""A step at the entrance of a chain: handles in the user's text, messages, or a dict, model or dataclass of them,
become text.

A handle that nobody handed out is refused without it too. With it the chain answers instead of raising, and one that a
user was shown and copied is text as well."""
