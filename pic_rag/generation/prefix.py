"""Keys and values of memories that the generator has read: the same documents again cost no second reading.

A prompt with memories is cut into *blocks*. A block is a run of memories with little text between them, the documents
of one retrieval say, and the text that stands before it; what follows the last memory, the question, is in no block.
A block's keys and values depend on all rows before its own, and so does its name: a conversation that goes on with
other documents still shares the blocks of its first ones. A block is read by itself, the first time as well, so among
prompts that are answered one by one whether it was kept changes no bit of an answer. In a batch, which rounds otherwise
in any case, blocks that several prompts share are read by themselves, once, and all other rows in one go.

This file knows rows, and a cache of transformers. It does not know tokenizers, sampling or threads.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from pic_rag.assembler import MEMORY_ROW, Assembled
from pic_rag.memory import Memory

PREFIX_CACHE_BYTES = 256 * 2**20
"""Keys and values that are kept by default."""

GAP_ROWS = 16
"""So many rows of text between two memories part them into two blocks."""

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Of every layer, keys and values: `(kv_heads, rows, head width)` each."""


@dataclass(frozen=True)
class Block:
    """Rows of a prompt that end with a memory.

    Attributes:
        name: hash of all rows of the prompt up to the end of this block.
        start: its first row in the prompt.
        end: the row after its last.
    """

    name: bytes
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Prefix:
    """What of one prompt need not be read again.

    Attributes:
        prompt_tokens: rows of the prompt.
        blocks: the prompt's blocks, in order.
        kept: keys and values of the first blocks.
    """

    prompt_tokens: int
    blocks: list[Block]
    kept: list[Layers]

    @property
    def cached_tokens(self) -> int:
        """Rows whose keys and values are there."""
        return self.blocks[len(self.kept) - 1].end if self.kept else 0

    @property
    def next_block(self) -> Block | None:
        """The first block to read; None when all are there, or no row follows it."""
        number = len(self.kept)
        if number == len(self.blocks) or self.blocks[number].end == self.prompt_tokens:
            return None
        return self.blocks[number]

    def with_next(self, layers: Layers) -> Prefix:
        """With the keys and values of `next_block`."""
        return replace(self, kept=[*self.kept, layers])

    def without_kept(self) -> Prefix:
        """The same prompt, to be read whole."""
        return replace(self, kept=[])


class PrefixCache:
    """Keys and values of the blocks that were read last, for one generator and one reader.

    The caller sees to it that one thread at a time uses it.

    Args:
        max_bytes: keys and values to keep; those used longest ago go first.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self._kept: OrderedDict[bytes, Layers] = OrderedDict()

    def find(self, prompt: Assembled) -> Prefix:
        """What is kept of a prompt. Its last row is always left to read: it says what comes next."""
        blocks = list(cut_blocks(prompt))
        kept: list[Layers] = []
        for block in blocks:
            if block.name not in self._kept or block.end == prompt.prompt_tokens:
                break
            kept.append(self._kept[block.name])
        return Prefix(prompt.prompt_tokens, blocks, kept)

    def keep(self, prefixes: Sequence[Prefix], past: DynamicCache) -> None:
        """Take up what a batch has read.

        Args:
            prefixes: of the batch's prompts, as found before it was read.
            past: `join(prefixes)` after the model has read all rows, and perhaps written some.
        """
        read = _prompt_columns(prefixes)
        for at, prefix in enumerate(prefixes):
            shift = read - prefix.prompt_tokens  # from a row that was read now to its column
            for number, block in reversed(list(enumerate(prefix.blocks))):  # the first last: no other goes without it
                if block.name not in self._kept:
                    there = number < len(prefix.kept)
                    layers = prefix.kept[number] if there else cut(past, at, block.start + shift, block.end + shift)
                    if _size_bytes(layers) > self.max_bytes:
                        continue
                    self._add(block.name, layers)
                self._kept.move_to_end(block.name)
        while self.size_bytes > self.max_bytes:
            self.size_bytes -= _size_bytes(self._kept.popitem(last=False)[1])

    def _add(self, name: bytes, layers: Layers) -> None:
        self._kept[name] = layers
        self.size_bytes += _size_bytes(layers)


def supports_reuse(model: PreTrainedModel) -> bool:
    """Whether a row's keys and values are kept whole, and depend on nothing but the rows before it.

    Not so with sliding windows, recurrent states, or positions that are scaled by the length of all the text.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    layers = DynamicCache(config=model.config).layers
    return (
        all(type(layer) is DynamicLayer for layer in layers)
        and rope.get("rope_type") not in ("dynamic", "longrope")
        and model.generation_config.cache_implementation is None
    )


