"""pic-rag for LangChain: documents become handles, and `ChatPIC` reads the memories they stand for.

`PICMiddleware` loads on first use and is not part of `import *`: it alone needs the package `langchain`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_pic_rag.chat import ChatPIC
from langchain_pic_rag.compressor import PICCompressor
from langchain_pic_rag.escaping import escape_input
from langchain_pic_rag.guard import HandleGuard, reads_handles
from langchain_pic_rag.restoring import PICRestore, restore_documents
from langchain_pic_rag.retriever import PassageRetriever, PICRetriever
from langchain_pic_rag.store import PICByteStore
from langchain_pic_rag.transformer import PICDocumentTransformer

if TYPE_CHECKING:
    from langchain_pic_rag.middleware import PICMiddleware as PICMiddleware

__version__ = "0.1.0"

__all__ = [
    "ChatPIC",
    "HandleGuard",
    "PICByteStore",
    "PICCompressor",
    "PICDocumentTransformer",
    "PICRestore",
    "PICRetriever",
    "PassageRetriever",
    "escape_input",
    "reads_handles",
    "restore_documents",
]


def __getattr__(name: str) -> Any:
    if name != "PICMiddleware":
        raise AttributeError(f"module 'langchain_pic_rag' has no attribute {name!r}")
    try:
        from langchain_pic_rag.middleware import PICMiddleware
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("langchain", "langgraph"):
            raise
        raise ImportError(
            "PICMiddleware needs the package langchain 1.x. Install it with: pip install 'langchain>=1,<2'"
        ) from error
    return PICMiddleware
