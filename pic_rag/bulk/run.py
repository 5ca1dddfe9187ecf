"""A corpus goes through an engine, and somebody counts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from pic_rag.bulk.corpus import Corpus, Item, Status
from pic_rag.bulk.engines import Engine, start
from pic_rag.bulk.worker import Job
from pic_rag.models.checkpoint import Checkpoint
from pic_rag.progress import progress_bar
from pic_rag.store import MemoryCache

logger = logging.getLogger(__name__)


@dataclass
class Tally:
    """What became of a corpus.

    Attributes:
        texts: how many texts came to which end; see `pic_rag.bulk.corpus.Item`.
        text_bytes: of the texts in UTF-8, each counted once.
        text_tokens: of the texts that have a memory.
        memory_tokens: of their memories.
        stored_bytes: of the memories written now.
    """

    texts: dict[Status, int] = field(default_factory=lambda: {"compressed": 0, "known": 0, "repeated": 0, "refused": 0})
    text_bytes: int = 0
    text_tokens: int = 0
    memory_tokens: int = 0
    stored_bytes: int = 0

    @property
    def complete(self) -> bool:
        """Whether every text has a memory."""
        return not self.texts["refused"]

    @property
    def bytes_a_text(self) -> float | None:
        """Mean size of a memory written now; None when none was."""
        written = self.texts["compressed"]
        return self.stored_bytes / written if written else None

    def count(self, item: Item) -> None:
        """Add an item."""
        self.texts[item.status] += 1
        self.text_bytes += item.text_bytes if item.status in ("compressed", "known") else 0
        self.text_tokens += item.text_tokens
        self.memory_tokens += item.memory_tokens
        self.stored_bytes += item.stored_bytes


def compress_corpus(
    paths: Iterable[str | os.PathLike[str]],
    job: Job,
    *,
    split: bool = False,
    engine: Engine = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    progress: bool | None = None,
) -> Tally:
    """Put the memories of all documents into a store, each content once.

    What the store holds already is left alone, so a run that was interrupted or killed at any moment goes on where it
    stopped. A file that cannot be read, and a text that cannot be compressed, is a warning and costs itself only.

    Args:
        paths: files, and folders of files.
        job: the compressor, its settings and the store.
        split: compress the passages that a `Retriever` cuts, which are what `PicRag.ask` looks for.
        engine: "local" in this process; "ray" on a Ray cluster, whose machines must all see the files and the store.
        workers: of the ray engine; None: one for each GPU, or one for every few CPUs.
        ray_address: of a running cluster; None: the one Ray finds, else one started here for this run.
        progress: True shows a bar, False none; None shows one on a terminal once it takes over a second.

    Raises:
        ImportError: ray is not installed.
        StoreError: the store cannot be read or written.
        ValueError: nothing could be read, or a setting is out of range.
    """
    checkpoint = Checkpoint.load(job.compressor)
    checkpoint.config.check_ratio(job.ratio)
    MemoryCache(job.store, checkpoint.fingerprint, namespace=job.namespace, at_rest=job.at_rest)  # raises, before all
    corpus = Corpus(paths, split=split)
    tally = Tally()
    total, unit = (None, "passage") if split else (len(corpus), "document")
    with progress_bar(progress, total=total, unit=unit, desc="compress") as bar:
        for items in start(engine, corpus, job, workers=workers, ray_address=ray_address):
            for item in items:
                tally.count(item)
                if item.message:
                    logger.warning("%s", item.message)
            bar.update(len(items))
    if not tally.text_bytes:
        raise ValueError("paths must name at least one document that can be read, got none.")
    return tally
