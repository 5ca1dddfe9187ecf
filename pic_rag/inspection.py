"""Pictures of the PIC rule and of what it does: who may attend to whom, and where each memory token looks.

matplotlib (the extra `plot`) is imported by the functions that draw, through its object interface: no window, no
global state. Shapes are named as in `pic_rag.mask`. This file does not know where a figure is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pic_rag.chunking import Segment, place_slots, token_segments
from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig
from pic_rag.layout import build_layout
from pic_rag.mask import Places, Scope, allowed_pairs
from pic_rag.reporting import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELLED_PLACES = 64  # more labels than that cannot be read
_KINDS = ("not allowed", "text to text", "memory token to text", "memory token to memory token")
_SEEN = {
    "chunk": "memory tokens see their chunk",
    "chunk+past": "memory tokens see their chunk and earlier memory tokens",
    "segment": "memory tokens see their segment",
}
_COLOURS = ("#f4f4f2", "#9db4c8", "#d9822b", "#7a3b8f")


@dataclass(frozen=True, eq=False)
class Pattern:
    """The mask of one segment.

    Attributes:
        allowed: `(places, places)` bool; row i, column j is true where place i may attend to place j.
        labels: the token of each text place, `m0`, `m1`, ... for the slots.
        chunk: `(places,)` the chunk of each place.
        is_slot: `(places,)` bool.
        title: the settings in words.
    """

    allowed: np.ndarray
    labels: list[str]
    chunk: np.ndarray
    is_slot: np.ndarray
    title: str

    @property
    def text_tokens(self) -> int:
        """Text places; slots come after them."""
        return int((~self.is_slot).sum())


def mask_pattern(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PicConfig,
    ratio: int | None = None,
    *,
    max_tokens: int | None = None,
) -> Pattern:
    """The PIC mask for the beginning of a text.

    Args:
        text: its first segment is taken.
        tokenizer: the compressor's.
        config: whose rule to draw.
        ratio: text tokens per memory token; None for the configuration's.
        max_tokens: take at most so many tokens of it.

    Raises:
        ValueError: when the text has no token, or the configuration does not serve the ratio.
    """
    ratio = config.check_ratio(ratio)
    segment = _first_segment(text, tokenizer, config, ratio, max_tokens)
    layout = build_layout([segment], positions=config.positions)
    row = [field[0].numpy() for field in layout.places]
    _, chunk, is_slot = row
    return Pattern(
        allowed=_allowed(layout.places, config),
        labels=[*_token_labels(segment, tokenizer), *(f"m{number}" for number in range(len(segment.chunk)))],
        chunk=chunk,
        is_slot=is_slot,
        title=f"text sees its {config.text_scope}, {_SEEN[config.memory_scope]}, ratio {ratio}",
    )


def render_mask(pattern: Pattern) -> str:
    """The mask as text: a row for every place, `x` where it may attend, `.` where it comes later or is kept apart.

    Chunks, and text and memory tokens, are set apart by a space.
    """
    width = max(len(label) for label in pattern.labels)
    lines = []
    for label, row in zip(pattern.labels, pattern.allowed, strict=True):
        cells = ["x" if allowed else "." for allowed in row]
        for edge in reversed(_edges(pattern)):
            cells.insert(edge, " ")
        lines.append(f"{label:>{width}}  {''.join(cells)}")
    return "\n".join(lines)


def draw_mask(pattern: Pattern) -> Figure:
    """The mask as a picture; `figure.savefig(path)` keeps it.

    Raises:
        ImportError: without matplotlib.
    """
    figure = _figure(_side(len(pattern.labels)) + 0.6, _side(len(pattern.labels)) + 1.2)
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    to_slot = pattern.is_slot[None, :] & pattern.is_slot[:, None]
    kinds = np.where(pattern.allowed, 1 + pattern.is_slot[:, None] + to_slot, 0)
    axes = figure.add_subplot()
    axes.imshow(kinds, cmap=ListedColormap(_COLOURS), vmin=0, vmax=3, interpolation="nearest")
    _draw_edges(axes, pattern, _edges(pattern))
    _label(axes.xaxis, pattern.labels, "may attend to")
    _label(axes.yaxis, pattern.labels, "place in the encoder row: text, then memory tokens")
    figure.suptitle(f"The PIC mask: {pattern.title}", fontsize=11)
    patches = [
        Patch(facecolor=colour, edgecolor="#888888", label=kind) for kind, colour in zip(_KINDS, _COLOURS, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


@dataclass(frozen=True, eq=False)
class Attention:
    """Where the memory tokens of one segment attend.

    Attributes:
        weights: `(layers, slots, places)` float32, mean over the heads; a row sums to 1.
        pattern: the segment's mask and labels.
    """

    weights: torch.Tensor
    pattern: Pattern

    def last_layers(self, count: int) -> torch.Tensor:
        """`(slots, places)` mean over the last layers.

        Raises:
            ValueError: when there are not so many.
        """
        if not 1 <= count <= len(self.weights):
            raise ValueError(f"layers must be from 1 to {len(self.weights)} (the encoder's), got {count}.")
        return self.weights[-count:].mean(0)


@torch.inference_mode()
def slot_attention(
    compressor: Compressor, text: str, ratio: int | None = None, *, max_tokens: int | None = None
) -> Attention:
    """Compress the beginning of a text and look where its memory tokens attend.

    Args:
        compressor: loaded with `attn_implementation="eager"`, the only one that gives its weights.
        text: its first segment is taken.
        ratio: text tokens per memory token; None for the compressor's default.
        max_tokens: take at most so many tokens of it.

    Raises:
        ValueError: when the compressor is not eager, the text has no token, or the ratio is not served.
    """
    decoder = compressor.encoder.decoder
    implementation = compressor.encoder.attn_implementation
    if implementation != "eager":
        raise ValueError(
            f"attn_implementation must be 'eager' to show attention weights, got {implementation!r}. "
            "Load it with Compressor.from_pretrained(..., attn_implementation='eager')."
        )
    config = compressor.config
    segment = _first_segment(text, compressor.tokenizer, config, config.check_ratio(ratio), max_tokens)
    layout = build_layout([segment], positions=config.positions)
    weights: list[torch.Tensor] = []  # (slots, places) of each layer

    def keep(module: torch.nn.Module, arguments: Any, outputs: Any) -> None:  # noqa: ANN401 - torch's hook
        weights.append(outputs[1][0].float().mean(0)[layout.slot_place].cpu())

    layers: Any = decoder.layers
    hooks = [layer.self_attn.register_forward_hook(keep) for layer in layers]
    try:
        compressor.encoder(layout.to(compressor.device))
    finally:
        for hook in hooks:
            hook.remove()
    pattern = mask_pattern(text, compressor.tokenizer, config, ratio, max_tokens=max_tokens)
    return Attention(torch.stack(weights), pattern)


def draw_attention(attention: Attention, *, layers: int = 4, per_layer: bool = False) -> Figure:
    """A heat map: a row for every memory token, a column for every place it may look at.

    Args:
        attention: of `slot_attention`.
        layers: the last layers to show; fewer when the encoder has fewer.
        per_layer: one panel for each of them in place of one for their mean.

    Raises:
        ImportError: without matplotlib.
        ValueError: when `layers` is below 1.
    """
    count = min(layers, len(attention.weights))
    first = len(attention.weights) - count
    if per_layer and count > 0:
        panels = [(f"layer {first + number + 1}", weights) for number, weights in enumerate(attention.weights[first:])]
    else:
        panels = [(f"mean of the last {count} layers" if count > 1 else "last layer", attention.last_layers(count))]
    pattern = attention.pattern
    slots, places = panels[0][1].shape
    height = min(max(0.24 * slots, 1.6), 9.0)
    figure = _figure(_side(places) + 2.0, 1.4 + (height + 0.9) * len(panels))
    for axes, (name, weights) in zip(figure.subplots(len(panels), squeeze=False).flat, panels, strict=True):
        allowed = np.ma.masked_where(~pattern.allowed[pattern.is_slot], weights.numpy())
        image = axes.imshow(allowed, cmap=_heat(), norm=_scale(), aspect="auto", interpolation="nearest")
        _draw_edges(axes, pattern, _slot_edges(pattern))
        _label(axes.xaxis, pattern.labels, "")
        _label(axes.yaxis, pattern.labels[pattern.text_tokens :], "memory token")
        axes.set_title(name, fontsize=10)
        figure.colorbar(image, ax=axes, label="attention weight", fraction=0.03, pad=0.01)
    figure.suptitle("Where each memory token attends (mean over heads)", fontsize=11)
    axes.set_xlabel("text tokens, then memory tokens (grey: the mask does not allow it)")
    return figure


def _allowed(places: Places, config: PicConfig) -> np.ndarray:
    return allowed_pairs(places, Scope(config.text_scope, config.memory_scope))[0].numpy()


def _first_segment(
    text: str, tokenizer: PreTrainedTokenizerBase, config: PicConfig, ratio: int, max_tokens: int | None
) -> Segment:
    first = next(token_segments([text], tokenizer, config.segment_tokens), None)
    if first is None:
        raise ValueError(f"text must hold at least one token, got {text!r}.")
    return place_slots(first[1][:max_tokens], ratio, config.slots_per_chunk)


def _token_labels(segment: Segment, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens as they are read: line breaks and the like as escapes, a space alone as `_`."""
    pieces = [str(tokenizer.decode([token_id])) for token_id in segment.token_ids.tolist()]
    escaped = [piece if piece.isprintable() else piece.encode("unicode_escape").decode() for piece in pieces]
    return [piece.strip() or "_" for piece in escaped]


