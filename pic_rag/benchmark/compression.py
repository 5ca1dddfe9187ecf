"""The compressor's own speed: against its floor, with length, with mixed lengths, and against a matrix product.

The floor is one plain forward of the same encoder layers, no mask, no converter: over the same text tokens, or over
rows as long as the compressor's, which hold the slots as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from pic_rag.benchmark.measure import matrix_rate, seconds
from pic_rag.benchmark.workload import Workload
from pic_rag.compression.compressor import Compressor
from pic_rag.layout import Layout

_MIXED_TOKENS = (37, 61, 128, 190, 350, 511, 700, 1500)  # documents of a corpus of mixed lengths


@dataclass(frozen=True)
class Compression:
    """How fast the compressor is. Ratios of times are medians over repetitions that measured both.

    Attributes:
        text_tokens: measured on.
        floor_s: one plain forward over the text.
        compress_s: by ratio.
        over_floor: `compress_s` over that, by ratio.
        over_floor_with_slots: `compress_s` over a plain forward over as many places as text and slots take, by ratio;
            1.15 is the goal.
        growth: time a token of a document of `text_tokens` over that of one four times shorter; 1 is linear.
        mixed_tokens: of the corpus of mixed lengths that the next two are of.
        mixed_over_floor: time a token there over the floor's.
        padding: share of the encoder's places there that hold neither text nor slot.
        matrix_flops: operations a second of a large matrix product in the same dtype.
        mfu: operations of the floor for that corpus over what the matrix product would do in the time it took.
    """

    text_tokens: int
    floor_s: float
    compress_s: dict[int, float]
    over_floor: dict[int, float]
    over_floor_with_slots: dict[int, float]
    growth: float
    mixed_tokens: int
    mixed_over_floor: float
    padding: float
    matrix_flops: float
    mfu: float


def measure_compression(
    compressor: Compressor, workload: Workload, ratios: Sequence[int], text_tokens: int, repeats: int
) -> Compression:
    """Measure a compressor on about so many text tokens, everything once in each repetition."""
    segment = compressor.config.segment_tokens
    text_tokens = max(2, text_tokens // (2 * segment)) * 2 * segment
    documents = [workload.document(2 * segment) for _ in range(text_tokens // (2 * segment))]
    long, short = workload.document(text_tokens), workload.document(text_tokens // 4)
    mixed = [workload.document(tokens) for tokens in _mixed(text_tokens)]
    rows = text_tokens // segment
    calls: dict[str | int | tuple[str, int], Callable[[], object]] = {
        "floor": lambda: _floor(compressor, rows, segment),
        "long": lambda: compressor.compress([long], progress=False),
        "short": lambda: compressor.compress([short], progress=False),
        "mixed": lambda: compressor.compress(mixed, progress=False),
    }
    for ratio in ratios:
        calls[ratio] = lambda ratio=ratio: compressor.compress(documents, ratio, progress=False)  # type: ignore[misc]
        places = segment + segment // ratio
        calls["floor", ratio] = lambda places=places: _floor(compressor, rows, places)  # type: ignore[misc]
    calls["floor"]()  # warm
    runs = [{name: seconds(call, compressor.device) for name, call in calls.items()} for _ in range(repeats)]
    with _places(compressor) as counted:
        compressor.compress(mixed, progress=False)
    places, padding = map(sum, zip(*counted, strict=True))
    mixed_tokens = sum(_mixed(text_tokens))
    rate = matrix_rate(compressor.device, compressor.encoder.token_embedding_weight.dtype)
    with FlopCounterMode(display=False) as counter:
        _floor(compressor, rows, segment)
    useful = counter.get_total_flops() * mixed_tokens / text_tokens
    return Compression(
        text_tokens=text_tokens,
        floor_s=median(run["floor"] for run in runs),
        compress_s={ratio: median(run[ratio] for run in runs) for ratio in ratios},
        over_floor={ratio: median(run[ratio] / run["floor"] for run in runs) for ratio in ratios},
        over_floor_with_slots={ratio: median(run[ratio] / run["floor", ratio] for run in runs) for ratio in ratios},
        growth=median(run["long"] / run["short"] / (text_tokens / (text_tokens // 4)) for run in runs),
        mixed_tokens=mixed_tokens,
        mixed_over_floor=median(run["mixed"] / mixed_tokens / (run["floor"] / text_tokens) for run in runs),
        padding=padding / places,
        matrix_flops=rate,
        mfu=median(useful / run["mixed"] / rate for run in runs),
    )


@torch.inference_mode()
def _floor(compressor: Compressor, rows: int, places: int) -> None:
    """One plain forward over so many rows of so many places, in batches as the compressor makes them."""
    ids = torch.arange(rows * places).view(rows, places) % len(compressor.encoder.token_embedding_weight)
    for batch in ids.split(compressor.batch_size):
        compressor.encoder.decoder(input_ids=batch.to(compressor.device), use_cache=False)


def _mixed(text_tokens: int) -> list[int]:
    """Tokens of the documents of a corpus of about so many."""
    return list(_MIXED_TOKENS) * max(1, text_tokens // sum(_MIXED_TOKENS))


@contextmanager
def _places(compressor: Compressor) -> Iterator[list[tuple[int, int]]]:
    """Places, and those of them that are padding, of every layout that the encoder is given meanwhile."""
    counted: list[tuple[int, int]] = []

    def count(module: torch.nn.Module, arguments: tuple[Layout, ...]) -> None:
        segment = arguments[0].segment
        counted.append((segment.numel(), int((segment < 0).sum())))

    hook = compressor.encoder.register_forward_pre_hook(count)
    try:
        yield counted
    finally:
        hook.remove()
