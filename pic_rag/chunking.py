"""Where strings end: a text becomes segments of token ids, and every segment gets its chunks and slots.

This room knows nothing of models or attention; it counts.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

WINDOW_CHARACTERS = 50_000
"""Characters of a text tokenised in one piece, so that memory does not grow with the length of a text."""

_WINDOWS_AT_ONCE = 8  # full ones tokenised together

_BREAK = re.compile(r"(?<=\S)\s(?=\S)")  # not inside a run of white space: tokenizers make one token of a run

_copies: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of tokenizers, see `_for_documents`
_copying = threading.Lock()


@dataclass(frozen=True, eq=False)
class Segment:
    """One encoder sequence: text tokens and the spans its slots stand for.

    Attributes:
        token_ids: `(text_tokens,)` int64.
        chunk: `(slots,)` the chunk of each slot.
        start: `(slots,)` first text token of the slot's span.
        stop: `(slots,)` one past its last.
        chunk_tokens: text tokens in a full chunk.
        ratio: text tokens per slot.
        offset: position of the first text token (not 0 once a chunk is folded out of its segment).
    """

    token_ids: np.ndarray
    chunk: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    chunk_tokens: int
    ratio: int
    offset: int = 0

    @property
    def places(self) -> int:
        """Places the segment takes in an encoder row: its text tokens and its slots."""
        return len(self.token_ids) + len(self.chunk)

    @property
    def strides(self) -> np.ndarray:
        """`(slots,)`, see `strides`."""
        return strides(len(self.chunk), len(self.token_ids), self.ratio)


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


def tokenize(text: str | list[str], tokenizer: Any, **options: Any) -> Any:  # noqa: ANN401 - any Hugging Face tokenizer
    """The tokenizer's encoding of one document's text, or of several.

    "<|im_end|>" in them is text: it must not end a message.
    """
    own = _for_documents(tokenizer)
    return own(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **options)


def _for_documents(tokenizer: Any) -> Any:  # noqa: ANN401
    """A copy of the tokenizer that reads nothing but documents.

    A fast tokenizer keeps `split_special_tokens` from call to call: were prompts tokenised by the same object in
    another thread, each would now and then be read as the other.
    """
    with _copying:
        if tokenizer not in _copies:
            _copies[tokenizer] = copy.deepcopy(tokenizer)
        return _copies[tokenizer]


def token_windows(text: str, tokenizer: Any) -> Iterator[np.ndarray]:  # noqa: ANN401 - any Hugging Face tokenizer
    """Token ids of a text, no special tokens, window by window."""
    for window in text_windows(text):
        yield np.asarray(tokenize(window, tokenizer)["input_ids"], dtype=np.int64)


def count_tokens(text: str, tokenizer: Any) -> int:  # noqa: ANN401 - any Hugging Face tokenizer
    """How many tokens a document's text has, no special tokens."""
    return sum(map(len, token_windows(text, tokenizer)))


def token_segments(
    texts: Iterable[str],
    tokenizer: Any,  # noqa: ANN401 - any Hugging Face tokenizer
    segment_tokens: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """Token ids of texts, `(tokens,)` int64, in pieces of `segment_tokens`, with the number of their text.

    Each text's last piece may be shorter. Empty texts yield nothing. Windows of several texts are tokenised together,
    which a tokenizer does on all cores.
    """
    for number, windows in groupby(_tokenized(texts, tokenizer), key=itemgetter(0)):
        rest = np.empty(0, dtype=np.int64)
        for _, window in windows:
            rest = np.concatenate([rest, window])
            whole = len(rest) // segment_tokens * segment_tokens
            for start in range(0, whole, segment_tokens):
                yield number, rest[start : start + segment_tokens]
            rest = rest[whole:]
        if len(rest):
            yield number, rest


def _tokenized(texts: Iterable[str], tokenizer: Any) -> Iterator[tuple[int, np.ndarray]]:  # noqa: ANN401
    """Token ids of every window of texts, with the number of its text."""
    windows = ((number, window) for number, text in enumerate(texts) for window in text_windows(text))
    for run in _runs(windows, _WINDOWS_AT_ONCE * WINDOW_CHARACTERS):
        encoded = tokenize([window for _, window in run], tokenizer)["input_ids"]
        for (number, _), token_ids in zip(run, encoded, strict=True):
            yield number, np.asarray(token_ids, dtype=np.int64)


def _runs(windows: Iterable[tuple[int, str]], characters: int) -> Iterator[list[tuple[int, str]]]:
    """Neighbouring numbered windows of so many characters together at most."""
    run: list[tuple[int, str]] = []
    gathered = 0
    for numbered in windows:
        length = len(numbered[1])
        if run and gathered + length > characters:
            yield run
            run, gathered = [], 0
        run.append(numbered)
        gathered += length
    if run:
        yield run


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
    return Segment(token_ids, chunk, start, stop, chunk_tokens, ratio)


def cut(token_ids: np.ndarray, ratio: int, slots_per_chunk: int, *, foldable: bool) -> list[Segment]:
    """A segment of T tokens as the encoder reads it: whole, or its chunks one by one where they can be folded."""
    segment = place_slots(token_ids, ratio, slots_per_chunk)
    return fold(segment) if foldable else [segment]


def strides(slots: int, text_tokens: int, ratio: int) -> np.ndarray:
    """`(slots,)` how far each memory token of a text lies behind the one before where a prompt spreads them.

    `ratio`, and for the last one what is left: the same whatever a text's segments and chunks.

    >>> strides(3, text_tokens=10, ratio=4).tolist()
    [4, 4, 2]
    """
    return np.diff(np.minimum(np.arange(slots + 1) * ratio, text_tokens))


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
                segment.ratio,
                segment.offset + begin,
            )
        )
    return folded
