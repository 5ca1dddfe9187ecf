"""The command line, `pic-rag`: one module a command.

Standard output holds the result and nothing else; notes, warnings and progress bars go to standard error. Commands
import what they need when they run, so that `pic-rag --help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import pic_rag
from pic_rag.cli import ask, average, bench, compress, demo, evaluate, fetch, inspect, report, serve, study, train
from pic_rag.cli.console import error_line, say, shown_warnings

FAILED, INTERRUPTED = 1, 130  # argparse leaves with 2 for wrong usage


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0 when all went well, 1 for an error of the run, 3 when `compress` left documents out, 130 after
        Ctrl-C.

    Raises:
        SystemExit: code 2 for wrong usage, 0 for `--help` and `--version`.
    """
    args = build_parser().parse_args(argv)
    for name in ("stdout", "stderr"):  # None where the caller has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for the whole process
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):  # an answer is not lost for one letter
            stream.reconfigure(errors="backslashreplace")
    try:
        with shown_warnings(debug=args.debug):
            code = int(args.run(args))
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        say(f"error: {error_line(error)}")
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="pic-rag",
        description="Answer questions from documents that the LLM reads as a few memory tokens each.",
        epilog="Exit codes: 0 done, 1 error of the run, 2 wrong usage, 3 done but for the documents named, "
        "130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"pic-rag {pic_rag.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (fetch, demo, ask, compress, inspect, train, average, evaluate, bench, report, study, serve):
        command.add_parser(commands)
    return parser
