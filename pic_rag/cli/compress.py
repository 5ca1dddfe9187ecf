"""`pic-rag compress`: documents into a store of memories; what is there already is left alone."""

from __future__ import annotations

import argparse
import glob
from pathlib import Path
from typing import TYPE_CHECKING

from pic_rag.cli.console import calm_libraries
from pic_rag.cli.options import (
    Commands,
    add_command,
    add_model_options,
    add_ratio,
    named_path,
    positive,
    progress,
    show_bars,
)

if TYPE_CHECKING:
    from pic_rag.bulk.run import Tally
    from pic_rag.store import ShardStore, SQLiteStore

PARTIAL = 3


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "compress",
        help="compress documents into a store",
        description="Compress each document into one memory, each content once. A run that was interrupted or killed "
        "goes on where it stopped: a memory that the store holds is not made again. Exit code 3 says that all is done "
        "but for the documents named on standard error.",
    )
    parser.add_argument("--docs", nargs="+", required=True, metavar="PATH", help="files, and folders of files")
    parser.add_argument(
        "--out",
        required=True,
        type=named_path,
        metavar="STORE",
        help="a SQLite file when it ends in .sqlite, else a folder of shards",
    )
    parser.add_argument(
        "--split", action="store_true", help="compress the passages that `ask` looks for, not whole documents"
    )
    add_ratio(parser)
    parser.add_argument(
        "--at-rest", choices=("bf16", "int8", "int4"), default="bf16", help="precision of new memories in the store"
    )
    parser.add_argument("--namespace", default="default", help="keeps the memories of different users apart")
    add_model_options(parser)
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this process (default), or a Ray cluster"
    )
    engine.add_argument(
        "--workers", type=positive, metavar="N", help="of ray (default: one a GPU, else one for every 4 CPUs)"
    )
    engine.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a running cluster, or `local` for one of this run's own (default: what Ray finds, else its own)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compress, then say what became of how much."""
    from pic_rag.bulk.run import compress_corpus
    from pic_rag.bulk.worker import Job

    calm_libraries(bars=show_bars(args))
    store = open_store(args.out)
    job = Job(
        store,
        compressor=args.compressor,
        generator=args.generator,
        ratio=args.ratio,
        at_rest=args.at_rest,
        namespace=args.namespace,
        device=args.device,
        dtype=args.dtype,
    )
    tally = compress_corpus(
        args.docs,
        job,
        split=args.split,
        engine=args.engine,
        workers=args.workers,
        ray_address=args.ray_address,
        progress=progress(args),
    )
    if hasattr(store, "close"):
        store.close()
    _print_summary(tally, args)
    return 0 if tally.complete else PARTIAL


def open_store(out: Path) -> SQLiteStore | ShardStore:
    """The store that the name's ending asks for."""
    from pic_rag.store import ShardStore, SQLiteStore

    return SQLiteStore(out) if out.name.endswith(".sqlite") else ShardStore(out)


def _print_summary(tally: Tally, args: argparse.Namespace) -> None:
    texts, rate = tally.texts, tally.text_tokens / max(1, tally.memory_tokens)
    print(f"{'passages ' if args.split else 'documents'}  {texts['compressed']:,} compressed, {texts['known']:,} there "
          f"already, {texts['repeated']:,} repeated, {texts['refused']:,} skipped")  # fmt: skip
    print(f"tokens     {tally.text_tokens:,} of text -> {tally.memory_tokens:,} of memory ({rate:.1f}x)")
    if tally.bytes_a_text is not None:
        print(f"at rest    {tally.bytes_a_text:,.0f} bytes a memory in {args.at_rest}")
    print(f"on disk    {tally.text_bytes:,} bytes of text -> {disk_bytes(args.out):,} bytes in {args.out}")


def disk_bytes(path: Path) -> int:
    """Size of a SQLite file and its log, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path, *path.parent.glob(f"{glob.escape(path.name)}-*")]
    return sum(file.stat().st_size for file in files if file.is_file())
