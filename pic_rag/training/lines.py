"""Files of lines, a JSON object each: begun, added to, read back. Standard library only.

A last line that was cut while it was written is as if it had not been.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; none where there is no file.

    Raises:
        ValueError: when a line before the last one is no JSON object; the message names file and line.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(_read_object(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path} must hold a JSON object in every line, got line {number}: {error}. Restore or delete it."
                ) from error
    return objects


def begin_lines(path: Path, head: Mapping[str, Any], step: int) -> None:
    """Start a file of lines at a step: lines of later steps, from a run that was killed, are dropped."""
    if step > 0 and not path.exists():
        logger.warning("%s is gone and begins anew: it will not tell of the steps up to %d", path, step)
    write_lines(path, head, *(line for line in read_lines(path)[1:] if line.get("step", 0) <= step))


def write_lines(path: Path, *lines: Mapping[str, Any]) -> None:
    """Write a file of lines; it appears whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(_text(lines), encoding="utf-8")
    part.replace(path)


def append_lines(path: Path, *lines: Mapping[str, Any]) -> None:
    """Add JSON objects to a file of lines, in one go."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_text(lines))


def _text(lines: tuple[Mapping[str, Any], ...]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _read_object(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value
