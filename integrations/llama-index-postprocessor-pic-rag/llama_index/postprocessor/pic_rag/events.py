"""What instrumentation sees of a compression: attach an event handler to LlamaIndex's dispatcher to read them."""

from __future__ import annotations

from llama_index.core.instrumentation.events.base import BaseEvent


class PICCompressStartEvent(BaseEvent):
    """Nodes are about to become memories.

    Attributes:
        documents: nodes with text.
        ratio: text tokens per memory token, as it was set; None is the compressor's default.
        compressor: the compressor's folder or hub id; None is the one shipped with pic-rag.
    """

    documents: int
    ratio: int | tuple[int, ...] | None
    compressor: str | None

    @classmethod
    def class_name(cls) -> str:
        """The event's name in traces."""
        return "PICCompressStartEvent"


class PICCompressEndEvent(BaseEvent):
    """Nodes have become memories.

    Attributes:
        documents: nodes with text.
        cached: how many of their memories were in the store already.
        text_tokens: tokens of the nodes' text.
        memory_tokens: memory tokens that the LLM reads in their place.
        tokens_saved: the difference.
        latency_ms: loading a model that was not loaded yet included.
    """

    documents: int
    cached: int
    text_tokens: int
    memory_tokens: int
    tokens_saved: int
    latency_ms: float

    @classmethod
    def class_name(cls) -> str:
        """The event's name in traces."""
        return "PICCompressEndEvent"
