"""LangChain's messages as pic-rag's prompts, and pic-rag's answers as LangChain's messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from langchain_pic_rag.texts import map_text
from langchain_pic_rag.tools import format_calls, parse_calls, tool_instructions
from pic_rag import escape_handles, find_handles

if TYPE_CHECKING:
    from pic_rag import Generation


def to_prompt(
    messages: Sequence[BaseMessage], tools: Sequence[dict[str, Any]] = (), tool_choice: str | None = None
) -> list[dict[str, Any]]:
    """Messages as pic-rag takes them, tools and tool calls written out as text."""
    prompt = [_with_calls(message) for message in convert_to_openai_messages(list(messages))]
    if tools:
        instructions = tool_instructions(tools, tool_choice)
        if prompt and prompt[0]["role"] == "system":
            instructions = f"{_text(prompt.pop(0)['content'])}\n\n{instructions}"
        prompt.insert(0, {"role": "system", "content": instructions})
    return prompt


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.pop("tool_calls", None)
    if not calls:
        return message
    return {**message, "content": "\n".join(filter(None, [_text(message.get("content")), format_calls(calls)]))}


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content or [] if part.get("type") == "text")


def map_prompt(prompt: Sequence[dict[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """The prompt with every text in it changed, tools and tool calls included."""
    return [{**message, "content": map_text(message.get("content") or "", change)} for message in prompt]


def prompt_handles(prompt: Sequence[dict[str, Any]]) -> list[str]:
    """Handles of a prompt, in order, with repeats."""
    handles: list[str] = []

    def collect(text: str) -> str:
        handles.extend(find_handles(text))
        return text

    map_prompt(prompt, collect)
    return handles


def only_handles(text: str, allowed: Collection[str]) -> str:
    """The text with every handle that is not allowed turned into text."""
    for handle in set(find_handles(text)).difference(allowed):
        text = text.replace(handle, escape_handles(handle))
    return text


def usage(generation: Generation) -> UsageMetadata:
    """What an answer cost, in LangChain's form."""
    details: Any = {"memory": generation.memory_tokens}  # LangChain allows keys of a provider's own
    return UsageMetadata(
        input_tokens=generation.prompt_tokens,
        output_tokens=generation.completion_tokens,
        total_tokens=generation.prompt_tokens + generation.completion_tokens,
        input_token_details=details,
    )


def tool_chunk(answer: str) -> ChatGenerationChunk:
    """A whole answer as one chunk, its tool calls taken out."""
    use = parse_calls(answer)
    chunks = [
        tool_call_chunk(name=call["name"], args=json.dumps(call["args"]), id=call["id"], index=index)
        for index, call in enumerate(use.calls)
    ]
    return ChatGenerationChunk(message=AIMessageChunk(content=use.text, tool_call_chunks=chunks))
