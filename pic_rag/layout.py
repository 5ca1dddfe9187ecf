"""Segments side by side in the rows of a batch: token ids, positions, and what the PIC rule needs to know."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from pic_rag.chunking import Segment
from pic_rag.mask import Places


class RowsFullError(ValueError):
    """Sequences do not fit in the rows that were asked for."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A batch of encoder rows; the shapes' names are those of `pic_rag.mask`.

    Attributes:
        token_ids: `(rows, places)` int64, 0 where there is no text.
        position_ids: `(rows, places)` int64.
        segment: `(rows, places)` int64, see `Places`.
        chunk: `(rows, places)` int64.
        is_slot: `(rows, places)` bool.
        slot_row: `(slots,)` the row of each slot, slots in the order of the segments given.
        slot_place: `(slots,)` its place in that row.
        span_place: `(slots, span)` places, in the slot's row, of the text it stands for; -1 after a short span's end.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    segment: torch.Tensor
    chunk: torch.Tensor
    is_slot: torch.Tensor
    slot_row: torch.Tensor
    slot_place: torch.Tensor
    span_place: torch.Tensor

    @property
    def places(self) -> Places:
        """The fields the PIC rule reads."""
        return Places(self.segment, self.chunk, self.is_slot)

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on another device; the copy does not wait for it."""
        return Layout(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def pin_memory(self) -> Layout:
        """The same layout in memory that a GPU copies from while it computes."""
        return Layout(*(getattr(self, field.name).pin_memory() for field in fields(self)))


def fit(lengths: Sequence[int], row_places: int, most_rows: int) -> dict[int, tuple[int, int]]:
    """The (row, first place) of each length that finds room, longest first, each into the fullest row it fits in.

    >>> fit([3, 5, 2, 4], row_places=5, most_rows=2)
    {1: (0, 0), 3: (1, 0)}
    """
    rooms: list[tuple[int, int]] = []  # (places left, row), the fullest row first
    rows = 0
    spots = {}
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        at = bisect_left(rooms, (lengths[number],))
        if at < len(rooms):
            left, row = rooms.pop(at)
        elif rows < most_rows:
            left, row, rows = row_places, rows, rows + 1
        else:
            continue
        spots[number] = (row, row_places - left)
        insort(rooms, (left - lengths[number], row))
    return spots


def pack(lengths: Sequence[int], row_places: int) -> list[tuple[int, int]]:
    """The (row, first place) of each length, in as many rows as it takes.

    >>> pack([3, 5, 2], row_places=5)
    [(1, 0), (0, 0), (1, 3)]
    """
    spots = fit(lengths, row_places, most_rows=len(lengths))
    return [spots[number] for number in range(len(lengths))]


def arrange(lengths: Sequence[int], row_places: int, rows: int = 0) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """The (row, first place) of each length, and the (rows, width) of what holds them all.

    With `rows` the shape is `(rows, row_places)` whatever the lengths, so that compiled code sees one shape; without,
    it is as small as it can be, and rows are as long as the longest length at least.

    >>> arrange([3, 5, 2], row_places=6)
    ([(1, 0), (0, 0), (1, 3)], (2, 5))
    >>> arrange([3, 2], row_places=6, rows=4)
    ([(0, 0), (0, 3)], (4, 6))

    Raises:
        RowsFullError: when `rows` rows do not hold them.
    """
    spots = pack(lengths, row_places if rows else max(row_places, *lengths))
    needed = 1 + max(row for row, _ in spots)
    if not rows:
        return spots, (needed, max(first + length for length, (_, first) in zip(lengths, spots, strict=True)))
    if needed > rows or max(lengths) > row_places:
        raise RowsFullError(f"{rows} rows of {row_places} places must hold all sequences, got {needed} rows of them.")
    return spots, (rows, row_places)


def build_layout(
    segments: Sequence[Segment], *, positions: str, row_places: int = 0, rows: int = 0, row_step: int = 1
) -> Layout:
    """Lay segments out in rows: each one's text, then its slots.

    Args:
        segments: at least one.
        positions: "spread" puts a slot at the position of its span's last token, "append" after the text.
        row_places: room in a row; short segments share a row. Rows are as long as the longest segment at least.
        rows: so many rows, each exactly `row_places` long, full or not; 0: as many and as long as it takes.
        row_step: rows that are as long as it takes are a multiple of this long.
    """
    spots, (rows, width) = arrange([segment.places for segment in segments], row_places, rows)
    width += -width % row_step
    token_ids, position_ids, chunk = np.zeros((3, rows, width), dtype=np.int64)
    owner = np.broadcast_to(-1 - np.arange(width), (rows, width)).copy()
    is_slot = np.zeros((rows, width), dtype=bool)
    for number, (segment, (row, first)) in enumerate(zip(segments, spots, strict=True)):
        text = slice(first, first + len(segment.token_ids))
        slots = slice(text.stop, first + segment.places)
        count = len(segment.token_ids)
        token_ids[row, text] = segment.token_ids
        position_ids[row, text] = segment.offset + np.arange(count)
        spread = segment.stop - 1 if positions == "spread" else count + np.arange(len(segment.chunk))
        position_ids[row, slots] = segment.offset + spread
        chunk[row, text] = np.arange(count) // segment.chunk_tokens
        chunk[row, slots] = segment.chunk
        owner[row, first : slots.stop] = number
        is_slot[row, slots] = True
    arrays = (token_ids, position_ids, owner, chunk, is_slot, *_slot_arrays(segments, spots))
    return Layout(*(torch.from_numpy(array) for array in arrays))


def _slot_arrays(
    segments: Sequence[Segment], spots: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    span = max(1, max(int((segment.stop - segment.start).max(initial=1)) for segment in segments))
    rows, places, spans = [], [], []
    for segment, (row, first) in zip(segments, spots, strict=True):
        slots = len(segment.chunk)
        rows.append(np.full(slots, row))
        places.append(first + len(segment.token_ids) + np.arange(slots))
        reach = segment.start[:, None] + np.arange(span)
        spans.append(np.where(reach < segment.stop[:, None], first + reach, -1))
    return np.concatenate(rows), np.concatenate(places), np.concatenate(spans)
