"""LangChain's messages as pic-rag's prompts, and pic-rag's answers as LangChain's messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from langchain_pic_rag.texts import join_texts
from langchain_pic_rag.tools import format_calls, parse_calls, tool_instructions

if TYPE_CHECKING:
    from pic_rag import Generation

_REASONING = ("reasoning", "reasoning_content", "thinking", "redacted_thinking")


def to_prompt(
    messages: Sequence[BaseMessage], tools: Sequence[dict[str, Any]] = (), tool_choice: str | None = None
) -> list[dict[str, Any]]:
    """Messages as pic-rag takes them, tools and tool calls written out as text, what other models reasoned left out."""
    shown = [_without_reasoning(message) for message in messages]
    prompt = [_with_calls(message) for message in convert_to_openai_messages(shown)]
    if tools:
        instructions = tool_instructions(tools, tool_choice)
        if prompt and prompt[0]["role"] == "system":
            instructions = f"{join_texts(prompt.pop(0)['content'])}\n\n{instructions}"
        prompt.insert(0, {"role": "system", "content": instructions})
    return prompt


def _without_reasoning(message: BaseMessage) -> BaseMessage:
    if not isinstance(message, AIMessage) or isinstance(message.content, str):
        return message
    kept = [part for part in message.content if isinstance(part, str) or part.get("type") not in _REASONING]
    return message.model_copy(update={"content": kept})


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.pop("tool_calls", None)
    if not calls:
        return message
    return {**message, "content": "\n".join(filter(None, [join_texts(message.get("content")), format_calls(calls)]))}


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
    # With their tags around them, which are no JSON: LangChain would complete the beginning of a call to one.
    chunks += [
        tool_call_chunk(name=None, args=call["args"], id=call["id"], index=index)
        for index, call in enumerate(use.invalid, len(chunks))
    ]
    return ChatGenerationChunk(message=AIMessageChunk(content=use.text, tool_call_chunks=chunks))
