"""The text of a message's content, which is a string or a list of parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def join_texts(content: str | Sequence[str | Mapping[str, Any]] | None) -> str:
    """The texts of a content, a line each, as the generator reads them; parts that are no text are left out.

    `BaseMessage.text` glues them together: "12" and "5 euros" would be 125 euros.
    """
    if isinstance(content, str):
        return content
    return "\n".join(text for part in content or () if (text := _part_text(part)) is not None)


def _part_text(part: str | Mapping[str, Any]) -> str | None:
    if isinstance(part, str):
        return part
    return part["text"] if part.get("type") == "text" and isinstance(part.get("text"), str) else None


def _map_part(part: str | dict[str, Any], change: Callable[[str], str]) -> str | dict[str, Any]:
    if isinstance(part, str):
        return change(part)
    return {**part, "text": change(part["text"])} if isinstance(part.get("text"), str) else part
