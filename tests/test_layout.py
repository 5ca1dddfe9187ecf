"""Segments side by side in rows: every token, slot and position where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pic_rag.chunking import fold, place_slots
from pic_rag.layout import RowsFullError, build_layout, pack


def _segment(tokens, first=0, ratio=4, slots_per_chunk=2):
    return place_slots(np.arange(first, first + tokens), ratio, slots_per_chunk)


def test_packing_never_overfills_a_row_and_never_overlaps():
    lengths = np.random.default_rng(0).integers(1, 50, size=60).tolist()
    taken = set()
    for length, (row, first) in zip(lengths, pack(lengths, 50), strict=True):
        here = {(row, place) for place in range(first, first + length)}
        assert first + length <= 50
        assert not taken & here
        taken |= here
    rows = 1 + max(row for row, _ in taken)
    assert len(taken) == sum(lengths) > 0.8 * 50 * rows


def test_a_slot_of_spread_positions_sits_at_its_spans_last_token():
    layout = build_layout([_segment(11)], positions="spread")
    assert layout.position_ids[0].tolist() == [*range(11), 3, 7, 10]


def test_appended_slots_follow_the_text():
    layout = build_layout([_segment(11)], positions="append")
    assert layout.position_ids[0].tolist() == list(range(14))


def test_a_folded_chunk_keeps_the_positions_it_had():
    whole = build_layout([_segment(21)], positions="spread")
    folded = build_layout(fold(_segment(21)), positions="spread")
    positions = folded.position_ids[folded.slot_row, folded.slot_place]
    assert positions.tolist() == whole.position_ids[whole.slot_row, whole.slot_place].tolist()
    text = folded.position_ids[(folded.segment >= 0) & ~folded.is_slot]
    assert text.tolist() == list(range(21))


def test_every_segment_starts_at_position_zero_in_a_packed_row():
    segments = [_segment(9), _segment(6), _segment(4)]
    layout = build_layout(segments, positions="spread", row_places=64)
    assert layout.token_ids.shape[0] == 1
    for number, segment in enumerate(segments):
        own = (layout.segment[0] == number) & ~layout.is_slot[0]
        assert layout.position_ids[0, own].tolist() == list(range(len(segment.token_ids)))


@pytest.mark.parametrize("row_places", [0, 40, 200])
def test_slots_come_in_the_order_of_the_segments_given_and_stand_for_their_spans(row_places):
    segments = [_segment(tokens, first=100 * number) for number, tokens in enumerate([3, 30, 11, 8])]
    layout = build_layout(segments, positions="spread", row_places=row_places)
    assert layout.is_slot[layout.slot_row, layout.slot_place].all()
    assert layout.is_slot.sum() == len(layout.slot_row) == sum(len(segment.chunk) for segment in segments)
    owner = layout.segment[layout.slot_row, layout.slot_place].tolist()
    assert owner == [number for number, segment in enumerate(segments) for _ in segment.chunk]
    row = layout.slot_row[:, None].expand_as(layout.span_place)
    inside = layout.span_place >= 0
    spans = layout.token_ids[row[inside], layout.span_place[inside]].tolist()
    assert spans == [token for segment in segments for token in segment.token_ids.tolist()]


def test_padding_belongs_to_no_segment_and_each_place_to_itself():
    layout = build_layout([_segment(30), _segment(3)], positions="spread")
    padding = layout.segment[1, 4:]
    assert (padding < 0).all()
    assert len(padding.unique()) == len(padding)


def test_a_layout_moves_as_a_whole():
    layout = build_layout([_segment(9)], positions="spread").to("meta")
    assert {tensor.device.type for tensor in vars(layout).values()} == {"meta"}
    assert all(isinstance(tensor, torch.Tensor) for tensor in vars(layout).values())


def test_rows_of_a_fixed_shape_hold_the_same_segments_and_padding_attends_to_itself_alone():
    segments = [_segment(21), _segment(11, 30)]
    tight = build_layout(segments, positions="spread", row_places=64)
    fixed = build_layout(segments, positions="spread", row_places=64, rows=3)
    assert fixed.token_ids.shape == (3, 64)
    width = tight.token_ids.shape[1]
    assert torch.equal(fixed.token_ids[:1, :width], tight.token_ids)
    assert torch.equal(fixed.position_ids[:1, :width], tight.position_ids)
    padding = fixed.segment[fixed.segment < 0]
    assert len(padding) == 3 * 64 - sum(segment.places for segment in segments)
    assert all(len(row[row < 0].unique()) == int((row < 0).sum()) for row in fixed.segment)


def test_rows_are_rounded_up_with_padding_behind_the_segments():
    segments = [_segment(21), _segment(11)]
    tight = build_layout(segments, positions="spread")
    rounded = build_layout(segments, positions="spread", row_step=16)
    width = tight.token_ids.shape[1]
    assert width % 16 != 0
    assert rounded.token_ids.shape == (2, width + -width % 16)
    assert torch.equal(rounded.segment[:, :width].clamp(min=-1), tight.segment.clamp(min=-1))
    assert (rounded.segment[:, width:] < 0).all()


def test_rows_that_are_too_few_are_an_error():
    with pytest.raises(RowsFullError, match="1 rows of 32 places must hold all sequences, got 2 rows of them"):
        build_layout([_segment(21), _segment(21)], positions="spread", row_places=32, rows=1)
