"""`pic-rag compress`: documents into a store of memories; what is there already is left alone."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pic_rag.cli.options import Commands, add_command, add_model_options, add_ratio, load_compressor, progress

if TYPE_CHECKING:
    from pic_rag.compressor import Compressor
    from pic_rag.documents import Document
    from pic_rag.memory import Memory
    from pic_rag.store import MemoryCache, ShardStore, SQLiteStore

logger = logging.getLogger(__name__)

GROUP_DOCUMENTS = 64  # written together: what an interrupted run loses at most


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "compress",
        help="compress documents into a store",
        description="Compress each document into one memory. An interrupted run goes on where it stopped: a memory "
        "that the store holds is not made again.",
    )
    parser.add_argument("--docs", nargs="+", required=True, metavar="PATH", help="files, and folders of files")
    parser.add_argument(
        "--out", required=True, metavar="STORE", help="a SQLite file when it ends in .sqlite, else a folder of shards"
    )
    add_ratio(parser)
    parser.add_argument(
        "--at-rest", choices=("bf16", "int8", "int4"), default="bf16", help="precision of new memories in the store"
    )
    parser.add_argument("--namespace", default="default", help="keeps the memories of different users apart")
    add_model_options(parser)
    parser.set_defaults(run=run)


@dataclass
class Tally:
    """What was done so far."""

    compressed: int = 0
    known: int = 0
    text_tokens: int = 0
    memory_tokens: int = 0

    def count(self, memories: Sequence[Memory], *, known: bool) -> None:
        """Add memories."""
        self.known += len(memories) if known else 0
        self.compressed += 0 if known else len(memories)
        self.text_tokens += sum(memory.text_tokens for memory in memories)
        self.memory_tokens += sum(memory.memory_tokens for memory in memories)


def run(args: argparse.Namespace) -> int:
    """Compress group by group, then say what became of how much."""
    from tqdm import tqdm

    from pic_rag.documents import load_documents
    from pic_rag.store import MemoryCache

    loaded = load_documents(args.docs, progress=progress(args))
    if not loaded.documents:
        raise ValueError("--docs must name at least one document that can be read, got none.")
    compressor = load_compressor(args)
    store = open_store(args.out)
    cache = MemoryCache(store, compressor.fingerprint, namespace=args.namespace, at_rest=args.at_rest)
    documents = {compressor.handle(document.text, args.ratio): document for document in loaded.documents}
    handles = list(documents)
    tally = Tally()
    with tqdm(total=len(handles), desc="compress", unit="document", delay=1, disable=args.quiet or None) as bar:
        for start in range(0, len(handles), GROUP_DOCUMENTS):
            group = handles[start : start + GROUP_DOCUMENTS]
            _compress(cache, compressor, {handle: documents[handle] for handle in group}, args.ratio, tally)
            bar.update(len(group))
    if hasattr(store, "close"):
        store.close()
    _print_summary(tally, documents.values(), args.out)
    return 0


def open_store(out: str) -> SQLiteStore | ShardStore:
    """The store that the name's ending asks for."""
    from pic_rag.store import ShardStore, SQLiteStore

    return SQLiteStore(out) if out.endswith(".sqlite") else ShardStore(out)


def _compress(
    cache: MemoryCache, compressor: Compressor, documents: dict[str, Document], ratio: int | None, tally: Tally
) -> None:
    """Unlike `MemoryCache.get_or_compress`, stop when the store cannot be written: it is all this command is for."""
    found = {handle: _find(cache, handle, document.source) for handle, document in documents.items()}
    tally.count([memory for memory in found.values() if memory is not None], known=True)
    missing = [documents[handle].text for handle, memory in found.items() if memory is None]
    if missing:
        made = compressor.compress(missing, ratio, progress=False)
        cache.put(made)
        tally.count(made, known=False)


def _find(cache: MemoryCache, handle: str, source: str) -> Memory | None:
    from pic_rag.memory import MemoryFormatError

    try:
        return cache.get([handle])[0]
    except MemoryFormatError as error:
        logger.warning("Compressing '%s' again: %s", source, error)
        return None


def _print_summary(tally: Tally, documents: Iterable[Document], out: str) -> None:
    text_bytes = sum(len(document.text.encode("utf-8", "surrogatepass")) for document in documents)
    rate = tally.text_tokens / max(1, tally.memory_tokens)
    print(f"documents  {tally.compressed:,} compressed, {tally.known:,} there already")
    print(f"tokens     {tally.text_tokens:,} of text -> {tally.memory_tokens:,} of memory ({rate:.1f}x)")
    print(f"on disk    {text_bytes:,} bytes of text -> {disk_bytes(Path(out)):,} bytes in {out}")


def disk_bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
