"""The PIC rule itself, place by place, and its two forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from pic_rag.chunking import place_slots
from pic_rag.config import PRESETS
from pic_rag.layout import build_layout
from pic_rag.mask import Scope, allowed_pairs, attention_mask, dense_mask, flex_mask

SCOPES = {
    f"{text}/{memory}": Scope(text, memory)
    for text in ("segment", "chunk")
    for memory in ("chunk", "chunk+past", "segment")
}


def _places(*lengths, ratio=2, slots_per_chunk=2, row_places=0):
    segments = [place_slots(np.arange(length), ratio, slots_per_chunk) for length in lengths]
    return build_layout(segments, positions="spread", row_places=row_places).places


def _picture(places, preset):
    scope = Scope(PRESETS[preset]["text_scope"], PRESETS[preset]["memory_scope"])
    return ["".join(".x"[allowed] for allowed in row) for row in allowed_pairs(places, scope)[0].tolist()]


# Two chunks of four tokens, then two slots of each.
PICTURES = {
    "pic": """
        x...........
        xx..........
        xxx.........
        xxxx........
        xxxxx.......
        xxxxxx......
        xxxxxxx.....
        xxxxxxxx....
        xxxx....x...
        xxxx....xx..
        ....xxxxxxx.
        ....xxxxxxxx
    """,
    "local": """
        x...........
        xx..........
        xxx.........
        xxxx........
        ....x.......
        ....xx......
        ....xxx.....
        ....xxxx....
        xxxx....x...
        xxxx....xx..
        ....xxxx..x.
        ....xxxx..xx
    """,
    "global": """
        x...........
        xx..........
        xxx.........
        xxxx........
        xxxxx.......
        xxxxxx......
        xxxxxxx.....
        xxxxxxxx....
        xxxxxxxxx...
        xxxxxxxxxx..
        xxxxxxxxxxx.
        xxxxxxxxxxxx
    """,
}


@pytest.mark.parametrize("preset", PICTURES)
def test_a_preset_reaches_exactly_what_the_design_says(preset):
    assert _picture(_places(8), preset) == PICTURES[preset].split()


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_padding_and_other_segments_are_out_of_reach(scope):
    places = _places(9, 5, 3, row_places=24)
    allowed = allowed_pairs(places, scope)
    same = places.segment[:, :, None] == places.segment[:, None, :]
    assert not (allowed & ~same).any()
    padding = places.segment < 0
    assert padding.any()
    assert (allowed.sum(2)[padding] == 1).all()  # itself, so that no row of the softmax is empty
    assert (allowed.sum(1)[padding] == 1).all()


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_everything_sees_itself_and_nothing_sees_what_follows(scope):
    allowed = allowed_pairs(_places(21, 6), scope)
    assert allowed.diagonal(dim1=1, dim2=2).all()
    assert not allowed.triu(1).any()


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_text_never_sees_a_slot(scope):
    places = _places(21, 6, row_places=64)
    allowed = allowed_pairs(places, scope)
    text = ~places.is_slot & (places.segment >= 0)
    assert not (allowed & text[:, :, None] & places.is_slot[:, None, :]).any()


@pytest.mark.parametrize("form", ["dense", "flex"])
def test_a_window_ends_what_is_seen_and_adds_nothing(form):
    places = _places(40, 9)
    whole = Scope("segment", "segment")
    index = torch.arange(places.segment.shape[1])
    near = index[:, None] - index < 8
    if form == "dense":
        windowed = allowed_pairs(places, whole._replace(window=8))
    else:
        rule = flex_mask(places, whole._replace(window=8)).mask_mod
        rows = range(len(places.segment))
        windowed = torch.stack([rule(torch.tensor(row), torch.tensor(0), index[:, None], index) for row in rows])
    assert torch.equal(windowed, allowed_pairs(places, whole) & near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dense_mask_is_additive_and_finite(dtype):
    places = _places(9, 4)
    mask = dense_mask(places, SCOPES["segment/chunk+past"], dtype)
    assert mask.dtype == dtype
    assert mask.shape == (2, 1, places.segment.shape[1], places.segment.shape[1])
    allowed = allowed_pairs(places, SCOPES["segment/chunk+past"])[:, None]
    assert (mask[allowed] == 0).all()
    assert (mask[~allowed] == torch.finfo(dtype).min).all()


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_the_flex_mask_is_the_same_rule(scope):
    places = _places(150, 90, 7, row_places=256)  # more than one block of 128
    block_mask = flex_mask(places, scope)
    rows, count = places.segment.shape
    index = torch.arange(count)
    rule = block_mask.mask_mod
    flex = torch.stack([rule(torch.tensor(row), torch.tensor(0), index[:, None], index) for row in range(rows)])
    assert torch.equal(flex, allowed_pairs(places, scope))
    dense = flex.new_zeros(rows, 256, 256)
    dense[:, :count, :count] = flex
    blocks = dense.view(rows, 2, 128, 2, 128).any(4).any(2)
    assert count > 128
    assert torch.equal(block_mask.to_dense()[:, 0].bool(), blocks)


def test_layers_get_the_mask_they_take():
    places, scope = _places(9, 4), SCOPES["segment/chunk+past"]
    for attn_implementation in ("sdpa", "eager"):
        mask = attention_mask(places, scope, torch.float32, attn_implementation)
        assert torch.equal(mask, dense_mask(places, scope, torch.float32))
    assert isinstance(attention_mask(places, scope, torch.float32, "flex_attention"), BlockMask)
    with pytest.raises(ValueError, match="attn_implementation must be .* got 'flash_attention_2'"):
        attention_mask(places, scope, torch.float32, "flash_attention_2")
