"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pic_rag.cli.console import calm_libraries, status

if TYPE_CHECKING:
    from pic_rag.compression.compressor import Compressor

Commands = Any  # argparse names the type of add_subparsers() with an underscore


def add_command(commands: Commands, name: str, *, help: str, description: str = "") -> argparse.ArgumentParser:
    """A parser with the options every command has."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=description or help)
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no notes")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own warnings")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Where the models are and what they run on."""
    models = parser.add_argument_group("models")
    models.add_argument("--compressor", metavar="NAME", help="folder or hub id (default: the one shipped with pic-rag)")
    models.add_argument("--generator", metavar="NAME", help="folder or hub id (default: where the compressor says)")
    models.add_argument("--device", help="such as cpu, cuda, mps (default: the best there is)")
    models.add_argument("--dtype", help="such as float32, bfloat16 (default: what the device is fast at)")


def add_ratio(parser: argparse.ArgumentParser, *, ranked: bool = False) -> None:
    """How far to compress; where passages are ranked, each rank may have a ratio of its own."""
    ranks = "; 2+16: 2 for the best passage, 16 for the others" if ranked else ""
    parser.add_argument(
        "--ratio",
        type=ratios if ranked else positive,
        metavar="N",
        help=f"text tokens per memory token (default: the compressor's own){ranks}",
    )


def ratios(text: str) -> int | tuple[int, ...]:
    """One ratio, or those of the first, second, ... document between plus signs, for argparse."""
    each = tuple(positive(part) for part in text.split("+"))
    return each if len(each) > 1 else each[0]


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return number


def count(text: str) -> int:
    """A whole number, 0 or more, for argparse."""
    number = _whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 or more, got {text}")
    return number


def names(text: str) -> tuple[str, ...]:
    """Names between commas, one at least, for argparse."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"must name at least one, got {text!r}")
    return found


def minutes(text: str) -> float:
    """A time above zero, for argparse."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return number


def share(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text}")
    return number


def named_path(text: str) -> Path:
    """A path that is not empty, for argparse: an unset variable must not mean the folder one happens to be in."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return Path(text)


def new_file(text: str) -> Path:
    """A file that can be written, for argparse: known before anything is computed for it."""
    path = named_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text!r}")
    new_folder(str(path.parent))
    return path


def new_folder(text: str) -> Path:
    """A folder that can be made and written to, for argparse."""
    path = named_path(text)
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder, got {text!r}, where {str(there)!r} is a file")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be in a folder that can be written to, got {text!r}")
    return path


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def progress(args: argparse.Namespace) -> bool | None:
    """False with --quiet; None lets the library show a bar on a terminal."""
    return False if args.quiet else None


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `PicRag.from_pretrained` and `load`; what was not given is left to them."""
    names = ("compressor", "generator", "device", "dtype")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def load_compressor(args: argparse.Namespace, **options: str) -> Compressor:
    """The compressor of the model options."""
    with status("Loading the compressor", quiet=args.quiet):
        from pic_rag.compression.compressor import Compressor

        calm_libraries(bars=show_bars(args))
        return Compressor.from_pretrained(
            args.compressor,
            generator=getattr(args, "generator", None),
            device=args.device,
            dtype=args.dtype,
            **options,
        )


def show_bars(args: argparse.Namespace) -> bool:
    """Whether a bar would reach somebody."""
    return sys.stderr.isatty() and not args.quiet
