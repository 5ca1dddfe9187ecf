"""Threads in which coroutines wait for a model."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_MOST_THREADS = 256  # more calls than any batch has prompts; what is beyond waits without a thread


class WaitingThreads:
    """Threads of an engine for calls that mostly wait for their turn.

    The event loop's own are few (`min(32, cores + 4)`) and serve everything else, name lookups included: calls that
    wait there would stop that, and could not share a batch either.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="pic-rag-wait")

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 - any function's
        """Call a function in one of the threads, as `asyncio.to_thread` does."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._executor, context.run, function, *args)
