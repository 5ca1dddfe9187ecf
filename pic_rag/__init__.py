"""Retrieved documents become memory tokens that the LLM reads in place of the text.

The public names below load on first use, so that `import pic_rag` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = {
    "Answer": "rag",
    "BaseGenerator": "generation.answering",
    "Checkpoint": "models.checkpoint",
    "Compressor": "compression.compressor",
    "Document": "retrieval.documents",
    "DocumentError": "retrieval.documents",
    "EmbeddedModelError": "models.embedded",
    "Fidelity": "compression.fidelity",
    "FidelityCheck": "compression.fidelity",
    "Generation": "generation.answering",
    "Generator": "generation.generator",
    "HandleSigner": "store",
    "Hit": "retrieval.retriever",
    "LoadedDocuments": "retrieval.documents",
    "Memory": "memory",
    "MemoryCache": "store",
    "MemoryFormatError": "memory",
    "MemoryStore": "store",
    "Passage": "retrieval.passages",
    "PicConfig": "config",
    "PicRag": "rag",
    "RetrievedDocument": "rag",
    "Retriever": "retrieval.retriever",
    "RetrieverError": "retrieval.index_folder",
    "SQLiteStore": "store",
    "ShardStore": "store",
    "StoreError": "store",
    "UnknownHandleError": "handles",
    "VLLMGenerator": "generation.vllm.generator",
    "cache_folder": "models.embedded",
    "escape_handles": "handles",
    "find_handles": "handles",
    "load_documents": "retrieval.documents",
    "restore": "assembler",
    "shared_checkpoint": "models.sharing",
    "shared_compressor": "compression.sharing",
    "shared_generator": "generation.sharing",
    "shared_store": "store",
    "unescape_handles": "handles",
    "unload_shared": "models.sharing",
}

__all__ = [
    "Answer",
    "BaseGenerator",
    "Checkpoint",
    "Compressor",
    "Document",
    "DocumentError",
    "EmbeddedModelError",
    "Fidelity",
    "FidelityCheck",
    "Generation",
    "Generator",
    "HandleSigner",
    "Hit",
    "LoadedDocuments",
    "Memory",
    "MemoryCache",
    "MemoryFormatError",
    "MemoryStore",
    "Passage",
    "PicConfig",
    "PicRag",
    "RetrievedDocument",
    "Retriever",
    "RetrieverError",
    "SQLiteStore",
    "ShardStore",
    "StoreError",
    "UnknownHandleError",
    "VLLMGenerator",
    "cache_folder",
    "escape_handles",
    "find_handles",
    "load_documents",
    "restore",
    "shared_checkpoint",
    "shared_compressor",
    "shared_generator",
    "shared_store",
    "unescape_handles",
    "unload_shared",
]

if TYPE_CHECKING:
    from pic_rag.assembler import restore
    from pic_rag.compression.compressor import Compressor
    from pic_rag.compression.fidelity import Fidelity, FidelityCheck
    from pic_rag.compression.sharing import shared_compressor
    from pic_rag.config import PicConfig
    from pic_rag.generation.answering import BaseGenerator, Generation
    from pic_rag.generation.generator import Generator
    from pic_rag.generation.sharing import shared_generator
    from pic_rag.generation.vllm.generator import VLLMGenerator
    from pic_rag.handles import UnknownHandleError, escape_handles, find_handles, unescape_handles
    from pic_rag.memory import Memory, MemoryFormatError
    from pic_rag.models.checkpoint import Checkpoint
    from pic_rag.models.embedded import EmbeddedModelError, cache_folder
    from pic_rag.models.sharing import shared_checkpoint, unload_shared
    from pic_rag.rag import Answer, PicRag, RetrievedDocument
    from pic_rag.retrieval.documents import Document, DocumentError, LoadedDocuments, load_documents
    from pic_rag.retrieval.index_folder import RetrieverError
    from pic_rag.retrieval.passages import Passage
    from pic_rag.retrieval.retriever import Hit, Retriever
    from pic_rag.store import HandleSigner, MemoryCache, MemoryStore, ShardStore, SQLiteStore, StoreError, shared_store


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    if name not in _ROOMS:
        raise AttributeError(f"module 'pic_rag' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pic_rag.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