def cut_blocks(prompt: Assembled) -> Iterator[Block]:
    """The blocks of a prompt. Their names tell embeddings and positions apart as the generator sees them.

    Embeddings in its own dtype; positions of memories, from which those of text follow. The device counts as well: what
    was read before the generator was moved lies on another.
    """
    weight = next(prompt.token_embeddings.parameters())
    dtype, root = weight.dtype, str(weight.device).encode()
    position_ids = prompt.position_ids
    is_memory = (prompt.token_ids == MEMORY_ROW).tolist()
    name, start, end = root, 0, 0
    for memory in filter(_has_rows, prompt.memories):
        first = is_memory.index(True, end)
        if end and first - end >= GAP_ROWS:
            yield Block(name, start, end)
            start = end
        text = prompt.token_ids[end:first].numpy().tobytes()
        hashed = hashlib.sha256(name + len(text).to_bytes(8, "little") + text)
        hashed.update(memory.embeddings.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes())
        end = first + memory.memory_tokens
        hashed.update(position_ids[first:end].numpy().tobytes())
        name = hashed.digest()
    if end:
        yield Block(name, start, end)


def shared_blocks(prefixes: Sequence[Prefix]) -> set[bytes]:
    """Names of the blocks to read by themselves: those that several prompts have, or the only one."""
    uses = Counter(block.name for prefix in prefixes for block in prefix.blocks)
    return {name for name, times in uses.items() if times > 1 or len(prefixes) == 1}


def spares_rows(prefixes: Sequence[Prefix], ahead: Collection[bytes]) -> bool:
    """Whether reuse pays: in a batch kept rows and rows to read are padded apart, up to the most that a prompt has.

    Fewer rows have to be read then, and the batch must not become much wider, for every token to come attends to all.

    Args:
        prefixes: of the batch's prompts.
        ahead: names of blocks that will be read by themselves.
    """
    if len(prefixes) == 1:
        return True
    longest = max(prefix.prompt_tokens for prefix in prefixes)
    to_read = {block.name: block for prefix in prefixes for block in _next_blocks(prefix, ahead)}
    reused = [max([prefix.cached_tokens, *(block.end for block in _next_blocks(prefix, ahead))]) for prefix in prefixes]
    left = max(prefix.prompt_tokens - rows for prefix, rows in zip(prefixes, reused, strict=True))
    alone = sum(block.end - block.start for block in to_read.values())
    return len(prefixes) * left + alone < len(prefixes) * longest and max(reused) + left <= 1.25 * longest


def _next_blocks(prefix: Prefix, ahead: Collection[bytes]) -> Iterator[Block]:
    """The blocks behind the kept ones that will be read by themselves."""
    unread = prefix.blocks[len(prefix.kept) :]
    return takewhile(lambda block: block.name in ahead and block.end < prefix.prompt_tokens, unread)


def _prompt_columns(prefixes: Sequence[Prefix]) -> int:
    """Columns that a batch of prompts takes: the kept rows and the rows to read, each with their own padding before."""
    kept = max(prefix.cached_tokens for prefix in prefixes)
    return kept + max(prefix.prompt_tokens - prefix.cached_tokens for prefix in prefixes)


def join(prefixes: Sequence[Prefix], model: PreTrainedModel) -> DynamicCache:
    """The kept keys and values of a batch, padded on the left, as the past of the model."""
    past = DynamicCache(config=model.config)
    columns = max(prefix.cached_tokens for prefix in prefixes)
    if columns:
        for at, layer in enumerate(_layers(past)):
            keys, values = (
                torch.stack([_pad([layers[at][kind] for layers in prefix.kept], columns, like) for prefix in prefixes])
                for kind, like in enumerate(_any_block(prefixes)[at])
            )  # (prompts, kv_heads, columns, head width)
            layer.update(keys, values)
    return past


def _any_block(prefixes: Sequence[Prefix]) -> Layers:
    return next(layers for prefix in prefixes for layers in prefix.kept)


def _pad(blocks: Sequence[torch.Tensor], columns: int, like: torch.Tensor) -> torch.Tensor:
    """`(kv_heads, columns, head width)`: blocks one after the other, zeros before them."""
    padding = columns - sum(block.shape[1] for block in blocks)
    return torch.cat([like.new_zeros(like.shape[0], padding, like.shape[2]), *blocks], dim=1)


def cut(past: DynamicCache, at: int, start: int, end: int) -> Layers:
    """Keys and values of one row's columns. A copy, for a view would hold the whole batch."""
    read = [(cast("torch.Tensor", layer.keys), cast("torch.Tensor", layer.values)) for layer in _layers(past)]
    return [(keys[at, :, start:end].clone(), values[at, :, start:end].clone()) for keys, values in read]


def _layers(past: DynamicCache) -> list[DynamicLayer]:
    return cast("list[DynamicLayer]", past.layers)  # of no other kind, says `supports_reuse`


def _size_bytes(layers: Layers) -> int:
    return sum(tensor.nbytes for pair in layers for tensor in pair)


def _has_rows(memory: Memory) -> bool:
    return memory.memory_tokens > 0
