"""Retrieved documents become memory tokens that the LLM reads in place of the text.

The public names below load on first use, so that `import pic_rag` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = {
    "BaseGenerator": "answering",
    "Checkpoint": "checkpoint",
    "Compressor": "compressor",
    "Document": "documents",
    "Fidelity": "fidelity",
    "FidelityCheck": "fidelity",
    "Generation": "answering",
    "Generator": "generator",
    "HandleSigner": "store",
    "Memory": "memory",
    "MemoryCache": "store",
    "MemoryFormatError": "memory",
    "MemoryStore": "store",
    "PicConfig": "config",
    "PicRag": "rag",
    "Retriever": "retriever",
    "SQLiteStore": "store",
    "ShardStore": "store",
    "StoreError": "store",
    "UnknownHandleError": "handles",
    "VLLMGenerator": "vllm",
    "cache_folder": "embedded",
    "escape_handles": "handles",
    "find_handles": "handles",
    "load_documents": "documents",
    "restore": "assembler",
    "shared_checkpoint": "shared",
    "shared_compressor": "shared",
    "shared_generator": "shared",
    "shared_store": "shared",
    "unescape_handles": "handles",
    "unload_shared": "shared",
}

__all__ = [
    "BaseGenerator",
    "Checkpoint",
    "Compressor",
    "Document",
    "Fidelity",
    "FidelityCheck",
    "Generation",
    "Generator",
    "HandleSigner",
    "Memory",
    "MemoryCache",
    "MemoryFormatError",
    "MemoryStore",
    "PicConfig",
    "PicRag",
    "Retriever",
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
    from pic_rag.answering import BaseGenerator, Generation
    from pic_rag.assembler import restore
    from pic_rag.checkpoint import Checkpoint
    from pic_rag.compressor import Compressor
    from pic_rag.config import PicConfig
    from pic_rag.documents import Document, load_documents
    from pic_rag.embedded import cache_folder
    from pic_rag.fidelity import Fidelity, FidelityCheck
    from pic_rag.generator import Generator
    from pic_rag.handles import UnknownHandleError, escape_handles, find_handles, unescape_handles
    from pic_rag.memory import Memory, MemoryFormatError
    from pic_rag.rag import PicRag
    from pic_rag.retriever import Retriever
    from pic_rag.shared import shared_checkpoint, shared_compressor, shared_generator, shared_store, unload_shared
    from pic_rag.store import HandleSigner, MemoryCache, MemoryStore, ShardStore, SQLiteStore, StoreError
    from pic_rag.vllm import VLLMGenerator


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    if name not in _ROOMS:
        raise AttributeError(f"module 'pic_rag' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pic_rag.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
