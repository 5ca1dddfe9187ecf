"""The settings that all components share, and what they lead to: a compressor, a cache, source texts.

Constructing a component reads no file. Models are loaded on first use and shared by equal settings (`models`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pic_rag
from pic_rag import MemoryStore
from pydantic import BaseModel, ConfigDict, Field

from langchain_pic_rag.models import Loading, default_store, load_compressor
from langchain_pic_rag.sources import SourceTexts

if TYPE_CHECKING:
    from pic_rag import Compressor, MemoryCache
else:
    Compressor = Any  # pydantic reads annotations at import, when torch must not be loaded yet


class StoreSettings(BaseModel):
    """Where memories and source texts are kept."""

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, extra="forbid")

    store: MemoryStore | None = None
    """Keys to bytes: a pic-rag store or any LangChain `ByteStore`. None: a SQLite file in `cache_folder`."""

    namespace: str = Field(default="default", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """Keeps tenants apart: a handle resolves only in the namespace it was made in."""

    cache_folder: str | None = None
    """Folder of the default store; None: pic-rag's own. (Models are cached where PIC_RAG_CACHE and HF_HOME say.)"""

    def get_store(self) -> MemoryStore:
        """The store in use."""
        return self.store if self.store is not None else default_store(self.cache_folder)

    @property
    def sources(self) -> SourceTexts:
        """Source texts by handle, in this namespace of the store."""
        return SourceTexts(self.get_store(), self.namespace)


class ModelSettings(StoreSettings):
    """Which models are used, besides where memories are kept."""

    model_name: str | None = Field(default=None, alias="model")
    """Folder or hub id of a trained compressor, which names its generator; None: the one shipped with pic-rag."""

    generator_name: str | None = None
    """Where the generator is, when it is not where the compressor's checkpoint says."""

    device: str | None = None
    """As torch names it; None picks cuda, mps or cpu."""

    dtype: str | None = None
    """Such as "bfloat16"; None picks what the device is fast at."""

    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `from_pretrained`, such as `attn_implementation`."""

    compressor: Compressor | None = Field(default=None, exclude=True, repr=False)
    """A ready `pic_rag.Compressor`, used instead of the one `model_name` names."""

    @property
    def loading(self) -> Loading:
        """The settings that decide which models are loaded."""
        return Loading.of(self.model_name, self.generator_name, self.device, self.dtype, self.model_kwargs)

    def get_compressor(self) -> Compressor:
        """The compressor, loaded at the first call of any component with the same settings."""
        return self.compressor if self.compressor is not None else load_compressor(self.loading)

    def get_memory_cache(self) -> MemoryCache:
        """The memories of this compressor in this namespace."""
        return pic_rag.MemoryCache(self.get_store(), self.get_compressor().fingerprint, namespace=self.namespace)
