"""Guards: an LLM that cannot read handles never gets them."""

from __future__ import annotations

import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableParallel, RunnableSequence, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import RunnableConfigurableAlternatives, RunnableConfigurableFields
from langchain_core.tracers.context import register_configure_hook

from langchain_pic_rag.texts import content_handles
from pic_rag import find_handles

LLM_TYPE = "chat-pic-rag"
"""`ChatPIC._llm_type`: how a callback knows the model."""

_WATCHED_HANDLES = 200_000  # about 40 MB


def reads_handles(llm: object) -> bool:
    """Whether an LLM, or a chain that ends in one, can be given handles.

    True for `ChatPIC`, also behind `bind`, `with_retry`, `with_config`, `configurable_fields`, `with_fallbacks` and
    `configurable_alternatives` (all of them must), and for a sequence with `PICRestore` or `ChatPIC` before any other
    LLM; a parallel step must do so in every branch that has one. Another class says so with `reads_handles:
    ClassVar[bool] = True`; the guard finds it only at the top of its module. What stands behind a lambda cannot be
    seen: that is False.
    """
    return _reads(llm) is True


def _reads(step: object) -> bool | None:
    """Whether what comes into a step may hold handles: None where no LLM is in it."""
    if isinstance(step, RunnableBindingBase):
        return _reads(step.bound)
    if isinstance(step, RunnableSequence):
        return next((kind for kind in map(_reads, step.steps) if kind is not None), None)
    if isinstance(step, RunnableConfigurableFields):
        return _reads(step.default)
    if isinstance(step, RunnableWithFallbacks):
        return _all_read(step.runnables)
    if isinstance(step, RunnableConfigurableAlternatives):
        return _all_read([step.default, *step.alternatives.values()])
    if isinstance(step, RunnableParallel):
        kinds = {_reads(part) for part in step.steps__.values()} - {None}
        return all(kinds) if kinds else None
    if getattr(step, "reads_handles", False) is True:
        return True
    field = getattr(step, "model_fields", {}).get("reads_handles")  # of a class that declares it without ClassVar
    if field is not None and isinstance(step, type):
        return field.default is True
    return False if isinstance(step, BaseLanguageModel) else None


def _all_read(options: Iterable[object]) -> bool | None:
    """As `_reads`, of steps of which any one may run."""
    kinds = set(map(_reads, options))
    return next(iter(kinds)) if len(kinds) == 1 else False


class HandleGuard(BaseCallbackHandler):
    """Stops a run in which an LLM that cannot read handles is about to get some.

    A callback sees every prompt just before its LLM does, so this works for any chain or agent. One watches over the
    handles that `PICCompressor` hands out in this process, from the first one on. Where documents were compressed in
    another process, pass one: `chain.invoke(question, {"callbacks": [HandleGuard()]})` stops any handle.
    """

    raise_error = True
    run_inline = True
    ignore_chain = ignore_agent = ignore_retriever = ignore_retry = ignore_custom_event = True

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        **kwargs: Any,
    ) -> None:
        """Check the messages for a chat model.

        Raises:
            ValueError: they hold a handle, and the model reads none.
        """
        if (kwargs.get("invocation_params") or {}).get("_type") == LLM_TYPE:
            return
        handles = [handle for batch in messages for message in batch for handle in content_handles(message)]
        self._check(handles, serialized)

    def on_llm_start(self, serialized: dict[str, Any], prompts: list[str], **kwargs: Any) -> None:
        """Check the prompts of a completion model.

        Raises:
            ValueError: they hold a handle, and the model reads none.
        """
        self._check([handle for prompt in prompts for handle in find_handles(prompt)], serialized)

    def _check(self, handles: Sequence[str], serialized: dict[str, Any] | None) -> None:
        handle = next(filter(self._concerns, handles), None)
        *package, name = (serialized or {}).get("id") or ["this LLM"]
        kind = getattr(sys.modules.get(".".join(package)), name, None)
        if handle is not None and not reads_handles(kind):
            raise ValueError(
                f"llm must read handles, as ChatPIC does, got {name} with {handle} in its prompt. Use ChatPIC, put "
                "PICRestore() before the LLM, or pass llm= and fallback='text' to the compressor; in an agent, put "
                "PICMiddleware last and let it compress what tools retrieve as text."
            )

    def _concerns(self, handle: str) -> bool:
        return True


class _Watch(HandleGuard):
    """Concerned with what was handed out here lately, so that no text that somebody types can stop another chain."""

    def __init__(self) -> None:
        super().__init__()
        self._handed_out: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, handles: Iterable[str]) -> None:
        with self._lock:
            for handle in handles:
                self._handed_out[handle] = None
                self._handed_out.move_to_end(handle)
            while len(self._handed_out) > _WATCHED_HANDLES:
                self._handed_out.popitem(last=False)

    def _concerns(self, handle: str) -> bool:
        with self._lock:
            return handle in self._handed_out


def watch(handles: Iterable[str]) -> None:
    """Let no LLM of this process that cannot read handles get one of these."""
    _watcher().add(handles)


@functools.cache
def _watcher() -> _Watch:
    watcher = _Watch()
    register_configure_hook(ContextVar("langchain_pic_rag_watch", default=watcher), inheritable=True)
    return watcher
