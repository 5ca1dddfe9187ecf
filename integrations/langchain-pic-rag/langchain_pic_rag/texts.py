"""The text of a message's content, which is a string or a list of parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from langchain_core.messages import BaseMessage

from pic_rag import find_handles

Content = str | list[str | dict[str, Any]]


def map_content(message: BaseMessage, change: Callable[[str], str]) -> Content:
    """The content with every text in it changed; parts that are no text stay."""
    if isinstance(message.content, str):
        return change(message.content)
    return [_map_part(part, change) for part in message.content]


def content_handles(message: BaseMessage) -> list[str]:
    """Handles in the texts of a message, in order, with repeats."""
    handles: list[str] = []

    def collect(text: str) -> str:
        handles.extend(find_handles(text))
        return text

    map_content(message, collect)
    return handles


def _map_part(part: str | dict[str, Any], change: Callable[[str], str]) -> str | dict[str, Any]:
    if isinstance(part, str):
        return change(part)
    return {**part, "text": change(part["text"])} if isinstance(part.get("text"), str) else part
