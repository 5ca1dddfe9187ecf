"""The doing of it: a group of texts is compressed and put into the store, on whatever machine this runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pic_rag.bulk.corpus import Item
from pic_rag.compression.compressor import Compressor
from pic_rag.memory import AtRest, Memory
from pic_rag.store import MemoryCache, MemoryStore


@dataclass(frozen=True)
class Job:
    """How texts become memories, and where these go: all that a worker needs, and small enough to be sent to one.

    Attributes:
        store: where memories go; one that can be pickled, as both of pic-rag's can.
        compressor: folder or hub id; None: the one shipped with pic-rag.
        generator: where the compressor's generator is, when not where its checkpoint says.
        ratio: text tokens per memory token; None for the compressor's own.
        at_rest: precision of new memories in the store.
        namespace: of the memories in the store.
        device: None picks cuda, mps or cpu.
        dtype: None picks the device's fast one.
    """

    store: MemoryStore
    compressor: str | None = None
    generator: str | None = None
    ratio: int | None = None
    at_rest: AtRest = "bf16"
    namespace: str = "default"
    device: str | None = None
    dtype: str | None = None


class Worker:
    """Compresses groups of items; the compressor is loaded once."""

    def __init__(self, job: Job) -> None:
        self.ratio = job.ratio
        self.compressor = Compressor.from_pretrained(
            job.compressor, generator=job.generator, device=job.device, dtype=job.dtype
        )
        self.cache = MemoryCache(job.store, self.compressor.fingerprint, namespace=job.namespace, at_rest=job.at_rest)

    def __call__(self, items: Sequence[Item]) -> list[Item]:
        """What became of the items; those that are not pending pass through.

        All new memories of a group are written in one go: a killed worker leaves all of them or none. A text that the
        compressor refuses, or whose memory the store does, costs itself only.

        Raises:
            StoreError: the store cannot be read or written.
        """
        looked_up = self._look_up(items)
        missing = [item for item in looked_up if item.status == "pending"]
        made = iter(self._compress(missing))
        return [next(made) if item.status == "pending" else item for item in looked_up]

    def _look_up(self, items: Sequence[Item]) -> list[Item]:
        """The items; a pending one is known if the store holds a whole memory of it."""
        handles = [self.compressor.handle(item.text, self.ratio) if item.status == "pending" else "" for item in items]
        memories, damaged = self.cache.find(filter(None, handles))
        seen = list(items)
        for number, handle in enumerate(handles):
            if handle in memories:
                seen[number] = _done(items[number], memories[handle], status="known")
            elif handle in damaged:
                message = f"Compressing '{items[number].source}' again: {damaged[handle]}"
                seen[number] = replace(items[number], message=message)
        return seen

    def _compress(self, items: list[Item]) -> list[Item]:
        if not items:
            return []
        try:
            memories = self.compressor.compress([item.text for item in items], self.ratio, progress=False)
            sizes = self.cache.put(memories)
        except ValueError as error:  # one text is at fault: find out which, and keep the others
            if len(items) == 1:
                message = f"Skipped: '{items[0].source}': {error}"
                return [replace(items[0], text="", status="refused", message=message)]
            middle = len(items) // 2
            return self._compress(items[:middle]) + self._compress(items[middle:])
        return [
            replace(_done(item, memory, status="compressed"), stored_bytes=size)
            for item, memory, size in zip(items, memories, sizes, strict=True)
        ]


def _done(item: Item, memory: Memory, *, status: Literal["compressed", "known"]) -> Item:
    return replace(item, text="", status=status, text_tokens=memory.text_tokens, memory_tokens=memory.memory_tokens)
