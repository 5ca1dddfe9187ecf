"""What the postprocessor and the ingestion transform have in common: how nodes become memories."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.bridge.pydantic import BaseModel, ConfigDict, Field, model_validator
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.postprocessor.pic_rag.events import PICCompressEndEvent, PICCompressStartEvent
from llama_index.postprocessor.pic_rag.nodes import restore_node

from pic_rag import HandleSigner, shared_checkpoint, shared_compressor, shared_generator, shared_store

if TYPE_CHECKING:
    from pic_rag import Compressor, Generator, Memory, MemoryCache, MemoryStore

dispatcher = get_dispatcher(__name__)


class CompressionSettings(BaseModel):
    """Settings of a compression; nothing is loaded before the first node is compressed."""

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    model_name: str | None = Field(
        default=None, description="Folder or hub id of a trained compressor; None: the one shipped with pic-rag."
    )
    ratio: int | tuple[int, ...] | None = Field(
        default=None,
        description="Text tokens per memory token; None: the compressor's default. [2, 16] is 2 for the first node, "
        "which a retriever finds best, and 16 for all others. With min_fidelity the highest one to try; None: the "
        "highest that is served.",
    )
    min_fidelity: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Each text gets the highest ratio whose memory keeps so much of it, as the generator finds, else "
        "stays raw text (a memory of ratio 1). None: ratio for all, unchecked.",
    )
    device: str | None = Field(default=None, description="Where to compress; None: cuda, mps or cpu.")
    dtype: str | None = Field(default=None, description="Compute dtype; None: the device's fast one.")
    batch_size: int | None = Field(default=None, ge=1, description="Encoder rows computed at once.")
    namespace: str = Field(
        default="default",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        description="Keeps the memories of different users of a store apart.",
    )
    at_rest: Literal["bf16", "int8", "int4"] = Field(default="bf16", description="How memories are kept in the store.")
    metadata_mode: MetadataMode = Field(
        default=MetadataMode.LLM,
        description="What of a node is compressed: 'llm' what the LLM would have read, 'none' the text alone.",
    )
    cache_folder: str | None = Field(
        default=None, description="Folder of the default store, memories.sqlite; None: pic-rag's cache folder."
    )
    model_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of Compressor.from_pretrained."
    )
    compressor: Any = Field(
        default=None, exclude=True, repr=False, description="A pic_rag.Compressor, in place of a name."
    )
    generator: Any = Field(
        default=None,
        exclude=True,
        repr=False,
        description="A pic_rag.Generator that checks for min_fidelity; None: the one that PICLLM with the same "
        "model_name, device and dtype loads.",
    )
    store: Any = Field(
        default=None, exclude=True, repr=False, description="A pic_rag.MemoryStore or any LangChain ByteStore."
    )

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """LlamaIndex takes a misspelt setting without a word, and it would do nothing."""
        unknown = set(values) - set(cls.model_fields) if isinstance(values, dict) else ()
        if unknown:
            raise ValueError(
                f"Unknown setting {min(unknown)!r}. {cls.__name__} has: {', '.join(sorted(cls.model_fields))}."
            )
        return values

    def __getstate__(self) -> dict[str, Any]:
        """LlamaIndex deletes what cannot be pickled, here as well, and the copy would load another one in its place."""
        given = {name: getattr(self, name) for name in ("compressor", "generator", "store")}
        state = super().__getstate__()
        for name, value in given.items():
            if name not in state["__dict__"]:
                self.__dict__.update(given)
                remedy = "a SQLiteStore, or cache_folder," if name == "store" else "model_name"
                raise TypeError(
                    f"{type(self).__name__} must have a {name} that can be pickled, got {type(value).__name__}. "
                    f"Give {remedy} in its place."
                )
        return state

    def get_compressor(self) -> Compressor:
        """The compressor: the one given, or one that all components with the same settings share."""
        if self.compressor is not None:
            return self.compressor
        return shared_compressor(self.model_name, device=self.device, dtype=self.dtype, **self.model_kwargs)

    def get_store(self) -> MemoryStore:
        """The store in use."""
        return self.store if self.store is not None else shared_store(self.cache_folder)

    def get_memory_cache(self) -> MemoryCache:
        """The memories kept for this compressor and namespace."""
        from pic_rag import MemoryCache

        fingerprint = self.get_compressor().fingerprint
        return MemoryCache(self.get_store(), fingerprint, namespace=self.namespace, at_rest=self.at_rest)

    @property
    def signer(self) -> HandleSigner:
        """Signs the handles that this namespace hands out."""
        return HandleSigner(self.get_store(), self.namespace)

    def make_memories(self, nodes: Sequence[BaseNode]) -> list[Memory | None]:
        """One memory a node, in order, out of the store or made now; None for a node without text.

        Raises:
            ValueError: when the compressor does not serve the ratio, or a text is not valid Unicode.
        """
        texts = [restore_node(node).get_content(self.metadata_mode) for node in nodes]
        found = [number for number, text in enumerate(texts) if text]
        memories: list[Memory | None] = [None] * len(nodes)
        if not found:
            return memories
        begin = time.perf_counter()
        dispatcher.event(PICCompressStartEvent(documents=len(found), ratio=self.ratio, compressor=self.model_name))
        made, cached = self.get_memory_cache().get_or_compress(
            [texts[number] for number in found],
            self.get_compressor(),
            self._ratio_of_ranks(found),
            sources=[nodes[number].node_id for number in found],
            batch_size=self.batch_size,
            min_fidelity=self.min_fidelity,
            generator=self._checking_generator(),
        )
        for number, memory in zip(found, made, strict=True):
            memories[number] = memory
        dispatcher.event(_end_event(made, sum(cached), 1000 * (time.perf_counter() - begin)))
        return memories

    def _ratio_of_ranks(self, ranks: Sequence[int]) -> int | tuple[int, ...] | None:
        """The ratio of the nodes at these ranks: a node without text keeps its rank from the others."""
        if not isinstance(self.ratio, tuple) or not self.ratio:
            return self.ratio
        own = (self.ratio[min(rank, len(self.ratio) - 1)] for rank in ranks)
        return (*own, *self.ratio)  # those behind serve no text, but are checked

    def _checking_generator(self) -> Generator | None:
        if self.min_fidelity is None or self.generator is not None:
            return self.generator
        checkpoint = shared_checkpoint(self.model_name) if self.compressor is None else self.compressor.checkpoint
        return shared_generator(checkpoint, device=self.device, dtype=self.dtype)


def _end_event(memories: Sequence[Memory], cached: int, latency_ms: float) -> PICCompressEndEvent:
    text_tokens = sum(memory.text_tokens for memory in memories)
    memory_tokens = sum(memory.memory_tokens for memory in memories)
    return PICCompressEndEvent(
        documents=len(memories),
        cached=cached,
        text_tokens=text_tokens,
        memory_tokens=memory_tokens,
        tokens_saved=text_tokens - memory_tokens,
        latency_ms=latency_ms,
    )
