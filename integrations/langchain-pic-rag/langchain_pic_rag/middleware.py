"""PICMiddleware: what an agent's tools retrieve reaches its model as memories."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Literal

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AnyMessage, ToolMessage

from langchain_pic_rag.compressor import PICCompressor
from langchain_pic_rag.escaping import escape
from langchain_pic_rag.guard import reads_handles
from langchain_pic_rag.restoring import PICRestore
from langchain_pic_rag.texts import content_handles, join_texts, map_content
from pic_rag import HandleSigner, find_handles

logger = logging.getLogger(__name__)


class PICMiddleware(AgentMiddleware):
    """Compresses tool messages just before the model reads them; the agent's state keeps the text.

    Put it last: a middleware behind it that puts in another model, or adds messages, is not seen.

    In messages of users and of the model itself, and in tool messages, handles are text, also signed ones: only
    `handle_tools` are trusted to write them. (A fresh one in another tool's message that nobody has written before is
    an error: that is a retriever tool which was not named.) Theirs stay handles in the state, and this middleware's
    model reads them at any age, so that a conversation can be resumed after days. Another model that is given the
    state, as by a summarising middleware, reads them as long as any handle: today and tomorrow. The system message is
    the application's: handles in it, such as those of documents that a `dynamic_prompt` retrieved, are read as in any
    prompt.

    Args:
        compressor: None: `PICCompressor()`.
        tools: names of the tools whose messages are compressed; None: all but `handle_tools`.
        handle_tools: names of tools that answer with handles already, such as a retriever tool on a `PICRetriever`.
        min_characters: shorter messages are left alone, where compressing saves less than it costs.
        fallback: what a model that cannot read handles gets: an error, or the text.
    """

    def __init__(
        self,
        compressor: PICCompressor | None = None,
        *,
        tools: Sequence[str] | None = None,
        handle_tools: Sequence[str] = (),
        min_characters: int = 500,
        fallback: Literal["error", "text"] = "error",
    ) -> None:
        super().__init__()
        for argument, names in (("tools", tools), ("handle_tools", handle_tools)):
            if isinstance(names, str):
                raise TypeError(f"{argument} must be a list of names, got {names!r}. Write [{names!r}].")
        self.compressor = compressor or PICCompressor()
        self.compressed_tools = None if tools is None else frozenset(tools)
        self.handle_tools = frozenset(handle_tools)
        self.min_characters = min_characters
        self.fallback = fallback

    @property
    def name(self) -> str:
        """Its tools are in it: agents refuse two middlewares of one name."""
        named = "" if self.compressed_tools is None else f"[{', '.join(sorted(self.compressed_tools))}]"
        return f"{type(self).__name__}{named}"

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Compress, then call the model.

        Raises:
            ValueError: the model cannot read handles and `fallback` is "error", or a tool that is not one of
                `handle_tools` answers with handles that nobody has said before.
        """
        return handler(self._prepare(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """`wrap_model_call`, compressing in a thread of its own."""
        return await handler(await asyncio.to_thread(self._prepare, request))

    def _prepare(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        signer = self.compressor.signer
        said = {handle for message in request.messages for handle in _said_handles(message)}
        messages = [self._admit(message, signer, said) for message in request.messages]
        if not reads_handles(request.model):
            return self._as_text(request.override(messages=messages))
        for number, message in enumerate(request.messages):
            if self._compresses(message):  # each alone: the first of several, as `top_n` and ratios by rank have it
                [made] = self.compressor.compress_documents([Document(page_content=join_texts(message.content))], "")
                messages[number] = messages[number].model_copy(update={"content": made.page_content})
        return request.override(messages=messages)

    def _as_text(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        if self.fallback == "error":
            problem = (
                f"model must read handles, as ChatPIC does, got {type(request.model).__name__}. Use ChatPIC, or "
                "PICMiddleware(fallback='text') to give it the original text."
            )
            logger.warning(problem)  # a middleware that falls back to another model takes any error for an outage
            raise ValueError(problem)
        restore = PICRestore(
            store=self.compressor.store,
            namespace=self.compressor.namespace,
            cache_folder=self.compressor.cache_folder,
        )
        return request.override(
            system_message=request.system_message and restore.invoke(request.system_message),
            messages=[
                restore.invoke(message) if self._is_trusted(message) else message for message in request.messages
            ],
        )

    def _admit(self, message: AnyMessage, signer: HandleSigner, said: Collection[str]) -> AnyMessage:
        """The message with the handles that may be read: those of trusted tools, signed anew, and no others.

        A tool may repeat what was `said`; handed out lately and new, a handle is that of a document it retrieved.
        """
        if self._is_trusted(message):
            return message.model_copy(update={"content": map_content(message, lambda text: _renew(text, signer))})
        handles = content_handles(message)
        own = [handle for handle in handles if handle not in said and signer.verify(handle)]
        if isinstance(message, ToolMessage) and own:
            raise ValueError(
                f"handle_tools must name each tool that answers with handles, got one from {message.name!r}: {own[0]}. "
                f"Add {message.name!r} to handle_tools, or give that tool a retriever that does not compress."
            )
        if any(signer.verify(handle, any_age=True) for handle in handles):
            logger.warning(
                "Handles in a message of type %r are text to the model, for a user may have typed them. Documents "
                "belong into the answers of handle_tools, or into the system message, as by a dynamic_prompt.",
                message.type,
            )
        return escape(message)

    def _compresses(self, message: AnyMessage) -> bool:
        if not isinstance(message, ToolMessage) or self._is_trusted(message):
            return False
        named = self.compressed_tools is None or message.name in self.compressed_tools
        return named and len(join_texts(message.content)) >= self.min_characters and _is_text(message)

    def _is_trusted(self, message: AnyMessage) -> bool:
        return isinstance(message, ToolMessage) and message.name in self.handle_tools


def _renew(text: str, signer: HandleSigner) -> str:
    for signed in set(find_handles(text)):
        if handle := signer.verify(signed, any_age=True):
            text = text.replace(signed, signer.sign(handle))
    return text


def _said_handles(message: AnyMessage) -> list[str]:
    """Handles that a user, or the model, has written: also those in the arguments of its calls."""
    if isinstance(message, ToolMessage):
        return []
    calls = message.tool_calls if isinstance(message, AIMessage) else []
    return [*content_handles(message), *find_handles(json.dumps(calls, default=str))]


def _is_text(message: ToolMessage) -> bool:
    """Whether the text is the whole content: an image in it would be lost."""
    return isinstance(message.content, str) or all(
        isinstance(part, str) or part.get("type") == "text" for part in message.content
    )
