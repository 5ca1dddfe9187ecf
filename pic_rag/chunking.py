"""Where strings end: a text becomes segments of token ids, and every segment gets its chunks and slots.

This room knows nothing of models or attention; it counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW_CHARACTERS = 50_000
"""Characters tokenised at once, so that memory does not grow with the length of a text."""

_BREAK = re.compile(r"(?<=\S)\s(?=\S)")  # not inside a run of white space: tokenizers make one token of a run


@dataclass(frozen=True, eq=False)
class Segment:
    """One encoder sequence: text tokens and the spans its slots stand for.

    Attributes:
        token_ids: `(text_tokens,)` int64.
        chunk: `(slots,)` the chunk of each slot.
        start: `(slots,)` first text token of the slot's span.
        stop: `(slots,)` one past its last.
        chunk_tokens: text tokens in a full chunk.
        offset: position of the first text token (not 0 once a chunk is folded out of its segment).
    """

    token_ids: np.ndarray
    chunk: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    chunk_tokens: int
    offset: int = 0

    @property
    def places(self) -> int:
        """Places the segment takes in an encoder row: its text tokens and its slots."""
        return len(self.token_ids) + len(self.chunk)


def text_windows(text: str) -> Iterator[str]:
    """The text in pieces of `WINDOW_CHARACTERS` at most that break before a word."""
    start = 0
    while start < len(text):
        stop = start + WINDOW_CHARACTERS
        if stop < len(text):
            gaps = [gap.start() for gap in _BREAK.finditer(text, stop - WINDOW_CHARACTERS // 10, stop)]
            stop = gaps[-1] if gaps else stop
        yield text[start:stop]
        start = stop


def tokenize(text: str, tokenizer: Any, **options: Any) -> Any:  # noqa: ANN401 - any Hugging Face tokenizer
    """The tokenizer's encoding of a document's text, in which "<|im_end|>" is text: it must not end a message."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **options)


def token_windows(text: str, tokenizer: Any) -> Iterator[np.ndarray]:  # noqa: ANN401 - any Hugging Face tokenizer
    """Token ids of a text, no special tokens, window by window."""
    for window in text_windows(text):
        yield np.asarray(tokenize(window, tokenizer)["input_ids"], dtype=np.int64)


def token_segments(text: str, tokenizer: Any, segment_tokens: int) -> Iterator[np.ndarray]:  # noqa: ANN401
    """Token ids of a text in pieces of `segment_tokens`, the last one shorter. Empty text yields nothing."""
    rest = np.empty(0, dtype=np.int64)
    for window in token_windows(text, tokenizer):
        rest = np.concatenate([rest, window])
        whole = len(rest) // segment_tokens * segment_tokens
        for start in range(0, whole, segment_tokens):
            yield rest[start : start + segment_tokens]
        rest = rest[whole:]
    if len(rest):
        yield rest


def place_slots(token_ids: np.ndarray, ratio: int, slots_per_chunk: int) -> Segment:
    """Cut a segment of T tokens into chunks of `slots_per_chunk * ratio` and give n tokens `ceil(n / ratio)` slots.

    A chunk's slots share its tokens evenly: each stands for a span of at most `ratio` tokens.

    >>> segment = place_slots(np.arange(21), ratio=4, slots_per_chunk=2)
    >>> segment.chunk.tolist(), segment.start.tolist(), segment.stop.tolist()
    ([0, 0, 1, 1, 2, 2], [0, 4, 8, 12, 16, 18], [4, 8, 12, 16, 18, 21])
    """
    chunk_tokens = ratio * slots_per_chunk
    full, rest = divmod(len(token_ids), chunk_tokens)
    start = np.arange(full * slots_per_chunk) * ratio
    stop = start + ratio
    chunk = np.arange(full * slots_per_chunk) // slots_per_chunk
    last = -(-rest // ratio)
    if last:
        edges = full * chunk_tokens + np.arange(last + 1) * rest // last
        start, stop = np.concatenate([start, edges[:-1]]), np.concatenate([stop, edges[1:]])
        chunk = np.concatenate([chunk, np.full(last, full)])
    return Segment(token_ids, chunk, start, stop, chunk_tokens)


def fold(segment: Segment) -> list[Segment]:
    """The segment's chunks as segments of their own, at the positions they had: for scopes that keep chunks apart."""
    folded = []
    for number, begin in enumerate(range(0, len(segment.token_ids), segment.chunk_tokens)):
        own = segment.chunk == number
        folded.append(
            Segment(
                segment.token_ids[begin : begin + segment.chunk_tokens],
                np.zeros(int(own.sum()), dtype=np.int64),
                segment.start[own] - begin,
                segment.stop[own] - begin,
                segment.chunk_tokens,
                segment.offset + begin,
            )
        )
    return folded