def _edges(pattern: Pattern) -> list[int]:
    """First place of every chunk's text and of every chunk's slots, but the very first."""
    kind = list(zip(pattern.chunk.tolist(), pattern.is_slot.tolist(), strict=True))
    return [place for place in range(1, len(kind)) if kind[place] != kind[place - 1]]


def _slot_edges(pattern: Pattern) -> list[int]:
    return [edge - pattern.text_tokens for edge in _edges(pattern) if edge > pattern.text_tokens]


def _figure(width: float, height: float) -> Figure:
    figure = new_figure(width, height)
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    return figure


def _side(places: int) -> float:
    """Inches for so many places: readable labels when there are few, one page when there are many."""
    return min(max(0.2 * places, 5.0), 13.0)


def _heat() -> Any:  # noqa: ANN401 - matplotlib's Colormap
    from matplotlib import colormaps

    return colormaps["magma_r"].with_extremes(bad="#e6e6e6")


def _scale() -> Any:  # noqa: ANN401 - matplotlib's Normalize
    """Square root: a few tokens take most of the weight (attention sinks), the rest should be seen too."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0)


def _draw_edges(axes: Axes, pattern: Pattern, rows: Sequence[int]) -> None:
    """Thin lines between chunks, thinner where there are many, and a stronger one between text and memory tokens."""
    width = 0.6 if len(pattern.labels) <= _LABELLED_PLACES else 0.15
    for column in _edges(pattern):
        axes.axvline(column - 0.5, color="#444444", linewidth=1.2 if column == pattern.text_tokens else width)
    for row in rows:
        axes.axhline(row - 0.5, color="#444444", linewidth=width)


def _label(axis: Any, labels: Sequence[str], title: str) -> None:  # noqa: ANN401 - matplotlib's Axis
    if len(labels) <= _LABELLED_PLACES:
        rotation = 90 if axis.axis_name == "x" else 0
        axis.set_ticks(range(len(labels)), labels, fontsize=7, rotation=rotation, family="monospace", parse_math=False)
    axis.set_label_text(title)
