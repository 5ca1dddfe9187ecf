"""What every report needs: versions, a JSON file, a Markdown table, a figure (by matplotlib, the extra `plot`)."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pic_rag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "sentence-transformers")


def versions() -> dict[str, str]:
    """Of pic-rag, Python and the packages that figures depend on, and the name of the GPU, or else of the processor."""
    from importlib.metadata import version

    from torch import cuda

    device = cuda.get_device_name() if cuda.is_available() else cpu_name()
    own = {"pic_rag": pic_rag.__version__, "python": platform.python_version(), "device": device}
    return own | {name: version(name) for name in _PACKAGES}


def cpu_name() -> str:
    """Of the processor, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write a report; its folder is made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    Raises:
        ImportError: without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=140, layout="constrained")


def require_matplotlib() -> None:
    """Before anything is computed for pictures.

    Raises:
        ImportError: when it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install 'pic-rag[plot]', or '.[plot]' in a checkout."
        ) from error
