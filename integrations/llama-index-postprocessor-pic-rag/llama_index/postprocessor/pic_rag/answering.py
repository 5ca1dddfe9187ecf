"""Which LLM will read the nodes, whether it reads memories, and what the user said to get them.

LlamaIndex does not tell a postprocessor who reads its nodes. What can be known is looked up in this order: the LLM
given to the postprocessor, the LLM of the query or chat engine that is calling (found on the call stack), and the LLM
set in `Settings`. Nodes that are postprocessed by hand and passed on later may end up anywhere: `guard` watches them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FrameType

from llama_index.core import Settings
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.response_synthesizers.context_only import ContextOnly
from llama_index.core.response_synthesizers.no_text import NoText


class Nobody:
    """Stands for an engine that gives the nodes to no LLM: `response_mode` "no_text" or "context_only"."""


def find_llm() -> BaseLLM | Nobody | None:
    """Who will read the nodes, as far as can be known. Call it in the thread and task that the engine called in."""
    engine = _calling_engine()
    synthesizer = _part(engine, "response_synthesizer", BaseSynthesizer)
    if isinstance(synthesizer, (ContextOnly, NoText)):
        return Nobody()
    llm = _part(synthesizer or engine, "llm", BaseLLM)
    if llm is None:
        llm = Settings._llm  # Settings.llm would load OpenAI's when none is set
    return llm if isinstance(llm, BaseLLM) else None


def user_messages() -> list[str]:
    """What was said to the chat engines that are calling. A query may be a question that an LLM made of it."""
    messages = [frame.f_locals.get("message") for frame, owner in _callers() if isinstance(owner, BaseChatEngine)]
    return [message for message in messages if isinstance(message, str)]


def reads_handles(llm: BaseLLM) -> bool:
    """Whether an LLM can be asked which handles it does not know, which is what makes it read memories."""
    return callable(getattr(unwrap(llm), "unknown_handles", None))


def unwrap(llm: BaseLLM) -> BaseLLM:
    """The LLM inside `as_structured_llm`'s wrapper."""
    return llm.llm if isinstance(llm, StructuredLLM) else llm


def _part(owner: object, name: str, kind: type) -> object | None:
    """What an engine answers with: LlamaIndex's own keep it in a private attribute, custom ones in a public field."""
    parts = (getattr(owner, attribute, None) for attribute in (f"_{name}", name))
    return next((part for part in parts if isinstance(part, kind)), None)


def _calling_engine() -> BaseQueryEngine | BaseChatEngine | None:
    """The innermost engine on the call stack; one that awaits is on it too."""
    return next((owner for _, owner in _callers() if isinstance(owner, (BaseQueryEngine, BaseChatEngine))), None)


def _callers() -> Iterator[tuple[FrameType, object]]:
    """The frames of the call stack, innermost first, with the object whose method each of them runs."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame, frame.f_locals.get("self")
        frame = frame.f_back
