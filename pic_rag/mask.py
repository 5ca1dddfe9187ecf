"""The PIC rule: who attends to whom in an encoder row. It lives here and nowhere else.

Parallelized Iterative Compression, arXiv 2602.13980: only the attention mask of the Transformer
changes; it restricts a memory token's receptive field to a local chunk.

Shapes used here and in the other rooms:

    rows      encoder sequences in a batch; a row packs several segments behind one another
    places    places in a row: text tokens, slots, padding
    slots     memory tokens of a batch, all rows together
    hidden    width of a vector

A row of two chunks of four tokens, two slots each, under the preset `pic` (`.` no, `x` yes):

             text 0  text 1  slots
    text 0   x
    text 1   x x     x
    slot 0   x               x
    slot 1           x       x x

This module knows tensors only: no tokenizer, no model, no configuration file. It imports torch alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class Places(NamedTuple):
    """What the rule needs to know of every place of a batch of rows.

    Attributes:
        segment: `(rows, places)` int64, the segment a place belongs to; a number of its own, below zero,
            for each padding place, so that padding attends to itself and is attended by nothing else.
        chunk: `(rows, places)` int64, the chunk inside that segment.
        is_slot: `(rows, places)` bool, true where a memory token sits. Slots come after their segment's text.
    """

    segment: torch.Tensor
    chunk: torch.Tensor
    is_slot: torch.Tensor


class Scope(NamedTuple):
    """How far back places attend.

    Attributes:
        text: "segment" or "chunk": the text that text reads.
        memory: "chunk", "chunk+past" (its chunk, and the slots of earlier ones) or "segment": what a slot reads.
        window: nothing attends to what lies so many places back or more, as in layers of some generators; None: no end.
    """

    text: str
    memory: str
    window: int | None = None


def attends(
    query: Places, key: Places, query_index: torch.Tensor, key_index: torch.Tensor, scope: Scope
) -> torch.Tensor:
    """The rule itself, for broadcastable queries and keys; true where the query may attend to the key.

    Text attends to earlier text of its segment (`text="segment"`) or of its chunk (`"chunk"`) and never to a slot. A
    slot attends to the text of its chunk (all text of the segment with `memory="segment"`) and to itself and the
    earlier slots of its chunk (of all earlier chunks too, unless `memory="chunk"`).
    """
    same_chunk = query.chunk == key.chunk
    text_sees_text = same_chunk | (scope.text == "segment")
    slot_sees_text = same_chunk | (scope.memory == "segment")
    slot_sees_slot = same_chunk | (scope.memory != "chunk")
    sees_text = torch.where(query.is_slot, slot_sees_text, text_sees_text)
    sees_slot = query.is_slot & slot_sees_slot
    in_reach = torch.where(key.is_slot, sees_slot, sees_text)
    allowed = (query.segment == key.segment) & (key_index <= query_index) & in_reach
    return allowed if scope.window is None else allowed & (query_index - key_index < scope.window)


def allowed_pairs(places: Places, scope: Scope) -> torch.Tensor:
    """`(rows, places, places)` bool: row `i`, column `j` is true where place `i` may attend to place `j`."""
    index = torch.arange(places.segment.shape[1], device=places.segment.device)
    query = Places(*(field[:, :, None] for field in places))
    key = Places(*(field[:, None, :] for field in places))
    return attends(query, key, index[:, None], index, scope)


def attention_mask(
    places: Places, scope: Scope, dtype: torch.dtype, attn_implementation: str
) -> torch.Tensor | BlockMask:
    """The rule as the layers of a model take it: `dense_mask` in `dtype`, or `flex_mask` for flex_attention.

    Raises:
        ValueError: when `attn_implementation` is none of sdpa, eager and flex_attention.
    """
    if attn_implementation == "flex_attention":
        return flex_mask(places, scope)
    if attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation must be sdpa, eager or flex_attention, got {attn_implementation!r}. Load the model "
            "with one of them: no other back-end takes the PIC mask."
        )
    return dense_mask(places, scope, dtype)


def dense_mask(places: Places, scope: Scope, dtype: torch.dtype) -> torch.Tensor:
    """`(rows, 1, places, places)` additive mask in `dtype`: 0 where attention is allowed, the lowest value elsewhere.

    It is additive because transformers' `eager` attention adds whatever it is given, booleans included.
    """
    allowed = allowed_pairs(places, scope)
    mask = torch.full(allowed.shape, torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(allowed, 0.0)[:, None]


def flex_mask(places: Places, scope: Scope) -> BlockMask:
    """The same rule as a FlexAttention `BlockMask` over `(rows, 1, places, places)`."""

    def at(row: torch.Tensor, index: torch.Tensor) -> Places:
        return Places(*(field[row, index] for field in places))

    def rule(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return attends(at(row, query), at(row, key), query, key, scope)

    rows, count = places.segment.shape
    return create_block_mask(rule, rows, None, count, count, device=str(places.segment.device))
