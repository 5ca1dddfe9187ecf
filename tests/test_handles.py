"""Handles: what a prompt may hold in place of a document."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from typing import Any

import pytest

from pic_rag.handles import (
    HANDLE_PATTERN,
    UnknownHandleError,
    escape_handles,
    find_handles,
    make_handle,
    replace_handles,
    split_handles,
    unescape_handles,
)

PARTS: dict[str, Any] = {"source_hash": "ab" * 32, "fingerprint": "cd" * 32, "ratio": 16, "dtype": "bfloat16"}
HANDLE = make_handle(**PARTS)
OTHER = make_handle(**{**PARTS, "ratio": 8})


def random_texts(count: int) -> list[str]:
    """Texts made of everything that could confuse escaping: openings, colons, brackets, whole handles."""
    pieces = ["[", "[[", "[[pic", "[[pic:", "[[pic::", ":", "::", "]]", "a" * 32, "0", HANDLE, "pic:", "é\n", "\ud800"]
    generator = random.Random(0)
    return ["".join(generator.choices(pieces, k=generator.randrange(12))) for _ in range(count)]


def test_handle_is_printable_and_safe_in_templates() -> None:
    """Prompt templates, JSON and splitters on whitespace leave a handle whole."""
    assert HANDLE_PATTERN.fullmatch(HANDLE)
    assert HANDLE.isascii()
    assert HANDLE.isprintable()
    assert not set(HANDLE) & set(" \t\n\"'{}\\")


def test_same_parts_make_the_same_handle_for_good() -> None:
    """A handle kept in somebody's database must still be found by a later version."""
    assert make_handle(**PARTS) == HANDLE == "[[pic:405ef9ed8039836caf4b6d70b7101308]]"


@pytest.mark.parametrize(
    "change", [{"source_hash": "ac" * 32}, {"fingerprint": "ce" * 32}, {"ratio": 8}, {"dtype": "float32"}]
)
def test_any_other_part_makes_another_handle(change: dict[str, Any]) -> None:
    """No cache serves the memory of another text, compressor, ratio or dtype."""
    assert make_handle(**{**PARTS, **change}) != HANDLE


def test_parts_do_not_run_into_each_other() -> None:
    """Moving a character from one part to the next is another handle."""
    shifted = {**PARTS, "source_hash": PARTS["source_hash"] + "c", "fingerprint": PARTS["fingerprint"][1:]}
    assert make_handle(**shifted) != HANDLE


def test_handles_are_found_in_order_with_repeats() -> None:
    """COMPACT synthesis repeats handles, and the order is the order of the memories."""
    assert find_handles(f"{HANDLE}a{OTHER}{HANDLE}") == [HANDLE, OTHER, HANDLE]


@pytest.mark.parametrize(
    "text", ["", "[[pic:]]", "[[pic:" + "A" * 32 + "]]", "[[pic:" + "a" * 31 + "]]", "[[pic:" + "a" * 33 + "]]"]
)
def test_what_only_resembles_a_handle_is_text(text: str) -> None:
    """Upper case, other lengths and empty handles are no handles."""
    assert find_handles(text) == []
    assert split_handles(text) == ([(False, text)] if text else [])


def test_split_pieces_join_to_the_text() -> None:
    """Nothing is lost or reordered by cutting a text at its handles."""
    for text in random_texts(2000):
        pieces = split_handles(text)
        assert "".join(piece for _, piece in pieces) == text
        assert [piece for is_handle, piece in pieces if is_handle] == find_handles(text)
        assert all(piece for _, piece in pieces)


def test_escaping_round_trips_any_text_and_leaves_no_handle() -> None:
    """Escaping is harmless and lossless, also on text that is escaped already."""
    for text in random_texts(5000):
        escaped = escape_handles(text)
        assert find_handles(escaped) == []
        assert unescape_handles(escaped) == text
        assert unescape_handles(unescape_handles(escape_handles(escaped))) == text


def test_a_document_quoting_a_handle_is_readable_once_escaped() -> None:
    """The escape is one more colon: a reader still sees what the document said."""
    assert escape_handles(f"see {HANDLE}") == "see [[pic::" + HANDLE[len("[[pic:") :]


def test_text_without_handle_syntax_is_not_touched() -> None:
    """Ordinary documents keep their hash: escaping changes nothing in them."""
    text = "A [[wiki]] link, an array[[0]] and a pic: colon."
    assert escape_handles(text) == text == unescape_handles(text)


def test_replacement_restores_texts_once() -> None:
    """A restored text that holds a handle itself is not resolved again."""
    assert replace_handles(f"<{HANDLE}|{OTHER}>", {HANDLE: OTHER, OTHER: r"\1 plain"}) == rf"<{OTHER}|\1 plain>"


def test_an_unknown_handle_raises_by_name_with_the_next_step() -> None:
    """The message is a sentence, not the repr of a key, and survives a process boundary."""
    with pytest.raises(KeyError) as caught:
        replace_handles(f"{HANDLE} {OTHER}", {HANDLE: "text"})
    error = caught.value
    assert isinstance(error, UnknownHandleError)
    assert error.handle == OTHER
    assert OTHER in str(error)
    assert "1 known" in str(error)
    assert "compress its document again" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_importing_handles_loads_only_the_standard_library() -> None:
    """Adapters look for handles without paying for torch."""
    code = 'import sys, pic_rag.handles; sys.exit(not {"torch", "numpy", "transformers"}.isdisjoint(sys.modules))'
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
