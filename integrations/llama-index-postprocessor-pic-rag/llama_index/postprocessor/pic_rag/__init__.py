"""pic-rag for LlamaIndex: retrieved nodes become memory tokens that the LLM reads in place of their text."""

from llama_index.postprocessor.pic_rag.base import PICCompressor
from llama_index.postprocessor.pic_rag.events import PICCompressEndEvent, PICCompressStartEvent
from llama_index.postprocessor.pic_rag.nodes import restore_nodes
from llama_index.postprocessor.pic_rag.transform import PICTransform

__all__ = ["PICCompressEndEvent", "PICCompressStartEvent", "PICCompressor", "PICTransform", "restore_nodes"]
