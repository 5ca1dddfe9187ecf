"""Handles: the printable strings that stand for memories inside a prompt.

A handle is ``[[pic:<32 lowercase hex>]]``: no whitespace, quotes, braces or backslashes, so prompt templates and text
splitters leave it whole. It is content-addressed: the same text and the same compressor give the same handle.

In a prompt that others write too it is *signed*, ``[[pic:<64 lowercase hex>]]`` (`pic_rag.store.signing`): wherever a
handle is looked for both forms are found, and only who can check a signature turns the one into the other.

A handle inside somebody else's text is hostile until proven otherwise. `escape_handles` lengthens the colons of
everything that looks like one (``[[pic:`` becomes ``[[pic::``), which no longer matches and can be undone.

This file does not know tensors, stores or prompts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

HANDLE_PATTERN: re.Pattern[str] = re.compile(r"\[\[pic:([0-9a-f]{32})([0-9a-f]{32})?\]\]")
"""The handle, and its signature if it has one."""

OPENING = "[[pic:"
"""What every handle begins with."""

_ESCAPED_OPENING = "[[pic::"


_REMEDY = (
    "Pass the memory it stands for, compress its document again, "
    "or escape it with escape_handles if it is part of a text."
)


class UnknownHandleError(KeyError):
    """A handle stands in a prompt, but no memory or text was given for it.

    Args:
        handle: The handle nobody knows.
        known_handles: How many handles were known where it was looked up.
        remedy: What to do about it, in one sentence.
    """

    def __init__(self, handle: str, known_handles: int, remedy: str = _REMEDY) -> None:
        """Keep all parts, so that the error survives pickling between processes."""
        super().__init__(handle, known_handles, remedy)
        self.handle = handle
        self.known_handles = known_handles
        self.remedy = remedy

    def __str__(self) -> str:
        """The message itself: `KeyError` would show its `repr`."""
        return f"handle must be one of the {self.known_handles} known here, got {self.handle}. {self.remedy}"


def make_handle(*, source_hash: str, fingerprint: str, ratio: int, dtype: str) -> str:
    """Name the memory that one compressor makes of one text.

    Args:
        source_hash: SHA-256 of the source text, in hex (`pic_rag.memory.hash_text`).
        fingerprint: Fingerprint of the compressor, which covers its weights and mask settings.
        ratio: Text tokens per memory token.
        dtype: Compute dtype of the compressor, such as ``"bfloat16"``.

    Returns:
        ``[[pic:<32 hex>]]``, the first 128 bits of a SHA-256 over all four.
    """
    # JSON keeps the fields apart: ("ab", "c") and ("a", "bc") must not share a digest.
    parts = json.dumps([source_hash, fingerprint, ratio, dtype])
    return format_handle(hashlib.sha256(parts.encode()).hexdigest()[:32])


def format_handle(digits: str) -> str:
    """The handle of these digits: 32, or 64 with a signature."""
    return f"{OPENING}{digits}]]"


def handle_digits(handle: str) -> str:
    """The 32 digits of a handle.

    Raises:
        ValueError: It is no handle, or is signed: a signature has to be checked first.
    """
    match = HANDLE_PATTERN.fullmatch(handle)
    if match is None or match.group(2):
        raise ValueError(f"handle must be [[pic:<32 lowercase hex>]], got {handle!r}.")
    return match.group(1)


def placeholder(number: int) -> str:
    """A handle that no memory has: it stands for the document, or the piece, of that number."""
    return format_handle(f"{number:032x}")


def find_handles(text: str) -> list[str]:
    """Handles of a text, in order, with repeats."""
    return [match.group() for match in HANDLE_PATTERN.finditer(text)]


def split_handles(text: str) -> list[tuple[bool, str]]:
    """Cut a text at its handles.

    Returns:
        ``(is_handle, piece)`` pairs without empty pieces. The pieces join to the text.
    """
    pieces: list[tuple[bool, str]] = []
    end = 0
    for match in HANDLE_PATTERN.finditer(text):
        pieces += [(False, text[end : match.start()]), (True, match.group())]
        end = match.end()
    pieces.append((False, text[end:]))
    return [(is_handle, piece) for is_handle, piece in pieces if piece]


def escape_handles(text: str) -> str:
    """Make every handle in a text harmless, reversibly.

    >>> escape_handles("see [[pic:00112233445566778899aabbccddeeff]]")
    'see [[pic::00112233445566778899aabbccddeeff]]'
    """
    return text.replace(OPENING, _ESCAPED_OPENING)


def unescape_handles(text: str) -> str:
    """Undo `escape_handles`: ``unescape_handles(escape_handles(text)) == text`` for any text."""
    return text.replace(_ESCAPED_OPENING, OPENING)


def replace_handles(text: str, mapping: Mapping[str, str]) -> str:
    """Put a string in the place of every handle.

    The replacements go in as they are, and handles inside them are not looked up: escape texts before passing them.

    Args:
        text: A text with handles.
        mapping: Handle to replacement.

    Raises:
        UnknownHandleError: A handle of the text is not in the mapping.
    """

    def replacement(match: re.Match[str]) -> str:
        handle = match.group()
        if handle not in mapping:
            raise UnknownHandleError(handle, len(mapping))
        return mapping[handle]

    return HANDLE_PATTERN.sub(replacement, text)
