"""An LLM that reads no memories never gets the handles that were handed out here, whoever passes it the nodes.

LlamaIndex shows its span handlers which LLM is called, but swallows what they raise; its callbacks can stop a call, but
are not told whose. So the span handler here notes the LLM, and puts the callback in that stops it.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span import BaseSpan
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.postprocessor.pic_rag.answering import reads_handles, unwrap

from pic_rag import find_handles

_WATCHED_HANDLES = 200_000  # about 40 MB

_handed_out: OrderedDict[str, None] = OrderedDict()
_lock = threading.Lock()
_called: ContextVar[BaseLLM | None] = ContextVar("pic_rag_called_llm", default=None)


def watch(handles: Iterable[str]) -> None:
    """Let no LLM of this process that reads no memories get one of these, from now on."""
    _listen()
    with _lock:
        for handle in handles:
            _handed_out[handle] = None
            _handed_out.move_to_end(handle)
        while len(_handed_out) > _WATCHED_HANDLES:
            _handed_out.popitem(last=False)


class HandleGuard(BaseCallbackHandler):
    """Stops the call of an LLM that is about to get a watched handle and reads no memories."""

    def __init__(self) -> None:
        super().__init__(event_starts_to_ignore=[], event_ends_to_ignore=[])

    def on_event_start(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str = "",
        parent_id: str = "",
        **kwargs: Any,
    ) -> str:
        """Check what an LLM is about to get.

        Raises:
            RuntimeError: it holds a handle, and the LLM reads none. (Refining synthesizers log a ValueError and go on.)
        """
        llm = _called.get()
        if event_type == CBEventType.LLM and llm is not None and not reads_handles(llm):
            for handle in _watched(payload or {}):
                raise RuntimeError(
                    f"llm must read memories, as PICLLM does, got {type(unwrap(llm)).__name__} with {handle} in its "
                    "prompt. Answer with PICLLM, give the LLM restore_nodes(nodes), or pass it to the postprocessor: "
                    'PICCompressor(llm=..., fallback="text").'
                )
        return event_id

    def on_event_end(
        self, event_type: CBEventType, payload: dict[str, Any] | None = None, event_id: str = "", **kwargs: Any
    ) -> None:
        """Nothing is left to do."""

    def start_trace(self, trace_id: str | None = None) -> None:
        """Traces are of no concern."""

    def end_trace(self, trace_id: str | None = None, trace_map: dict[str, list[str]] | None = None) -> None:
        """Traces are of no concern."""


class _LLMSpans(BaseSpanHandler[BaseSpan]):
    """Notes which LLM is called, and sees to it that its callbacks include the guard."""

    def span_enter(self, id_: str, bound_args: Any, instance: Any = None, *args: Any, **kwargs: Any) -> None:
        """An LLM, or anything else, is about to be called."""
        if isinstance(instance, BaseLLM):
            _called.set(instance)
            handlers = instance.callback_manager.handlers
            if not any(isinstance(handler, HandleGuard) for handler in handlers):
                handlers.append(HandleGuard())

    def span_exit(self, id_: str, bound_args: Any, instance: Any = None, result: Any = None, **kwargs: Any) -> None:
        """Nothing was opened."""

    def span_drop(self, id_: str, bound_args: Any, instance: Any = None, err: Any = None, **kwargs: Any) -> None:
        """Nothing was opened."""

    def new_span(self, *args: Any, **kwargs: Any) -> None:
        """Never called: no span is opened."""

    prepare_to_exit_span = prepare_to_drop_span = new_span


@functools.cache
def _listen() -> None:
    get_dispatcher().add_span_handler(_LLMSpans())


def _watched(payload: dict[str, Any]) -> Iterable[str]:
    texts = [payload.get(EventPayload.PROMPT), *(message.content for message in payload.get(EventPayload.MESSAGES, ()))]
    found = [handle for text in texts if text for handle in find_handles(str(text))]
    with _lock:
        return [handle for handle in found if handle in _handed_out]
