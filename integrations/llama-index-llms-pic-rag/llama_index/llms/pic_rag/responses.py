"""pic-rag's words in LlamaIndex's: messages in, responses and errors out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from collections.abc import Generator as ResponseStream
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    MessageRole,
    TextBlock,
)

if TYPE_CHECKING:
    from pic_rag import Generation

_ROLES = {MessageRole.CHATBOT: "assistant", MessageRole.MODEL: "assistant", MessageRole.DEVELOPER: "system"}


@contextmanager
def as_runtime_errors() -> Iterator[None]:
    """The same words in an error that reaches the user: refining synthesizers swallow ValueError and TypeError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise RuntimeError(str(error)) from error


def as_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages with a role and a text, as chat templates take them.

    Raises:
        ValueError: when a message holds something other than text.
    """
    return [{"role": _ROLES.get(each.role, each.role.value), "content": _text(each)} for each in messages]


def completion(generation: Generation) -> CompletionResponse:
    """A whole answer. `raw` holds the usage, memory tokens included, and why the answer ended."""
    usage = _usage(generation)
    raw = {"usage": usage, "finish_reason": generation.finish_reason}
    return CompletionResponse(text=generation.text, raw=raw, additional_kwargs=usage)


def completions(pieces: ResponseStream[str, None, Generation]) -> ResponseStream[CompletionResponse, None, None]:
    """An answer in pieces; the last response adds no text but the usage."""
    text = ""
    while True:
        try:
            with as_runtime_errors():
                piece = next(pieces)
        except StopIteration as end:
            yield completion(end.value).model_copy(update={"delta": "", "text": text})
            return
        text += piece
        yield CompletionResponse(text=text, delta=piece)


async def acompletions(pieces: AsyncGenerator[str | Generation, None]) -> CompletionResponseAsyncGen:
    """`completions` for coroutines. A consumer that stops asking ends the pieces, and with them the model."""
    text = ""
    with as_runtime_errors():
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, str):
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
                else:
                    yield completion(piece).model_copy(update={"delta": "", "text": text})


def as_chat(response: CompletionResponse) -> ChatResponse:
    """The same answer as an assistant's message."""
    return ChatResponse(
        message=ChatMessage(role=MessageRole.ASSISTANT, content=response.text),
        delta=response.delta,
        raw=response.raw,
        additional_kwargs=response.additional_kwargs,
    )


async def achats(responses: CompletionResponseAsyncGen) -> ChatResponseAsyncGen:
    """The same answers, piece by piece, as an assistant's messages."""
    async with aclosing(responses):
        async for response in responses:
            yield as_chat(response)


def _usage(generation: Generation) -> dict[str, int]:
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "total_tokens": generation.prompt_tokens + generation.completion_tokens,
        "memory_tokens": generation.memory_tokens,
    }


def _text(message: ChatMessage) -> str:
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            raise ValueError(f"messages must hold text, got a {type(block).__name__}. Remove that block.")
    return message.content or ""
