"""What a command shows besides its result: notes, warnings and errors, all on standard error."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_EXPECTED = (ValueError, TypeError, KeyError, OSError, RuntimeError, ImportError)


def say(text: str) -> None:
    """One line on standard error, signed."""
    print(f"pic-rag: {text}", file=sys.stderr)


def error_line(error: BaseException) -> str:
    r"""An error in one line; one that no rule of pic-rag foresees also says its type and how to see more.

    >>> error_line(ValueError("ratio must be\n one of 4, 8, got 5."))
    'ratio must be one of 4, 8, got 5.'
    """
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}."
    text = " ".join(str(error).split())
    if isinstance(error, _EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


@contextmanager
def shown_warnings(*, debug: bool) -> Iterator[None]:
    """Show pic-rag's own warnings, one line each, and with `debug` everybody's; then leave logging as it was."""
    logger = logging.getLogger("pic_rag")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("pic-rag: %(levelname_lower)s: %(message)s"))
    handler.addFilter(_lower_level)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def calm_libraries(*, bars: bool) -> None:
    """Keep libraries' loading bars and advice off the terminal; `bars` leaves those of downloads from the hub."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # a broken file is told of in our own words
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # the hub's too
    (enable_progress_bars if bars else disable_progress_bars)()


@contextmanager
def status(text: str, *, quiet: bool) -> Iterator[None]:
    """Say what takes so long, on a terminal and only while it does."""
    shown = sys.stderr.isatty() and not quiet
    if shown:
        print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _lower_level(record: logging.LogRecord) -> bool:
    record.levelname_lower = record.levelname.lower()
    return True
