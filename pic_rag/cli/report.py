"""`pic-rag report`: the table of an evaluation, printed or put into Markdown files."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import NoReturn

from pic_rag.cli.options import Commands, add_command, names
from pic_rag.evaluation.report import COLUMNS, read_report, refill, report_table


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "report",
        help="the table of an evaluation",
        description="Print the rows of a report as a Markdown table; or with --update renew the tables of Markdown "
        "files, which stand between <!-- pic-rag report FILE [options] --> and <!-- end of report -->, FILE as seen "
        "from the Markdown file.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "report", nargs="?", metavar="FILE", help="what `pic-rag eval --json` wrote, or report.json of `pic-rag bench`"
    )
    what.add_argument("--update", nargs="+", metavar="MARKDOWN", help="Markdown files whose tables are renewed")
    _add_options(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Print, or renew."""
    if args.report is not None:
        print(report_table(read_report(args.report), args.columns, args.rows), end="")
        return 0
    if args.columns or args.rows:
        args.usage_error("--update reads --columns and --rows above each table: leave them out")
    for path in map(Path, args.update):
        text = updated(path)
        ends = "\r\n" if b"\r\n" in path.read_bytes() else "\n"
        path.write_text(text, encoding="utf-8", newline=ends)
        print(path)
    return 0


def updated(path: Path) -> str:
    """A Markdown file's text with its tables as their reports have them now."""
    marker = _Marker(add_help=False)
    marker.add_argument("report", metavar="FILE")
    _add_options(marker)

    def render(options: str) -> str:
        args = marker.read(options)
        return report_table(read_report(path.parent / args.report), args.columns, args.rows)

    try:
        return refill(path.read_text(encoding="utf-8"), render)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Marker(argparse.ArgumentParser):
    """Reads what stands above a table; it is no command, so what is wrong there is an error and no usage."""

    def read(self, options: str) -> argparse.Namespace:
        """Parse the options of a marker; ValueError quotes those that are wrong."""
        try:
            return self.parse_args(shlex.split(options))
        except ValueError as error:
            raise ValueError(
                f"A table's marker must hold FILE, --columns and --rows, got {options!r}: {error}. Correct it."
            ) from error

    def error(self, message: str) -> NoReturn:
        """In place of leaving with the usage of a command."""
        raise ValueError(message)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--columns",
        type=names,
        metavar="A,B",
        help=f"of {', '.join(COLUMNS)} (default: those that tell most of such a report)",
    )
    parser.add_argument("--rows", type=names, metavar="A,B", help="such as text,pic:4 (default: all)")
