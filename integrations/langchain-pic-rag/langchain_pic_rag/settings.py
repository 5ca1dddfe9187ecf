"""The settings that all components share, and what they lead to: a checkpoint, a cache, source texts.

Constructing a component reads no file. What equal settings lead to is shared in the process (`shared_compressor`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

import pic_rag
from langchain_pic_rag.sources import SourceTexts
from pic_rag import MemoryStore, shared_checkpoint, shared_compressor, shared_store

if TYPE_CHECKING:
    from pic_rag import Checkpoint, Compressor, HandleSigner, MemoryCache
else:
    Compressor = Any  # pydantic reads annotations at import, when torch must not be loaded yet


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
