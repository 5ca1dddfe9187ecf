"""The ingestion transform: memories are made when documents are indexed, so that no question waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import model_validator
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.postprocessor.pic_rag.nodes import note_handle, restore_node
from llama_index.postprocessor.pic_rag.settings import CompressionSettings

_IDENTITY = ("fingerprint", "compute_dtype")


class PICTransform(CompressionSettings, TransformComponent):
    """Compresses nodes into the store, for `PICCompressor` with the same settings to find. Put it after the splitter.

    Every node carries its handle in `metadata["pic_memory"]`, hidden from LLM and embedding model: the index still
    serves any LLM. What an ingestion cache replays, or a lost store lacks, `PICCompressor` compresses again.
    """

    @model_validator(mode="after")
    def _check_ratio(self) -> PICTransform:
        if isinstance(self.ratio, tuple):
            raise ValueError(
                f"ratio must be one number at ingestion, got {self.ratio}: ranks are known when a question is asked. "
                "Transform once with each of them."
            )
        return self

    @classmethod
    def class_name(cls) -> str:
        """The component's name in serialised form."""
        return "PICTransform"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Copies of the nodes that carry their handles, in order; a node without text stays as it is."""
        return [
            restore_node(node) if memory is None else note_handle(node, memory.handle)
            for node, memory in zip(nodes, self.make_memories(nodes), strict=True)
        ]

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """As a call, without blocking the event loop."""
        return await asyncio.to_thread(self, nodes, **kwargs)

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The settings and the compressor's fingerprint: the ingestion cache's key. Loads the compressor.

        A name alone would not do: other weights in the same folder make other memories.
        """
        compressor = self.get_compressor()
        identity = dict(zip(_IDENTITY, (compressor.fingerprint, compressor.dtype), strict=True))
        return {**super().to_dict(**kwargs), **identity}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> PICTransform:
        """The component of a `to_dict`; the fingerprint in it identifies, and is no setting."""
        return super().from_dict({name: value for name, value in data.items() if name not in _IDENTITY}, **kwargs)
