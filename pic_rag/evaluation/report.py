"""Tables from the JSON that `pic-rag eval` writes, also inside Markdown files, where nobody types a figure.

Standard library only, but for the descriptions of the systems. This file does not know how a figure came about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pic_rag.reporting import markdown_table

_BEGIN = r"<!-- pic-rag report (?P<options>[^\n]+?) -->\n"
_END = "<!-- end of report -->"
_MARKED = re.compile(f"({_BEGIN})(?P<table>.*?)(?:{_END}|(?=<!-- pic-rag report )|\\Z)", re.DOTALL)

JsonRow = Mapping[str, Any]

COLUMNS: dict[str, tuple[str, Callable[[JsonRow], str]]] = {
    "reads": ("the generator reads", lambda row: _reads(row)),
    "system": ("system", lambda row: str(row["system"])),
    "ratio": ("ratio", lambda row: "mixed" if row["ratio"] is None and "min_fidelity" in row else _ratio(row)),
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
    "floor": ("floor", lambda row: _number(row, "min_fidelity", "g")),
    "single_f1": ("single F1", lambda row: percent(row["single_f1"])),
    "fidelity": ("fidelity", lambda row: _number(row, "fidelity_mean", ".2f")),
    "auroc": ("AUROC", lambda row: _number(row, "auroc", ".2f")),
}
"""What a table may show: heading, and how a row of a report says it. From `batch` on they are of `pic-rag bench`, from
`floor` on of `pic-rag eval --floors`."""

DEFAULT_COLUMNS = ("system", "ratio", "f1", "em", "contains", "agreement", "prompt", "text", "seconds")
BENCH_COLUMNS = ("system", "cache", "batch", "context", "ratio", "first", "sooner", "faster")
FLOOR_COLUMNS = ("ratio", "floor", "f1", "single_f1", "contains", "prompt", "fidelity", "auroc")


def report_table(
    report: Mapping[str, Any], columns: Sequence[str] | None = None, rows: Sequence[str] | None = None
) -> str:
    """The rows of a report as a Markdown table.

    Args:
        report: what `pic-rag eval --json` or `pic-rag bench` wrote.
        columns: keys of `COLUMNS`; None: those that tell most of such a report.
        rows: which, in that order: a system, or a system and a ratio as `pic:4`; None: all measured ones, as they come.

    Raises:
        ValueError: when there is no such column or row, or the report does not have it.
    """
    columns = _default_columns(report) if columns is None else columns
    for column in columns:
        if column not in COLUMNS:
            raise ValueError(f"columns must be some of {', '.join(COLUMNS)}, got {column!r}.")
    measured = [row for row in report["rows"] if not row.get("skipped")]
    shown = measured if rows is None else [_find(measured, name) for name in rows]
    return markdown_table(
        [COLUMNS[column][0] for column in columns], [[_cell(row, column) for column in columns] for row in shown]
    )


def _default_columns(report: Mapping[str, Any]) -> Sequence[str]:
    if "compression" in report:
        return BENCH_COLUMNS
    if "auroc_of_parts" in report:
        return FLOOR_COLUMNS
    stored = any(row.get("document_bytes_mean") is not None for row in report["rows"])
    return (*DEFAULT_COLUMNS, "bytes") if stored else DEFAULT_COLUMNS


def _cell(row: JsonRow, column: str) -> str:
    try:
        return COLUMNS[column][1](row)
    except KeyError as error:
        raise ValueError(
            f"columns must be in the report, got {column!r}, whose rows lack {error}. Leave it out."
        ) from error


def refill(markdown: str, render: Callable[[str], str]) -> str:
    """Renew every table that stands between `<!-- pic-rag report OPTIONS -->` and `<!-- end of report -->`.

    Args:
        markdown: the text around them.
        render: the table of some options, as the command line takes them.

    Raises:
        ValueError: when there is no such place, or one does not end.
    """

    def renewed(found: re.Match[str]) -> str:
        if not found[0].endswith(_END):
            raise ValueError(f"{_END} must stand below every table, got none for {found[1].strip()!r}. Put it there.")
        return found[1] + render(found["options"]) + _END

    text, count = _MARKED.subn(renewed, markdown)
    if not count:
        raise ValueError("There must be a line <!-- pic-rag report FILE --> where a table belongs, got none.")
    return text


def read_report(path: str | Path) -> dict[str, Any]:
    """A report as `pic-rag eval --json` or `pic-rag bench` wrote it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds something else.
    """
    rule = "must be a report of `pic-rag eval --json` or `pic-rag bench`"
    remedy = "Name a file that one of them wrote."
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {rule}, got no JSON: {error}. {remedy}") from error
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        raise ValueError(f"{path} {rule}, got JSON without rows. {remedy}")
    return report


def percent(share: float | None) -> str:
    """A share from 0 to 1 in per cent; nothing for None."""
    return "" if share is None else f"{100 * share:.1f}"


def _ratio(row: JsonRow) -> str:
    return _number(row, "ratio", "")


def _number(row: JsonRow, name: str, form: str) -> str:
    return "" if row.get(name) is None else format(row[name], form)


def _reads(row: JsonRow) -> str:
    from pic_rag.evaluation.systems import SYSTEMS

    ratio = row["ratio"]
    return SYSTEMS[row["system"]] + ("" if ratio is None else f", ratio {ratio}")


def _find(rows: Sequence[JsonRow], name: str) -> JsonRow:
    for row in rows:
        if _name(row) == name:
            return row
    known = ", ".join(map(_name, rows))
    raise ValueError(f"rows must be some of {known}, got {name!r}.")


def _name(row: JsonRow) -> str:
    """A system, or a system and a ratio; of a report without systems the ratio alone."""
    return ":".join(str(part) for part in (row.get("system"), row["ratio"]) if part is not None)
