"""pic-rag for LlamaIndex: an LLM that reads memory tokens in place of text."""

from llama_index.llms.pic_rag.base import PICLLM

__all__ = ["PICLLM"]
