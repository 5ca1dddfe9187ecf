"""Batches: the segments of every thread that compresses, encoded together, and in smaller lots where memory is short.

This file knows segments and the encoder; it knows neither texts nor memories' provenance.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from pic_rag.chunking import Segment
from pic_rag.encoder import PicEncoder
from pic_rag.layout import build_layout, fit

logger = logging.getLogger(__name__)

_MOST_WASTE = 0.05  # share of a batch's places that may hold nothing
_ROW_STEP = 16  # rows that are a multiple of it: at other lengths attention takes up to half as long again
_FLEX_ROW_STEP = 128  # places of a FlexAttention block: on a GPU it has no kernel for shorter rows


@dataclass(eq=False)
class _Call:
    """What one thread waits for.

    Attributes:
        segments: what it wants encoded.
        most_places: places it allows in a batch.
        memories: `(slots, hidden)` of each segment; empty until they are there.
    """

    segments: list[Segment]
    most_places: int
    memories: list[torch.Tensor] = field(default_factory=list)

    @property
    def places(self) -> int:
        return sum(segment.places for segment in self.segments)


class Batcher:
    """Encodes segments for any number of threads, one batch at a time.

    Calls that arrive while a batch is computed wait for it; the next one then takes along all that fit in.
    """

    def __init__(self, encoder: PicEncoder) -> None:
        self.encoder = encoder
        self._most_places = sys.maxsize  # in a batch; less once one did not fit into memory
        self._waiting: list[_Call] = []
        self._turn = Lock()

    def __reduce__(self) -> tuple[type[Batcher], tuple[PicEncoder]]:
        """A copy, in another process for example, has nobody waiting."""
        return Batcher, (self.encoder,)

    def encode(self, segments: Sequence[Segment], rows: int) -> list[torch.Tensor]:
        """`(slots, hidden)` of each segment, on the CPU, encoded in batches of `rows` full rows at most.

        A batch begins with the longest segment that is left, and shorter ones fill its rows.

        Raises:
            RuntimeError: when not even one segment fits into memory (torch.OutOfMemoryError on a GPU).
        """
        full_row = self._full_row(segments)
        memories: list[torch.Tensor] = [torch.empty(0)] * len(segments)
        left = list(range(len(segments)))
        while left:
            most_places = min(rows * full_row, self._most_places)
            _, spots = narrow_rows([segments[number].places for number in left], full_row, most_places)
            batch = [left[at] for at in spots]
            encoded = self._wait_for(_Call([segments[number] for number in batch], most_places))
            for number, memory in zip(batch, encoded, strict=True):
                memories[number] = memory
            left = [number for at, number in enumerate(left) if at not in spots]
        return memories

    def _wait_for(self, call: _Call) -> list[torch.Tensor]:
        self._waiting.append(call)
        try:
            with self._turn:
                if not call.memories:
                    self._serve(call)
        finally:
            self._waiting.remove(call)
        return call.memories

    def _serve(self, call: _Call) -> None:
        """Encode a call, and with it those that wait and fit into its batch."""
        calls, places, most_places = [call], call.places, call.most_places
        for other in [other for other in self._waiting if other is not call and not other.memories]:
            allowed = min(most_places, other.most_places)
            if places + other.places <= allowed:
                calls.append(other)
                places, most_places = places + other.places, allowed
        try:
            memories = iter(self._encode([segment for each in calls for segment in each.segments]))
        except Exception:
            if len(calls) == 1:
                raise
            calls = []  # what ails another call is raised in its own turn
        for each in calls:
            each.memories = list(islice(memories, len(each.segments)))
        if not calls:
            call.memories = self._encode(call.segments)

    def _encode(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        """Memories of segments, all at once or, when they do not fit into memory, one half after the other."""
        try:
            return self._forward(segments)
        except RuntimeError as error:
            if len(segments) == 1 or not _out_of_memory(error):
                raise
        # Out of the except block: the error's traceback keeps the tensors of the batch that failed alive.
        clear_device_cache()
        half = len(segments) // 2
        self._stay_below(sum(segment.places for segment in segments[:half]))
        return self._encode(segments[:half]) + self._encode(segments[half:])

    @torch.inference_mode()
    def _forward(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        lengths = [segment.places for segment in segments]
        row_places, spots = narrow_rows(lengths, self._full_row(segments), sys.maxsize)
        if self.encoder.attn_implementation == "flex_attention":
            row_step = _FLEX_ROW_STEP
        else:
            row_step = _ROW_STEP if _waste(lengths, spots, _ROW_STEP) <= _MOST_WASTE else 1
        positions = self.encoder.config.positions
        layout = build_layout(segments, positions=positions, row_places=row_places, row_step=row_step)
        memories = self.encoder(layout.to(self.encoder.token_embedding_weight.device)).cpu()
        return list(memories.split([len(segment.chunk) for segment in segments]))

    def _full_row(self, segments: Sequence[Segment]) -> int:
        return max(self.encoder.config.segment_tokens, *(segment.places for segment in segments))

    def _stay_below(self, places: int) -> None:
        """Make later batches that small, and say so the first time."""
        if self._most_places == sys.maxsize:
            logger.warning(
                "Out of memory: compressing in smaller batches, of %d places at first. "
                "Pass a smaller batch_size to begin with.",
                places,
            )
        self._most_places = min(places, self._most_places)


def gather(segments: Iterable[tuple[int, Segment]], text_tokens: int) -> Iterator[list[tuple[int, Segment]]]:
    """Runs of numbered segments with about so many text tokens."""
    run: list[tuple[int, Segment]] = []
    gathered = 0
    for numbered in segments:
        run.append(numbered)
        gathered += len(numbered[1].token_ids)
        if gathered >= text_tokens:
            yield run
            run, gathered = [], 0
    if run:
        yield run


def narrow_rows(lengths: Sequence[int], full_row: int, most_places: int) -> tuple[int, dict[int, tuple[int, int]]]:
    """Places of a row, and what `fit`s: rows as narrow as can be without wasting over 5 % of their places.

    Attention pays for every pair of a row's places, so two short rows cost less than a long one.

    Args:
        lengths: at least one.
        full_row: places of the widest row, unless a length is above that.
        most_places: places of all rows together; the longest length gets its row anyway.
    """
    longest = max(lengths)
    best: tuple[float, int, dict[int, tuple[int, int]]] = (math.inf, 0, {})
    for row_places in sorted({longest + step * max(0, full_row - longest) // 8 for step in range(9)}):
        spots = fit(lengths, row_places, max(1, most_places // row_places))
        waste = _waste(lengths, spots)
        if waste < best[0]:
            best = (waste, row_places, spots)
        if waste <= _MOST_WASTE:
            break
    return best[1], best[2]


def _waste(lengths: Sequence[int], spots: Mapping[int, tuple[int, int]], row_step: int = 1) -> float:
    """Share of the rows' places that hold nothing, when rows are a multiple of that long."""
    rows = 1 + max(row for row, _ in spots.values())
    width = max(first + lengths[number] for number, (_, first) in spots.items())
    width += -width % row_step
    return 1 - sum(lengths[number] for number in spots) / (rows * width)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether a smaller batch may do; oneDNN says in its own words that it got no memory."""
    return should_reduce_batch_size(error) or "could not create a primitive" in str(error)
