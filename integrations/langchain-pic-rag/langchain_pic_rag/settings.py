"""The settings of all components, and what they lead to: a checkpoint, a cache, source texts, documents with handles.

Constructing a component reads no file. What equal settings lead to is shared in the process (`shared_compressor`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from langchain_core.documents import Document
from pydantic import BaseModel, ConfigDict, Field, model_validator

import pic_rag
from langchain_pic_rag.metadata import with_memory
from langchain_pic_rag.sources import SourceTexts
from pic_rag import MemoryStore, shared_checkpoint, shared_compressor, shared_generator, shared_store

if TYPE_CHECKING:
    from pic_rag import Checkpoint, Compressor, Generator, HandleSigner, MemoryCache
else:
    Compressor = Generator = Any  # pydantic reads annotations at import, when torch must not be loaded yet


class StoreSettings(BaseModel):
    """Where memories and source texts are kept."""

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, extra="forbid")

    ignored_settings: ClassVar[frozenset[str]] = frozenset()
    """Names that are taken and have no effect."""

    store: MemoryStore | None = None
    """Keys to bytes: a pic-rag store or any LangChain `ByteStore`. None: a SQLite file in `cache_folder`."""

    namespace: str = Field(default="default", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """Keeps tenants apart: a handle resolves only in the namespace it was made in."""

    cache_folder: str | None = None
    """Folder of the default store; None: pic-rag's own. (Models are cached where PIC_RAG_CACHE and HF_HOME say.)"""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """A misspelt setting would do nothing; pydantic's own error does not say which settings there are."""
        known = {name for field, info in cls.model_fields.items() for name in (field, info.alias) if name}
        unknown = set(values) - known - cls.ignored_settings if isinstance(values, dict) else ()
        if unknown:
            raise ValueError(f"Unknown setting {min(unknown)!r}. {cls.__name__} has: {', '.join(sorted(known))}.")
        return values

    def get_store(self) -> MemoryStore:
        """The store in use."""
        return self.store if self.store is not None else shared_store(self.cache_folder)

    @property
    def signer(self) -> HandleSigner:
        """Signs the handles that this namespace hands out, and knows them again."""
        return pic_rag.HandleSigner(self.get_store(), self.namespace)

    @property
    def sources(self) -> SourceTexts:
        """Source texts by handle, in this namespace of the store."""
        return SourceTexts(self.get_store(), self.namespace)


class ModelSettings(StoreSettings):
    """Which models are used, besides where memories are kept."""

    model_name: str | None = Field(default=None, alias="model")
    """Folder or hub id of a trained compressor, which names its generator; None: the one shipped with pic-rag."""

    device: str | None = None
    """As torch names it; None picks cuda, mps or cpu."""

    dtype: str | None = None
    """Such as "bfloat16"; None picks what the device is fast at."""

    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `Compressor.from_pretrained`, such as `attn_implementation`; `ChatPIC`'s are those of
    `Generator.from_checkpoint`, such as `merge_calls`."""

    compressor: Compressor | None = Field(default=None, exclude=True, repr=False)
    """A ready `pic_rag.Compressor`, used instead of the one `model_name` names."""

    @property
    def loading(self) -> dict[str, Any]:
        """How a model is loaded."""
        return {"device": self.device, "dtype": self.dtype, **self.model_kwargs}

    def get_checkpoint(self) -> Checkpoint:
        """What the compressor is on disk: it tells whose memories these are, and no model is loaded for it."""
        return shared_checkpoint(self.model_name) if self.compressor is None else self.compressor.checkpoint

    def get_compressor(self) -> Compressor:
        """The compressor, loaded at the first call of any component with the same settings."""
        return shared_compressor(self.model_name, **self.loading) if self.compressor is None else self.compressor

    def get_memory_cache(self) -> MemoryCache:
        """The memories of this compressor in this namespace."""
        return pic_rag.MemoryCache(self.get_store(), self.get_checkpoint().fingerprint, namespace=self.namespace)


class CompressionSettings(ModelSettings):
    """How documents become memories."""

    ratio: int | tuple[int, ...] | None = None
    """Text tokens per memory token; None: the compressor's default. `[2, 16]` is 2 for the first document, which a
    retriever finds best, and 16 for all others. With `min_fidelity` the highest one to try; None: the highest that is
    served."""

    min_fidelity: float | None = Field(default=None, ge=0.0, le=1.0)
    """Each text gets the highest ratio whose memory keeps so much of it, as the generator finds, else stays raw text
    (a memory of ratio 1). None: `ratio` for all, unchecked."""

    generator: Generator | None = Field(default=None, exclude=True, repr=False)
    """A ready `pic_rag.Generator` that checks for `min_fidelity`; None: the one that `ChatPIC` with the same
    `model_name`, `device` and `dtype` loads."""

    batch_size: int | None = Field(default=None, ge=1)
    """Encoder rows computed at once."""

    at_rest: Literal["bf16", "int8", "int4"] = "bf16"
    """How memories are written to the store: "int8" and "int4" take a half and a quarter of the space."""

    keep_source: bool = True
    """Keep each text in `metadata["pic_source_text"]` (whose `repr` is short) and, by handle, in the store, so that it
    can be restored."""

    def get_memory_cache(self) -> MemoryCache:
        """The memories of this compressor in this namespace, written as `at_rest` says."""
        fingerprint = self.get_compressor().fingerprint
        return pic_rag.MemoryCache(self.get_store(), fingerprint, namespace=self.namespace, at_rest=self.at_rest)

    def compress_originals(self, documents: Sequence[Document]) -> Compressed:
        """Documents with their text in, the same with handles out: memories from the store, or made now."""
        texts = [document.page_content for document in documents]
        labels = [label(document, number) for number, document in enumerate(documents)]
        memories, cached = self.get_memory_cache().get_or_compress(
            texts,
            self.get_compressor(),
            self.ratio,
            sources=labels,
            batch_size=self.batch_size,
            progress=False,
            min_fidelity=self.min_fidelity,
            generator=self._checking_generator(),
        )
        if self.keep_source:
            self.sources.put({memory.handle: text for memory, text in zip(memories, texts, strict=True)})
        signer = self.signer
        return Compressed(
            [
                with_memory(document, memory, signer.sign(memory.handle), text if self.keep_source else None)
                for document, memory, text in zip(documents, memories, texts, strict=True)
            ],
            text_tokens=sum(memory.text_tokens for memory in memories),
            memory_tokens=sum(memory.memory_tokens for memory in memories),
            cached_documents=sum(cached),
        )

    def _checking_generator(self) -> Generator | None:
        if self.min_fidelity is None or self.generator is not None:
            return self.generator
        return shared_generator(self.get_checkpoint(), device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Compressed:
    """Documents with handles, and what they cost and save."""

    documents: list[Document]
    text_tokens: int = 0
    memory_tokens: int = 0
    cached_documents: int = 0

    def report(self) -> dict[str, Any]:
        """What a trace shows as the outputs of the run."""
        return {
            "documents": [document.page_content for document in self.documents],
            "text_tokens": self.text_tokens,
            "memory_tokens": self.memory_tokens,
            "tokens_saved": self.text_tokens - self.memory_tokens,
            "cached_documents": self.cached_documents,
        }


def label(document: Document, number: int) -> str:
    """What messages and traces call a document."""
    return str(document.id or document.metadata.get("source") or f"document {number}")
