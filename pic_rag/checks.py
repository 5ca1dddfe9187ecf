"""What values from outside have to be: whole numbers, valid Unicode. Standard library only."""

from __future__ import annotations

from operator import index
from typing import Any


def as_whole(value: Any) -> int | None:  # noqa: ANN401 - whatever the user gave
    """The value as an int where it is a whole number, NumPy's and others' included; None where it is not.

    >>> as_whole(4), as_whole("4"), as_whole(4.0), as_whole(True)
    (4, None, None, None)
    """
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def check_whole(name: str, value: Any, least: int = 1) -> int:  # noqa: ANN401 - whatever the user gave
    """The value as an int.

    Raises:
        ValueError: when it is no whole number, or less than that.
    """
    number = as_whole(value)
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}.")
    return number


def check_unicode(what: str, text: str) -> None:
    """Tokenizers take no lone surrogates, which PDF extractors and JSON escapes make.

    Args:
        what: names the text in the message, such as "query".
        text: any string.

    Raises:
        ValueError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} must be valid Unicode, got a lone surrogate at character {error.start}. "
            'Decode with errors="replace".'
        ) from error
