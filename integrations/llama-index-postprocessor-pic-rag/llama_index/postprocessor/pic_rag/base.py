"""The postprocessor: retrieved nodes show the LLM their memory's handle in place of their text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.bridge.pydantic import Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.postprocessor.pic_rag.answering import Nobody, find_llm, reads_handles, unwrap, user_messages
from llama_index.postprocessor.pic_rag.guard import watch
from llama_index.postprocessor.pic_rag.nodes import restore_nodes, show_handle
from llama_index.postprocessor.pic_rag.settings import CompressionSettings

from pic_rag import find_handles

if TYPE_CHECKING:
    from pic_rag import Memory


class PICCompressor(CompressionSettings, BaseNodePostprocessor):
    """Compresses retrieved nodes for an LLM that reads memories, such as `PICLLM`. Put it last of all postprocessors.

    The LLM is shown one handle a node; `source_nodes`, evaluators and everybody else read the original text. Ids,
    scores, order, metadata and relationships stay, and the nodes passed in are not changed. The query plays no part.
    """

    top_n: int | None = Field(default=None, ge=1, description="Nodes to keep, the first ones; None: all.")
    fallback: Literal["error", "text"] = Field(
        default="error", description="For an LLM that is known not to read memories: raise, or give it the text."
    )
    label: str | None = Field(
        default=None,
        description="Line above each handle, such as 'Source {number}:', which CitationQueryEngine needs.",
    )
    llm: Any = Field(
        default=None, exclude=True, repr=False, description="The LLM that answers, where it cannot be found out."
    )

    @classmethod
    def class_name(cls) -> str:
        """The component's name in serialised form."""
        return "PICCompressor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        _refuse_handles(query_bundle)
        return self._compress(nodes, self.llm or find_llm())

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        _refuse_handles(query_bundle)
        llm = self.llm or find_llm()  # here: another thread does not see the engine
        return await asyncio.to_thread(self._compress, nodes, llm)

    def _compress(self, nodes: list[NodeWithScore], llm: Any) -> list[NodeWithScore]:
        kept = nodes[: self.top_n]
        if not self._shows_handles(llm):
            return restore_nodes(kept)
        memories = self.make_memories([node.node for node in kept])
        signer = self.signer
        handles = ["" if memory is None else signer.sign(memory.handle) for memory in memories]
        if llm is not None:
            self._check_known(llm, [handle for handle in handles if handle])
        watch(handle for handle in handles if handle)
        numbers = range(1, len(kept) + 1)
        return [self._show(*shown) for shown in zip(restore_nodes(kept), handles, memories, numbers, strict=True)]

    def _shows_handles(self, llm: Any) -> bool:
        if isinstance(llm, Nobody):
            return False
        if llm is None or reads_handles(llm):
            return True
        if self.fallback == "error":
            raise ValueError(
                f"llm must read memories, as PICLLM does, got {type(unwrap(llm)).__name__}. Answer with PICLLM, "
                'pass the LLM that answers as PICCompressor(llm=...), or choose fallback="text": the original text.'
            )
        return False

    def _check_known(self, llm: Any, handles: Sequence[str]) -> None:
        """An LLM with other settings would fail at its first handle, with less to say about the reason."""
        llm = unwrap(llm)
        if unknown := llm.unknown_handles(handles):
            raise ValueError(
                f"llm must find the memories that PICCompressor makes, got {len(unknown)} of {len(handles)} that "
                f"{type(llm).__name__} does not find. Give both the same compressor, dtype, store (or "
                "cache_folder) and namespace; a store that could not be written has logged a warning."
            )

    def _show(self, node: NodeWithScore, handle: str, memory: Memory | None, number: int) -> NodeWithScore:
        if memory is None:
            return node
        label = None if self.label is None else self.label.replace("{number}", str(number))
        return node.model_copy(update={"node": show_handle(node.node, handle, memory, label)})


def _refuse_handles(query_bundle: QueryBundle | None) -> None:
    """What a user asks is printed into the prompt as it is, where a handle in it would be resolved."""
    asked = [*user_messages(), *([] if query_bundle is None else [query_bundle.query_str])]
    for handle in (handle for words in asked for handle in find_handles(words)):
        raise ValueError(f"query must not hold a handle, got {handle}. Pass it through pic_rag.escape_handles first.")
