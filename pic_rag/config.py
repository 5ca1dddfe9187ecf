"""What a PIC compressor is, apart from its weights. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast, get_args

from pic_rag.checks import as_whole, check_whole

TextScope = Literal["segment", "chunk"]
MemoryScope = Literal["chunk", "chunk+past", "segment"]
SlotPositions = Literal["spread", "append"]
GeneratorPositions = Literal["contiguous", "spread"]

RAW_TEXT = 1
"""The ratio of a memory that is the text itself: the generator's own token embeddings. No compressor serves it."""

PRESETS: dict[str, dict[str, str]] = {
    "pic": {"text_scope": "segment", "memory_scope": "chunk+past", "positions": "spread"},
    "local": {"text_scope": "chunk", "memory_scope": "chunk", "positions": "spread"},
    "global": {"text_scope": "segment", "memory_scope": "segment", "positions": "append"},
}


def described(text: str, **kwargs: Any) -> Any:  # noqa: ANN401 - a dataclass field of any type
    """A dataclass field with its help, unit included."""
    return dataclasses.field(metadata={"help": text}, **kwargs)


@dataclass(frozen=True)
class PicConfig:
    """The settings of a compressor; all of them are part of its fingerprint.

    Raises:
        ValueError: when a field breaks its rule; the message names the field, the rule and the value.
    """

    ratio: int = described("text tokens per memory token when the caller names no ratio", default=4)
    ratios: tuple[int, ...] = described(
        "ratios the compressor serves, in text tokens per memory token", default=(2, 4, 8, 16, 32, 64)
    )
    slots_per_chunk: int = described("slots in a full chunk; chunk_tokens = slots_per_chunk * ratio", default=4)
    segment_tokens: int = described("text tokens in one encoder sequence, at most", default=512)
    text_scope: TextScope = described(
        "what text attends to: earlier text of its segment, or of its chunk", default="segment"
    )
    memory_scope: MemoryScope = described("what a slot attends to besides itself and its chunk", default="chunk+past")
    positions: SlotPositions = described(
        "slots sit inside their chunk's positions, or after the segment", default="spread"
    )
    generator_positions: GeneratorPositions = described(
        "memory tokens sit side by side in a prompt, or as far apart as the text they stand for", default="contiguous"
    )
    residual_pool: bool = described(
        "add the mean of the generator's token embeddings over the slot's span", default=True
    )
    encoder_layers: int | None = described(
        "layers of the base model the encoder keeps, from the first; None: all", default=None
    )
    lora_rank: int = described("rank of the LoRA on every linear layer of the encoder; 0: none", default=32)
    lora_alpha: int = described("LoRA scale is lora_alpha / lora_rank", default=32)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", _rising("ratios", self.ratios))
        for name in ("ratio", "slots_per_chunk", "segment_tokens", "lora_alpha"):
            object.__setattr__(self, name, check_whole(name, getattr(self, name)))
        for ratio in self.ratios:
            if ratio == RAW_TEXT:
                raise ValueError(f"ratios must be 2 or more, got {self.ratios}. Ratio 1 is the text itself.")
            if self.segment_tokens % ratio:
                raise ValueError(
                    f"segment_tokens must be a multiple of every ratio, got segment_tokens={self.segment_tokens} "
                    f"and ratio={ratio}."
                )
        if self.encoder_layers is not None:
            object.__setattr__(self, "encoder_layers", check_whole("encoder_layers", self.encoder_layers))
        if self.lora_rank != 0:
            object.__setattr__(self, "lora_rank", check_whole("lora_rank", self.lora_rank))
        if not isinstance(self.residual_pool, bool):
            raise ValueError(f"residual_pool must be true or false, got {self.residual_pool!r}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        self.check_ratio(self.ratio)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PicConfig:  # noqa: ANN401 - any field of the config
        """The configuration called `pic`, `local` or `global`, with any field overridden."""
        if name not in list(PRESETS):
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}.")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PicConfig:
        """Build from `to_dict()`'s form; an unknown key raises ValueError and names the known ones."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"Unknown PicConfig field {unknown[0]!r}. Known fields: {', '.join(sorted(known))}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {**dataclasses.asdict(self), "ratios": list(self.ratios)}

    def check_ratio(self, ratio: int | None) -> int:
        """The ratio to use: the given one if this compressor serves it, the default when None.

        Raises:
            ValueError: when the compressor does not serve that ratio.
        """
        if ratio is None:
            return self.ratio
        if as_whole(ratio) not in self.ratios:
            served = ", ".join(map(str, self.ratios))
            raise ValueError(f"ratio must be one of {served} (the ratios this compressor serves), got {ratio!r}.")
        return cast("int", as_whole(ratio))

    @property
    def foldable(self) -> bool:
        """Whether chunks are independent of each other, so that they can be folded into the batch.

        Appended slots are not: their positions follow the whole segment's text.
        """
        return self.text_scope == "chunk" and self.memory_scope == "chunk" and self.positions == "spread"


_CHOICES = {
    "text_scope": get_args(TextScope),
    "memory_scope": get_args(MemoryScope),
    "positions": get_args(SlotPositions),
    "generator_positions": get_args(GeneratorPositions),
}


def _rising(name: str, values: Any) -> tuple[int, ...]:  # noqa: ANN401 - whatever the user gave
    """The values as a tuple, in increasing order: weights given beside them belong to them one by one."""
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"{name} must be a list of at least one whole number, got {values!r}.")
    numbers = tuple(check_whole(name, value) for value in values)
    if any(left >= right for left, right in pairwise(numbers)):
        raise ValueError(f"{name} must be in increasing order without repeats, got {numbers}.")
    return numbers
