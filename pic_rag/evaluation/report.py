"""Tables from the JSON that `pic-rag eval` writes, also inside Markdown files, where nobody types a figure.

Standard library only, but for the descriptions of the systems. This file does not know how a figure came about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_MARKED = re.compile(r"(<!-- pic-rag report (?P<options>[^\n]+?) -->\n).*?(?=<!-- end of report -->)", re.DOTALL)

Row = Mapping[str, Any]

COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "reads": ("the generator reads", lambda row: _reads(row)),
    "system": ("system", lambda row: str(row["system"])),
    "ratio": ("ratio", lambda row: _number(row, "ratio", "")),
    "n": ("questions", lambda row: _number(row, "n", "")),
    "f1": ("F1", lambda row: percent(row["f1"])),
    "em": ("EM", lambda row: percent(row["em"])),
    "contains": ("answer contained", lambda row: percent(row["contains_answer"])),
    "agreement": ("agreement", lambda row: percent(row["agreement"])),
    "reader_agreement": ("agreement, read with the reader", lambda row: percent(row["reader_agreement"])),
    "prompt": ("prompt tokens", lambda row: _number(row, "prompt_tokens_mean", ".0f")),
    "text": ("text tokens", lambda row: _number(row, "text_tokens_mean", ".0f")),
    "too_long": ("too long", lambda row: _number(row, "too_long", "")),
    "bytes": ("bytes a document", lambda row: _number(row, "document_bytes_mean", ",.0f")),
    "seconds": ("seconds", lambda row: _number(row, "seconds", ".1f")),
    "batch": ("questions at once", lambda row: _number(row, "batch_size", "")),
    "context": ("context tokens", lambda row: _number(row, "context_tokens", ",d")),
    "cache": ("memories", lambda row: row.get("cache") or ""),
    "first": ("first token, seconds", lambda row: _number(row, "first_token_s", ".2f")),
    "sooner": ("first token sooner", lambda row: _number(row, "first_token_sooner", ".2f")),
    "faster": ("whole answer faster", lambda row: _number(row, "faster", ".2f")),
}
"""What a table may show: heading, and how a row of a report says it. From `batch` on they are of `pic-rag bench`."""

DEFAULT_COLUMNS = ("system", "ratio", "f1", "em", "contains", "agreement", "prompt", "text", "seconds")


def report_table(
    report: Mapping[str, Any], columns: Sequence[str] = DEFAULT_COLUMNS, rows: Sequence[str] | None = None
) -> str:
    """The rows of a report as a Markdown table.

    Args:
        report: what `pic-rag eval --json` wrote.
        columns: keys of `COLUMNS`.
        rows: which, in that order: a system, or a system and a ratio as `pic:4`; None: all measured ones, as they come.

    Raises:
        ValueError: when there is no such column or row.
    """
    for column in columns:
        if column not in COLUMNS:
            raise ValueError(f"columns must be some of {', '.join(COLUMNS)}, got {column!r}.")
    measured = [row for row in report["rows"] if not row.get("skipped")]
    shown = measured if rows is None else [_find(measured, name) for name in rows]
    return markdown_table(
        [COLUMNS[column][0] for column in columns], [[COLUMNS[column][1](row) for column in columns] for row in shown]
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Markdown, columns aligned: the first to the left, the others to the right.

    >>> print(markdown_table(["system", "F1"], [["text", "54.4"], ["none", "7.4"]]), end="")
    | system |   F1 |
    | ------ | ---: |
    | text   | 54.4 |
    | none   |  7.4 |
    """
    widths = [max(4, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |\n"

    return "".join(map(line, [header, rule, *rows]))


def refill(markdown: str, render: Callable[[str], str]) -> str:
    """Renew every table that stands between `<!-- pic-rag report OPTIONS -->` and `<!-- end of report -->`.

    Args:
        markdown: the text around them.
        render: the table of some options, as the command line takes them.
    """
    return _MARKED.sub(lambda found: found[1] + render(found["options"]), markdown)


def read_report(path: str | Path) -> dict[str, Any]:
    """A report as `pic-rag eval --json` or `pic-rag bench` wrote it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds something else.
    """
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        raise ValueError(f"{path} must be a report of `pic-rag eval --json`, got JSON without rows.")
    return report


def percent(share: float | None) -> str:
    """A share from 0 to 1 in per cent; nothing for None."""
    return "" if share is None else f"{100 * share:.1f}"


def _number(row: Row, name: str, form: str) -> str:
    return "" if row.get(name) is None else format(row[name], form)


def _reads(row: Row) -> str:
    from pic_rag.evaluation.systems import SYSTEMS

    ratio = row["ratio"]
    return SYSTEMS[row["system"]] + ("" if ratio is None else f", ratio {ratio}")


def _find(rows: Sequence[Row], name: str) -> Row:
    system, _, ratio = name.partition(":")
    for row in rows:
        if row["system"] == system and str(row["ratio"] or "") == ratio:
            return row
    known = ", ".join(f"{row['system']}:{row['ratio']}" if row["ratio"] else row["system"] for row in rows)
    raise ValueError(f"rows must be some of {known}, got {name!r}.")
