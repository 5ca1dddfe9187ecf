"""A blocking iterator for the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, TypeVar

Item = TypeVar("Item")

_END: Any = object()


async def iterate_in_thread(items: Generator[Item, None, None]) -> AsyncGenerator[Item, None]:
    """The items of a generator that a thread runs. A consumer that stops asking stops it at its next item."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Item] = asyncio.Queue()
    stopped = threading.Event()

    def send(item: Item) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is listening
            loop.call_soon_threadsafe(queue.put_nowait, item)

    running = asyncio.ensure_future(asyncio.to_thread(_run, items, send, stopped))
    try:
        while (item := await queue.get()) is not _END:
            yield item
        await running  # raises what the model raised
    finally:
        stopped.set()


def _run(items: Generator[Item, None, None], send: Callable[[Item], None], stopped: threading.Event) -> None:
    try:
        with contextlib.closing(items):
            for item in items:
                if stopped.is_set():
                    return
                send(item)
    finally:
        send(_END)
